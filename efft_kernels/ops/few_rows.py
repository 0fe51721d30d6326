"""efft_linear of a few rows on a CPU, in plain torch: (x u) sigma v from left to right.

Forming sigma v first costs as much as P rows, which a few rows do not pay back. A call of one row is mostly the host's
time, so forward and backward are one node of autograd each, and the checks and the choice are made once per shapes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import decisions
from ..kernels.memory import checked
from .checks import as_rows, check_scale
from .dispatch import default_backend, direct, once, records, remember, select

_MOST = 16
_SMALL = 1 << 19  # entries of a weight that is read before a kernel has made up for forming sigma v


def take(x, weight, bias, u, sigma, v, scale, backend, check) -> Tensor | None:
    """The result if this association costs least, or None. ``check`` raises for arguments that do not fit."""
    # asked first: a symbolic size must not be read
    if not isinstance(x, Tensor) or backend or not direct(x, weight, bias, u, sigma, v) or not x.is_cpu:
        return None
    if type(scale) not in (int, float) or not x.dim() or not 0 < x.numel() <= _MOST * x.shape[-1]:
        return None
    # all that the checks and the choice read, spelled out because this runs at every call
    key = (
        *("few_rows", scale, default_backend(), x.shape, x.stride(), x.dtype, weight.shape, weight.stride()),
        *(weight.dtype, weight.device, weight.requires_grad, u.shape, u.stride(), u.dtype, u.device),
        *(sigma.shape, sigma.stride(), sigma.dtype, sigma.device, v.shape, v.stride(), v.dtype, v.device),
        bias if bias is None else (bias.shape, bias.stride(), bias.dtype, bias.device, bias.requires_grad),
    )
    chosen = decisions.get(key)
    if chosen is None:
        check_scale(scale)
        check()
        chosen = remember(key, not default_backend() and _leads(x.numel() // x.shape[-1], x, weight, bias, u, sigma, v))
    if not chosen:
        return None
    if records(x, weight, bias, u, sigma, v):
        return _FewRows.apply(x, weight, bias, u, sigma, v, scale)
    return _forward(x, weight, bias, u, sigma, v, scale)[0]


def _leads(rows: int, x, weight, bias, u, sigma, v) -> bool:
    """Measured on a Zen 3, in float32; what a kernel is better at, it is given"""
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    others = (weight, u, sigma, v) if bias is None else (weight, u, sigma, v, bias)
    same = all(t.dtype == x.dtype and t.device == x.device for t in others)
    if trained or not same or x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        return False
    wide = x.dtype in (torch.float32, torch.float64)
    if wide and (rows <= 2 or weight.numel() < _SMALL):
        return True
    up = v if sigma.dim() == 2 else v.new_empty(u.shape[1], weight.shape[0])
    return select("lowrank_linear", None, as_rows(x), weight, bias, u, up).__name__.endswith("reference")


def _slices(sigma: Tensor) -> Tensor:
    """sigma [S, P, Q] as [P, S * Q]"""
    if sigma.dim() == 2:
        return sigma
    return sigma[0] if sigma.shape[0] == 1 else sigma.transpose(0, 1).reshape(sigma.shape[1], -1)


@checked()
def _forward(x, weight, bias, u, sigma, v, scale) -> tuple[Tensor, Tensor, Tensor]:
    """y, p = x @ u [M, P], q = p @ sigma [M * S, Q]"""
    rows = x if x.dim() == 2 else as_rows(x)
    y = F.linear(rows, weight, bias)
    p = torch.mm(rows, u)
    q = torch.mm(p, _slices(sigma))
    if q.shape[1] == v.shape[0]:
        y.addmm_(q, v, alpha=scale)
    else:  # several slices, side by side
        q = q.view(-1, v.shape[0])
        y.view(-1, v.shape[1]).addmm_(q, v, alpha=scale)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0]), p, q


@checked()
def _backward(dy, x, weight, u, sigma, v, p, q, scale, needs) -> tuple[Tensor | None, ...]:
    """dq = scale * dy @ v.T;  dv = scale * q.T @ dy;  dp = dq @ sigma.T;  dsigma = p.T @ dq;  du = x.T @ dp"""
    need_x, need_u, need_sigma, need_v = needs
    dx = du = dsigma = dv = None
    rows = as_rows(dy, "dy")
    slices = rows if rows.shape[1] == v.shape[1] else rows.reshape(-1, v.shape[1])
    # with beta=0 the first argument is not read: this is a product that takes the scale along
    if need_v:
        dv = torch.addmm(v, q.t(), slices, beta=0, alpha=scale)
    if need_x or need_u or need_sigma:
        dq = torch.addmm(q, slices, v.t(), beta=0, alpha=scale).view(p.shape[0], -1)
    if need_sigma:
        dsigma = torch.mm(p.t(), dq)
        if sigma.dim() == 3:
            dsigma = dsigma.view(-1, *sigma.shape[::2]).transpose(0, 1)
    if need_x or need_u:
        dp = torch.mm(dq, _slices(sigma).t())
    if need_u:
        du = torch.mm(as_rows(x).t(), dp)
    if need_x:
        dx = torch.mm(rows, weight).addmm_(dp, u.t()).view(x.shape)
    return dx, du, dsigma, dv


class _FewRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, u, sigma, v, scale):
        y, p, q = _forward(x, weight, bias, u, sigma, v, scale)
        ctx.save_for_backward(x, weight, u, sigma, v, p, q)
        ctx.scale = scale
        return y

    @staticmethod
    @once
    def backward(ctx, dy):
        x, _, _, u, sigma, v, _ = ctx.needs_input_grad
        dx, du, dsigma, dv = _backward(dy, *ctx.saved_tensors, ctx.scale, (x, u, sigma, v))
        return dx, None, None, du, dsigma, dv, None
