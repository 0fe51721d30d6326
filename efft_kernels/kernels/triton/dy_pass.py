"""dp = dy @ up.T and dup = p.T @ dy from one read of dy, as slots that are summed afterwards."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import block, cdiv, config, precision, ragged


@triton.jit
def dy_pass_kernel(
    dy, up, p, dp_slots, dup_slots, M, N, R, ROWS, sym, syn, sur, sun, spm, spr, ss, sr, sn,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dp = dy @ up.T    dup = p.T @ dy, both from one read of dy

    dy [M, N], up [R, N], p [M, R] -> dp_slots [N / BN, M, R], dup_slots [M / ROWS, R, N] with strides ss, sr, sn
    A program has ROWS rows and BN columns of dy, for BR of the ranks: dup is complete over its rows, dp over its
    columns, and the slots are summed afterwards. up and dp_slots may be None: then only dup is computed, or
    ddown.T = dp.T @ x with dy = x, p = dp.
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
    # eight slots at a time, for eight loads in flight
    for s0 in range(0, count, 8):
        at = (s0 + s).to(tl.int64)[:, None] * size + i[None, :]
        acc += tl.sum(tl.load(slots + at, mask=(s0 + s < count)[:, None] & (i < size)[None, :], other=0.0), axis=0)
    tl.store(out + i, acc.to(out.dtype.element_ty), mask=i < size)


def reduce_slots(*pairs: tuple[Tensor, Tensor]) -> None:
    """out = slots.sum(0) for each (slots, out), in one launch for up to two pairs; nothing to do where slots is out"""
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
    """The number of runs of rows that a pass over dy [M, N] is split into, from shapes alone: the same on every GPU.

    Enough for two programs on each of 132 multiprocessors, as long as a run has 64 * block(R) rows: its slot of dup is
    written and read in float32, 8 * R * N bytes compared to 2 * rows * N of dy, at most a sixteenth of the traffic.
    16 runs are allowed in any case, and no run is shorter than a tile.
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
    c = config("dy_pass", dy, M, N, 0, R, ragged(dy, up, p))
    BM, BN, BR = c["BM"], c["BN"], min(block(R), c.pop("BR"))
    # whole tiles per run, and no run without rows
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
