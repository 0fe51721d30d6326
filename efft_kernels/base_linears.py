"""Linears whose own forward must run: quantized, parametrized or weight-normed ones, and what is known of each kind.

Their forward runs unchanged and the update is added to its result; the gradient of x is the sum of both. They are
recognised by name, and their packages are never imported before one is met: torchao's weights (tensor subclasses in a
plain nn.Linear), bitsandbytes' Linear4bit and Linear8bitLt, and torch's own parametrizations, weight norm, spectral
norm and pruning.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .attention import OutputProjection, Projection
from .precision import autocast_dtype
from .wrappers import is_sharded

PLAIN = nn.Linear, OutputProjection, Projection  # classes that compute x W from a weight of their own, and no more
_BITSANDBYTES = ("Linear4bit", "Linear8bitLt")


def has_own_forward(linear: nn.Linear, base: type = nn.Linear) -> bool:
    """Whether a Linear must compute x W itself, because no kernel here can read its weight.

    Args:
        linear: any Linear.
        base: its class, or, for an adapted Linear, the class it had before.
    """
    if base is Projection:
        return wraps(linear.weight)
    if base not in PLAIN or "bias" not in linear._parameters:
        return True
    weight = linear._parameters.get("weight")
    if weight is None:  # remove_parametrizations leaves a frozen weight as a buffer
        weight = linear._buffers.get("weight")
    return weight is None or wraps(weight)


def add_low_rank(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:  # [..., N], [..., K], [K, R], [R, N]
    """y + (x @ down) @ up, where y comes from a Linear's own forward."""
    return torch.addmm(y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]) @ down, up).view(y.shape)


def wraps(weight: Tensor) -> bool:
    """whether it is a tensor made of others; torch's own check for that gives the wrong answer under torch.compile"""
    # asked at every call: to find that a class lacks an attribute takes two microseconds
    return type(weight) is not nn.Parameter and hasattr(type(weight), "__tensor_flatten__")


def _bitsandbytes(cls: type) -> str | None:
    """the name of the bitsandbytes Linear that a class is, or None"""
    known = (c.__name__ for c in cls.__mro__ if c.__module__.startswith("bitsandbytes."))
    return next((name for name in known if name in _BITSANDBYTES), None)


def kind(linear: nn.Linear) -> str | None:
    """What quantizes this Linear, for an error message; None if nothing does."""
    if name := _bitsandbytes(type(linear)):
        return f"bitsandbytes' {name}"
    weight = linear._parameters.get("weight")
    if weight is not None and wraps(weight) and not is_sharded(weight) and hasattr(weight, "dequantize"):
        return f"{type(weight).__module__.partition('.')[0]}'s {type(weight).__name__}"
    return None


def untrainable(linear: nn.Linear) -> str | None:
    """Why the weight of this Linear cannot be trained, for an error message; None if it can be."""
    if what := kind(linear):
        return f"is quantized ({what})"
    return "is offloaded by accelerate" if _offload(linear) is not None else None


def refusal(linear: nn.Linear, base: type) -> str | None:
    """Why this Linear of class ``base`` cannot be adapted, and what to do about it; None if it can be."""
    if (own := linear.__dict__.get("forward")) is not None and not _reaches(linear, own, base):
        return (
            f"has a forward of its own, {getattr(own, '__qualname__', own)!r}, set on the instance, which would bypass "
            "the adapter; remove it, and set it again afterwards if it calls the forward that it replaces"
        )
    if is_parametrized_class(base):
        (base,) = base.__bases__
    if base in PLAIN:
        weight = linear.weight
        if not weight.dtype.is_floating_point:
            return f"must have a floating-point weight, got {weight.dtype}"
        return None
    if _bitsandbytes(base):
        return None
    return (
        f"must be an nn.Linear, got {base.__name__}, which may compute something else; "
        "put a plain nn.Linear in its place, or leave it out with targets= or blocks="
    )


def tensors(linear: nn.Linear) -> Iterator[nn.Parameter]:
    """The parameters that make up the weight: one, or those that a parametrization or a norm computes it from."""
    if isinstance(linear, Projection):
        return iter([linear.weight])
    # a parametrized bias is named parametrizations.bias.original
    return (p for name, p in linear.named_parameters() if "bias" not in name.split("."))


def kept_in(linear: nn.Linear) -> tuple[torch.dtype | None, torch.device]:
    """The dtype and device for factors of this Linear; the dtype is None where only its inputs will tell."""
    # the parameters of a parametrized weight, which would be computed to read its dtype
    weight = next(tensors(linear), None)
    weight = linear.weight if weight is None else weight
    device = weight.device
    if (hook := _offload(linear)) is not None:
        device = torch.device(hook.execution_device)
    if not _bitsandbytes(type(linear)):
        return weight.dtype, device
    for holder in (linear.bias, getattr(linear.weight, "quant_state", None), linear.weight):
        if holder is not None and holder.dtype.is_floating_point:
            return holder.dtype, device
    return None, device


def _offload(linear: nn.Linear):
    """the hook with which accelerate brings the weight to a device for each forward, and None if there is none"""
    hook = linear.__dict__.get("_hf_hook")
    return next((part for part in getattr(hook, "hooks", (hook,)) if getattr(part, "offload", False)), None)


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
    if wraps(weight) and hasattr(weight, "dequantize"):
        return weight.dequantize()
    if weight.is_meta and (hook := _offload(linear)) is not None:
        return hook.weights_map["weight"]
    return weight.detach()


def _unpack(linear: nn.Linear) -> None:
    """Bring a Linear4bit whose weight is packed for inference back to the layout that can be dequantized."""
    if getattr(linear.weight.quant_state, "packing_format_for_cpu", False):
        linear.state_dict()  # unpacks as a side effect


def is_parametrized_class(cls: type) -> bool:
    """Whether a class is one that torch makes for a single module, with a property for each parametrized tensor."""
    return cls.__module__ == parametrize.__name__ and cls.__name__.startswith("Parametrized")


def change_class(linear: nn.Linear, cls: type) -> None:
    """Make a Linear one of this class, in place, with its parametrizations and all that is set on the instance."""
    old = type(linear).forward
    if is_parametrized_class(type(linear)):
        # as torch would have made it of cls, so that its own remove_parametrizations works
        own = {key: value for key, value in vars(type(linear)).items() if key not in ("__dict__", "__weakref__")}
        linear.__class__ = type(f"Parametrized{cls.__name__}", (cls,), own)
    else:
        linear.__class__ = cls
    for key, value in list(linear.__dict__.items()):
        if _is_bound(value, linear, old):  # as accelerate's hooks keep the forward that they replace
            linear.__dict__[key] = MethodType(cls.forward, linear)


def _is_bound(value, linear: nn.Linear, function: Callable) -> bool:
    return isinstance(value, MethodType) and value.__self__ is linear and value.__func__ is function


def _reaches(linear: nn.Linear, forward: Callable, base: type) -> bool:
    """whether a forward set on the instance is that of its class, or a hook of accelerate that calls it"""
    kept = linear.__dict__.get("_old_forward") if "_hf_hook" in linear.__dict__ else forward
    return any(_is_bound(kept, linear, cls.forward) for cls in (base, type(linear)))


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
    """path -> dense weight of these Linears in one dtype, on one device; made when asked for, and not kept."""

    def __init__(self, linears: Mapping[str, nn.Linear], dtype: torch.dtype, device: torch.device):
        self.linears, self.dtype, self.device = linears, dtype, device

    def __getitem__(self, path: str) -> Tensor:
        return dense(self.linears[path]).to(self.device, self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.linears)

    def __len__(self) -> int:
        return len(self.linears)
