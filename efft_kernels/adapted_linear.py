"""The Linear of an injected model."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base_linears import has_own_forward, pin_layout, unpin_layout
from .ops import lowrank_linear
from .passes import Adapters


class AdaptedLinear(nn.Linear):
    """A Linear of an injected model: y = x @ weight.T + bias + (x @ down) @ up, where its model's Adapters say.

    Made by changing the class of a Linear: its parameters, names, hooks and whoever refers to it stay as they are. One
    that keeps its own product (base_linears.py) is called as before, and gets a class that is both.
    """

    base: type = nn.Linear  # the class that it had

    @staticmethod
    def adopt(linear: nn.Linear, path: str, adapters: Adapters) -> None:
        pin_layout(linear)
        linear.__class__ = _adapted(type(linear))
        linear.efft = (adapters, path)  # a tuple, which registers nothing

    def release(self) -> None:
        """Back to the Linear it was."""
        del self.efft
        self.__class__ = self.base
        unpin_layout(self)

    def forward(self, x: Tensor) -> Tensor:
        adapters, path = self.efft
        pair = adapters.pair(path)
        if pair is None:
            return super().forward(x)
        down, up, dropout = pair
        if has_own_forward(self, self.base):
            return self._beside(x, down, up, dropout)
        if down.dtype != self.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            down, up = down.to(self.weight.dtype), up.to(self.weight.dtype)
        if dropout and self.training:
            return F.linear(x, self.weight, self.bias) + F.dropout(x @ down, dropout) @ up
        return lowrank_linear(x, self.weight, self.bias, down, up, backend=adapters.backend)

    def _beside(self, x: Tensor, down: Tensor, up: Tensor, dropout: float) -> Tensor:
        y = super().forward(x)
        if torch.is_grad_enabled() and x.requires_grad and not y.requires_grad:
            # quantized activations, mostly: the layers before would be trained with a part of their gradient
            raise RuntimeError(
                f"{self.efft[1]} passes no gradient to its input, as {type(self.weight).__name__} computes it; train on "
                "a base whose weights alone are quantized, and run this one under torch.no_grad()"
            )
        x, down, up = x.to(y.dtype), down.to(y.dtype), up.to(y.dtype)
        if dropout and self.training:
            return y + F.dropout(x @ down, dropout) @ up
        return torch.addmm(y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]) @ down, up).view(y.shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, adapted={self.efft[0].active!r}"


@cache
def _adapted(base: type) -> type[AdaptedLinear]:
    """The class of an adapted Linear that was a ``base``."""
    if base is nn.Linear:
        return AdaptedLinear

    def __reduce_ex__(self, protocol):
        # such a class has no name to be found under: a copy or a pickle makes it again from the base
        _, _, *state = super(cls, self).__reduce_ex__(protocol)
        return _bare, (base,), *state

    cls = type(f"Adapted{base.__name__}", (AdaptedLinear, base), {"base": base, "__reduce_ex__": __reduce_ex__})
    return cls


def _bare(base: type) -> AdaptedLinear:
    cls = _adapted(base)
    return cls.__new__(cls)
