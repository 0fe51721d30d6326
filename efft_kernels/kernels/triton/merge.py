"""weight += (down @ up).T in place, for many weights in one launch."""

import torch
import triton
import triton.language as tl

from ..memory import checked
from .launch import cdiv, config, describable


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
        # done once per model: not worth the error of TF32
        acc = tl.dot(a, b, acc, input_precision="ieee")
        up_tile += BR * tl.load(table + 10)
        down_tile += BR * tl.load(table + 9)
    w_tile = weight + n.to(tl.int64)[:, None] * swn + k.to(tl.int64)[None, :] * swk
    acc += tl.load(w_tile, mask=n_ok & k_ok, other=0.0).to(tl.float32)
    tl.store(w_tile, acc.to(like.dtype.element_ty), mask=n_ok & k_ok)


NUMBERS = ["n", "weight", "down", "up", "N", "K", "R", "swn", "swk", "sdk", "sdr", "sur", "sun", "start"]


@triton.jit(do_not_specialize=NUMBERS)
def merge_row_kernel(table, starts, n, weight, down, up, N, K, R, swn, swk, sdk, sdr, sur, sun, start):
    """table[n] = (weight, down, up, N, K, R, strides), starts[n] = start; weight, down and up are addresses"""
    tl.store(starts + n, start)
    table += n * 12
    tl.store(table, weight)
    tl.store(table + 1, down)
    tl.store(table + 2, up)
    tl.store(table + 3, N)
    tl.store(table + 4, K)
    tl.store(table + 5, R)
    tl.store(table + 6, swn)
    tl.store(table + 7, swk)
    tl.store(table + 8, sdk)
    tl.store(table + 9, sdr)
    tl.store(table + 10, sur)
    tl.store(table + 11, sun)


@checked()
def merge_(weights, downs, ups):
    """weight += (down @ up).T, in place; the sum is formed in float32 and rounded once"""
    if not weights:
        return
    like = weights[0]
    c = config("merge", like, 0, 0, 0, 0)
    table = torch.empty(len(weights), 12, dtype=torch.int64, device=like.device)
    starts = torch.empty(len(weights), dtype=torch.int32, device=like.device)
    aligned = all(describable(weight) and weight.stride(0) % 16 == 0 for weight in weights)
    tiles = 0
    with torch.cuda.device_of(like):
        # numbers are passed as arguments of launches: a copy from host memory would wait for the GPU, and would not be
        # part of a CUDA graph
        for n, (weight, down, up) in enumerate(zip(weights, downs, ups)):
            (N, K), R = weight.shape, down.shape[1]
            addresses = weight.data_ptr(), down.data_ptr(), up.data_ptr()
            strides = *weight.stride(), *down.stride(), *up.stride()
            merge_row_kernel[(1,)](table, starts, n, *addresses, N, K, R, *strides, tiles)
            tiles += cdiv(N, c["BN"]) * cdiv(K, c["BK"])
        merge_kernel[(tiles,)](
            table, starts, like, len(weights), BC=triton.next_power_of_2(len(weights)), ALIGNED=aligned, **c
        )
