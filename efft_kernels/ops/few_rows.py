"""efft_linear of a few rows on a CPU: (x u) sigma v from left to right, by one call of the C++ kernels or plain torch.

Forming sigma v first costs as much as P rows, which a few rows do not pay back. A call of one row is mostly the host's
time, so both are one node of autograd; of the kernels, forward and backward are one call each, and C++ checks the
arguments. Each pass is computed by what is faster for it: both keep the same p and q.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from ..kernels import FLOATS, FewRows, reference
from ..precision import without_autocast
from .checks import FLOAT32_MAX
from .dispatch import any_autocast, candidates, default_backend, direct_outside_autocast, once, records

_MOST = 16
_CPU = torch.device("cpu")


def take(x, weight, bias, u, sigma, v, scale, backend) -> Tensor | None:
    """The result if this association costs least, or None: then also for arguments that do not fit together."""
    # asked first: a symbolic size must not be read
    if (
        not isinstance(x, Tensor)
        or backend
        or not direct_outside_autocast(x, weight, bias, u, sigma, v)
        or not x.is_cpu
    ):
        return None
    if (
        type(scale) not in (int, float)
        or not abs(scale) <= FLOAT32_MAX
        or not x.dim()
        or not 0 < x.numel() <= _MOST * x.shape[-1]
    ):
        return None
    if weight.requires_grad or (bias is not None and bias.requires_grad) or default_backend():
        return None
    scale = float(scale)  # an int of more than 64 bits is no number for C++
    kernels: FewRows = (candidates(_CPU) or [reference])[0]
    how = kernels.for_few_rows(x, weight, False)
    if how is None or (how == "torch" and not _fit(x, weight, bias, u, sigma, v)):
        return None
    forward = reference if how == "torch" else kernels
    if records(x, weight, bias, u, sigma, v):
        backward = reference if kernels.for_few_rows(x, weight, True) == "torch" else kernels
        return _FewRows.apply(forward, backward, x, weight, bias, u, sigma, v, scale)
    found = forward.few_rows(x, weight, bias, u, sigma, v, scale)
    return found[0] if found else None


def _fit(x, *others) -> bool:
    """Whether plain torch would compute what is meant; if not, the caller says what is wrong"""
    weight, bias, u, sigma, v = others
    for t in others if bias is not None else (weight, u, sigma, v):
        if t is None or t.dtype != x.dtype or t.layout is not torch.strided or not t.is_cpu or t.numel() >= 1 << 31:
            return False
    if sigma.dim() not in (2, 3) or not u.dim() == v.dim() == weight.dim() == 2:
        return False
    (K, P), (Q, N), S = u.shape, v.shape, len(sigma) if sigma.dim() == 3 else 1
    return (
        sigma.shape[-2:] == (P, Q)
        and weight.shape == (S * N, K)
        and x.shape[-1] == K
        and S * P * Q * N > 0
        and (bias is None or bias.shape == (S * N,))
        and x.dtype in FLOATS
        and x.layout is torch.strided
    )


class _FewRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, first, second, x, weight, bias, u, sigma, v, scale):  # the kernels of forward and of backward
        found = first.few_rows(x, weight, bias, u, sigma, v, scale)
        if not found:
            return None
        y, p, q = found
        ctx.save_for_backward(x, weight, u, sigma, v, p, q)
        ctx.kernels, ctx.scale = second, scale
        return y

    @staticmethod
    @once
    def backward(ctx, dy):
        _, _, need_x, _, _, *needs, _ = ctx.needs_input_grad
        needs = need_x, *needs
        kernels = reference if torch.compiler.is_dynamo_compiling() else ctx.kernels  # compiled autograd traces no C++
        with without_autocast(dy.device) if any_autocast() else nullcontext():
            grads = iter(kernels.few_rows_backward(dy, *ctx.saved_tensors, ctx.scale, needs))
        dx, du, dsigma, dv = (next(grads) if need else None for need in needs)
        return None, None, dx, None, None, du, dsigma, dv, None
