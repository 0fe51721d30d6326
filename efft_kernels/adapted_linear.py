"""The Linear of an injected model."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Projection
from .base_linears import (
    add_low_rank,
    change_class,
    has_own_forward,
    is_parametrized_class,
    pin_layout,
    unpin_layout,
    wraps,
)
from .dora import gain, scaled
from .low_rank import Pair
from .ops import lowrank_linear
from .passes import Adapters


class AdaptedLinear(nn.Linear):
    """A Linear of an injected model: y = x @ weight.T + bias + (x @ down) @ up, with the pair that its model gives it.

    Made by changing the class of a Linear: its parameters, names, hooks and references to it stay as they are. A Linear
    with its own forward (base_linears.py) gets a class derived from both, which calls that forward and adds the update.
    """

    base: type = nn.Linear  # the class that it had

    @staticmethod
    def adopt(linear: nn.Linear, path: str, adapters: Adapters) -> None:
        """Turn a Linear into an adapted one, in place."""
        pin_layout(linear)
        change_class(linear, adapted_class(linear))
        linear.efft = (adapters, path)  # a tuple, which registers nothing
        if isinstance(linear, Projection):
            linear.keep()

    def release(self) -> None:
        """Turn it back into the Linear it was, in place."""
        if isinstance(self, Projection):
            self.drop()
        del self.efft
        change_class(self, self.base)
        unpin_layout(self)

    def __setattr__(self, name: str, value) -> None:
        if name == "forward":
            self.efft[0].watched.clear()  # the next forward of the model tells whether it calls the one below
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        adapters, path = self.efft
        pair = adapters.pair(path, self)
        if pair is None:
            return super().forward(x)
        parameters = self._parameters  # self.weight would take a Python frame of nn.Module.__getattr__ at each use
        weight, bias = parameters.get("weight"), parameters.get("bias", self)  # self: there is none, not even None
        # a plain Parameter in a plain Linear needs no further question
        if type(weight) is not nn.Parameter or bias is self or self.base is not nn.Linear:
            if has_own_forward(self, self.base):
                return self._add_to_own(x, pair)
            weight, bias = self.weight, self.bias
        return self._add(x, weight, bias, pair)

    def add_to(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, columns: slice | None = None) -> Tensor:
        """x @ weight.T + bias with the update, for a module that reads the weight of this Linear itself.

        Args:
            x: [..., K].
            weight, bias: those of this Linear, or the rows of them that ``columns`` names.
            columns: the outputs that are computed; None for all.
        """
        adapters, path = self.efft
        pair = adapters.pair(path, self)
        if pair is None:
            return F.linear(x, weight, bias)
        pair = pair if columns is None else pair.of(columns)
        if not wraps(weight):
            return self._add(x, weight, bias, pair)
        self._refuse_magnitude(pair)
        y = F.linear(x, weight, bias)
        return add_low_rank(y, x.to(y.dtype), pair.down.to(y.dtype), pair.up.to(y.dtype))

    def _add(self, x: Tensor, weight: Tensor, bias: Tensor | None, pair: Pair) -> Tensor:
        adapters, _ = self.efft
        down, up, dropout, magnitude = pair
        if down.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            down, up = down.to(weight.dtype), up.to(weight.dtype)
        if dropout and self.training:
            y = F.linear(x, weight, bias) + F.dropout(x @ down, dropout) @ up
        else:
            y = lowrank_linear(x, weight, bias, down, up, backend=adapters.backend)
        return y if magnitude is None else scaled(y, bias, gain(weight, down, up, magnitude))

    def _refuse_magnitude(self, pair: Pair) -> None:
        if pair.magnitude is not None:
            raise ValueError(f"dora=True needs a plain weight in {self.efft[1]}, got {type(self.weight).__name__}")

    def _add_to_own(self, x: Tensor, pair: Pair) -> Tensor:
        """the update added to what the base's own forward returns"""
        self._refuse_magnitude(pair)
        y = super().forward(x)
        if torch.is_grad_enabled() and x.requires_grad and not y.requires_grad:
            # mostly quantized activations: the layers before would be trained with a part of their gradient
            raise RuntimeError(
                f"{self.efft[1]} passes no gradient to its input, as {type(self.weight).__name__} computes it; train "
                "on a base whose weights alone are quantized, and run this one under torch.no_grad()"
            )
        x, down, up = x.to(y.dtype), pair.down.to(y.dtype), pair.up.to(y.dtype)
        if pair.dropout and self.training:
            return y + F.dropout(x @ down, pair.dropout) @ up
        return add_low_rank(y, x, down, up)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, adapted={self.efft[0].active!r}"


def adapted_class(linear: nn.Linear, kind: type[AdaptedLinear] = AdaptedLinear) -> type[AdaptedLinear]:
    """The class, of this kind, of a Linear that is about to be adapted."""
    cls = type(linear)
    return _adapted(cls.__bases__[0] if is_parametrized_class(cls) else cls, kind)


@cache
def _adapted(base: type, kind: type[AdaptedLinear]) -> type[AdaptedLinear]:
    if base is nn.Linear:
        return kind
    named = {"base": base, "__reduce_ex__": made_again(_adapted, base, kind)}
    return type(f"Adapted{base.__name__}", (kind, base), named)


def made_again(make: Callable[..., type], *given: type) -> Callable:
    """The __reduce_ex__ of the class make(*given), which pickle cannot find by name: a copy makes the class again"""

    def __reduce_ex__(self, protocol):
        _, _, *state = super(make(*given), self).__reduce_ex__(protocol)
        return _made, (make, *given), *state

    return __reduce_ex__


def _made(make: Callable[..., type], *given: type) -> nn.Module:
    cls = make(*given)
    return cls.__new__(cls)
