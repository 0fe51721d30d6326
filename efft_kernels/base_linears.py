"""Linears whose own forward must run: quantized, parametrized or weight-normed ones, and what is known of each kind.

Their forward runs unchanged and the update is added to its result; the gradient of x is the sum of both. They are
recognised by name, and their packages are never imported before one is met: torchao's weights (tensor subclasses in a
plain nn.Linear), bitsandbytes' Linear4bit and Linear8bitLt, and torch's own parametrizations, weight norm, spectral
norm and pruning.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .precision import autocast_dtype

_BITSANDBYTES = ("Linear4bit", "Linear8bitLt")


def has_own_forward(linear: nn.Linear, base: type = nn.Linear) -> bool:
    """Whether a Linear must compute x W itself, because no kernel here can read its weight.

    Args:
        linear: any Linear.
        base: its class, or, for an adapted Linear, the class it had before.
    """
    weight = linear._parameters.get("weight")
    return base is not nn.Linear or weight is None or _wraps(weight)


def add_low_rank(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:  # [..., N], [..., K], [K, R], [R, N]
    """y + (x @ down) @ up, where y comes from a Linear's own forward."""
    return torch.addmm(y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]) @ down, up).view(y.shape)


def _wraps(weight: Tensor) -> bool:
    """whether it is a tensor made of others; torch's own check for that gives the wrong answer under torch.compile"""
    return hasattr(type(weight), "__tensor_flatten__")


def _bitsandbytes(cls: type) -> str | None:
    """the name of the bitsandbytes Linear that a class is, or None"""
    known = (c.__name__ for c in cls.__mro__ if c.__module__.startswith("bitsandbytes."))
    return next((name for name in known if name in _BITSANDBYTES), None)


def kind(linear: nn.Linear) -> str | None:
    """What quantizes this Linear, for an error message; None if nothing does."""
    if name := _bitsandbytes(type(linear)):
        return f"bitsandbytes' {name}"
    weight = linear._parameters.get("weight")
    if weight is not None and _wraps(weight) and hasattr(weight, "dequantize"):
        return f"{type(weight).__module__.partition('.')[0]}'s {type(weight).__name__}"
    return None


def refusal(linear: nn.Linear, base: type) -> str | None:
    """Why this Linear of class ``base`` cannot be adapted, and what to do about it; None if it can be."""
    if base is nn.Linear:
        weight = linear.weight
        if not weight.dtype.is_floating_point:
            return f"must have a floating-point weight, got {weight.dtype}"
        return None
    if _bitsandbytes(base) or (parametrize.is_parametrized(linear) and base.__bases__ == (nn.Linear,)):
        return None
    if base is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return "is read past its forward by nn.MultiheadAttention; leave it out with targets= or blocks="
    return (
        f"must be an nn.Linear, got {base.__name__}, which may compute something else; "
        "put a plain nn.Linear in its place, or leave it out with targets= or blocks="
    )


def tensors(linear: nn.Linear) -> Iterator[nn.Parameter]:
    """The parameters that make up the weight: one, or those that a parametrization or a norm computes it from."""
    # a parametrized bias is named parametrizations.bias.original
    return (p for name, p in linear.named_parameters() if "bias" not in name.split("."))


def kept_in(linear: nn.Linear) -> tuple[torch.dtype | None, torch.device]:
    """The dtype and device for factors of this Linear; the dtype is None where only its inputs will tell."""
    first = next(tensors(linear))
    device = first.device
    if not _bitsandbytes(type(linear)):
        # a parametrized weight would be computed to read its dtype
        return linear._parameters.get("weight", first).dtype, device
    for holder in (linear.bias, getattr(linear.weight, "quant_state", None), linear.weight):
        if holder is not None and holder.dtype.is_floating_point:
            return holder.dtype, device
    return None, device


def computes_in(linear: nn.Linear) -> torch.dtype | None:
    """The dtype of this Linear's matmul at present; None where only its output will tell."""
    dtype, device = kept_in(linear)
    return dtype if dtype == torch.float64 else autocast_dtype(device) or dtype


@torch.no_grad()
def dense(linear: nn.Linear) -> Tensor:
    """The weight [N, K] that the Linear multiplies with, as a plain tensor: a copy unless it is stored that way."""
    weight, name = linear.weight, _bitsandbytes(type(linear))
    if name == "Linear4bit" and getattr(weight, "quant_state", None) is not None:
        _unpack(linear)
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if name == "Linear8bitLt" and weight.dtype == torch.int8:
        from bitsandbytes.functional import int8_vectorwise_dequant

        # its first forward moves the scales from the weight to the state
        scales = weight.SCB if getattr(weight, "SCB", None) is not None else linear.state.SCB
        return int8_vectorwise_dequant(weight.data, scales)
    if _wraps(weight) and hasattr(weight, "dequantize"):
        return weight.dequantize()
    return weight.detach()


def _unpack(linear: nn.Linear) -> None:
    """Bring a Linear4bit whose weight is packed for inference back to the layout that can be dequantized."""
    if getattr(linear.weight.quant_state, "packing_format_for_cpu", False):
        linear.state_dict()  # unpacks as a side effect


def pin_layout(linear: nn.Linear) -> None:
    """Keep a Linear4bit in the layout that has a gradient, before it is adapted.

    On processors with AVX-512 BF16 its first forward without a gradient repacks the weight for good, and no gradient
    passes through it afterwards.
    """
    if getattr(linear, "support_avx512bf16_for_cpu", False):
        _unpack(linear)
        linear.support_avx512bf16_for_cpu = False


def unpin_layout(linear: nn.Linear) -> None:
    """Undo :func:`pin_layout`, after the Linear is plain again."""
    if hasattr(linear, "support_avx512bf16_for_cpu"):
        from bitsandbytes.functional import has_avx512bf16

        linear.support_avx512bf16_for_cpu = has_avx512bf16()


class DenseWeights(Mapping):
    """path -> dense weight of these Linears in one dtype; made when asked for, and not kept."""

    def __init__(self, linears: Mapping[str, nn.Linear], dtype: torch.dtype):
        self.linears, self.dtype = linears, dtype

    def __getitem__(self, path: str) -> Tensor:
        return dense(self.linears[path]).to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.linears)

    def __len__(self) -> int:
        return len(self.linears)
