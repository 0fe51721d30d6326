"""Random calls of the operators in every layout of memory, against float64. ``python tests/fuzz.py --help`` runs many.

A call draws an operator, a backend, a dtype, sizes, and the layout of each tensor: permuted, sliced, expanded,
overlapping, at an offset, lazily negated, empty; and perhaps a storage that was freed or resized. The result must be
right, or an error that names the argument.
"""

import argparse
import faulthandler
import math
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from unittest.mock import patch

import hypothesis
import numpy as np
import pytest
import torch
from accuracy import exactly
from hypothesis import strategies as st
from torch import Tensor

import efft_kernels
from efft_kernels.kernels import reference
from efft_kernels.ops import dispatch

FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64
SIZES = 1, 2, 3, 7, 8, 16, 17, 33, 64
ROWS = 0, *SIZES, 130
# the reference as it computes on AMD processors with AVX-512, wherever oneDNN is
ONEDNN = "reference over oneDNN"
OPS = (
    *("lowrank_linear", "lowrank_linear_backward", "mixed_linear", "mixed_linear_backward"),
    *("group_update", "group_update_backward", "merge_", "efft_linear"),
)


def backends() -> list[str]:
    """What can compute here, the interpreter of Triton included"""
    found = [b.name for b in efft_kernels.backends() if b.available and b.name != "cuda"]
    return found + [ONEDNN] * torch.backends.mkldnn.is_available()


@st.composite
def tensors(draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of this shape, in any layout, whose storage is its own"""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(0.5).to(dtype)

    layout = draw(st.sampled_from(["contiguous", "permuted", "slice", "expanded", "strides"]))
    if layout == "contiguous":
        t = numbers(*shape)
    elif layout == "permuted":
        order = draw(st.permutations(range(len(shape))))
        t = numbers(*(shape[i] for i in order)).permute([order.index(i) for i in range(len(shape))])
    elif layout == "slice":
        starts, steps = ([draw(st.integers(low, 2)) for _ in shape] for low in (0, 1))
        wide = numbers(*(start + n * step + 1 for start, n, step in zip(starts, shape, steps)))
        t = wide[tuple(slice(a, a + n * step, step) for a, n, step in zip(starts, shape, steps))]
    elif layout == "expanded":
        t = numbers(*(1 if draw(st.booleans()) else n for n in shape)).expand(shape)
    else:
        strides = [draw(st.integers(0, 9)) for _ in shape]
        start = draw(st.integers(0, 3))
        t = numbers(start + 1 + sum(n * step for n, step in zip(shape, strides))).as_strided(shape, strides, start)
    return torch._neg_view(t) if draw(st.integers(0, 9)) == 9 else t


@st.composite
def calls(draw, names: list[str], ops: tuple[str, ...] = OPS) -> tuple[str, str, dict]:
    """(backend, operator, its arguments)"""
    backend, op = draw(st.sampled_from(names)), draw(st.sampled_from(ops))
    dtype = draw(st.sampled_from([torch.float32, torch.float16] if backend == "triton" else FLOATS))
    size = st.sampled_from(SIZES)
    K, N, R = draw(size), draw(size), draw(size)

    def make(*shape: int) -> Tensor:
        return draw(tensors(shape, dtype))

    backward = op.endswith("backward")
    if op == "merge_":
        count = draw(st.integers(0, 3))
        parts = [[make(N, K), make(K, R), make(R, N)] for _ in range(count)]
        if count and draw(st.booleans()):  # some of them in one buffer, perhaps at the same places
            shared = torch.randn(8 * (N + K + R) + N * K).mul_(0.5).to(dtype)
            at = st.integers(0, len(shared) - N * K)
            parts[0][0] = shared[draw(at) :][: N * K].view(N, K)
            other = draw(st.integers(0, 2))
            rows, columns = ((N, K), (K, R), (R, N))[other]
            if rows * columns <= len(shared):
                start = draw(st.integers(0, len(shared) - rows * columns))
                parts[-1][other] = shared[start:][: rows * columns].view(rows, columns)
        weights, downs, ups = ([part[i] for part in parts] for i in range(3))
        return backend, op, dict(weights=weights, downs=downs, ups=ups)
    if op.startswith("group"):
        S, P, Q = draw(st.integers(1, 4)), K, R
        given = dict(sigma=make(S, P, Q), v=make(Q, N), scale=draw(st.sampled_from([1.0, -0.1, 10.0])))
        if backward:
            given = dict(dup=make(S, P, N), **given, needs=draw(st.lists(st.booleans(), min_size=2, max_size=2)))
        return backend, op, given
    M, adapters, lead = draw(st.sampled_from(ROWS)), (), ()
    if op.startswith("mixed"):
        B = draw(st.sampled_from([n for n in range(1, 9) if M % n == 0])) if M else draw(st.integers(0, 3))
        adapters, A = (A := draw(st.integers(1, 3)),), A
        ids = torch.tensor(draw(st.lists(st.integers(-1, A - 1), min_size=2 * B, max_size=2 * B)), dtype=torch.int64)
        ids = ids[::2] if draw(st.booleans()) else ids[:B]
    if draw(st.booleans()):
        n = draw(st.sampled_from([n for n in range(1, M + 1) if M % n == 0])) if M else 3
        lead = draw(st.sampled_from([(n, M // n), (1, M)]))
    rows = lead or (M,)
    if op == "efft_linear":
        S, Q = draw(st.integers(1, 3)), draw(size)
        given = dict(x=make(*rows, K), weight=make(S * N, K), bias=draw(st.one_of(st.none(), tensors((S * N,), dtype))))
        given |= dict(u=make(K, R), sigma=make(S, R, Q), v=make(Q, N), scale=draw(st.sampled_from([1.0, 0.1, 10.0])))
        return backend, op, given | dict(dy=make(*rows, S * N))
    down, up = make(*adapters, K, R), make(*adapters, R, N)
    if backward:
        needs = draw(st.lists(st.booleans(), min_size=5, max_size=5))
        x = make(*rows, K) if needs[1] or needs[3] or draw(st.booleans()) else None
        p = make(M, R) if needs[4] or draw(st.booleans()) else None
        given = dict(dy=make(*rows, N), x=x, weight=make(N, K), down=down, up=up, p=p)
    else:
        bias = draw(st.one_of(st.none(), tensors((N,), dtype)))
        given = dict(x=make(*rows, K), weight=make(N, K), bias=bias, down=down, up=up)
    if adapters:
        given["ids"] = ids
    return backend, op, given | (dict(needs=needs) if backward else {})


def _addresses(t: Tensor) -> np.ndarray:
    """Of each entry of a matrix"""
    (rows, columns), (row, column) = t.shape, t.stride()
    return (t.data_ptr() + t.itemsize * (np.arange(rows)[:, None] * row + np.arange(columns) * column)).ravel()


def _writable(given: dict) -> bool:
    """Whether merge_ may write these weights: each entry once, and nothing else that it reads"""
    if any(t.is_neg() for t in given["weights"]):
        return False
    written = np.concatenate([np.zeros(0, int), *(_addresses(t) for t in given["weights"])])
    read = np.concatenate([np.zeros(0, int), *(_addresses(t) for t in (*given["downs"], *given["ups"]))])
    return len(np.unique(written)) == len(written) and not np.isin(read, written).any()


def _compute(backend: str, op: str, given: dict) -> list[Tensor]:
    onednn, last = backend == ONEDNN, reference._large_product_last
    with (
        patch.object(reference, "_onednn_leads", lambda: onednn),
        # the order of a processor where oneDNN leads
        patch.object(reference, "_large_product_last", lambda *of: not onednn and last(*of)),
    ):
        backend = backend.partition(" ")[0]
        if op == "merge_":
            efft_kernels.merge_(*given.values(), backend=backend)
            return given["weights"]
        if op == "efft_linear":  # by name in the general way; else a few rows are one call
            *inputs, scale, dy = given.values()
            inputs = [t if t is None else t.detach() for t in inputs]
            leaves = [inputs[i].requires_grad_() for i in (0, 3, 4, 5)]
            y = efft_kernels.efft_linear(*inputs, scale, backend=None if backend == "cpu" else backend)
            return [y, *torch.autograd.grad(y, leaves, dy)]
        if op == "group_update":
            return [efft_kernels.group_update(*given.values(), backend=backend)]
        if op == "lowrank_linear":  # the public function gives y alone, by the short way
            y = efft_kernels.lowrank_linear(*given.values(), backend=backend)
            return [y, torch.ops.efft_kernels.lowrank_linear(*given.values(), backend)[1]]
        results = getattr(torch.ops.efft_kernels, op)(*given.values(), backend)
        return [results] if isinstance(results, Tensor) else list(results)


def _plain(t):
    """A copy with one address for each entry, [rows, columns] if it may have more leading dimensions"""
    return t.detach().clone().contiguous() if isinstance(t, Tensor) else t


def _wanted(op: str, given: dict, change=lambda t: t) -> list[np.ndarray]:
    """The results, more exact than the arguments' dtype"""
    if op == "merge_":
        lists = [[change(_plain(t).double().resolve_neg()).clone().numpy() for t in ts] for ts in given.values()]
        return [weight + (down @ up).T for weight, down, up in zip(*lists)]
    flat = _flat(given)
    if op.endswith("linear_backward"):
        rows, K = len(flat["dy"]), given["weight"].shape[1]
        for name, columns in (("x", K), ("p", given["up"].shape[-2])):
            if given[name] is None:  # no result that is asked for reads it
                flat[name] = torch.zeros(rows, columns)
    return exactly(op, tuple(map(_plain, flat.values())), change)


def check(backend: str, op: str, given: dict) -> None:
    """One call gives the right results, or refuses weights that cannot be written"""
    named = backend.partition(" ")[0]
    listed = [t for value in given.values() for t in (value if isinstance(value, list) else [value])]
    of_kind = [t for t in listed if isinstance(t, Tensor)]
    module = dispatch.load(named)[0]
    if of_kind and (op != "merge_" or given["weights"]) and module.unsupported(op, *_in_order(op, given)):
        return
    if op == "merge_" and not _writable(given):
        before = [t.clone() for t in given["weights"]]
        with pytest.raises(ValueError, match=r"weights(\[\d\])? must"):
            _compute(backend, op, given)
        assert all(torch.equal(a, b) for a, b in zip(before, given["weights"])), "written before it refused"
        return
    wanted, summed = _wanted(op, given), _wanted(op, given, torch.abs)
    longest = max((n for t in _in_order(op, given) if t is not None for n in t.shape), default=0)
    for got, exact, total in zip(_compute(backend, op, given), wanted, summed, strict=True):
        limits = torch.finfo(got.dtype)
        error = abs(_plain(got).double().resolve_neg().numpy().reshape(exact.shape) - exact)
        # float32 and float64 are summed in their own precision, where equal numbers round to one side
        roundings = 8 if got.itemsize == 2 else 8 + longest / 4
        granted = roundings * limits.eps * (abs(total) + 64 * limits.tiny)
        assert (error <= granted).all(), f"{op} by {backend}: error {error.max():.3g}, granted {granted.max():.3g}"


def _flat(given: dict) -> dict:
    """The arguments with x and dy of two dimensions"""
    rows = {name: given[name] for name in ("x", "dy") if given.get(name) is not None}
    return given | {name: t.reshape(-1, t.shape[-1]) for name, t in rows.items()}


def _in_order(op: str, given: dict) -> list:
    """The operator's tensors, as a backend is asked about them"""
    if op == "merge_":
        return [t for ts in given.values() for t in ts]
    return [t for name, t in _flat(given).items() if name not in ("scale", "needs")]


def check_freed(backend: str, op: str, given: dict, name: str, share: float, first: bool) -> None:
    """A call after the storage of the argument of this name was cut to a share of the bytes that it needs: an error.

    first: one call before that, which the backend may remember.
    """
    t = given[name][-1] if isinstance(given[name], list) else given[name]
    if first:
        check(backend, op, given)
    end = t.storage_offset() + 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride()))
    t.untyped_storage().resize_(int((end * t.itemsize - 1) * share))
    # lists may share a storage; the general way of efft_linear calls u what lowrank_linear calls it
    named = "(weights|downs|ups)" if op == "merge_" else "(u|down)" if name == "u" else name
    with pytest.raises(RuntimeError, match=rf"{named}(\[\d\])? must have memory"):
        _compute(backend, op, given)


def run(count: int, seed: int, names: list[str], ops: tuple[str, ...] = OPS) -> Counter:
    """Check this many random calls; how many were computed, and how many were of freed memory"""
    done = Counter()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=[*hypothesis.HealthCheck]
    )
    @hypothesis.given(st.data())
    def one(data):
        backend, op, given = data.draw(calls(names, ops))
        sizes = {name: value[-1] if isinstance(value, list) and value else value for name, value in given.items()}
        # torch itself reads a lazily negated view, to negate it, before a kernel can check its memory
        freeable = [name for name, t in sizes.items() if isinstance(t, Tensor) and t.numel() > 0 and not t.is_neg()]
        whole = [name for name in freeable if reads(op, name, given)]
        if whole and data.draw(st.integers(0, 4)) == 0 and (op != "merge_" or _writable(given)):
            module = dispatch.load(backend.partition(" ")[0])[0]
            if module.unsupported(op, *_in_order(op, given)):
                return
            freed = data.draw(st.sampled_from(whole)), data.draw(st.sampled_from([0.0, 0.5, 1.0]))
            check_freed(backend, op, given, *freed, data.draw(st.booleans()))
            done["freed"] += 1
        else:
            check(backend, op, given)
            done["computed"] += 1

    one()
    return done


def reads(op: str, name: str, given: dict) -> bool:
    """Whether a result depends on this argument of a backward"""
    if not op.endswith("backward"):
        return math.prod(given["x"].shape[:-1]) > 0 if "x" in given else True
    needs = given["needs"]
    if op.startswith("group"):
        return {"dup": any(needs), "sigma": needs[1], "v": needs[0]}[name]
    rows = math.prod(given["dy"].shape[:-1]) > 0
    read = dict(dy=any(needs), x=needs[1] or needs[3], weight=needs[0], down=needs[0], up=needs[0] or needs[3])
    read |= dict(p=needs[4], ids=needs[0] or needs[3] or needs[4])
    return rows and read.get(name, False)


def main() -> int:
    parser = argparse.ArgumentParser(description="Random calls against float64, in parts, each in a new process.")
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--part", type=int, default=5000, help="calls of one process")
    parser.add_argument("--seed", type=int, default=0, help="of the first part; the others count on from it")
    parser.add_argument("--backends", nargs="+", default=None, help="default: all but triton's slow interpreter")
    args = parser.parse_args()
    names = args.backends or [name for name in backends() if name != "triton"]
    if args.calls <= args.part:
        faulthandler.enable()
        torch.set_num_threads(1)
        random.seed(args.seed)
        print(*(f"{count} {kind}" for kind, count in run(args.calls, args.seed, names).items()), sep=", ")
        return 0
    total, failed = Counter(), []
    for number, start in enumerate(range(0, args.calls, args.part)):
        seed = args.seed + number
        size = min(args.part, args.calls - start)
        command = [sys.executable, __file__, "--calls", size, "--part", size, "--seed", seed, "--backends", *names]
        child = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if child.returncode:
            how = signal.Signals(-child.returncode).name if child.returncode < 0 else f"exit {child.returncode}"
            failed.append(seed)
            print(f"seed {seed}: {how}\n{child.stderr}", flush=True)
        else:
            print(f"seed {seed}: {child.stdout.strip()}", flush=True)
            total.update({kind: int(count) for count, kind in re.findall(r"(\d+) (\w+)", child.stdout)})
    print(f"all: {', '.join(f'{count} {kind}' for kind, count in total.items())}; failed seeds: {failed or 'none'}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
