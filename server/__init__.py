"""The processes: HTTP in, tokens out."""
