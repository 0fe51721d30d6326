"""How long each plan takes for one op at one size, beside plain torch in both of its orders.

The variants take turns, and so do several copies of the inputs: what drifts, drifts for all of them, and no variant
finds its inputs in the cache because it ran before. On a GPU graphs are replayed, which leaves out the host's share.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from .. import reference
from . import plans, prove, table

ROUNDS, CALLS, HOST_ROUNDS = 8, 12, 5
TURNS, STEADY = 3, 1.25  # of an instruction set: the most, and by what factor plain torch's time may differ in them


def plain_orders(op: str, needs: list[bool] | None) -> dict[str, Callable]:
    """Plain torch with the large product first, or last: which is faster depends on the sizes."""
    if op == table.LINEAR:
        return {
            "product first": lambda x, w, b, down, up: F.linear(x, w, b).addmm_(x @ down, up),
            "product last": lambda x, w, b, down, up: torch.addmm(b, x @ down, up).addmm_(x, w.t()),
        }

    def ordered(dy, x, w, down, up, p, first: bool):
        dp = dy @ up.t() if needs[0] or needs[3] else None
        grads = []
        if needs[0]:
            grads.append((dy @ w).addmm_(dp, down.t()) if first else (dp @ down.t()).addmm_(dy, w))
        return grads + ([x.t() @ dp] if needs[3] else []) + ([p.t() @ dy] if needs[4] else [])

    orders = {"product first": lambda *given: ordered(*given, True)}
    return orders | ({"product last": lambda *given: ordered(*given, False)} if needs[0] else {})


def _plain_here(op: str, needs: list[bool] | None) -> dict[str, Callable]:
    """what runs otherwise: on a CPU maybe another library's product, for a mixed batch one product per sample"""
    function = getattr(reference, op)
    return {"product first": lambda *given: function(*given, *([] if needs is None else [needs]))}


def linear_copies(op: str, shape, dtype, device, needs) -> list[tuple]:
    """Inputs of the op, several times: more than a cache holds where memory allows it"""
    M, K, N, R, *mixed = shape
    size = M * (K + N) * torch.empty(0, dtype=dtype).element_size()
    ids = [torch.arange(mixed[1], device=device) % mixed[0]] if mixed else []  # neighbours have different adapters
    copies = []
    for seed in range(max(2, min(6, int(5e8 / size)))):
        x, weight, bias, down, up, dy = prove.linear_inputs(M, K, N, R, dtype, device, seed, *mixed[:1])
        if needs is None:
            copies.append((x, weight, bias, down, up, *ids))
        else:
            p = (x.view(-1, M // mixed[1], K) @ down[ids[0]]).view(M, R) if mixed else x @ down
            copies.append((dy, x if needs[3] else None, weight, down, up, p if needs[4] else None, *ids))
    return copies


def time_linear(
    op: str, shape, dtype: torch.dtype, device: torch.device, needs, candidates: list[tuple[str, dict]], budget: float
) -> Iterator[dict]:
    """Events for one op at one size: {"at": ...} before each risky launch, then {"row": ...} for the table.

    shape: M, K, N, R; of a mixed batch also the numbers of its adapters and samples, A and B.
    A candidate is first compared with float64 at this very size; a wrong one is dropped and named.
    """
    M, K, N, R, *mixed = shape
    size = " ".join(f"{name}{value}" for name, value in zip("MKNRAB", shape))
    yield {"at": {}}  # no plan is to blame if there is no memory for the inputs
    copies = linear_copies(op, shape, dtype, device, needs)
    variants = plain_orders(op, needs) if device.type == "cuda" and not mixed else _plain_here(op, needs)
    plain_names = list(variants)
    judged = _judge(op, copies[0], needs)
    made = {}
    if needs and not needs[0]:  # plans are of the product dx: without it those with the same passes are one
        candidates = [*{(b, plan.get("hopper")): (b, plan) for b, plan in reversed(candidates)}.values()]
    for backend, plan in candidates:
        if not plans.takes(backend, plan, op, copies[0], needs):
            continue
        yield {"at": plan, "backend": backend, "case": f"{op} {size}"}
        call = _called(backend, plan, op, needs)
        try:
            with plans.active(backend, plan):
                prove.check(f"{op} {size}", lambda: list(call(*copies[0])), *judged, device)
        except prove.Wrong as reason:
            yield {"backend": backend, "plan": plan, "dropped": str(reason)}
            continue
        made[f"{backend}: {table.plan_name(plan)}"] = backend, plan
        variants[f"{backend}: {table.plan_name(plan)}"] = call
    yield {"at": {}}
    if any(backend == "cpu" for backend, _ in made.values()):
        us = _by_isa(variants, made, copies, device, budget)
    else:
        us = interleaved(variants, copies, device, budget)
    row: dict = {"torch": min(us[name] for name in plain_names)}
    for name, (backend, plan) in made.items():
        if name in us and (backend not in row or us[name] < row[backend]["us"]):
            row[backend] = {"us": us[name], "plan": plan}
    best = {b: _bound(b, row[b]["plan"], op, needs, copies[0]) for b in row if b != "torch"}
    _add_host(row, {name: variants[name] for name in plain_names}, best, copies, device)
    entry = table.key(op, dtype, K, N, R, needs, *mixed)
    yield {"row": row, "entry": entry, "M": M, "us": us}


def time_op(op: str, sizes: tuple, dtype, device, candidates: list[tuple[str, dict]], budget: float) -> Iterator[dict]:
    """The same for an op with one way in each backend: (S, P, Q, N) of a group, (count, N, K, R) of a merge."""
    g = torch.Generator(device).manual_seed(0)
    new = lambda *shape: prove.make(*shape, std=1, like=g, dtype=dtype)
    yield {"at": {}}
    if op == "merge_":
        M, N, K, R = sizes
        entry = table.key(op, dtype, K, N, R)
        copies = [([new(N, K) for _ in range(M)], [new(K, R)] * M, [new(R, N)] * M) for _ in range(2)]
    else:
        M, P, Q, N = sizes
        entry = f"{op} {str(dtype)[6:]} P{P} Q{Q} N{N}"
        given = [(new(M, P, Q), new(Q, N), 1.0) for _ in range(3)]
        copies = given if op == "group_update" else [(new(M, P, N), *each, [True, True]) for each in given]
    variants = {"product first": getattr(reference, op)}
    for backend, plan in candidates:
        kernels = plans.module(backend)
        if kernels.unsupported(op, *_tensors(copies[0])):
            continue
        yield {"at": plan, "backend": backend, "case": f"{op} {sizes}"}
        getattr(kernels, op)(*copies[0])
        prove.wait(device)
        variants[backend] = getattr(kernels, op)
    us = interleaved(variants, copies, device, budget)
    row = {"torch": us["product first"]} | {b: {"us": us[b], "plan": plan} for b, plan in candidates if b in us}
    plain = {"product first": variants["product first"]}
    _add_host(row, plain, {b: variants[b] for b, _ in candidates if b in us}, copies, device)
    yield {"row": row, "entry": entry, "M": M, "us": us}


def _tensors(given: tuple) -> list[torch.Tensor]:
    flat = [t for part in given for t in (part if isinstance(part, list) else [part])]
    return [t for t in flat if isinstance(t, torch.Tensor)]


def _called(backend: str, plan: dict, op: str, needs) -> Callable:
    function = getattr(plans.module(backend), op)

    def call(*given):
        if backend == "cpu":  # its instruction set is chosen outside: to change it throws packed weights away
            return function(*given, *([] if needs is None else [needs]))
        with table.override(backend, plan):
            return function(*given, *([] if needs is None else [needs]))

    return call


def _bound(backend: str, plan: dict, op: str, needs, given: tuple) -> Callable:
    """What the calls of a layer run, once they are bound to their plan: the host's time is about these"""
    kernels, more = plans.module(backend), () if needs is None else (needs,)
    bind = getattr(kernels, f"bind_{op}", None)
    bound = bind and bind(*given, *more, plan=kernels.KernelPlan(**plan))
    return (lambda *given: bound(*given, *more)) if bound else _called(backend, plan, op, needs)


def _judge(op: str, given: tuple, needs) -> tuple[list, list]:
    """(plain torch's results, those of float64)"""
    function, more = getattr(reference, op), () if needs is None else (needs,)
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in given]
    return list(function(*given, *more)), list(function(*wide, *more))


def interleaved(
    variants: dict[str, Callable], copies: list[tuple], device: torch.device, budget: float
) -> dict[str, float]:
    """Median microseconds of one call of each variant."""
    runs = {}
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None  # one for all: no result is read
    for name, call in variants.items():
        try:
            runs[name] = _replays(call, copies, device, pool) if pool else _loops(call, copies)
        except RuntimeError:
            if pool is None or name.startswith("product"):
                raise
            torch.cuda.synchronize(device)  # what cannot be captured is not timed, and so not chosen
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.monotonic() + budget
    for number in range(ROUNDS):
        for name in list(runs)[:: 1 if number % 2 else -1]:
            times[name].append(runs[name]())
        if number >= 2 and time.monotonic() > end:
            break
    return {name: float(f"{statistics.median(found):.4g}") for name, found in times.items()}


def _add_host(row: dict, plain: dict, best: dict[str, Callable], copies: list[tuple], device: torch.device) -> None:
    """Add what one call takes of the host's time, where the host is not the device."""
    if device.type == "cuda":
        us = host_times(plain | best, copies, device)
        row["torch_host"] = min(us[name] for name in plain)
        for backend in best:
            row[backend]["host"] = us[backend]


def host_times(variants: dict[str, Callable], copies: list[tuple], device: torch.device) -> dict[str, float]:
    """Median microseconds of the host for one call of each variant, which the GPU executes later."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    with torch.cuda.device(device):
        for _ in range(HOST_ROUNDS):
            for name, call in variants.items():
                torch.cuda.synchronize()
                start = time.perf_counter()
                for number in range(CALLS):
                    call(*copies[number % len(copies)])
                times[name].append((time.perf_counter() - start) / CALLS * 1e6)
        torch.cuda.synchronize()
    return {name: float(f"{statistics.median(found):.4g}") for name, found in times.items()}


def _by_isa(variants, made, copies, device, budget: float) -> dict[str, float]:
    """One instruction set after the other, each in turn with plain torch, whose least time is everybody's measure.

    A turn that was disturbed is repeated; what stays so is corrected by STEADY at most: not both are slowed alike.
    """
    plain = {name: call for name, call in variants.items() if name not in made}
    first, turns, least = next(iter(plain)), {}, 0.0
    for _ in range(TURNS):
        for name, (backend, plan) in made.items():
            if name in turns and turns[name][first] <= STEADY * least:
                continue
            with plans.active(backend, plan):
                found = interleaved(plain | {name: variants[name]}, copies, device, budget / len(made))
            turns[name] = min(found, turns.get(name, found), key=lambda turn: turn[first])
        least = min(turn[first] for turn in turns.values())
    us = next({other: turn[other] for other in plain} for turn in turns.values() if turn[first] == least)
    for name, turn in turns.items():
        us[name] = float(f"{turn[name] * max(least / turn[first], 1 / STEADY):.4g}")
    return us


def _replays(call: Callable, copies: list[tuple], device: torch.device, pool) -> Callable[[], float]:
    with torch.cuda.device(device):
        for given in copies:
            call(*given)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            for number in range(CALLS):
                call(*copies[number % len(copies)])
        graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run() -> float:
        with torch.cuda.device(device):
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / CALLS * 1e3

    return run


def _loops(call: Callable, copies: list[tuple]) -> Callable[[], float]:
    for given in copies:
        call(*given)
    begun = time.perf_counter()
    call(*copies[0])
    count = max(1, min(100, int(2e-3 / max(1e-7, time.perf_counter() - begun))))

    def run() -> float:
        start = time.perf_counter()
        for number in range(count):
            call(*copies[number % len(copies)])
        return (time.perf_counter() - start) / count * 1e6

    return run
