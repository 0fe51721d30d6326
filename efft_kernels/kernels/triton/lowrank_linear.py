"""y = x @ weight.T + bias + p @ up, with p = x @ down inside the matmul or in a separate pass, and its backward."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..memory import checked
from ..tuning import table
from .dy_pass import dy_pass, reduce_slots
from .launch import DEFAULTS, architecture, block, cdiv, config, describable, kind_of, lookup, precision, ragged


@triton.jit
def tile_of(pid, tiles_m, tiles_n, GM: tl.constexpr):
    """(row, column) of tile number pid: GM rows down, then one column right, so concurrent programs share x and w"""
    first = pid // (GM * tiles_n) * GM
    rows = tl.minimum(tiles_m - first, GM)
    pid = pid % (GM * tiles_n)
    return first + pid % rows, pid // rows


@triton.jit
def p_kernel(
    x, down, p, ids, M, K, R, A, sxm, sxk, sda, sdk, sdr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p = x @ down    x [M, K], down [K, R] -> p [M, R]

    With ids, each id stands for a run of M rows, which uses its own adapter of down [A, K, R].
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
        # without an adapter the sum over K is empty
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
        c = config("p", x, M, R, K, R, ragged(x, down))
        BR = min(block(R), c.pop("BR"))
        with torch.cuda.device_of(x):
            p_kernel[(cdiv(M, c["BM"]), cdiv(R, BR))](
                x, down, p, None, M, K, R, 0, *x.stride(), 0, *down.stride(), BR=BR, PRECISION=precision(x), **c
            )
    return p


@triton.jit
def adapter_of(ids, sample, samples, A):
    """(the adapter of a sample, whether it has one); a sample past the last has none"""
    adapter = tl.load(ids + sample, mask=sample < samples, other=-1)
    # `True &` is for Triton's interpreter: there a comparison has the type of its left operand, and from 3.9 on an
    # int32 block cannot be a mask. The compiler removes it.
    known = True & (adapter >= 0) & (adapter < A)
    return tl.where(known, adapter, 0), known


@triton.jit
def add_own_rows(acc, p, up_tile, own, ok, PRECISION: tl.constexpr):
    """acc += p @ up in the rows where ``own`` is true, and nothing in the others, even where up is not finite"""
    up = tl.load(up_tile, mask=ok, other=0.0)
    finite = up.to(tl.float32) - up.to(tl.float32) == 0
    # 0 * inf would be nan in the other rows; own rows get their nan through p instead
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
    OWN_P: every program computes its rows of p from the tiles of x that it loads for y; the first column of tiles
    stores p. Otherwise p is an input and the sum over K is extended by R: y = [x | p] @ [w ; up] + bias.
    TMA: x and w are tensor descriptors; W_ROWS says which dimension of w has the rows in memory ("k" or "n").
    ids: every run of T rows uses its own adapter of down [A, K, R] and up [A, R, N]. With OWN_P a tile has rows of at
    most two samples (T >= BM), and the matmul with both downs is computed for all of its rows.
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
            # zeros for a sample without an adapter, even where x is nan: 0 * nan is not 0
            acc_p = tl.where(known1, acc_p, 0.0)
            acc_p2 = tl.where(known2, acc_p2, 0.0)
            acc_p = tl.where((sample == first)[:, None], acc_p, acc_p2)
        # y uses p as it is rounded for storage, which is the p that the backward reads
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
        # not pipelined: that would double the shared memory for a loop of one to four steps
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
    """Whether to compute p inside the matmul y [M, N] = x [M, K] @ w, rather than in a separate pass over x.

    Inside, p costs block(R) / BN of the matmul, repeated for every column of tiles. A separate pass reads x a second
    time, which costs ridge / N of the matmul (ridge: the FLOP per byte at which memory and tensor cores take equally
    long), unless dup needs a pass over x (which is then dy) anyway, which gives p at no cost.
    """
    if N <= BN:  # one tile spans the columns: nothing is computed twice
        return True
    if dup:
        return False
    # few tiles: the time is that of a launch plus one program's loop over K
    return cdiv(M, 64) * cdiv(N, BN) <= 128 or block(R) * N < ridge * BN


@functools.lru_cache(maxsize=4096)
def strategy(arch: str, kind: str, M: int, K: int, N: int, R: int, dup: bool) -> bool:
    use = lookup("single_pass", arch, kind, M, N, R)
    if use is None:  # the accumulators of p and y do not fit into the registers together
        return False
    return single_pass(M, N, K, R, use["BN"], DEFAULTS["ridge"][arch], dup)


def prefers_single_pass(x: Tensor, N: int, R: int, dup: bool = False) -> bool:
    """single_pass() for x [M, K] and rank R"""
    return strategy(architecture(x), kind_of(x), *x.shape, N, R, dup)


WAYS = ("single_pass", "extended_k")


def planned_single_pass(op: str, x: Tensor, weight: Tensor, R: int, needs: list[bool] | None = None) -> bool:
    """Whether p is computed inside the matmul: as measured for these sizes on this GPU if on record, else by the rule.

    x is the op's first tensor, weight [N, K].
    """
    N, K = weight.shape
    columns = N if needs is None else K
    plan = table.overridden("triton") or _recorded(op, x.device, x.dtype, len(x), N, K, R, needs and tuple(needs))
    if plan is None:
        return prefers_single_pass(x, columns, R, bool(needs and needs[4]))
    use = lookup("single_pass", architecture(x), kind_of(x), len(x), columns, R)
    return plan.get("way") == "single_pass" and use is not None


@table.cached
def _recorded(
    op: str, device: torch.device, dtype: torch.dtype, M: int, N: int, K: int, R: int, needs: tuple | None
) -> dict | None:
    """The plan on record for these sizes, or None"""
    found = table.choice(device, table.key(op, dtype, K, N, R, needs and list(needs)), M)
    return found and found.plans.get("triton")


def mixed_rank(R: int) -> int:
    """The rank whose tiles leave a mixed batch its registers, for two accumulators of p and two tiles of up"""
    return 4 * block(R)


def lowrank_product(
    x: Tensor,  # [M, K]
    w: Tensor,  # [K, N]
    bias: Tensor | None,  # [N]
    down: Tensor | None,  # [K, R], or [A, K, R] with ids; None where p is given
    up: Tensor,  # [R, N], or [A, R, N] with ids
    p: Tensor | None,  # [M, R]; None where it is computed from down
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
    # blocks of ranks no larger than needed: the last step issues only ceil(R / 16) tensor-core steps. For a mixed batch
    # blocks of one such step, because the registers hold two tiles of up
    BR = block(R) if own_p else min(block(R), 16 if A else 64)
    odd = ragged(x, w, down, up, y) or (R % 16 and BR == 64)
    c = config("single_pass" if own_p else "extended_k", x, M, N, K, mixed_rank(R) if own_p and A else R, odd)
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
    """p = x @ down;  y = x @ weight.T + bias + p @ up, with p computed inside the matmul"""
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


@checked(addresses=True)
def lowrank_linear(x, weight, bias, down, up):
    """p = x @ down;  y = x @ weight.T + bias + p @ up"""
    if planned_single_pass(table.LINEAR, x, weight, up.shape[0]):
        return lowrank_linear_single_pass(x, weight, bias, down, up)
    return lowrank_linear_extended_k(x, weight, bias, down, up)


@checked(addresses=True)
def lowrank_linear_backward(dy, x, weight, down, up, p, needs):
    """dp = dy @ up.T;  dx = dy @ weight + dp @ down.T;  ddown = x.T @ dp;  dup = p.T @ dy"""
    need_x, need_weight, need_bias, need_down, need_up = needs
    need_dp = need_x or need_down
    dx = dp = None
    ddown = dup = ()
    if need_x and planned_single_pass(table.BACKWARD, dy, weight, up.shape[0], needs):
        # dp = dy @ up.T inside dx = dy @ weight + dp @ down.T: the forward's kernel with other operands
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
