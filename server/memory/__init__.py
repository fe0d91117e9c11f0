"""One pool of pages, and its two users: the KV cache and the resident adapters."""
