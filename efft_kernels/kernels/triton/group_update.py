"""up[s] = scale * sigma[s] @ v, and its backward."""

import torch
import triton
import triton.language as tl

from ..memory import checked
from .launch import cdiv, config, precision, ragged


@triton.jit
def group_update_kernel(
    sigma, v, up, scale, S, P, Q, N, ss, sp, sq, svq, svn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """up[s] = scale * sigma[s] @ v    sigma [S, P, Q], v [Q, N] -> up [S, P, N], memory [P, S, N]

    All slices are one matmul: row i = p * S + s of the memory [P * S, N].
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
    # scaled in float32, so the formula is rounded once
    tl.store(
        up + i.to(tl.int64)[:, None] * N + n0 + n[None, :], (acc * scale).to(up.dtype.element_ty), mask=i_ok & n_ok
    )


@checked(addresses=True)
def group_update(sigma, v, scale):
    """up[s] = scale * sigma[s] @ v"""
    S, P, Q = sigma.shape
    N = v.shape[1]
    up = torch.empty(P, S, N, dtype=v.dtype, device=v.device)
    if up.numel():
        c = config("group_update", v, P * S, N, Q, Q, ragged(sigma, v, up))
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
    The first programs of the grid compute tiles of dsigma, the others tiles of dv; either output may be None.
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


@checked(addresses=True)
def group_update_backward(dup, sigma, v, scale, needs):
    """dsigma[s] = scale * dup[s] @ v.T;  dv = sum_s scale * sigma[s].T @ dup[s]"""
    S, P, Q = sigma.shape
    N = v.shape[1]
    dsigma = torch.empty(S, P, Q, dtype=v.dtype, device=v.device) if needs[0] else None
    dv = torch.empty(Q, N, dtype=v.dtype, device=v.device) if needs[1] else None
    c = config("group_update_backward", v, P * S, N, Q, Q, ragged(dup, sigma, v))
    tiles = (cdiv(P * S, c["BM"]) * needs[0] + cdiv(N, c["BN"]) * needs[1]) * cdiv(Q, c["BQ"])
    if tiles:
        with torch.cuda.device_of(v):
            group_update_backward_kernel[(tiles,)](
                dup, sigma, v, dsigma, dv, float(scale), S, P, Q, N,
                *dup.stride(), *sigma.stride(), *v.stride(), PRECISION=precision(v), **c,
            )  # fmt: skip
    return [grad for grad in (dsigma, dv) if grad is not None]
