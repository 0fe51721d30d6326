"""Modules that read the weight of a Linear instead of calling it are made to call it, so that an adapter has effect."""

from collections.abc import Iterator
from functools import cache

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .attention import CallingAttention, projections
from .wrappers import module_at


def call_linear(model: nn.Module, *paths: str) -> None:
    """Make the modules around the Linears at these paths call them.

    An nn.MultiheadAttention gets the class that does (attention.py). BEiT, EVA and Swin V2 of timm have a switch; an
    attention that keeps q and v biases apart and has none gets a class in whose forward F.linear on the weight of its
    qkv is a call of that. nn.TransformerEncoderLayer and nn.TransformerEncoder have attributes that turn their fast
    paths off. :func:`uncall_linear` undoes it.
    """
    for module, name, value in (switch for path in paths for switch in switches(model, path)):
        if getattr(module, name) != value:
            module._efft_switched = {name: getattr(module, name)}, *getattr(module, "_efft_switched", ())
            setattr(module, name, value)


def uncall_linear(model: nn.Module, *paths: str) -> None:
    """Undo :func:`call_linear`."""
    for module, _, _ in (switch for path in paths for switch in switches(model, path)):
        for before in module.__dict__.pop("_efft_switched", ()):
            for name, value in before.items():
                setattr(module, name, value)


def switches(model: nn.Module, path: str) -> Iterator[tuple[nn.Module, str, object]]:
    """(module, attribute, value) of what :func:`call_linear` changes for the Linear at this path"""
    names = path.split(".")
    for n in range(len(names) - 1, -1, -1):
        module = module_at(model, ".".join(names[:n]))
        if names[n:] == ["qkv"] and getattr(module, "q_bias", None) is not None:
            if hasattr(module, "qkv_bias_separate"):
                yield module, "qkv_bias_separate", True
            else:
                yield module, "__class__", _calling(getattr(type(module), "efft_base", type(module)))
        elif projections(module):
            yield module, "__class__", CallingAttention
        elif isinstance(module, nn.TransformerEncoderLayer):
            yield module, "activation_relu_or_gelu", 0
        elif isinstance(module, nn.TransformerEncoder) and hasattr(module, "use_nested_tensor"):
            yield module, "use_nested_tensor", False


class _Caller(TorchFunctionMode):
    """Within it, F.linear on the weight of a Linear is a call of that Linear."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear and _weight(*args, **kwargs) is self.linear.weight:
            return self.linear.add_to(*args, **{"x" if k == "input" else k: v for k, v in kwargs.items()})
        return func(*args, **kwargs)


def _weight(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return weight


@cache
def _calling(base: type) -> type:
    """The class of an attention with q_bias and v_bias that was a ``base``."""

    def forward(self, *args, **kwargs):
        if not hasattr(self.qkv, "add_to"):  # of AdaptedLinear, and of PEFT's layer
            return base.forward(self, *args, **kwargs)
        with _Caller(self.qkv):
            return base.forward(self, *args, **kwargs)

    def __reduce_ex__(self, protocol):
        # pickle cannot find such a class by name, so a copy or a pickle makes it again from the base
        _, _, *state = super(cls, self).__reduce_ex__(protocol)
        return _bare, (base,), *state

    cls = type(f"Calling{base.__name__}", (base,), {"forward": forward, "efft_base": base})
    cls.__reduce_ex__ = __reduce_ex__
    return cls


def _bare(base: type) -> nn.Module:
    cls = _calling(base)
    return cls.__new__(cls)
