"""Adapters at rest: formats, validation, packing, versions; knows no device and no HTTP."""
