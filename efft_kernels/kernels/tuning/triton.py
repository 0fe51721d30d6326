"""What is tried on a GPU for the Triton backend: tile sizes of each kernel, and where p is formed."""

import torch
import triton
from triton.runtime.errors import OutOfResources, PTXASError

from .. import reference
from .. import triton as kernels
from . import table


def device() -> torch.device:
    return torch.device("cpu") if kernels.INTERPRETED else torch.device("cuda", torch.cuda.current_device())


def gpu() -> tuple[str, str]:
    """(name, architecture class)"""
    return table.gpu(None if kernels.INTERPRETED else torch.cuda.current_device())


def products(BR: int) -> list[dict]:
    """tiles of y [M, N]; BR ranks beside them"""
    tiles = [(128, 256, 64, 8), (256, 128, 64, 8), (128, 128, 64, 8), (128, 128, 64, 4), (128, 128, 32, 4)]
    tiles += [(128, 64, 64, 4), (64, 128, 64, 4), (64, 64, 64, 4), (128, 256, 32, 8), (64, 256, 32, 4)]
    return [
        {"BM": BM, "BN": BN, "BK": BK, "GM": 8, "num_warps": warps, "num_stages": stages, "TMA": tma}
        for BM, BN, BK, warps in tiles
        for stages in (3, 4)
        for tma in (False, True)
        if BM * (BN + BR) <= 256 * 160 * (warps // 4)
    ]


def row_passes(BR: int) -> list[dict]:
    """tiles of dy [M, N] in a pass over it"""
    return [
        {"BM": BM, "BN": BN, "BR": min(BR, 64), "num_warps": warps, "num_stages": stages}
        for BM in (32, 64, 128)
        for BN in (64, 128, 256, 512)
        for warps in (4, 8)
        for stages in (2, 3, 4)
        if BM * BN <= 128 * 256
    ]


def p_tiles(BR: int) -> list[dict]:
    """tiles of x [M, K] in p = x @ down"""
    return [
        {"BM": BM, "BK": BK, "BR": min(BR, 128), "num_warps": 4, "num_stages": stages}
        for BM in (16, 32, 64, 128)
        for BK in (64, 128, 256)
        for stages in (3, 4)
    ]


# how a tile that the chip has no room for fails
TOO_LARGE = (OutOfResources, PTXASError, triton.compiler.CompilationError)
CANDIDATES = {"single_pass": products, "extended_k": products, "dy_pass": row_passes, "p": p_tiles}


def tune_shape(tuner, inputs) -> dict[str, dict]:
    """entries for one low-rank linear: of each kernel's tiles, and of forward and backward beside plain torch's"""
    x, weight, bias, down, up = inputs.forward
    (M, K), (R, N), dy = x.shape, up.shape, inputs.backward[0]
    (y, p), (dx, ddown, dup) = inputs.y, inputs.grads
    dp = reference.lowrank_linear(dy, weight.t(), None, up.t(), down.t())[1]

    def dup_alone():
        _, pair = kernels.dy_pass(dy, up, p)
        kernels.reduce_slots(pair)
        return pair[1]

    def ddown_alone():
        _, pair = kernels.dy_pass(x, None, dp, transposed=True)
        kernels.reduce_slots(pair)
        return pair[1]

    # (kernel, the sizes that config() is asked with, a call of it, what it must give)
    jobs = [
        ("p", (M, R, K, R), lambda: kernels.lowrank_p(x, down), p),
        ("p", (M, R, N, R), lambda: kernels.lowrank_p(dy, up.t()), dp),
        ("extended_k", (M, N, K, R), lambda: kernels.lowrank_product(x, weight.t(), bias, None, up, p)[0], y),
        ("extended_k", (M, K, N, R), lambda: kernels.lowrank_product(dy, weight, None, None, down.t(), dp)[0], dx),
        ("dy_pass", (M, N, 0, R), dup_alone, dup),
        ("dy_pass", (M, K, 0, R), ddown_alone, ddown),
    ]
    if kernels.block(R) <= 64:
        jobs += [
            ("single_pass", (M, N, K, R), lambda: kernels.lowrank_linear_single_pass(*inputs.forward)[0], y),
            (
                "single_pass",
                (M, K, N, R),
                lambda: kernels.lowrank_product(dy, weight, None, up.t(), down.t(), None)[0],
                dx,
            ),
        ]
    kind = kernels.kind_of(x)
    found = {}
    for kernel, sizes, call, right in jobs:
        entry = table.key(kernel, kind, *sizes)
        tried = tuner.candidates.get(kernel) or CANDIDATES[kernel](kernels.block(R))
        if entry not in found and (best := tuner.fastest(entry, tried, call, right, TOO_LARGE)):
            found[entry] = best

    ways = {False: tuner.bench(lambda: kernels.lowrank_linear_extended_k(*inputs.forward))}
    if kernels.block(R) <= 64:
        ways[True] = tuner.bench(lambda: kernels.lowrank_linear_single_pass(*inputs.forward))
    single = min(ways, key=ways.get)
    found[table.key("lowrank_linear", kind, M, N, K, R)] = {
        "single_pass": single, "ms": ways[single], "torch_ms": tuner.bench(inputs.plain("lowrank_linear")),
    }  # fmt: skip
    # the backward goes by the sizes of its product, dx [M, K] = dy [M, N] @ weight
    found[table.key("lowrank_linear_backward", kind, M, K, N, R)] = {
        "ms": tuner.bench(lambda: kernels.lowrank_linear_backward(*inputs.backward)),
        "torch_ms": tuner.bench(inputs.plain("lowrank_linear_backward")),
    }
    return found
