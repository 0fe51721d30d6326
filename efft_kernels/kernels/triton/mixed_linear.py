"""The low-rank linear of a mixed batch: its product is the kernel of lowrank_linear.py, with ids."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..memory import checked
from .dy_pass import dy_pass_kernel
from .launch import block, cdiv, config, precision, ragged
from .lowrank_linear import lowrank_product, mixed_rank, p_kernel, prefers_single_pass


def mixed_p(
    x: Tensor,  # [M, K]
    down: Tensor,  # [A, K, R]
    ids: Tensor,  # [B]
) -> Tensor:  # [M, R]
    """p[m] = x[m] @ down[ids[m // (M / B)]]"""
    (M, K), (A, _, R), B = x.shape, down.shape, len(ids)
    p = torch.empty(M, R, dtype=x.dtype, device=x.device)
    if M:
        c = config("p", x, M, R, K, R, ragged(x, down))
        BR = min(block(R), c.pop("BR"))
        with torch.cuda.device_of(x):
            p_kernel[(B * cdiv(M // B, c["BM"]), cdiv(R, BR))](
                x, down, p, ids, M // B, K, R, A, *x.stride(), *down.stride(), BR=BR, PRECISION=precision(x), **c
            )
    return p


def mixed_single_pass(x: Tensor, N: int, R: int, B: int) -> bool:
    """prefers_single_pass for a mixed batch: only where a tile has rows of at most two samples"""
    if not prefers_single_pass(x, N, mixed_rank(R)):
        return False
    M, K = x.shape
    return M // B >= config("single_pass", x, M, N, K, mixed_rank(R))["BM"]


def mixed_product(
    x: Tensor,  # [M, K]
    w: Tensor,  # [K, N]
    bias: Tensor | None,  # [N]
    down: Tensor,  # [A, K, R]
    up: Tensor,  # [A, R, N]
    ids: Tensor,  # [B]
) -> tuple[Tensor, Tensor]:  # y [M, N], p [M, R]
    """a = ids[m // (M / B)];  p[m] = x[m] @ down[a];  y[m] = x[m] @ w + bias + p[m] @ up[a]"""
    if not len(x) or mixed_single_pass(x, up.shape[2], up.shape[1], len(ids)):
        return lowrank_product(x, w, bias, down, up, None, ids)
    return lowrank_product(x, w, bias, None, up, mixed_p(x, down, ids), ids)


@checked(addresses=True)
def mixed_linear(x, weight, bias, down, up, ids):
    """a = ids[m // (M / B)];  p[m] = x[m] @ down[a];  y[m] = x[m] @ weight.T + bias + p[m] @ up[a]"""
    return mixed_product(x, weight.t(), bias, down, up, ids)


@triton.jit
def mixed_reduce_kernel(slots, out, ids, size, B, BLOCK: tl.constexpr):
    """out[a, i] = sum of slots[b, i] over the samples b of adapter a, in ascending order    ids [B]"""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.program_id(1).to(tl.int64)
    b = tl.arange(0, 8)
    acc = tl.zeros((BLOCK,), tl.float32)
    for b0 in range(0, B, 8):
        own = tl.load(ids + b0 + b, mask=b0 + b < B, other=-1) == a
        at = (b0 + b).to(tl.int64)[:, None] * size + i[None, :]
        acc += tl.sum(tl.load(slots + at, mask=own[:, None] & (i < size)[None, :], other=0.0), axis=0)
    tl.store(out + a * size + i, acc.to(out.dtype.element_ty), mask=i < size)


def mixed_dup(
    dy: Tensor,  # [M, N]
    p: Tensor,  # [M, R]
    ids: Tensor,  # [B]
    A: int,
    transposed: bool = False,
) -> Tensor:  # [A, R, N], or [A, N, R] if transposed
    """dup[a] = sum of p[m].T @ dy[m] over the rows of adapter a"""
    (M, N), R, B = dy.shape, p.shape[1], len(ids)
    shape = (N, R) if transposed else (R, N)
    dup = torch.empty(A, *shape, dtype=dy.dtype, device=dy.device)
    if not M:
        return dup.zero_()
    slots = torch.empty(B, *shape, dtype=torch.float32, device=dy.device)
    c, block_of = config("dy_pass", dy, M, N, 0, R, ragged(dy, p)), config("reduce", dy, 0, 0, 0, 0)
    BR = min(block(R), c.pop("BR"))
    with torch.cuda.device_of(dy):
        # one run of rows per sample
        dy_pass_kernel[(B, cdiv(N, c["BN"]), cdiv(R, BR))](
            dy, None, p, None, slots, M, N, R, M // B, *dy.stride(), 0, 0, *p.stride(),
            R * N, *((1, R) if transposed else (N, 1)), BR=BR, PRECISION=precision(dy), **c,
        )  # fmt: skip
        mixed_reduce_kernel[(cdiv(R * N, block_of["BLOCK"]), A)](slots, dup, ids, R * N, B, **block_of)
    return dup


@checked(addresses=True)
def mixed_linear_backward(dy, x, weight, down, up, p, ids, needs):
    """dp = dy @ up[a].T;  dx = dy @ weight + dp @ down[a].T;  ddown[a] = sum x.T @ dp;  dup[a] = sum p.T @ dy"""
    need_x, need_weight, need_bias, need_down, need_up = needs
    grads = []
    if need_x:
        # the forward's kernel with other operands
        dx, dp = mixed_product(dy, weight, None, up.mT, down.mT, ids)
        grads.append(dx)
    elif need_down:
        dp = mixed_p(dy, up.mT, ids)
    if need_weight:
        grads.append(torch.mm(dy.t(), x))
    if need_bias:
        grads.append(dy.sum(0))
    if need_down:
        # ddown = x.T @ dp, as (dp.T @ x).T
        grads.append(mixed_dup(x, dp, ids, len(down), transposed=True))
    if need_up:
        grads.append(mixed_dup(dy, p, ids, len(up)))
    return grads
