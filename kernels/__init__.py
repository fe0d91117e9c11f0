"""The arithmetic: tensors in, tensors out; imports nothing of the other packages."""
