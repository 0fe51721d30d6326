"""Checks of arguments that several operators share. Each raises a sentence that names the argument."""

import math
import numbers
import sys

import torch
from torch import Tensor

from ..kernels import FLOATS
from ..kernels.memory import check_memory

FLOAT32_MAX = torch.finfo(torch.float32).max


def check_tensors(**tensors) -> None:
    """TypeError for an argument that is not a tensor, or a sparse, nested or opaque one"""
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if t.layout is not torch.strided or t.is_nested:
            raise TypeError(f"{name} must be a strided tensor, got {'a nested one' if t.is_nested else t.layout}")


def check_floats(first: str, like: Tensor, **others: Tensor | None) -> None:
    """``like``, the argument called ``first``, has a supported dtype, and the others have its dtype and device"""
    if like.dtype not in FLOATS:
        raise TypeError(f"{first} must be float32, bfloat16, float16 or float64, got {like.dtype}")
    for name, t in others.items():
        if t is None:
            continue
        if t.dtype != like.dtype:
            raise TypeError(f"{name} must have the dtype of {first}, {like.dtype}, got {t.dtype}")
        if t.device != like.device:
            raise ValueError(f"{name} must be on the device of {first}, {like.device}, got {t.device}")


def check_shape(name: str, t: Tensor, *dims: int | str) -> None:
    """dims: a number is the required size, a letter stands for any size of at least 1"""
    good = t.dim() == len(dims) and all(n >= 1 if isinstance(d, str) else n == d for n, d in zip(t.shape, dims))
    if not good:
        wanted = ", ".join(map(str, dims))
        free = " with every letter at least 1" if any(isinstance(d, str) for d in dims) else ""
        raise ValueError(f"{name} must be [{wanted}]{free}, got {list(t.shape)}")


def check_product(name: str, like: Tensor, *sizes: int) -> None:
    """These sizes, in the dtype of ``like``, are fewer than 2^63 bytes: an expanded tensor can have any sizes"""
    # a symbolic size would be bounded for all later calls
    if all(isinstance(n, int) for n in sizes) and math.prod(sizes) * like.itemsize >= 2**63:
        raise ValueError(f"{name} must be of sizes that fit into memory, got {list(sizes)} in {like.dtype}")


def check_scale(scale, dtype: torch.dtype = torch.float64):
    """Returns scale as a float: torch.compile would treat a numpy scalar as a tensor, and C++ takes no large int"""
    if type(scale) not in (float, torch.SymInt, torch.SymFloat):
        if not isinstance(scale, numbers.Real):
            hint = "; for a trained scale multiply sigma by it" if isinstance(scale, Tensor) else ""
            raise TypeError(f"scale must be a number, got {type(scale).__name__}{hint}")
        try:
            scale = float(scale)
        except OverflowError:  # Python prints at most 4300 digits
            scale = max(min(scale, 10**4000), -(10**4000))
    if not abs(scale) <= sys.float_info.max:  # an int can be larger than any float
        text = str(scale)
        raise ValueError(f"scale must be finite, got {text if len(text) <= 40 else f'{text[:40]}...'}")
    # what has another dtype is multiplied in float32
    if dtype is not torch.float64 and not abs(scale) <= FLOAT32_MAX:
        raise ValueError(f"scale must be in the range of float32, +-{FLOAT32_MAX:.4g}, for {dtype}, got {scale}")
    return scale


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> None:
    """The arguments of a low-rank linear fit together"""
    check_floats("x", x, weight=weight, bias=bias, down=down, up=up)
    check_shape("weight", weight, "N", "K")
    N, K = weight.shape
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"x must be [..., {K}] for weight {list(weight.shape)}, got {list(x.shape)}")
    if bias is not None:
        check_shape("bias", bias, N)
    check_shape("down", down, K, "R")
    check_shape("up", up, down.shape[1], N)
    rows, R = math.prod(x.shape[:-1]), down.shape[1]
    check_product("weight", weight, N, K)
    check_product("down", down, K, R)
    check_product("up", up, R, N)
    for name, features in (("x", K), ("x and weight", N), ("x and down", R)):
        check_product(name, x, rows, features)


def check_dy(dy: Tensor, x: Tensor | None, weight: Tensor, p: Tensor | None, needs: list[bool]) -> None:
    """What the backward of a low-rank linear and of a mixed one have in common: dy and x against the weight"""
    if len(needs) != 5:
        raise ValueError(f"needs must be five bools, for (x, weight, bias, down, up), got {needs}")
    for name, t, read in (("x", x, needs[1] or needs[3]), ("p", p, needs[4])):
        if t is None and read:
            raise ValueError(f"{name} must be a tensor for needs={needs}, got None")
    check_shape("weight", weight, "N", "K")
    N, K = weight.shape
    if dy.dim() < 1 or dy.shape[-1] != N:
        raise ValueError(f"dy must be [..., {N}] for weight {list(weight.shape)}, got {list(dy.shape)}")
    if x is not None:
        check_shape("x", as_rows(x), as_rows(dy, "dy").shape[0], K)


def as_rows(t: Tensor | None, name: str = "x") -> Tensor | None:
    """t with all leading dimensions flattened into one; a number without dimensions is left to the checks

    Raises:
        RuntimeError: t would be copied, and its storage was freed or resized.
    """
    if t is None or t.dim() == 2 or t.dim() == 0:
        return t
    if not t.is_contiguous():
        check_memory(name, t)
    return t.reshape(-1, t.shape[-1])


_unsafe_view = torch.ops.aten._unsafe_view.default


def no_view(y: Tensor) -> Tensor:
    """y itself or a tensor on its memory: autograd lets nobody change a view that one of its functions returned"""
    return _unsafe_view(y, y.shape) if y._is_view() else y
