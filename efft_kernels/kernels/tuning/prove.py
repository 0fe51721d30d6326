"""The battery: what a plan must get right on the device itself before it may be chosen.

Every result is compared with float64 on the same device, and its error with that of plain torch in the same dtype.
Memory that results will be written to holds nan before, and each call is made twice and must give the same bits.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import reference
from . import plans, table

# M, K, N, R: ragged in every direction, one row of tiles, one step of the sum, ranks at the ends, many tiles
SHAPES = [
    (300, 456, 408, 16), (128, 64, 128, 16), (1, 64, 64, 16), (129, 72, 200, 16), (12608, 768, 768, 16),
    (12608, 768, 2304, 16), (999, 1000, 1000, 1), (512, 768, 768, 8), (512, 768, 768, 24), (512, 768, 768, 32),
    (512, 768, 768, 33), (512, 768, 768, 64), (512, 768, 768, 256), (200704, 96, 288, 16), (257, 3072, 776, 16),
    (4096, 1024, 4096, 16), (131080, 64, 96, 16), (12672, 768, 3072, 16), (640, 40, 24, 3), (2000, 2304, 768, 16),
]  # fmt: skip
# Triton compiles its kernels anew for sizes and strides of another divisibility, seconds each
TRITON_SHAPES = [SHAPES[i] for i in (0, 3, 4, 6, 7, 10, 12, 13, 18, 19)]
SMALL_SHAPES = [
    (70, 48, 64, 5),
    (33, 40, 24, 16),
    (16, 16, 128, 1),
]  # for a simulator, which takes seconds for a large one
# (x, down, up): all three, a first layer's, a frozen adapter's, each factor alone
NEEDS = [table.ALL, [False, False, False, True, True], [True, False, False, False, False],
         [False, False, False, True, False],
         [True, False, False, False, True]]  # fmt: skip


class Wrong(Exception):
    """What a plan got wrong, in a sentence."""


def shapes(backend: str, device: torch.device, simulated: bool) -> list[tuple[int, int, int, int]]:
    if simulated:
        return SMALL_SHAPES
    if backend == "cpu":
        return [shape for shape in SHAPES if shape[0] * shape[1] * shape[2] < 5e8]
    return TRITON_SHAPES if backend == "triton" else SHAPES


def make(*shape: int, std: float, like: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=like, device=like.device).mul_(std).to(dtype)


def linear_inputs(
    M: int, K: int, N: int, R: int, dtype: torch.dtype, device: torch.device, seed: int = 0, *A: int
) -> tuple:
    """x, weight, bias, down, up, dy; the adapter's part is as large as the weight's, so that a missing one is seen.

    down has K contiguous, as groups hand it to the kernels of a GPU, and R where 16 does not divide K, as a parameter.
    With a number of adapters, A, down and up are those of a mixed batch.
    """
    g = torch.Generator(device).manual_seed(seed)
    sizes = ((M, K), 1), ((N, K), K**-0.5), ((N,), 1), ((*A, R, K), K**-0.5), ((*A, R, N), R**-0.5), ((M, N), 1)
    x, weight, bias, down, up, dy = (make(*size, std=std, like=g, dtype=dtype) for size, std in sizes)
    return x, weight, bias, down.mT if K % 16 == 0 else down.mT.contiguous(), up, dy


def error(got: Tensor, plain: Tensor, exact: Tensor) -> float:
    """The error over what is granted, twice plain torch's and a few roundings; up to 1 is right."""
    if got.shape != exact.shape or got.dtype != plain.dtype or not torch.isfinite(got).all():
        return float("inf")
    off, own = (got.double() - exact).abs(), (plain.double() - exact).abs()
    # plain torch may be nearly exact by luck, above all of few terms: a few roundings of the largest value are granted
    rounding = (2 if got.dtype.itemsize == 2 else 8) * torch.finfo(got.dtype).eps * exact.abs().max()
    largest = off.max() / (2 * own.max() + rounding + 1e-30)
    norm = off.norm() / (2 * own.norm() + rounding * (8 if got.numel() < 64 else 1) + 1e-30)
    return max(largest.item(), norm.item())


def poison(results: list[Tensor]) -> None:
    """nan where the next allocations of these sizes will lie"""
    held = [torch.full_like(t, float("nan")) for t in results]
    del held


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check(what: str, call: Callable[[], list[Tensor]], plain: list[Tensor], exact: list[Tensor], device) -> float:
    """The largest error of a call's results; Wrong where it is above 1 or where two calls differ."""
    found = []
    for _ in range(2):
        poison(plain)
        found.append(call())
        wait(device)
    worst = [error(*three) for three in zip(found[0], plain, exact, strict=True)]
    if not max(worst) <= 1:
        raise Wrong(f"{what}: result {worst.index(max(worst))} is off by {max(worst):.3g} of what is granted")
    if not all(torch.equal(a, b) for a, b in zip(*found, strict=True)):
        raise Wrong(f"{what}: two runs differ")
    return max(worst)


def exact_linear(x, weight, bias, down, up, dy, p, needs=None) -> list[Tensor]:
    x, weight, bias, down, up, dy, p = (t.double() for t in (x, weight, bias, down, up, dy, p))
    if needs is None:
        return [x @ weight.t() + bias + (x @ down) @ up, x @ down]
    dp = dy @ up.t()
    grads = dy @ weight + dp @ down.t(), dy.t() @ x, dy.sum(0), x.t() @ dp, p.t() @ dy
    return [grad for grad, need in zip(grads, needs) if need]


def linear_cases(backend: str, shape, dtype, device) -> Iterator[tuple[str, tuple, list[bool] | None, list, list]]:
    """(op, its tensors, needs, plain torch's results, those of float64) of the forward and every kind of backward"""
    x, weight, bias, down, up, dy = linear_inputs(*shape, dtype, device)
    forward = x, weight, bias, down, up
    plain = list(reference.lowrank_linear(*forward))
    p = plain[1]
    yield table.LINEAR, forward, None, plain, exact_linear(*forward, dy, p)
    # Triton compiles other kernels for other gradients
    few = len(x) * weight.numel() > 1e10 or (backend == "triton" and shape not in (*TRITON_SHAPES[:1], *SMALL_SHAPES))
    for needs in NEEDS[:1] if few else NEEDS:
        given = dy, x if needs[1] or needs[3] else None, weight, down, up, p if needs[4] else None
        plain = reference.lowrank_linear_backward(*given, needs)
        yield table.BACKWARD, given, needs, plain, exact_linear(*forward, dy, p, needs)


def prove_linear(backend: str, given: list[dict], dtypes, device: torch.device, simulated: bool) -> Iterator[dict]:
    """Events of the battery for some plans of the linear: {"at": plan} before a launch, then {"plan", "cases", ...}."""
    kernels, left = plans.module(backend), list(given)
    cases, worst = [0] * len(left), [0.0] * len(left)
    for dtype in dtypes:
        for shape in shapes(backend, device, simulated):
            yield {"at": {}}  # no plan is to blame if there is no memory for the inputs
            for op, tensors, needs, plain, exact in linear_cases(backend, shape, dtype, device):
                for i, plan in enumerate(left):
                    if plan is None or not plans.takes(backend, plan, op, tensors, needs):
                        continue
                    what = f"{op} {str(dtype)[6:]} M{shape[0]} K{shape[1]} N{shape[2]} R{shape[3]}"
                    what += "" if needs is None else f" needs {needs}"
                    yield {"at": plan, "case": what}
                    try:
                        with plans.active(backend, plan):
                            call = lambda: list(getattr(kernels, op)(*tensors, *([needs] if needs else [])))
                            worst[i] = max(worst[i], check(what, call, plain, exact, device))
                        cases[i] += 1
                    except Wrong as reason:
                        yield {"plan": plan, "dropped": str(reason)}
                        left[i] = None
    for plan, count, largest in zip(left, cases, worst):
        if plan is not None:
            yield {"plan": plan, "cases": count, "worst": round(largest, 3)} if count else {
                "plan": plan, "dropped": "it took none of the battery's cases"
            }  # fmt: skip


def prove_op(backend: str, plan: dict, dtypes, device: torch.device, simulated: bool) -> Iterator[dict]:
    """The same for an op that a backend computes in one way."""
    kernels, cases, worst = plans.module(backend), 0, 0.0
    for dtype in dtypes:
        for what, call, plain, exact in op_cases(plan["op"], kernels, dtype, device, simulated):
            yield {"at": plan, "case": what}
            try:
                worst = max(worst, check(f"{what} {str(dtype)[6:]}", call, plain, exact, device))
                cases += 1
            except Wrong as reason:
                yield {"plan": plan, "dropped": str(reason)}
                return
    yield {"plan": plan, "cases": cases, "worst": round(worst, 3)}


def op_cases(op: str, kernels, dtype, device, simulated: bool) -> Iterator[tuple]:
    """(what, call, plain torch's results, those of float64)"""
    g = torch.Generator(device).manual_seed(0)
    new = lambda *shape, std=1.0: make(*shape, std=std, like=g, dtype=dtype)
    plain = lambda name, *args: _list(getattr(reference, name)(*args))
    wide = lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
    sizes = (
        [(3, 5, 7, 40), (2, 16, 16, 64)]
        if simulated
        else [(12, 16, 16, 768), (36, 16, 16, 3072), (3, 5, 7, 41), (1, 64, 48, 2304)]
    )
    if op == "group_update":
        for S, P, Q, N in sizes:
            given = new(S, P, Q, std=Q**-0.5), new(Q, N), 0.7
            dup = new(S, P, N)
            yield (
                f"{op} {S, P, Q, N}",
                lambda: [kernels.group_update(*given)],
                plain(op, *given),
                plain(op, *map(wide, given)),
            )
            for needs in ([True, True], [True, False], [False, True]):
                back = dup, *given, needs
                exact = plain("group_update_backward", *map(wide, back))
                call = lambda: kernels.group_update_backward(*back)
                yield f"{op}_backward {S, P, Q, N}", call, plain("group_update_backward", *back), exact
    elif op == "merge_":
        shapes = (
            [[(40, 24, 3), (33, 17, 16)]]
            if simulated
            else [[(768, 768, 16)] * 12 + [(2304, 768, 16), (33, 17, 5)], [(3072, 768, 64)]]
        )
        for group in shapes:
            weights = [new(N, K, std=K**-0.5) for N, K, _ in group]
            downs, ups = [new(K, R, std=K**-0.5) for _, K, R in group], [new(R, N, std=R**-0.5) for N, _, R in group]

            def merged(module, to=lambda t: t):
                copies = [to(w).clone() for w in weights]
                module.merge_(copies, [to(d) for d in downs], [to(u) for u in ups])
                return copies

            yield f"{op} of {len(group)}", lambda: merged(kernels), merged(reference), merged(reference, wide)
    else:
        for B, T, K, N, R in [(3, 20, 40, 24, 4)] if simulated else [(8, 197, 768, 2304, 16), (5, 33, 72, 200, 7)]:
            x, weight, bias, _, _, dy = linear_inputs(B * T, K, N, R, dtype, device)
            down, up = new(3, K, R, std=K**-0.5), new(3, R, N, std=R**-0.5)
            ids = torch.arange(B, device=device) % 4 - 1
            given = x, weight, bias, down, up, ids
            p = plain(op, *given)[1]
            yield (
                f"{op} {B, T, K, N, R}",
                lambda: list(kernels.mixed_linear(*given)),
                plain(op, *given),
                plain(op, *map(wide, given)),
            )
            back = dy, x, weight, down, up, p, ids, table.ALL
            exact = plain("mixed_linear_backward", *map(wide, back))
            call = lambda: kernels.mixed_linear_backward(*back)
            yield f"{op}_backward {B, T, K, N, R}", call, plain("mixed_linear_backward", *back), exact


def _list(result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)
