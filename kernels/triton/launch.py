"""What every launcher needs of its tensors and shapes before a kernel runs."""

from torch import Tensor

MAX_VECTOR = 8
"""Elements of 16 bits that one GPU load instruction reads at most: 128 bits."""


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n; 1 for n < 1."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def check_rows(**tensors: Tensor) -> None:
    """Raise ValueError naming the first tensor whose last axis is not contiguous."""
    for name, tensor in tensors.items():
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} has stride {tensor.stride(-1)} along its last axis, which must be 1: "
                f"pass {name}.contiguous()"
            )


def check_dtypes(**tensors: Tensor) -> None:
    """Raise ValueError unless all the tensors have one dtype and one device."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, but {first_name} is {first.dtype} "
                f"on {first.device}: they must be the same"
            )
