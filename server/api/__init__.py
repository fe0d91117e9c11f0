"""HTTP: OpenAI routes, adapter routes, operations, errors on the wire."""
