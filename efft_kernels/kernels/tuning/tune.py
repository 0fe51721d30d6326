"""Tunes the kernels of a GPU backend on the GPU at hand. Only an explicit call does this, never a first use.

    from efft_kernels.kernels.tuning.tune import tune
    tune([(64 * 197, 768, 2304, 16)])                    # (M, K, N, R): ViT-B's qkv at batch 64, rank 16
    tune([(64 * 197, 768, 2304, 16)], backend="cuda")

What it measured goes to the user's own table of that backend (table.py), which is used from then on.
triton.py and cuda.py have what is tried.
"""

import importlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from .table import Table

BACKENDS = ("triton", "cuda")
ALL = [True, False, False, True, True]  # the gradients of a frozen weight's training step: x, down, up


def tune(
    shapes: Iterable[tuple[int, int, int, int]],  # (M, K, N, R) of each low-rank linear
    dtype: torch.dtype = torch.bfloat16,
    *,
    backend: str = "triton",
    candidates: dict[str, list[dict]] | None = None,
    bench: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, dict]:
    """The fastest choices for these shapes on the current GPU, and how forward and backward compare with torch's.

    backend: "triton" (tile sizes of each kernel) or "cuda" (a Plan of kernels/cuda.py for each op). candidates: what to
    try instead of all that the chip can run, by kernel or op. bench: call -> milliseconds, instead of
    triton.testing.do_bench. Every candidate's result is compared with plain torch's before it is timed.

    Returns the entries, as written to the user's table, shape by shape: what an error or an interruption ends keeps the
    shapes before it. Raises RuntimeError where the kernels cannot run or give a wrong result, ValueError for a bad
    argument.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    shapes = [tuple(shape) for shape in shapes]
    for shape in shapes:
        if len(shape) != 4 or not all(isinstance(size, int) and size > 0 for size in shape):
            raise ValueError(f"shapes must be of (M, K, N, R), positive integers, got {shape}")
    module = importlib.import_module(f".{backend}", __package__)
    kernels, device = module.kernels, module.device
    if reason := kernels.unavailable():
        raise RuntimeError(f"nothing to tune: {reason}")
    at, (name, arch) = device(), module.gpu()
    tuner = Tuner(kernels.TABLE, name, arch, candidates or {}, bench or do_bench)
    found: dict[str, dict] = {}
    for shape in shapes:
        inputs = Inputs.make(*shape, dtype, at)
        if reason := kernels.unsupported("lowrank_linear", *inputs.forward):
            raise RuntimeError(f"nothing to tune for {shape}: {reason}")
        try:
            entries = module.tune_shape(tuner, inputs)
        finally:
            # what was only tried out is forgotten
            kernels.TABLE.forget()
        kernels.TABLE.keep(name, entries)
        found |= entries
    return found


def do_bench(call: Callable[[], object]) -> float:
    """median milliseconds; every call finds the GPU's cache empty"""
    from triton.testing import do_bench

    return do_bench(call, return_mode="median")


class Inputs(NamedTuple):
    """Of one low-rank linear, and what plain torch makes of them"""

    forward: tuple[Tensor, ...]  # x [M, K], weight [N, K], bias [N], down [K, R], up [R, N]
    backward: tuple  # dy [M, N], x, weight, down, up, p [M, R], needs
    y: tuple[Tensor, Tensor]  # y [M, N], p
    grads: list[Tensor]  # dx [M, K], ddown [K, R], dup [R, N]

    @classmethod
    def make(cls, M: int, K: int, N: int, R: int, dtype: torch.dtype, device: torch.device) -> "Inputs":
        x, weight, bias, down, up, dy = (
            torch.randn(shape, device=device, dtype=torch.float32).mul_(shape[-1] ** -0.5).to(dtype)
            for shape in ((M, K), (N, K), (N,), (K, R), (R, N), (M, N))
        )
        forward = x, weight, bias, down, up
        y = reference.lowrank_linear(*forward)
        backward = dy, x, weight, down, up, y[1], ALL
        return cls(forward, backward, y, reference.lowrank_linear_backward(*backward))

    def plain(self, op: str) -> Callable[[], object]:
        """a call of plain torch's"""
        given = self.forward if op == "lowrank_linear" else self.backward
        return lambda: getattr(reference, op)(*given)


class Tuner(NamedTuple):
    """Tries candidates for the entries of a table."""

    table: Table
    gpu: str
    arch: str
    candidates: dict[str, list[dict]]  # to try instead of a backend's own
    bench: Callable[[Callable[[], object]], float]

    def fastest(
        self,
        entry: str,
        candidates: list[dict],
        call: Callable[[], Tensor | tuple[Tensor, ...] | list[Tensor]],
        right: Tensor | tuple[Tensor, ...] | list[Tensor],  # what it must give
        cannot_run: tuple[type[Exception], ...] = (),
    ) -> dict | None:
        """the candidate with which the call is fastest, {use, ms}, of those that the chip can run; it stays in use"""
        best = None
        for candidate in candidates:
            # a time stands beside every entry of a table; it is not known yet
            self.table.use(self.gpu, entry, {"use": candidate, "ms": 0.0, "torch_ms": 0.0})
            try:
                got = call()
            except cannot_run:
                continue
            if reason := difference(got, right):
                raise RuntimeError(f"{entry} with {candidate} is wrong: {reason}")
            ms = self.bench(call)
            if best is None or ms < best["ms"]:
                best = {"use": candidate, "ms": ms}
        self.table.use(self.gpu, entry, best and best | {"torch_ms": 0.0})
        return best


def difference(got, right) -> str | None:
    """how a result differs from plain torch's by more than rounding, or None"""
    pairs = [(got, right)] if isinstance(right, Tensor) else list(zip(got, right, strict=True))
    for got, right in pairs:
        if got.shape != right.shape:
            return f"{list(got.shape)} for {list(right.shape)}"
        # both are rounded in this dtype, p among them
        limit = 4 * torch.finfo(right.dtype).eps + 1e-5
        off, right = (got - right).float(), right.float()
        error = torch.linalg.vector_norm(off) / torch.linalg.vector_norm(right)
        if not error <= limit:
            return f"relative error {error:.2g}"
        # a wrong tile among thousands hardly shows in the norm
        largest = off.abs().max() / right.abs().max()
        if not largest <= limit:
            return f"largest error {largest:.2g} of the largest value"
    return None
