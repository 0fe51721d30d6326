"""A base layer plus a low-rank update, in one pass over x where the base is a plain nn.Linear."""

import torch
from torch import Tensor, nn

from ..kernels import FLOATS
from ..ops import lowrank_linear


def add_update(
    base: nn.Module, x: Tensor, down: Tensor, up: Tensor, *args, backend: str | None = None, **kwargs
) -> Tensor:
    """base(x) + (x @ down) @ up, fused if base is a plain nn.Linear and gets no further arguments."""
    weight = base.weight
    autocast = torch.is_autocast_enabled(x.device.type)
    if is_plain(base) and not args and not kwargs and (autocast or x.dtype == weight.dtype):
        like = {"device": weight.device} if autocast else {"device": weight.device, "dtype": weight.dtype}
        return lowrank_linear(x, weight, base.bias, down.to(**like), up.to(**like), backend=backend)
    y = base(x, *args, **kwargs)
    p = x.to(down.dtype) @ down.to(x.device)
    return y + (p @ up.to(p)).to(y)


def is_plain(base: nn.Module) -> bool:
    """Whether base(x) is F.linear of its weight and bias: no subclass, no hook, no replaced forward."""
    return (
        type(base) is nn.Linear
        and type(base.weight) in (nn.Parameter, Tensor)
        and base.weight.dtype in FLOATS
        and "forward" not in base.__dict__
        and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
    )
