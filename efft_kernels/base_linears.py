"""Linears that keep their own product: quantized, parametrized or weight-normed ones. What is known of each kind.

Their forward runs as it is and the update is added beside it (torch.addmm); the gradient of x is theirs plus ours.
Known are, by name and never imported before one is met: torchao's weights (tensor subclasses inside a plain nn.Linear),
bitsandbytes' Linear4bit and Linear8bitLt, and torch's own parametrizations, weight norm, spectral norm and pruning.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_BITSANDBYTES = ("Linear4bit", "Linear8bitLt")


def has_own_forward(linear: nn.Linear, base: type = nn.Linear) -> bool:
    """Whether the product of a Linear whose class is, or was before it was adapted, ``base`` must be left to itself."""
    weight = linear._parameters.get("weight")
    return base is not nn.Linear or weight is None or _wraps(weight)


def _wraps(weight: Tensor) -> bool:
    """whether it is a tensor made of others; torch's own question for that is answered wrongly under torch.compile"""
    return hasattr(type(weight), "__tensor_flatten__")


def _bitsandbytes(cls: type) -> str | None:
    """which of its Linears a class is"""
    known = (c.__name__ for c in cls.__mro__ if c.__module__.startswith("bitsandbytes."))
    return next((name for name in known if name in _BITSANDBYTES), None)


def kind(linear: nn.Linear) -> str | None:
    """What quantizes this Linear, for a sentence; None if nothing does."""
    if name := _bitsandbytes(type(linear)):
        return f"bitsandbytes' {name}"
    weight = linear._parameters.get("weight")
    if weight is not None and _wraps(weight) and hasattr(weight, "dequantize"):
        return f"{type(weight).__module__.partition('.')[0]}'s {type(weight).__name__}"
    return None


def refusal(linear: nn.Linear, base: type) -> str | None:
    """Why an update beside this Linear, of class ``base``, would be wrong or cannot be had, and what to do; or None."""
    if base is nn.Linear:
        weight = linear.weight
        if not weight.dtype.is_floating_point:
            return f"must have a floating-point weight, got {weight.dtype}"
        return None
    if _bitsandbytes(base) or parametrize.is_parametrized(linear) and base.__bases__ == (nn.Linear,):
        return None
    if base is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return "is read past its forward by nn.MultiheadAttention; leave it out with targets= or blocks="
    return (
        f"must be an nn.Linear, got {base.__name__}, which may compute something else; "
        "put a plain nn.Linear in its place, or leave it out with targets= or blocks="
    )


def tensors(linear: nn.Linear) -> Iterator[nn.Parameter]:
    """What the weight is made of: its one parameter, or those that a parametrization or a norm computes it from."""
    # a bias that is parametrized is parametrizations.bias.original
    return (p for name, p in linear.named_parameters() if "bias" not in name.split("."))


def kept_in(linear: nn.Linear) -> tuple[torch.dtype | None, torch.device]:
    """(dtype, device) that factors beside this Linear have; the dtype None where only its inputs will tell."""
    device = next(tensors(linear)).device
    if not _bitsandbytes(type(linear)):
        return linear.weight.dtype, device
    for holder in (linear.bias, getattr(linear.weight, "quant_state", None), linear.weight):
        if holder is not None and holder.dtype.is_floating_point:
            return holder.dtype, device
    return None, device


@torch.no_grad()
def dense(linear: nn.Linear) -> Tensor:
    """The weight [N, K] that the Linear multiplies with, as a plain tensor, new unless the Linear keeps it so."""
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
    """a Linear4bit whose weight is laid out for inference back to the layout that can be dequantized"""
    if getattr(linear.weight.quant_state, "packing_format_for_cpu", False):
        linear.state_dict()  # does so as it saves


def pin_layout(linear: nn.Linear) -> None:
    """Before a Linear is adapted: keep a Linear4bit in the layout that has a gradient.

    On processors with AVX-512 BF16 its first forward without a gradient lays the weight out anew, for good, and from
    then on no gradient passes.
    """
    if getattr(linear, "support_avx512bf16_for_cpu", False):
        _unpack(linear)
        linear.support_avx512bf16_for_cpu = False


def unpin_layout(linear: nn.Linear) -> None:
    """After it was adapted: as before :func:`pin_layout`."""
    if hasattr(linear, "support_avx512bf16_for_cpu"):
        from bitsandbytes.functional import has_avx512bf16

        linear.support_avx512bf16_for_cpu = has_avx512bf16()


class DenseWeights(Mapping):
    """path -> dense weight of these Linears in one dtype, made when it is asked for and held by nobody."""

    def __init__(self, linears: Mapping[str, nn.Linear], dtype: torch.dtype):
        self.linears, self.dtype = linears, dtype

    def __getitem__(self, path: str) -> Tensor:
        return dense(self.linears[path]).to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.linears)

    def __len__(self) -> int:
        return len(self.linears)
