"""Benches: one script, one question; see bench/README.md."""
