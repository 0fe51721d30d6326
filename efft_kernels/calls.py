"""Modules that read the weight of a Linear instead of calling it are made to call it, so that an adapter has effect."""

import dis
import inspect
from collections.abc import Iterator
from functools import cache

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .adapted_linear import made_again
from .attention import CallingAttention, projections
from .wrappers import module_at


def call_linear(model: nn.Module, *paths: str) -> None:
    """Make the modules around the Linears at these paths call them.

    An nn.MultiheadAttention gets the class that does (attention.py). BEiT, EVA and Swin V2 of timm have a switch. Any
    other module with a q_bias, or with methods that read self.NAME.weight of a Linear and do not call it, as in
    torchvision's Swin, gets a class in whose forward F.linear on that weight is a call of the Linear.
    nn.TransformerEncoderLayer and nn.TransformerEncoder have attributes that turn their fast paths off.
    :func:`uncall_linear` undoes it.
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
        base, apart = getattr(type(module), "efft_base", type(module)), getattr(module, "q_bias", None) is not None
        if names[n:] == ["qkv"] and apart and hasattr(module, "qkv_bias_separate"):
            yield module, "qkv_bias_separate", True
        elif projections(module):
            yield module, "__class__", CallingAttention
        elif (names[n:] == ["qkv"] and apart) or (len(names) - n == 1 and names[n] in _read(base)):
            yield module, "__class__", _calling(base)
        elif isinstance(module, nn.TransformerEncoderLayer):
            yield module, "activation_relu_or_gelu", 0
        elif isinstance(module, nn.TransformerEncoder) and hasattr(module, "use_nested_tensor"):
            yield module, "use_nested_tensor", False


class _Caller(TorchFunctionMode):
    """Within it, F.linear on the weight of one of these Linears is a call of that Linear."""

    def __init__(self, linears: list[nn.Module]):
        super().__init__()
        self.linears = linears

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for linear in self.linears if func is F.linear else ():
            if _weight(*args, **kwargs) is linear.weight:
                return linear.add_to(*args, **{"x" if k == "input" else k: v for k, v in kwargs.items()})
        return func(*args, **kwargs)


def _weight(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return weight


@cache
def _read(cls: type) -> tuple[str, ...]:
    """The names of the Linears of which a class of modules uses the weight, and nothing else but the bias."""
    used, loads = {}, ("LOAD_ATTR", "LOAD_METHOD")  # self.qkv, and until Python 3.11 that of self.qkv(x)
    every = [item for each in cls.__mro__[: cls.__mro__.index(nn.Module)] for item in vars(each).items()]
    methods = (method for name, method in every if not name.lstrip("_").startswith(("init", "reset")))
    for method in filter(inspect.isfunction, map(inspect.unwrap, methods)):
        found = [each for each in dis.get_instructions(method) if each.opname not in ("CACHE", "EXTENDED_ARG")]
        for at, after, last in zip(found, found[1:], found[2:]):
            none = after.opname.endswith("NONE") or (after.opname == "LOAD_CONST" and after.argval is None)
            if at.opname in loads and not none:  # self.qkv is not None
                name = after.argval if after.opname in loads else None
                if not (name == "weight" and last.opname in loads):  # its dtype, device or shape
                    used.setdefault(at.argval, set()).add(name)
    return tuple(name for name, of in used.items() if "weight" in of <= {"weight", "bias"})


@cache
def _calling(base: type) -> type:
    """The class of a module that was a ``base``, and reads the weights of Linears in it."""
    names = {*_read(base), "qkv"}  # a qkv beside a q_bias may be called by another branch of the class

    def forward(self, *args, **kwargs):
        linears = [self._modules.get(name) for name in names]
        with _Caller([linear for linear in linears if hasattr(linear, "add_to")]):  # AdaptedLinear, and PEFT's layer
            return base.forward(self, *args, **kwargs)

    named = {"forward": forward, "efft_base": base, "__reduce_ex__": made_again(_calling, base)}
    return type(f"Calling{base.__name__}", (base,), named)
