"""Timing, memory and the limits of the machine, for all benchmarks.

A call is a tuple of stages, functions that each get the result of the previous one: (forward,) or (forward, backward).
Calls of all variants alternate within one process, so a machine that slows down slows all of them,
and ratios are taken round by round.
"""

import functools
import gc
import glob
import itertools
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from record import add_rows, write_run

KEEP_EVERY = 10.0  # seconds between two writes of the record during a case
Stages = tuple[Callable, ...]


class Lap(NamedTuple):
    """Seconds of one stage."""

    time: float  # CPU: wall clock. CUDA: between two events, with the launches hidden behind a busy device
    cpu: float  # process CPU time, all threads
    wall: float  # wall clock; on CUDA, of a second call, until the device is idle


class Spread(NamedTuple):
    median: float
    q1: float
    q3: float


def spread(values: list[float]) -> Spread:
    t = torch.tensor(values, dtype=torch.float64)
    return Spread(*torch.quantile(t, torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)).tolist())


def columns(own: list[list[Lap]], references: dict[str, list[list[Lap]]], quartiles: tuple[str, ...]) -> dict:
    """The columns of a record's row that hold times, as results/README.md describes them.

    Args:
        own: per round, the laps of the stages to add up.
        references: {name: the same for what the time is divided by}.
        quartiles: the references whose ratio gets quartiles, in addition to its median.
    """

    def of(clock: str, rounds: list[list[Lap]]) -> list[float]:
        return [1e3 * sum(getattr(lap, clock) for lap in laps) for laps in rounds]

    times = of("time", own)
    ms = spread(times)
    found = {"rounds": len(own), "ms": ms.median, "q1": ms.q1, "q3": ms.q3}
    if (walls := of("wall", own)) != times:
        found["wall_ms"] = spread(walls).median
    found["cpu_ms"] = spread(of("cpu", own)).median
    for name, rounds in references.items():
        ratio = spread([a / b for a, b in zip(times, of("time", rounds))])
        found[f"ratio_{name}"] = ratio.median
        if name in quartiles:
            found |= {f"ratio_{name}_q1": ratio.q1, f"ratio_{name}_q3": ratio.q3}
    return found


def time_cpu(stages: Stages) -> list[Lap]:
    laps, value = [], None
    for stage in stages:
        cpu, wall = time.process_time(), time.perf_counter()
        value = stage(value)
        wall = time.perf_counter() - wall
        laps.append(Lap(wall, time.process_time() - cpu, wall))
    return laps


class TimeCuda:
    """Time calls on the device, with its L2 cache overwritten before each call."""

    def __init__(self):
        size = torch.cuda.get_device_properties("cuda").L2_cache_size
        self.flush = torch.empty(4 * size, dtype=torch.uint8, device="cuda")

    def __call__(self, stages: Stages) -> list[Lap]:
        self.flush.zero_()
        # half a millisecond, in which the host queues the whole call, as it runs ahead in a model
        torch.cuda._sleep(1_000_000)
        events = [torch.cuda.Event(enable_timing=True)]
        events[0].record()
        value = None
        for stage in stages:
            value = stage(value)
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()
        del value
        torch.cuda.synchronize()
        device = [start.elapsed_time(end) * 1e-3 for start, end in itertools.pairwise(events)]

        self.flush.zero_()
        torch.cuda.synchronize()
        laps, value = [], None
        for stage, seconds in zip(stages, device):
            cpu, wall = time.process_time(), time.perf_counter()
            value = stage(value)
            torch.cuda.synchronize()
            laps.append(Lap(seconds, time.process_time() - cpu, time.perf_counter() - wall))
        return laps


def timer(device: str) -> Callable[[Stages], list[Lap]]:
    return TimeCuda() if device == "cuda" else time_cpu


def interleave(
    variants: dict[str, list[Stages]],  # per variant: the same call on each copy of the inputs
    lap: Callable[[Stages], list[Lap]],
    rounds: int,
    deadline: float = float("inf"),  # of time.perf_counter; at least three rounds are run
) -> Iterator[dict[str, list[Lap]]]:
    """Yield the laps of every variant, round by round.

    The order rotates from round to round and is reversed in every second one, so no variant keeps its neighbours. Each
    call takes the next copy of the inputs, so none finds in a cache what the previous one read.
    """
    names, turn = list(variants), 0
    gc.collect()
    gc.disable()
    try:
        for r in range(rounds):
            if r >= 3 and time.perf_counter() > deadline:
                return
            at = r % len(names)
            order = names[at:] + names[:at]
            laps = {}
            for name in order[::-1] if r % 2 else order:
                laps[name] = lap(variants[name][turn % len(variants[name])])
                turn += 1
            yield laps
    finally:
        gc.enable()


def measure_cases(args, run: dict, costs: dict[object, float], prepare: Callable) -> None:
    """Add the rows of one case after the other to a run, so that an interrupted one keeps what is complete.

    A killed one keeps it too: files are also rewritten during a case, at most every KEEP_EVERY seconds.

    Args:
        args: device, model, repeats, seconds and out, as the command line has them.
        costs: {case: what it costs, in the same unit for all of them}
        prepare: (case, progress bar) -> (the calls, warm, a function from the complete rounds to the case's rows).
    """
    from tqdm import tqdm

    lap, cost, setup, end = timer(args.device), list(costs.values()), 0.0, time.perf_counter() + args.seconds
    with tqdm(total=len(cost) * args.repeats, unit="round", disable=None) as bar:
        for n, case in enumerate(costs):
            bar.set_description(f"{args.model} {case}")
            setup -= time.perf_counter()
            calls, rows = prepare(case, bar)
            now, samples = time.perf_counter(), []
            setup, kept = setup + now, now
            bar.set_postfix_str("")
            # share the time that the set-up of later cases leaves by the cost of the cases, but give each a second
            left = end - now - setup * sum(cost[n + 1 :]) / sum(cost[: n + 1])
            deadline = now + max(1.0, left * cost[n] / sum(cost[n:]))
            try:
                for laps in interleave(calls, lap, args.repeats, deadline):
                    samples.append(laps)
                    bar.update()
                    if args.out and len(samples) >= 3 and time.perf_counter() > kept + KEEP_EVERY:
                        write_run(args.out, {**run, "results": [*run["results"], *rows(samples)]})
                        kept = time.perf_counter()
            finally:
                if samples:
                    add_rows(run, rows(samples), args.out)
            bar.update(args.repeats - len(samples))
            del calls, rows
            gc.collect()  # models and their hooks form reference cycles


def copies(bytes_per_copy: int, device: str) -> int:
    """Number of copies of the inputs (2 to 32, at most 2 GiB): twice the last-level cache between two uses."""
    enough = -(-2 * cache_bytes(device) // bytes_per_copy) + 1
    return max(2, min(enough, 32, (2 << 30) // bytes_per_copy))


@functools.cache
def _filler(device: str) -> torch.Tensor:
    return torch.zeros(2 * cache_bytes(device) // 8, dtype=torch.int64, device=device)


def evict(device: str) -> None:
    """Read twice the size of the last-level cache, which evicts everything in it."""
    _filler(device).sum()


def cache_bytes(device: str) -> int:
    """Size of the last-level cache; 32 MiB if the system does not report it."""
    if device == "cuda":
        return torch.cuda.get_device_properties("cuda").L2_cache_size
    sizes = [32 << 20]
    for path in glob.glob("/sys/devices/system/cpu/cpu0/cache/index*/size"):
        with open(path) as file:
            text = file.read().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes)


MEMORY = {
    "cpu": "largest amount that torch's CPU allocator had handed out during one call, by torch.profiler; without the "
    "inputs and without buffers that a library takes from the system itself",
    "cuda": "torch.cuda.max_memory_allocated during one call, minus what was allocated before it",
}


def run(stages: Stages) -> None:
    value = None
    for stage in stages:
        value = stage(value)


def memory(stages: Stages, device: str) -> tuple[int, int]:
    """(peak, kept) in bytes: the peak as MEMORY[device] says, and what stays allocated when all results are freed."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(stages)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise the profiler reports every start on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run(stages)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sums = list(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    return max(sums, default=0), sums[-1] if sums else 0


class Limits(NamedTuple):
    flops: dict[str, float]  # per second, by dtype
    gemm: dict[str, float]  # the best dense matmul in that dtype; on a CPU flops may come from a wider dtype
    bandwidth: float  # bytes per second
    source: str
    copy: float | None = None  # bytes per second of a copy in memory, if bandwidth is a data sheet's


# data sheets, dense: bfloat16 and float16 TFLOP/s (tensor cores), float32 TFLOP/s (TF32 off), TB/s; longer names first
_GPUS = {
    "H100 PCIe": (756, 51, 2.0),
    "H100 NVL": (835, 60, 3.9),
    "H100": (989, 67, 3.35),
    "H200": (989, 67, 4.8),
    "B200": (2250, 75, 8.0),
    "A100-PCIE-40GB": (312, 19.5, 1.555),
    "A100-SXM4-40GB": (312, 19.5, 1.555),
    "A100": (312, 19.5, 2.0),
    "L40S": (362, 91.6, 0.864),
    "L4": (121, 30.3, 0.3),
    "RTX 4090": (165, 82.6, 1.008),
}


def limits(device: str, dtypes: list[str]) -> Limits:
    """Limits of the machine: from the data sheet of a listed GPU, otherwise measured, which takes a second or two.

    gemm is always measured; copy is measured in addition to a data sheet.
    """
    if device == "cuda":
        model = torch.cuda.get_device_name()
        for name, (half, single, bandwidth) in _GPUS.items():
            if name in model:
                flops = {d: (single if d == "float32" else half) * 1e12 for d in dtypes}
                gemm = {d: _best_gemm(device, getattr(torch, d)) for d in dtypes}
                return Limits(flops, gemm, bandwidth * 1e12, f"data sheet of the {name}", _best_copy(device))
    gemm = {dtype: _best_gemm(device, getattr(torch, dtype)) for dtype in {*dtypes, "float32"}}
    # a CPU without instructions for a narrow dtype can widen it, so its limit is the faster of the two
    flops = {dtype: max(gemm[dtype], gemm["float32"]) for dtype in dtypes}
    return Limits(flops, gemm, _best_copy(device), "measured at the start: best dense GEMM, copy in memory")


def _best_gemm(device: str, dtype: torch.dtype) -> float:
    n = 8192 if device == "cuda" else 1024 if dtype == torch.float32 else 384  # slow without instructions for the dtype
    x, w = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    products = [(lambda _: F.linear(x, w),)]
    if device == "cpu" and torch.backends.mkldnn.is_available() and dtype == torch.float32:
        products.append((lambda _: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""),))
    return 2 * n**3 / _best(products, device)


def _best_copy(device: str) -> float:
    size = 4 * cache_bytes(device)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _best([(lambda _: target.copy_(source),)], device)


def _best(calls: list[Stages], device: str) -> float:
    lap = timer(device)
    return min(lap(call)[0].time for call in calls for _ in range(6))
