"""The operations as Triton kernels for the GPU, one operation a file."""
