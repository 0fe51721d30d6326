"""The contract in plain torch: the truth for tests, and the path taken where plain GEMMs win. Runs on any device.

float64 inputs are computed in float64 throughout; other dtypes as torch's own matrix products do (float32 sums,
one rounding per product).
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from . import processor
from .memory import checked

OVERWRITES_X = True  # see kernels.overwriting


def unavailable() -> str | None:
    return None


def unsupported(op: str, *tensors: Tensor | None) -> str | None:
    return None


def unproven(device: torch.device) -> str | None:
    return None


def slower(op: str, *tensors: Tensor | None, needs: list[bool] | None = None) -> str | None:
    return None


def for_few_rows(x: Tensor, weight: Tensor, backward: bool) -> str:
    """As cpu.for_few_rows, where there are no kernels"""
    return "torch"


@functools.cache
def _onednn_leads() -> bool:
    """Whether oneDNN has the faster float32 product: MKL, torch's default, does not use AVX-512 on AMD processors"""
    avx512 = "AVX512" in torch.backends.cpu.get_cpu_capability()
    return processor.amd() and torch.backends.mkldnn.is_available() and avx512


def _rows_apart(t: Tensor) -> bool:
    """Whether the rows of a matrix, or its columns, follow each other in memory without overlap"""
    (rows, columns), (row, column) = t.shape, t.stride()
    return columns * column <= row or rows * row <= column


def _product(
    a: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    out: Tensor | None = None,  # [M, N]
) -> Tensor:  # [M, N]
    """a @ weight.T + bias; without a bias in the memory of out, where torch's product can write there"""
    # for a few rows oneDNN is no faster, and costs more per call; it refuses rows that overlap
    if a.is_cpu and a.dtype == torch.float32 and a.shape[0] >= 8 and _onednn_leads() and _rows_apart(weight):
        # it reads the numbers of a bias as contiguous, and as they are in memory
        own = bias if bias is None else bias.resolve_neg().contiguous()
        return torch.ops.mkldnn._linear_pointwise(a, weight, own, "none", [], "")
    return F.linear(a, weight, bias) if out is None or bias is not None else torch.mm(a, weight.t(), out=out)


def _large_product_last(a: Tensor, N: int, K: int) -> bool:
    """Whether the product of K terms follows that of R: its own time then hides one pass over the result.

    On an H200 that gained 2 to 16 % where N > K, and lost up to 3 % elsewhere (benchmarks/results/nvidia_h200). On a
    CPU it was measured with MKL on an Intel processor: faster at most Linears of ViT-B and Swin-T, slower by more than
    the noise at none.
    """
    if a.is_cuda:
        return N > K
    return a.is_cpu and a.dtype in (torch.float32, torch.float64) and processor.intel()


def _sum(
    a: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    p: Tensor,  # [M, R]
    up: Tensor,  # [R, N]
    out: Tensor | None = None,  # [M, N]
) -> Tensor:  # [M, N]
    """a @ weight.T + bias + p @ up"""
    if _large_product_last(a, *weight.shape):
        small = torch.mm(p, up, out=out) if bias is None else torch.addmm(bias, p, up)
        return small.addmm_(a, weight.t())
    return _product(a, weight, bias, out).addmm_(p, up)


def _scaled(scale: float, a: Tensor, b: Tensor) -> Tensor:
    """scale * a @ b, rounded once: float16 may be too small for a factor or the product alone"""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)


@checked()
def group_update(sigma, v, scale):
    """up[s] = scale * sigma[s] @ v"""
    S, P, Q = sigma.shape
    N = v.shape[1]
    # one product for all slices side by side gives the [P, S, N] memory without a copy afterwards
    up = _scaled(scale, sigma.transpose(0, 1).reshape(P * S, Q), v)
    return up.view(P, S, N).transpose(0, 1)


@checked()
def group_update_backward(dup, sigma, v, scale, needs):
    """dsigma[s] = scale * dup[s] @ v.T;  dv = sum_s scale * sigma[s].T @ dup[s]"""
    S, P, Q = sigma.shape
    N = v.shape[1]
    grads = []
    dup = dup.transpose(0, 1).reshape(P * S, N)
    if needs[0]:
        grads.append(_scaled(scale, dup, v.t()).view(P, S, Q).transpose(0, 1).contiguous())
    if needs[1]:
        grads.append(_scaled(scale, sigma.transpose(0, 1).reshape(P * S, Q).t(), dup))
    return grads


@checked()
def lowrank_linear(x, weight, bias, down, up):
    """p = x @ down;  y = x @ weight.T + bias + p @ up"""
    p = torch.mm(x, down)
    return _sum(x, weight, bias, p, up), p


@checked()
def lowrank_linear_backward(dy, x, weight, down, up, p, needs, overwrite_x=False):
    """dp = dy @ up.T;  dx = dy @ weight + dp @ down.T;  ddown = x.T @ dp;  dup = p.T @ dy"""
    need_x, need_weight, need_bias, need_down, need_up = needs
    dp = torch.mm(dy, up.t()) if need_x or need_down else None
    grads = [torch.mm(dy.t(), x)] if need_weight else []
    if need_bias:
        grads.append(dy.sum(0))
    if need_down:
        grads.append(torch.mm(x.t(), dp))
    if need_up:
        grads.append(torch.mm(p.t(), dy))
    if need_x:  # last, because dx may take the place of x
        place = x if overwrite_x and x is not None and x.is_contiguous() else None
        grads.insert(0, _sum(dy, weight.t(), None, dp, down.t(), place))
    return grads


def _side_by_side(sigma: Tensor) -> Tensor:  # [P, Q] or [S, P, Q] -> [P, S * Q]
    return sigma if sigma.dim() == 2 else sigma.transpose(0, 1).flatten(1)


def _add(y: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:  # y += scale * a @ b, also where y is narrower
    return y.addmm_(a, b, alpha=scale) if y.dtype == a.dtype else y.add_(torch.mm(a, b), alpha=scale)


@checked()
def few_rows(x, weight, bias, u, sigma, v, scale):
    """y [..., S * N], p [M, P], q [M, S * Q]:  p = x @ u;  q = p @ sigma;  y = x @ weight.T + bias + scale * q @ v"""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = F.linear(rows, weight, bias)
    if x.dtype == torch.float16:  # the rest in float32, whose range p and q may need
        rows, u, sigma, v = rows.float(), u.float(), sigma.float(), v.float()
    p = torch.mm(rows, u)
    q = torch.mm(p, _side_by_side(sigma))
    _add(y.view(-1, v.shape[1]), q.view(-1, len(v)), v, scale)
    # not a view, which a custom function may not return to a caller that changes it in place
    return [y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, [*x.shape[:-1], len(weight)]), p, q]


@checked()
def few_rows_backward(dy, x, weight, u, sigma, v, p, q, scale, needs):
    """dq = scale * dy @ v.T;  dp = dq @ sigma.T;  dx = dy @ weight + dp @ u.T;  du = x.T @ dp;  dsigma = p.T @ dq;
    dv = scale * q.T @ dy, of which ``needs`` (x, u, sigma, v) asks for some
    """
    need_x, need_u, need_sigma, need_v = needs
    dy, grads = dy.reshape(len(p), len(weight)), []
    dx = torch.mm(dy, weight) if need_x else None
    if dy.dtype != p.dtype:  # as few_rows
        dy, x, u, sigma, v = dy.float(), x.float(), u.float(), sigma.float(), v.float()
    slices = dy.reshape(-1, v.shape[1])
    if need_x or need_u or need_sigma:
        dq = _scaled(scale, slices, v.t()).view(q.shape)
    if need_x or need_u:
        dp = torch.mm(dq, _side_by_side(sigma).t())
    if need_x:
        grads.append(_add(dx, dp, u.t(), 1.0).view(x.shape))
    if need_u:
        grads.append(torch.mm(x.reshape(-1, x.shape[-1]).t(), dp))
    if need_sigma:
        dsigma = torch.mm(p.t(), dq)
        if sigma.dim() == 3:
            dsigma = dsigma.view(len(dsigma), len(sigma), -1).transpose(0, 1).contiguous()
        grads.append(dsigma)
    if need_v:
        grads.append(_scaled(scale, q.view(-1, len(v)).t(), slices))
    return grads if dy.dtype == weight.dtype else [grad.to(weight.dtype) for grad in grads]


def _of_samples(
    t: Tensor,  # [A, ...]
    ids: Tensor,  # [B]
) -> Tensor:  # [B, ...]
    """t[ids], and zeros where an id stands for no adapter"""
    none = (ids < 0) | (ids >= len(t))
    return t.index_select(0, ids.masked_fill(none, 0)).masked_fill_(none.view(-1, *[1] * (t.dim() - 1)), 0)


def _to_adapters(
    t: Tensor,  # [B, ...]
    ids: Tensor,  # [B]
    A: int,
) -> Tensor:  # [A, ...]
    """The sum of t over the samples of each adapter, in their order"""
    total = t.new_zeros(A + 1, *t.shape[1:], dtype=torch.float64 if t.dtype == torch.float64 else torch.float32)
    rows = ids.masked_fill((ids < 0) | (ids >= A), A)  # an additional row, for no adapter
    # index_add_ adds in a fixed order on CPUs, index_put_ on GPUs
    if t.is_cpu:
        total.index_add_(0, rows, t.to(total.dtype))
    else:
        total.index_put_((rows,), t.to(total.dtype), accumulate=True)
    return total[:A].to(t.dtype)


@checked()
def mixed_linear(x, weight, bias, down, up, ids):
    """a = ids[m // (M / B)];  p[m] = x[m] @ down[a];  y[m] = x[m] @ weight.T + bias + p[m] @ up[a]"""
    y, (M, K), B = _product(x, weight, bias), x.shape, len(ids)
    if not M:
        return y, x.new_empty(0, down.shape[2])
    p = torch.bmm(x.reshape(B, M // B, K), _of_samples(down, ids))
    y.view(B, M // B, -1).baddbmm_(p, _of_samples(up, ids))
    return y, p.flatten(0, 1)


@checked()
def mixed_linear_backward(dy, x, weight, down, up, p, ids, needs, overwrite_x=False):
    """dp = dy @ up[a].T;  dx = dy @ weight + dp @ down[a].T;  ddown[a] = sum x.T @ dp;  dup[a] = sum p.T @ dy"""
    need_x, need_weight, need_bias, need_down, need_up = needs
    (M, N), (A, K, R), B = dy.shape, down.shape, len(ids)
    if not M:
        shapes = (0, K), (N, K), (N,), (A, K, R), (A, R, N)
        return [dy.new_zeros(shape) for shape, need in zip(shapes, needs) if need]

    def samples(t: Tensor) -> Tensor:  # [M, n] -> [B, M / B, n]
        return t.reshape(B, M // B, t.shape[1])

    dp = torch.bmm(samples(dy), _of_samples(up, ids).mT) if need_x or need_down else None
    grads = [torch.mm(dy.t(), x)] if need_weight else []
    if need_bias:
        grads.append(dy.sum(0))
    if need_down:
        grads.append(_to_adapters(torch.bmm(samples(x).mT, dp), ids, A))
    if need_up:
        grads.append(_to_adapters(torch.bmm(samples(p).mT, samples(dy)), ids, A))
    if need_x:  # last, because dx may take the place of x
        dx = _product(dy, weight.t(), None, x if overwrite_x and x is not None and x.is_contiguous() else None)
        samples(dx).baddbmm_(dp, _of_samples(down, ids).mT)
        grads.insert(0, dx)
    return grads


@checked()
def merge_(weights, downs, ups):
    """weight += (down @ up).T, in place; the sum is formed in float32 (float64 for float64) and rounded once"""
    for weight, down, up in zip(weights, downs, ups):
        if weight.dtype in (torch.float32, torch.float64):
            weight.addmm_(up.t(), down.t())
        else:
            weight.copy_(torch.addmm(weight.float(), up.t().float(), down.t().float()))
