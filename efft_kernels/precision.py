"""The dtype of factors: float32 beside bfloat16 and float16 weights, because small steps vanish in their few digits."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .kernels import FLOATS

LOW = (torch.bfloat16, torch.float16)


def check_factor_dtype(dtype: torch.dtype, name: str = "factor_dtype") -> None:
    """Raise TypeError for anything but a floating-point dtype that factors can have."""
    if dtype not in FLOATS:
        raise TypeError(f"{name} must be torch.float32, bfloat16, float16 or float64, got {dtype!r}")


def beside(weight: torch.dtype, factor_dtype: torch.dtype) -> torch.dtype:
    """The dtype of factors beside weights of this dtype: the one asked for, but float64 in place of float32 there."""
    return weight if (weight, factor_dtype) == (torch.float64, torch.float32) else factor_dtype


def floor(dtype: torch.dtype) -> torch.dtype:
    """The narrowest dtype to which factors created in this one are cast together with their model."""
    return dtype if dtype in LOW else torch.float32


def at_least(convert: Callable[[Tensor], Tensor], floor: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What nn.Module.to applies to its tensors, but never to a dtype narrower than ``floor``.

    ``model.to(torch.bfloat16)``, ``half()`` and the like then leave float32 factors as precise as they were.
    """

    def converted(t: Tensor) -> Tensor:
        made = convert(t)
        if made.dtype == t.dtype or not made.dtype.is_floating_point:
            return made
        wide = torch.promote_types(made.dtype, floor)
        return made if made.dtype == wide else t.to(made.device, wide)

    return converted


def narrowed(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    """t in the dtype of the matmul that it enters; unchanged for None, or if it is narrower already."""
    if dtype is None or dtype == t.dtype or dtype.itemsize > t.dtype.itemsize:
        return t
    return t.to(dtype)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast uses on this device now; None if it is off, or unknown there (meta)."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which autocast is off on this device."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)
