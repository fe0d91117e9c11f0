"""The base model: config, weights, decoder."""
