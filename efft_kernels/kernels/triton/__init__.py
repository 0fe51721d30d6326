"""The contract in Triton, for NVIDIA GPUs from compute capability 8.0 on. Importing this file needs triton.

Every kernel gives each output element to one program and sums in an order that the shapes alone decide: no atomics,
so two runs are bit-equal. Tile sizes are data, see ``tuning/triton_configs.json`` and tuning/tune.py; nothing is tuned on a first
call. Under TRITON_INTERPRET=1 the same code runs on CPU tensors, for tests.
"""

import functools
import hashlib
import json
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import build
from ..tuning import table
from ..tuning.table import gpu

MAX_RANK = 256
# offsets inside a tile, of 512 rows or columns at most, are 32-bit; the offset of the tile itself is 64-bit
MAX_STRIDE = 1 << 21


@triton.jit
def tile_of(pid, tiles_m, tiles_n, GM: tl.constexpr):
    """(row, column) of tile number pid: down GM rows, then right, so that programs running together share x and w"""
    first = pid // (GM * tiles_n) * GM
    rows = tl.minimum(tiles_m - first, GM)
    pid = pid % (GM * tiles_n)
    return first + pid % rows, pid // rows


@triton.jit
def group_update_kernel(
    sigma, v, up, scale, S, P, Q, N, ss, sp, sq, svq, svn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """up[s] = scale * sigma[s] @ v    sigma [S, P, Q], v [Q, N] -> up [S, P, N], memory [P, S, N]

    All slices are one product: row i = p * S + s of the memory [P * S, N].
    """
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    s = (i % S).to(tl.int64)
    p = (i // S).to(tl.int64)
    n0 = tl.program_id(1).to(tl.int64) * BN
    n = tl.arange(0, BN)
    k = tl.arange(0, BK)
    i_ok = (i < P * S)[:, None]
    n_ok = (n < N - n0)[None, :]
    sigma_tile = sigma + (s * ss + p * sp)[:, None] + k[None, :] * sq
    v_tile = v + n0 * svn + k[:, None] * svq + n[None, :] * svn
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, Q, BK):
        a = tl.load(sigma_tile, mask=i_ok & (k < Q - k0)[None, :], other=0.0)
        b = tl.load(v_tile, mask=(k < Q - k0)[:, None] & n_ok, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        sigma_tile += BK * sq
        v_tile += BK * svq
    # scaled in float32: one rounding for the whole formula
    tl.store(
        up + i.to(tl.int64)[:, None] * N + n0 + n[None, :], (acc * scale).to(up.dtype.element_ty), mask=i_ok & n_ok
    )


def group_update(
    sigma: Tensor,  # [S, P, Q]
    v: Tensor,  # [Q, N]
    scale: float,
) -> Tensor:  # [S, P, N], memory [P, S, N]
    """up[s] = scale * sigma[s] @ v"""
    S, P, Q = sigma.shape
    N = v.shape[1]
    up = torch.empty(P, S, N, dtype=v.dtype, device=v.device)
    if up.numel():
        c = config("group_update", v, P * S, N, Q, Q)
        with torch.cuda.device_of(v):
            group_update_kernel[(cdiv(P * S, c["BM"]), cdiv(N, c["BN"]))](
                sigma, v, up, float(scale), S, P, Q, N, *sigma.stride(), *v.stride(), PRECISION=precision(v), **c
            )
    return up.transpose(0, 1)


@triton.jit
def dsigma_tile(
    dup, v, dsigma, scale, pi, pq, S, P, Q, N, sds, sdp, sdn, svq, svn,
    BM: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dsigma[s] = scale * dup[s] @ v.T, tile (pi, pq) of [P * S, Q]"""
    i = pi * BM + tl.arange(0, BM)
    s = (i % S).to(tl.int64)
    p = (i // S).to(tl.int64)
    q = pq * BQ + tl.arange(0, BQ)
    n = tl.arange(0, BN)
    i_ok = (i < P * S)[:, None]
    q_ok = (q < Q)[None, :]
    dup_tile = dup + (s * sds + p * sdp)[:, None] + n[None, :] * sdn
    v_tile = v + n[:, None] * svn + q[None, :] * svq
    acc = tl.zeros((BM, BQ), tl.float32)
    for n0 in range(0, N, BN):
        a = tl.load(dup_tile, mask=i_ok & (n < N - n0)[None, :], other=0.0)
        b = tl.load(v_tile, mask=(n < N - n0)[:, None] & q_ok, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        dup_tile += BN * sdn
        v_tile += BN * svn
    out = dsigma + ((s * P + p) * Q)[:, None] + q[None, :]
    tl.store(out, (acc * scale).to(dsigma.dtype.element_ty), mask=i_ok & q_ok)


@triton.jit
def dv_tile(
    dup, sigma, dv, scale, pn, pq, S, P, Q, N, sds, sdp, sdn, ss, sp, sq,
    BM: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv = sum_s scale * sigma[s].T @ dup[s], tile (pq, pn) of [Q, N]: one sum over the P * S rows"""
    n0 = pn.to(tl.int64) * BN
    n = tl.arange(0, BN)
    q = pq * BQ + tl.arange(0, BQ)
    n_ok = (n < N - n0)[None, :]
    q_ok = (q < Q)[:, None]
    acc = tl.zeros((BQ, BN), tl.float32)
    for i0 in range(0, P * S, BM):
        i = i0 + tl.arange(0, BM)
        s = (i % S).to(tl.int64)
        p = (i // S).to(tl.int64)
        i_ok = i < P * S
        sigma_tile = sigma + (s * ss + p * sp)[None, :] + q[:, None] * sq
        dup_tile = dup + n0 * sdn + (s * sds + p * sdp)[:, None] + n[None, :] * sdn
        a = tl.load(sigma_tile, mask=i_ok[None, :] & q_ok, other=0.0)
        b = tl.load(dup_tile, mask=i_ok[:, None] & n_ok, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    out = dv + q.to(tl.int64)[:, None] * N + n0 + n[None, :]
    tl.store(out, (acc * scale).to(dv.dtype.element_ty), mask=q_ok & n_ok)


@triton.jit
def group_update_backward_kernel(
    dup, sigma, v, dsigma, dv, scale, S, P, Q, N, sds, sdp, sdn, ss, sp, sq, svq, svn,
    BM: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dsigma[s] = scale * dup[s] @ v.T    dv = sum_s scale * sigma[s].T @ dup[s]

    dup [S, P, N], sigma [S, P, Q], v [Q, N] -> dsigma [S, P, Q], dv [Q, N]; rows i = p * S + s as in the forward.
    The first programs of the grid own tiles of dsigma, the others tiles of dv; either output may be None.
    """
    pid = tl.program_id(0)
    tiles_q = tl.cdiv(Q, BQ)
    tiles = tl.cdiv(P * S, BM) * tiles_q
    if dsigma is None:
        dv_tile(
            dup, sigma, dv, scale, pid // tiles_q, pid % tiles_q, S, P, Q, N, sds, sdp, sdn, ss, sp, sq,
            BM, BN, BQ, PRECISION,
        )  # fmt: skip
    elif pid < tiles:
        dsigma_tile(
            dup, v, dsigma, scale, pid // tiles_q, pid % tiles_q, S, P, Q, N, sds, sdp, sdn, svq, svn,
            BM, BN, BQ, PRECISION,
        )  # fmt: skip
    elif dv is not None:
        pid -= tiles
        dv_tile(
            dup, sigma, dv, scale, pid // tiles_q, pid % tiles_q, S, P, Q, N, sds, sdp, sdn, ss, sp, sq,
            BM, BN, BQ, PRECISION,
        )  # fmt: skip


def group_update_backward(
    dup: Tensor,  # [S, P, N]
    sigma: Tensor,  # [S, P, Q]
    v: Tensor,  # [Q, N]
    scale: float,
    needs: list[bool],  # (sigma, v)
) -> list[Tensor]:
    """dsigma[s] = scale * dup[s] @ v.T;  dv = sum_s scale * sigma[s].T @ dup[s]"""
    S, P, Q = sigma.shape
    N = v.shape[1]
    dsigma = torch.empty(S, P, Q, dtype=v.dtype, device=v.device) if needs[0] else None
    dv = torch.empty(Q, N, dtype=v.dtype, device=v.device) if needs[1] else None
    c = config("group_update_backward", v, P * S, N, Q, Q)
    tiles = (cdiv(P * S, c["BM"]) * needs[0] + cdiv(N, c["BN"]) * needs[1]) * cdiv(Q, c["BQ"])
    if tiles:
        with torch.cuda.device_of(v):
            group_update_backward_kernel[(tiles,)](
                dup, sigma, v, dsigma, dv, float(scale), S, P, Q, N,
                *dup.stride(), *sigma.stride(), *v.stride(), PRECISION=precision(v), **c,
            )  # fmt: skip
    return [grad for grad in (dsigma, dv) if grad is not None]


@triton.jit
def p_kernel(
    x, down, p, ids, M, K, R, A, sxm, sxk, sda, sdk, sdr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p = x @ down    x [M, K], down [K, R] -> p [M, R]

    With ids: M rows for each of them, and each run with a down of its own, down [A, K, R].
    """
    m0 = tl.program_id(0).to(tl.int64) * BM
    if ids is not None:
        tiles = tl.cdiv(M, BM)
        sample = (tl.program_id(0) // tiles).to(tl.int64)
        m0 = (tl.program_id(0) % tiles).to(tl.int64) * BM
        x += sample * M * sxm
        p += sample * M * R
        adapter = tl.load(ids + sample)
        known = (adapter >= 0) & (adapter < A)
        # no adapter: nothing is summed up
        K = tl.where(known, K, 0)
        down += tl.where(known, adapter, 0) * sda
    m = tl.arange(0, BM)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    k = tl.arange(0, BK)
    m_ok = (m < M - m0)[:, None]
    r_ok = (r < R)[None, :]
    x_tile = x + m0 * sxm + m[:, None] * sxm + k[None, :] * sxk
    down_tile = down + k[:, None] * sdk + r[None, :] * sdr
    acc = tl.zeros((BM, BR), tl.float32)
    for k0 in range(0, K, BK):
        a = tl.load(x_tile, mask=m_ok & (k < K - k0)[None, :], other=0.0)
        b = tl.load(down_tile, mask=(k < K - k0)[:, None] & r_ok, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        x_tile += BK * sxk
        down_tile += BK * sdk
    tl.store(p + m0 * R + m[:, None] * R + r[None, :], acc.to(p.dtype.element_ty), mask=m_ok & r_ok)


def lowrank_p(
    x: Tensor,  # [M, K]
    down: Tensor,  # [K, R]
) -> Tensor:  # [M, R]
    """p = x @ down"""
    M, K = x.shape
    R = down.shape[1]
    p = torch.empty(M, R, dtype=x.dtype, device=x.device)
    if M:
        c = config("p", x, M, R, K, R)
        BR = min(block(R), c.pop("BR"))
        with torch.cuda.device_of(x):
            p_kernel[(cdiv(M, c["BM"]), cdiv(R, BR))](
                x, down, p, None, M, K, R, 0, *x.stride(), 0, *down.stride(), BR=BR, PRECISION=precision(x), **c
            )
    return p


def mixed_p(
    x: Tensor,  # [M, K]
    down: Tensor,  # [A, K, R]
    ids: Tensor,  # [B]
) -> Tensor:  # [M, R]
    """p[m] = x[m] @ down[ids[m // (M / B)]]"""
    (M, K), (A, _, R), B = x.shape, down.shape, len(ids)
    p = torch.empty(M, R, dtype=x.dtype, device=x.device)
    if M:
        c = config("p", x, M, R, K, R)
        BR = min(block(R), c.pop("BR"))
        with torch.cuda.device_of(x):
            p_kernel[(B * cdiv(M // B, c["BM"]), cdiv(R, BR))](
                x, down, p, ids, M // B, K, R, A, *x.stride(), *down.stride(), BR=BR, PRECISION=precision(x), **c
            )
    return p


@triton.jit
def adapter_of(ids, sample, samples, A):
    """(the adapter of a sample, whether it has one); a sample beyond the last has none"""
    adapter = tl.load(ids + sample, mask=sample < samples, other=-1)
    # True: to Triton's interpreter a comparison is of its left operand's type, which a block made of it has. From 3.9 on
    # an int32 block is no mask. The compiler drops it.
    known = True & (adapter >= 0) & (adapter < A)
    return tl.where(known, adapter, 0), known


@triton.jit
def add_own_rows(acc, p, up_tile, own, ok, PRECISION: tl.constexpr):
    """acc += p @ up in the rows that are ``own``, and nothing in the others, even where up is not finite"""
    up = tl.load(up_tile, mask=ok, other=0.0)
    finite = up.to(tl.float32) - up.to(tl.float32) == 0
    # 0 * inf would be nan in the rows of others: own rows become nan by way of p instead
    p += tl.where(tl.min(finite.to(tl.int32), axis=1) == 1, 0.0, float("nan"))[None, :].to(p.dtype)
    p = tl.where(own[:, None], p, 0.0).to(p.dtype)
    return tl.dot(p, tl.where(finite, up, 0.0).to(up.dtype), acc, input_precision=PRECISION)


@triton.jit
def lowrank_linear_kernel(
    x, w, bias, down, up, y, p, ids, M, N, K, R, A, T, sxm, sxk, swk, swn, sb, sda, sdk, sdr, sua, sur, sun,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GM: tl.constexpr,
    OWN_P: tl.constexpr, TMA: tl.constexpr, W_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p = x @ down    y = x @ w + bias + p @ up

    x [M, K], w [K, N], bias [N] or None, down [K, R], up [R, N] -> y [M, N], p [M, R]
    OWN_P: every program forms its rows of p from the tiles of x that it loads for y; the first column of tiles stores
    p. Otherwise p is an input and the sum over K is extended by R: y = [x | p] @ [w ; up] + bias.
    TMA: x and w are tensor descriptors; W_ROWS says which of w's two dimensions are the rows in memory ("k" or "n").
    ids: every run of T rows has a pair of its own, down [A, K, R] and up [A, R, N]. With OWN_P a tile holds rows of two
    samples at most (T >= BM), and the product with both downs is formed for all of its rows.
    """
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    pm, pn = tile_of(tl.program_id(0), tiles_m, tiles_n, GM)
    m0 = pm.to(tl.int64) * BM
    n0 = pn.to(tl.int64) * BN
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    k = tl.arange(0, BK)
    r = tl.arange(0, BR)
    m_ok = (m < M - m0)[:, None]
    n_ok = (n < N - n0)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    if ids is not None:
        first = pm * BM // T  # 32-bit divisions
        sample = (pm * BM + m) // T
        samples = M // T
    if OWN_P:
        acc_p = tl.zeros((BM, BR), tl.float32)
        down_tile = down + k[:, None] * sdk + r[None, :] * sdr
        if ids is not None:
            acc_p2 = tl.zeros((BM, BR), tl.float32)
            a1, known1 = adapter_of(ids, first, samples, A)
            a2, known2 = adapter_of(ids, first + 1, samples, A)
            down_tile2 = down_tile + a2 * sda
            down_tile += a1 * sda
            r1_ok = (r < R) & known1
            r2_ok = (r < R) & known2
        else:
            r1_ok = r < R
    if not TMA:
        x_tile = x + m0 * sxm + m[:, None] * sxm + k[None, :] * sxk
        w_tile = w + n0 * swn + k[:, None] * swk + n[None, :] * swn
    for k0 in range(0, K, BK):
        if TMA:
            a = x.load([pm * BM, k0])
            if W_ROWS == "n":
                b = w.load([pn * BN, k0]).T
            else:
                b = w.load([k0, pn * BN])
        else:
            a = tl.load(x_tile, mask=m_ok & (k < K - k0)[None, :], other=0.0)
            b = tl.load(w_tile, mask=(k < K - k0)[:, None] & n_ok, other=0.0)
            x_tile += BK * sxk
            w_tile += BK * swk
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if OWN_P:
            d = tl.load(down_tile, mask=(k < K - k0)[:, None] & r1_ok[None, :], other=0.0)
            acc_p = tl.dot(a, d, acc_p, input_precision=PRECISION)
            down_tile += BK * sdk
            if ids is not None:
                d = tl.load(down_tile2, mask=(k < K - k0)[:, None] & r2_ok[None, :], other=0.0)
                acc_p2 = tl.dot(a, d, acc_p2, input_precision=PRECISION)
                down_tile2 += BK * sdk
    p_tile = p + m0 * R + m[:, None] * R + r[None, :]
    up_tile = up + n0 * sun + r[:, None] * sur + n[None, :] * sun
    if OWN_P:
        if ids is not None:
            # a sample without an adapter has zeros, whatever x is: 0 * nan is not
            acc_p = tl.where(known1, acc_p, 0.0)
            acc_p2 = tl.where(known2, acc_p2, 0.0)
            acc_p = tl.where((sample == first)[:, None], acc_p, acc_p2)
        # y uses p as rounded for storage, so that it is the y of the p that backward sees
        a = acc_p.to(p.dtype.element_ty)
        if pn == 0:
            tl.store(p_tile, a, mask=m_ok & (r < R)[None, :])
        if ids is None:
            b = tl.load(up_tile, mask=(r < R)[:, None] & n_ok, other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        else:
            acc = add_own_rows(acc, a, up_tile + a1 * sua, sample == first, r1_ok[:, None] & n_ok, PRECISION)
            acc = add_own_rows(acc, a, up_tile + a2 * sua, sample != first, r2_ok[:, None] & n_ok, PRECISION)
    elif ids is not None:
        last = tl.minimum(pm * BM + BM, M) - 1
        steps = tl.cdiv(R, BR)
        for i in tl.range(0, (last // T + 1 - first) * steps, num_stages=1):
            s = first + i // steps
            r0 = i % steps * BR
            adapter, known = adapter_of(ids, s, samples, A)
            a = tl.load(p_tile + r0, mask=m_ok & (r < R - r0)[None, :], other=0.0)
            ok = ((r < R - r0) & known)[:, None] & n_ok
            acc = add_own_rows(acc, a, up_tile + adapter * sua + r0 * sur, sample == s, ok, PRECISION)
    else:
        # no pipeline here: it would double the shared memory for a loop of one to four steps
        for r0 in tl.range(0, R, BR, num_stages=1):
            a = tl.load(p_tile, mask=m_ok & (r < R - r0)[None, :], other=0.0)
            b = tl.load(up_tile, mask=(r < R - r0)[:, None] & n_ok, other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            p_tile += BR
            up_tile += BR * sur
    if bias is not None:
        acc += tl.load(bias + (n0 + n) * sb, mask=n < N - n0, other=0.0).to(tl.float32)[None, :]
    y_tile = y + m0 * N + n0 + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(y_tile, acc.to(y.dtype.element_ty), mask=m_ok & n_ok)


def single_pass(M: int, N: int, K: int, R: int, BN: int, ridge: int, dup: bool = False) -> bool:
    """Whether p is formed inside the product y [M, N] = x [M, K] @ w, instead of by a pass of its own over x.

    Inside, p costs block(R) / BN of the product again, once per column of tiles. A pass of its own re-reads x, which
    costs ridge / N of the product (ridge: FLOP per byte at which the chip's memory and tensor cores take equally long),
    unless dup needs a pass over x (which is then dy) anyway: p comes out of that one for nothing.
    """
    if N <= BN:  # one tile spans the columns: nothing is formed twice
        return True
    if dup:
        return False
    # few tiles: the time is that of launching, and of one program walking along K
    return cdiv(M, 64) * cdiv(N, BN) <= 128 or block(R) * N < ridge * BN


def lowrank_product(
    x: Tensor,  # [M, K]
    w: Tensor,  # [K, N]
    bias: Tensor | None,  # [N]
    down: Tensor | None,  # [K, R], or [A, K, R] with ids; None if p is given
    up: Tensor,  # [R, N], or [A, R, N] with ids
    p: Tensor | None,  # [M, R]; None if it is to be formed from down
    ids: Tensor | None = None,  # [B]
) -> tuple[Tensor, Tensor]:  # y [M, N], p [M, R]
    """p = x @ down;  y = x @ w + bias + p @ up, in one launch"""
    M, K = x.shape
    R, N = up.shape[-2:]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    own_p = p is None
    p = torch.empty(M, R, dtype=x.dtype, device=x.device) if own_p else p
    if not M:
        return y, p
    A, T = (0, 0) if ids is None else (len(up), M // len(ids))
    c = config("single_pass" if own_p else "extended_k", x, M, N, K, mixed_rank(R) if own_p and A else R)
    BM, BN, BK = c["BM"], c["BN"], c["BK"]
    strides = *x.stride(), *w.stride(), 0 if bias is None else bias.stride(0)
    for t in (down, up):
        strides += (0, 0, 0) if t is None else t.stride() if A else (0, *t.stride())
    rows = "n" if w.stride(0) == 1 else "k"
    stored_w = w.t() if rows == "n" else w
    TMA = c.pop("TMA") and describable(x) and describable(stored_w)
    if TMA:
        x = TensorDescriptor.from_tensor(x, [BM, BK])
        w = TensorDescriptor.from_tensor(stored_w, [BN, BK] if rows == "n" else [BK, BN])
    # a loop over ranks in blocks no larger than needed: the last step issues only ceil(R / 16) tensor-core steps
    # mixed, no larger than one of these: the registers hold a tile of up twice
    BR = block(R) if own_p else min(block(R), 16 if A else 64)
    with torch.cuda.device_of(y):
        lowrank_linear_kernel[(cdiv(M, BM) * cdiv(N, BN),)](
            x, w, bias, down, up, y, p, ids, M, N, K, R, A, T, *strides,
            BR=BR, OWN_P=own_p, TMA=TMA, W_ROWS=rows, PRECISION=precision(y), **c,
        )  # fmt: skip
    return y, p


def lowrank_linear_single_pass(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    down: Tensor,  # [K, R]
    up: Tensor,  # [R, N]
) -> tuple[Tensor, Tensor]:  # y [M, N], p [M, R]
    """p = x @ down;  y = x @ weight.T + bias + p @ up, with p formed beside y"""
    return lowrank_product(x, weight.t(), bias, down, up, None)


def lowrank_linear_extended_k(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    down: Tensor,  # [K, R]
    up: Tensor,  # [R, N]
) -> tuple[Tensor, Tensor]:  # y [M, N], p [M, R]
    """p = x @ down;  y = [x | p] @ [weight.T ; up] + bias"""
    return lowrank_product(x, weight.t(), bias, None, up, lowrank_p(x, down))


def lowrank_linear(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    down: Tensor,  # [K, R]
    up: Tensor,  # [R, N]
) -> tuple[Tensor, Tensor]:  # y [M, N], p [M, R]
    """p = x @ down;  y = x @ weight.T + bias + p @ up"""
    if planned_single_pass(table.LINEAR, x, weight, up.shape[0]):
        return lowrank_linear_single_pass(x, weight, bias, down, up)
    return lowrank_linear_extended_k(x, weight, bias, down, up)


@triton.jit
def dy_pass_kernel(
    dy, up, p, dp_slots, dup_slots, M, N, R, ROWS, sym, syn, sur, sun, spm, spr, ss, sr, sn,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dp = dy @ up.T    dup = p.T @ dy, both from one read of dy

    dy [M, N], up [R, N], p [M, R] -> dp_slots [N / BN, M, R], dup_slots [M / ROWS, R, N] with strides ss, sr, sn
    A program owns ROWS rows and BN columns of dy, for BR of the ranks: dup is complete over its rows, dp over its
    columns, and the slots are summed afterwards. up and dp_slots may be None: then only dup is formed, or
    ddown.T = dp.T @ x for dy = x, p = dp.
    """
    m0 = tl.program_id(0).to(tl.int64) * ROWS
    chunk = tl.program_id(1).to(tl.int64)
    n0 = chunk * BN
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    r = tl.program_id(2) * BR + tl.arange(0, BR)
    n_ok = n < N - n0
    r_ok = r < R
    rows = tl.minimum(M - m0, ROWS).to(tl.int32)
    dy_tile = dy + m0 * sym + n0 * syn + m[:, None] * sym + n[None, :] * syn
    p_tile = p + m0 * spm + m[None, :] * spm + r[:, None] * spr
    if up is not None:
        up_t = tl.load(
            up + n0 * sun + n[:, None] * sun + r[None, :] * sur, mask=n_ok[:, None] & r_ok[None, :], other=0.0
        )
        dp_tile = dp_slots + (chunk * M + m0) * R + m[:, None] * R + r[None, :]
    acc = tl.zeros((BR, BN), tl.float32)
    for i in range(0, rows, BM):
        a = tl.load(dy_tile, mask=(m < rows - i)[:, None] & n_ok[None, :], other=0.0)
        b = tl.load(p_tile, mask=(m < rows - i)[None, :] & r_ok[:, None], other=0.0)
        if up is not None:
            dp = tl.dot(a, up_t, input_precision=PRECISION)
            tl.store(dp_tile, dp.to(dp_slots.dtype.element_ty), mask=(m < rows - i)[:, None] & r_ok[None, :])
            dp_tile += BM * R
        acc = tl.dot(b, a, acc, input_precision=PRECISION)
        dy_tile += BM * sym
        p_tile += BM * spm
    out = dup_slots + tl.program_id(0).to(tl.int64) * ss + n0 * sn + r[:, None] * sr + n[None, :] * sn
    tl.store(out, acc.to(dup_slots.dtype.element_ty), mask=r_ok[:, None] & n_ok[None, :])


@triton.jit
def reduce_slots_kernel(a_slots, a, a_size, a_count, b_slots, b, b_size, b_count, BLOCK: tl.constexpr):
    """a[i] = sum_s a_slots[s, i]    b[i] = sum_s b_slots[s, i], slots in ascending order

    a_slots [a_count, a_size] -> a [a_size], and b likewise; b may be None.
    """
    pid = tl.program_id(0)
    a_blocks = tl.cdiv(a_size, BLOCK)
    if pid < a_blocks:
        sum_slots(a_slots, a, pid, a_size, a_count, BLOCK)
    else:
        if b is not None:
            sum_slots(b_slots, b, pid - a_blocks, b_size, b_count, BLOCK)


@triton.jit
def sum_slots(slots, out, pid, size, count, BLOCK: tl.constexpr):
    """out[i] = sum_s slots[s, i] for block number pid of i"""
    i = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, 8)
    acc = tl.zeros((BLOCK,), tl.float32)
    # eight slots at a time, to have eight loads in flight
    for s0 in range(0, count, 8):
        at = (s0 + s).to(tl.int64)[:, None] * size + i[None, :]
        acc += tl.sum(tl.load(slots + at, mask=(s0 + s < count)[:, None] & (i < size)[None, :], other=0.0), axis=0)
    tl.store(out + i, acc.to(out.dtype.element_ty), mask=i < size)


def reduce_slots(*pairs: tuple[Tensor, Tensor]) -> None:
    """out = slots.sum(0) for each (slots, out), one launch for two pairs; a pair with slots is out is complete"""
    pairs = [(slots, out) for slots, out in pairs if slots is not out]
    if not pairs:
        return
    c = config("reduce", pairs[0][1], 0, 0, 0, 0)
    args, blocks = [], 0
    for slots, out in pairs:
        args += [slots, out, out.numel(), slots.shape[0]]
        blocks += cdiv(out.numel(), c["BLOCK"])
    with torch.cuda.device_of(pairs[0][1]):
        reduce_slots_kernel[(blocks,)](*args, *[None, None, 0, 0] * (2 - len(pairs)), **c)


def splits(M: int, N: int, R: int, BM: int, BN: int) -> int:
    """Into how many runs of rows a pass over dy [M, N] is split: from shapes alone, never from the GPU at hand.

    Enough for two programs on each of 132 multiprocessors, as long as a run has 64 * block(R) rows: its slot of dup is
    written and read in float32, 8 * R * N bytes against 2 * rows * N of dy, so at most a sixteenth of the traffic.
    16 splits are allowed in any case, and no run is shorter than a tile.
    """
    wanted = min(cdiv(264, cdiv(N, BN)), max(16, M // (64 * block(R))))
    return max(1, min(wanted, cdiv(M, BM)))


def dy_pass(
    dy: Tensor,  # [M, N]
    up: Tensor | None,  # [R, N]; None: no dp
    p: Tensor,  # [M, R]
    transposed: bool = False,
) -> tuple[
    tuple[Tensor, Tensor], tuple[Tensor, Tensor]
]:  # (slots, dp [M, R]), (slots, dup [R, N], or [N, R] if transposed)
    """dp = dy @ up.T;  dup = p.T @ dy, as pairs that reduce_slots completes"""
    M, N = dy.shape
    R = p.shape[1]
    new = functools.partial(torch.empty, dtype=dy.dtype, device=dy.device)
    slots = functools.partial(torch.empty, dtype=torch.float32, device=dy.device)
    dup = new(N, R) if transposed else new(R, N)
    if not M:
        return (empty := new(0, R), empty), (dup.zero_(), dup)
    c = config("dy_pass", dy, M, N, 0, R)
    BM, BN, BR = c["BM"], c["BN"], min(block(R), c.pop("BR"))
    # whole tiles per run; no run is left without rows
    rows = cdiv(cdiv(M, splits(M, N, R, BM, BN)), BM) * BM
    runs = cdiv(M, rows)
    chunks = cdiv(N, BN)
    # a single slot is the result itself
    dp = new(M, R) if up is not None else None
    dp_slots = dp if up is None or chunks == 1 else slots(chunks, M, R)
    dup_slots = dup if runs == 1 else slots(runs, *dup.shape)
    with torch.cuda.device_of(dy):
        dy_pass_kernel[(runs, chunks, cdiv(R, BR))](
            dy, up, p, dp_slots, dup_slots, M, N, R, rows, *dy.stride(), *((0, 0) if up is None else up.stride()),
            *p.stride(), R * N, *((1, R) if transposed else (N, 1)), BR=BR, PRECISION=precision(dy), **c,
        )  # fmt: skip
    return (dp_slots, dp), (dup_slots, dup)


def lowrank_linear_backward(
    dy: Tensor,  # [M, N]
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    down: Tensor,  # [K, R]
    up: Tensor,  # [R, N]
    p: Tensor,  # [M, R]
    needs: list[bool],  # (x, weight, bias, down, up)
) -> list[Tensor]:
    """dp = dy @ up.T;  dx = dy @ weight + dp @ down.T;  ddown = x.T @ dp;  dup = p.T @ dy"""
    need_x, need_weight, need_bias, need_down, need_up = needs
    need_dp = need_x or need_down
    dx = dp = None
    ddown = dup = ()
    if need_x and planned_single_pass(table.BACKWARD, dy, weight, up.shape[0], needs):
        # dp = dy @ up.T beside dx = dy @ weight + dp @ down.T: the forward's product with other operands
        dx, dp = lowrank_product(dy, weight, None, up.t(), down.t(), None)
    if need_up:
        # dup = p.T @ dy, and dp = dy @ up.T from the same read of dy
        dp_pair, dup = dy_pass(dy, up if need_dp and dp is None else None, p)
        if need_dp and dp is None:
            reduce_slots(dp_pair)
            dp = dp_pair[1]
    elif need_dp and dp is None:
        dp = lowrank_p(dy, up.t())
    if need_x and dx is None:
        # dx = [dy | dp] @ [weight ; down.T]
        dx, _ = lowrank_product(dy, weight, None, None, down.t(), dp)
    if need_down:
        # ddown = x.T @ dp, as (dp.T @ x).T
        _, ddown = dy_pass(x, None, dp, transposed=True)
    reduce_slots(*(pair for pair in (ddown, dup) if pair))
    grads = [dx] if need_x else []
    if need_weight:
        grads.append(torch.mm(dy.t(), x))
    if need_bias:
        grads.append(dy.sum(0))
    return grads + [pair[1] for pair in (ddown, dup) if pair]


def mixed_single_pass(x: Tensor, N: int, R: int, B: int) -> bool:
    """Whether a mixed batch forms p inside the product, as prefers_single_pass: for two samples a tile, no more"""
    if not prefers_single_pass(x, N, mixed_rank(R)):
        return False
    M, K = x.shape
    return M // B >= config("single_pass", x, M, N, K, mixed_rank(R))["BM"]


def mixed_rank(R: int) -> int:
    """the rank whose tiles have the registers that a mixed one needs: for two accumulators of p, and up held twice"""
    return 4 * block(R)


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


def mixed_linear(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    down: Tensor,  # [A, K, R]
    up: Tensor,  # [A, R, N]
    ids: Tensor,  # [B]
) -> tuple[Tensor, Tensor]:  # y [M, N], p [M, R]
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
    c, block_of = config("dy_pass", dy, M, N, 0, R), config("reduce", dy, 0, 0, 0, 0)
    BR = min(block(R), c.pop("BR"))
    with torch.cuda.device_of(dy):
        # a run of rows for each sample
        dy_pass_kernel[(B, cdiv(N, c["BN"]), cdiv(R, BR))](
            dy, None, p, None, slots, M, N, R, M // B, *dy.stride(), 0, 0, *p.stride(),
            R * N, *((1, R) if transposed else (N, 1)), BR=BR, PRECISION=precision(dy), **c,
        )  # fmt: skip
        mixed_reduce_kernel[(cdiv(R * N, block_of["BLOCK"]), A)](slots, dup, ids, R * N, B, **block_of)
    return dup


def mixed_linear_backward(
    dy: Tensor,  # [M, N]
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    down: Tensor,  # [A, K, R]
    up: Tensor,  # [A, R, N]
    p: Tensor,  # [M, R]
    ids: Tensor,  # [B]
    needs: list[bool],  # (x, weight, bias, down, up)
) -> list[Tensor]:
    """dp = dy @ up[a].T;  dx = dy @ weight + dp @ down[a].T;  ddown[a] = sum x.T @ dp;  dup[a] = sum p.T @ dy"""
    need_x, need_weight, need_bias, need_down, need_up = needs
    grads = []
    if need_x:
        # the forward's product with other operands
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


@triton.jit
def merge_kernel(
    table, starts, like, count,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """weight[i] += (down[i] @ up[i]).T, in place    weight [N, K], down [K, R], up [R, N]

    table [count, 12]: for each weight the addresses of weight, down and up, N, K, R and the three pairs of strides;
    starts [count]: the number of its first tile. like: any of the weights, for the type.
    ALIGNED: every weight's rows are contiguous and start on 16 bytes.
    """
    pid = tl.program_id(0)
    c = tl.arange(0, BC)
    first = tl.load(starts + c, mask=c < count, other=0x7FFFFFFF)
    i = tl.sum((first <= pid).to(tl.int32), axis=0) - 1
    pid -= tl.load(starts + i)
    table += i * 12
    weight = tl.load(table).to(like.dtype)
    down = tl.load(table + 1).to(like.dtype)
    up = tl.load(table + 2).to(like.dtype)
    N = tl.load(table + 3)
    K = tl.load(table + 4)
    R = tl.load(table + 5)
    swn = tl.load(table + 6)
    swk = tl.load(table + 7)
    if ALIGNED:
        weight = tl.multiple_of(weight, 16)
        swn = tl.multiple_of(swn, 16)
        swk = 1
    tiles_k = tl.cdiv(K, BK).to(tl.int32)
    n = pid // tiles_k * BN + tl.arange(0, BN)
    k = pid % tiles_k * BK + tl.arange(0, BK)
    r = tl.arange(0, BR).to(tl.int64)
    n_ok = (n < N)[:, None]
    k_ok = (k < K)[None, :]
    up_tile = up + r[None, :] * tl.load(table + 10) + n[:, None] * tl.load(table + 11)
    down_tile = down + k[None, :] * tl.load(table + 8) + r[:, None] * tl.load(table + 9)
    acc = tl.zeros((BN, BK), tl.float32)
    for r0 in range(0, R.to(tl.int32), BR):
        a = tl.load(up_tile, mask=n_ok & (r < R - r0)[None, :], other=0.0)
        b = tl.load(down_tile, mask=(r < R - r0)[:, None] & k_ok, other=0.0)
        # done once per model: float32 is not worth saving time on
        acc = tl.dot(a, b, acc, input_precision="ieee")
        up_tile += BR * tl.load(table + 10)
        down_tile += BR * tl.load(table + 9)
    w_tile = weight + n.to(tl.int64)[:, None] * swn + k.to(tl.int64)[None, :] * swk
    acc += tl.load(w_tile, mask=n_ok & k_ok, other=0.0).to(tl.float32)
    tl.store(w_tile, acc.to(like.dtype.element_ty), mask=n_ok & k_ok)


def merge_(
    weights: list[Tensor],  # each [N, K]
    downs: list[Tensor],  # each [K, R]
    ups: list[Tensor],  # each [R, N]
) -> None:
    """weight += (down @ up).T, in place; the sum is formed in float32 and rounded once"""
    if not weights:
        return
    like = weights[0]
    c = config("merge", like, 0, 0, 0, 0)
    table, starts, tiles = [], [], 0
    for weight, down, up in zip(weights, downs, ups):
        (N, K), R = weight.shape, down.shape[1]
        starts.append(tiles)
        tiles += cdiv(N, c["BN"]) * cdiv(K, c["BK"])
        table.append([weight.data_ptr(), down.data_ptr(), up.data_ptr(), N, K, R])
        table[-1] += [*weight.stride(), *down.stride(), *up.stride()]
    aligned = all(describable(weight) and weight.stride(0) % 16 == 0 for weight in weights)
    with torch.cuda.device_of(like):
        merge_kernel[(tiles,)](
            torch.tensor(table, dtype=torch.int64, device=like.device),
            torch.tensor(starts, dtype=torch.int32, device=like.device),
            like, len(weights), BC=triton.next_power_of_2(len(weights)), ALIGNED=aligned, **c,
        )  # fmt: skip


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def block(R: int) -> int:
    """the block that a rank is padded to: a power of two, at least the tensor cores' 16"""
    return max(16, triton.next_power_of_2(R))


def precision(tensor: Tensor) -> str:
    """how tl.dot multiplies float32: as the user allowed torch to"""
    tf32 = tensor.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def describable(matrix: Tensor) -> bool:
    """whether a tensor descriptor can address it: rows contiguous and apart, everything on 16 bytes"""
    rows, columns = matrix.stride()
    apart = rows >= matrix.shape[1] and rows * matrix.element_size() % 16 == 0
    return columns == 1 and apart and matrix.data_ptr() % 16 == 0


# whether kernels run in triton's interpreter, which decorators decided when this file was imported
INTERPRETED = not isinstance(p_kernel, triton.runtime.JITFunction)
CONFIGS = Path(table.__file__).with_name("triton_configs.json")
DEFAULTS = json.loads(CONFIGS.read_text())


@functools.cache
def sources() -> str:
    """The digest of the kernels' sources, and of the tiles that they are launched with."""
    tiles = hashlib.sha256(json.dumps(DEFAULTS, sort_keys=True).encode()).hexdigest()
    return build.python_digest(sorted(Path(__file__).parent.glob("*.py"))) + tiles[:8]


table.SOURCES["triton"] = sources


def kind_of(tensor: Tensor) -> str:
    """ "half", "tf32" or "fp32": what tile sizes depend on"""
    if tensor.dtype != torch.float32:
        return "half"
    return "tf32" if precision(tensor) == "tf32" else "fp32"


@functools.lru_cache(maxsize=4096)
def lookup(kernel: str, arch: str, kind: str, M: int, N: int, R: int) -> dict | None:
    """what to launch a kernel with: the first default row that matches"""
    sizes = {"M": M, "N": N, "R": block(R), "tiles": cdiv(M, 128) * cdiv(N, 128)}
    for row in DEFAULTS["defaults"][arch][kernel]:
        where = row["where"]
        if kind in where["kind"] and all(
            where.get(f"min_{size}", value) <= value <= where.get(f"max_{size}", value) for size, value in sizes.items()
        ):
            return row["use"]
    return None


def config(kernel: str, tensor: Tensor, M: int, N: int, K: int, R: int) -> dict:
    """tile sizes, num_warps and num_stages for a kernel at these sizes"""
    arch = gpu(tensor.device.index if tensor.is_cuda else None)[1]
    found = lookup(kernel, arch, kind_of(tensor), M, N, R)
    if found is None:
        entry = f"{kernel} for {arch} {kind_of(tensor)} M{M} N{N} K{K} R{R}"
        raise LookupError(f"no configuration of {entry} in {CONFIGS}")
    return dict(found)


def prefers_single_pass(x: Tensor, N: int, R: int, dup: bool = False) -> bool:
    """single_pass() for x [M, K] and R ranks, by the rule"""
    return strategy(gpu(x.device.index if x.is_cuda else None)[1], kind_of(x), *x.shape, N, R, dup)


@functools.lru_cache(maxsize=4096)
def strategy(arch: str, kind: str, M: int, K: int, N: int, R: int, dup: bool) -> bool:
    use = lookup("single_pass", arch, kind, M, N, R)
    if use is None:  # the accumulator of p would not fit the registers beside that of y
        return False
    return single_pass(M, N, K, R, use["BN"], DEFAULTS["ridge"][arch], dup)


WAYS = ("single_pass", "extended_k")


def planned_single_pass(op: str, x: Tensor, weight: Tensor, R: int, needs: list[bool] | None = None) -> bool:
    """Whether p is formed beside the product: as measured for these sizes on this GPU if on record, else by the rule.

    x is the op's first tensor, weight [N, K].
    """
    N, K = weight.shape
    columns = N if needs is None else K
    plan = table.overridden("triton")
    if plan is None and (found := table.choice(x.device, table.key(op, x.dtype, K, N, R, needs), len(x))):
        plan = found.plans.get("triton")
    if plan is None:
        return prefers_single_pass(x, columns, R, bool(needs and needs[4]))
    arch = gpu(x.device.index if x.is_cuda else None)[1]
    use = lookup("single_pass", arch, kind_of(x), len(x), columns, R)
    return plan.get("way") == "single_pass" and use is not None


def unavailable() -> str | None:
    if INTERPRETED:
        return None
    if torch.version.cuda is None:
        return "triton needs a CUDA build of torch (or TRITON_INTERPRET=1, for tests on the CPU)"
    if not torch.cuda.is_available():
        return "triton needs a CUDA GPU, and torch sees none (TRITON_INTERPRET=1 runs its tests on the CPU)"
    return None


def unsupported(op: str, *tensors: Tensor | None) -> str | None:
    given = [tensor for tensor in tensors if tensor is not None]
    dtype, device = given[0].dtype, given[0].device
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"triton has float32, bfloat16 and float16 kernels, not {dtype}"
    if INTERPRETED:
        if dtype == torch.bfloat16:
            return "triton's interpreter multiplies bfloat16 wrongly"
    elif device.type != "cuda":
        return f"triton needs CUDA tensors, these are on {device}"
    elif gpu(device.index)[1] not in DEFAULTS["defaults"]:
        return f"triton kernels need compute capability 8.0, {gpu(device.index)[0]} is older"
    R = rank(op, tensors)
    if R > MAX_RANK:
        return f"triton kernels go to rank {MAX_RANK}, not {R}"
    stride = max(max(tensor.stride()[-2:]) for tensor in given)  # slices and adapters are counted in 64 bits
    if stride > MAX_STRIDE:
        return f"triton kernels address strides up to {MAX_STRIDE} elements, not {stride}"
    return None


def rank(op: str, tensors: tuple) -> int:
    """the largest rank among the arguments of an op"""
    if op == "group_update":  # sigma, v
        return max(tensors[0].shape[1:])
    if op == "group_update_backward":  # dup, sigma, v
        return max(tensors[1].shape[1:])
    if op == "merge_":  # all weights, all downs, all ups
        count = len(tensors) // 3
        return max(down.shape[1] for down in tensors[count : 2 * count])
    return tensors[3].shape[-1]


def unproven(device: torch.device) -> str | None:
    if INTERPRETED:
        return "the interpreter is for tests"
    return table.unproven("triton", device)


def slower(op: str, *tensors: Tensor | None, needs: list[bool] | None = None) -> str | None:
    """None only where this op was measured at these sizes on this GPU and gained enough over plain torch."""
    return table.slower("triton", op, tensors, needs)
