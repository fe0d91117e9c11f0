"""The operations compiled for the CPU with numba."""
