"""Tunes the Triton kernels on the GPU at hand. Only an explicit call does this, never a first use.

    from efft_kernels.kernels.tune import tune
    tune([(64 * 197, 768, 2304, 16)])    # (M, K, N, R): ViT-B's qkv at batch 64, rank 16

What it measured goes to the user's own table, ``triton_kernels.user_table()``, which is used from then on.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable

import torch
import triton
from triton.runtime.errors import OutOfResources, PTXASError

from . import reference
from . import triton_kernels as kernels


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


def tune(
    shapes: Iterable[tuple[int, int, int, int]],  # (M, K, N, R) of each low-rank linear
    dtype: torch.dtype = torch.bfloat16,
    *,
    candidates: dict[str, list[dict]] | None = None,
    bench: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, dict]:
    """The fastest tile sizes for these shapes on the current GPU, and how forward and backward compare with torch's.

    candidates: configurations to try instead of this file's, by kernel. bench: call -> milliseconds, instead of
    triton.testing.do_bench. Every candidate's result is compared with plain torch's before it is timed.
    Returns the entries, as written to the user's table. Raises RuntimeError where the kernels cannot run.
    """
    if reason := kernels.unavailable():
        raise RuntimeError(f"nothing to tune: {reason}")
    device = "cpu" if kernels.INTERPRETED else torch.device("cuda", torch.cuda.current_device())
    bench = bench or (lambda call: triton.testing.do_bench(call, return_mode="median"))
    name = kernels.gpu(None if kernels.INTERPRETED else device.index)[0]
    found: dict[str, dict] = {}
    try:
        for M, K, N, R in shapes:
            found |= tune_shape(M, K, N, R, dtype, device, name, candidates or {}, bench)
    finally:
        # what was only tried out is forgotten
        forget()
    keep(name, found)
    return found


def tune_shape(M, K, N, R, dtype, device, name, candidates, bench) -> dict[str, dict]:
    """entries for one low-rank linear, forward and backward"""
    x, weight, bias, down, up, dy = (
        torch.randn(shape, device=device, dtype=torch.float32).mul_(shape[-1] ** -0.5).to(dtype)
        for shape in ((M, K), (N, K), (N,), (K, R), (R, N), (M, N))
    )
    forward, every = (x, weight, bias, down, up), [True, False, False, True, True]
    y, p = reference.lowrank_linear(*forward)
    dx, ddown, dup = reference.lowrank_linear_backward(dy, x, weight, down, up, p, every)
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
            ("single_pass", (M, N, K, R), lambda: kernels.lowrank_linear_single_pass(*forward)[0], y),
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
        entry = kernels.key(kernel, kind, *sizes)
        tried = candidates.get(kernel) or CANDIDATES[kernel](kernels.block(R))
        if entry not in found and (best := fastest(name, entry, tried, call, right, bench)):
            found[entry] = best

    torch_ms = bench(lambda: reference.lowrank_linear(*forward))
    ways = {False: bench(lambda: kernels.lowrank_linear_extended_k(*forward))}
    if kernels.block(R) <= 64:
        ways[True] = bench(lambda: kernels.lowrank_linear_single_pass(*forward))
    single = min(ways, key=ways.get)
    found[kernels.key("lowrank_linear", kind, M, N, K, R)] = {
        "single_pass": single, "ms": ways[single], "torch_ms": torch_ms,
    }  # fmt: skip
    # the backward goes by the sizes of its product, dx [M, K] = dy [M, N] @ weight
    backward = dy, x, weight, down, up, p, every
    found[kernels.key("lowrank_linear_backward", kind, M, K, N, R)] = {
        "ms": bench(lambda: kernels.lowrank_linear_backward(*backward)),
        "torch_ms": bench(lambda: reference.lowrank_linear_backward(*backward)),
    }
    return found


def fastest(name, entry, candidates, call, right, bench) -> dict | None:
    """the candidate with which the call is fastest, among those that the chip can run"""
    best = None
    for candidate in candidates:
        use(name, entry, {"use": candidate})
        try:
            got = call()
        except TOO_LARGE:
            continue
        error = torch.linalg.vector_norm((got - right).float()) / torch.linalg.vector_norm(right.float())
        # both are rounded in this dtype, p among them
        if not error <= 4 * torch.finfo(right.dtype).eps + 1e-5:
            raise RuntimeError(f"{entry} with {candidate} is wrong: relative error {error:.2g}")
        ms = bench(call)
        if best is None or ms < best["ms"]:
            best = {"use": candidate, "ms": ms}
    use(name, entry, best)
    return best


def use(name: str, entry: str, value: dict | None) -> None:
    """let an entry count in this process, unwritten; None: go back to the default"""
    table = kernels.tables()[1].setdefault(name, {}).setdefault("tuned", {})
    table.pop(entry, None)
    if value:
        table[entry] = value
    kernels.lookup.cache_clear()
    kernels.strategy.cache_clear()


def forget() -> None:
    """read the tables anew at their next use"""
    for cached in (kernels.tables, kernels.lookup, kernels.strategy):
        cached.cache_clear()


def keep(name: str, entries: dict[str, dict]) -> None:
    """write these entries to the user's table, beside what it holds; a reader sees the old file or the new one"""
    shipped, gpus = kernels.tables()
    gpus.setdefault(name, {}).setdefault("tuned", {}).update(entries)
    path = kernels.user_table()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump({"format": shipped["format"], "gpus": gpus}, file, indent=1)
    os.replace(file.name, path)
    forget()
