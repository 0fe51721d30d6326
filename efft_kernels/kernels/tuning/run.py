"""Proves, records, times and chooses kernels on the device at hand: what ``python -m efft_kernels.tune`` runs."""

import datetime
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from . import children, plans, table

BACKENDS = ("cuda", "triton", "cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FIRST_LAYER = [False, False, False, True, True]  # its input needs no gradient
STEP_LIMIT = {"cuda": 30.0, "triton": 120.0, "cpu": 60.0}  # seconds for one step; Triton compiles
AT_ONCE = 6  # processes of the battery: most of their time is importing torch and compiling


class Timed(NamedTuple):
    """One op at one size."""

    entry: str
    M: int
    us: dict[str, float]  # of every variant that was timed, plain torch's two orders among them
    choice: table.Choice | None

    def __str__(self) -> str:
        best = min(self.us, key=self.us.get)
        chosen = f", chosen: {self.choice.backend or 'plain torch'}" if self.choice else ""
        plain = min(us for name, us in self.us.items() if name.startswith("product"))
        times = f"plain torch {plain:.4g} us, fastest {best} {self.us[best]:.4g} us"
        return f"{self.entry} M{self.M}: {times}{chosen}"


class Report(NamedTuple):
    """What :func:`tune` found."""

    proven: dict[str, dict[str, int]]  # backend -> {plan: cases that it got right}
    dropped: dict[str, dict[str, str]]  # backend -> {plan: why it was dropped}
    timed: list[Timed]
    left: list[str]  # what no time was left for
    not_written: str | None  # why the record counts in this process only


def tune(
    shapes: Iterable[tuple[int, ...]],  # (M, K, N, R) of each low-rank linear, (M, K, N, R, A, B) of a mixed batch
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    *,
    backends: Iterable[str] | None = None,
    device: torch.device | str | None = None,
    minutes: float = 3.0,
    worker: list[str] | None = None,
    simulated: bool = False,
    say: Callable[[str], None] = lambda line: None,
    note: Callable[[dict], None] = lambda event: None,
) -> Report:
    """Prove the kernels on a device, time them for these shapes, and choose them from now on where they win.

    Every plan first runs a battery in child processes: against float64 on the device itself, at ragged shapes and ranks
    at the ends, forward and backward. One that is wrong, dies or hangs is dropped and named; the rest goes on. What was
    proven before, in these dtypes with the same sources, driver, torch and triton, is not proven again. Then each shape
    is timed, plans and both orders of plain torch in turn, and the fastest is chosen if it gains 3 % at least. Records
    go to ``tuned.json`` in $EFFT_CACHE or the user's cache folder; deleting that file undoes the choice.

    Args:
        shapes: (M, K, N, R), positive integers; of a mixed batch also the numbers of its adapters and of its samples,
            which have M / B rows each.
        dtypes: of the activations, of bfloat16, float16, float32 and float64; a backend skips those that it has no
            kernels for.
        backends: of "cuda", "triton" and "cpu"; default: all that this device has.
        device: a CPU or CUDA device; default: the current GPU if there is one, else the CPU.
        minutes: after this time nothing new is started.
        worker: the command of a child process, for tests.
        simulated: a short battery, for a simulator or an interpreter; it counts until the whole one is asked for.
        say: called with each line of progress.
        note: called with each result as soon as it is known, {"proven" or "dropped" or "entry": ...}.

    Raises:
        ValueError: a bad argument. RuntimeError: none of the backends can run on this device.
    """
    of = "(M, K, N, R) or (M, K, N, R, A, B), positive integers, M a multiple of B"
    shapes = list(dict.fromkeys(tuple(shape) for shape in _listed("shapes", shapes, _is_shape, of)))
    dtypes = list(dict.fromkeys(_listed("dtypes", dtypes, DTYPES.__contains__, DTYPES)))
    if backends is not None:
        backends = list(dict.fromkeys(_listed("backends", backends, BACKENDS.__contains__, BACKENDS)))
    if not isinstance(minutes, int | float) or not minutes > 0:
        raise ValueError(f"minutes must be a positive number, got {minutes!r}")
    tuner = _Tuner(
        _device(device), dtypes, time.monotonic() + 60 * minutes, worker or children.WORKER, simulated, say, note
    )
    tuner.use(backends)
    tuner.prove()
    tuner.time(shapes)
    tuner.choose_isa()
    table.invalidate()
    return tuner.report()


def _listed(name: str, given, fits: Callable, of: object) -> list:
    """What was given as a list, even if it can be read once only; ValueError if it is none, empty or does not fit"""
    found = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else []
    for each in found or [given]:
        if not (found and fits(each)):
            raise ValueError(f"{name} must be a list of {of}, got {each!r}")
    return found


def _is_shape(shape) -> bool:
    if not isinstance(shape, tuple | list) or len(shape) not in (4, 6):
        return False
    return all(type(n) is int and n > 0 for n in shape) and shape[0] % (*shape, 1, 1)[5] == 0


def _device(device) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    count = torch.cuda.device_count()
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be cpu or one of torch's {count} CUDA devices, got {device!r}") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= count):
        raise ValueError(f"device must be cpu or one of torch's {count} CUDA devices, got {device}")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


class _Tuner:
    def __init__(self, device, dtypes, deadline, worker, simulated, say, note):
        self.device, self.dtypes, self.deadline = device, dtypes, deadline
        self.worker, self.simulated, self.say, self.note = worker, simulated, say, note
        self.name = table.device_name(device)
        # children measure with as many threads as the name says
        self.job = {"device": str(device), "threads": torch.get_num_threads()}
        self.backends: list[str] = []
        self.dropped: dict[str, dict[str, str]] = {}
        self.timed: list[tuple] = []
        self.left: list[str] = []
        self.not_written: str | None = None
        self.lock = threading.Lock()

    def use(self, wanted: Iterable[str] | None) -> None:
        """Keep the backends that can run on this device, and say of the others why they cannot."""
        fitting = ("cuda", "triton") if self.device.type == "cuda" else ("cpu",)
        for name in wanted or fitting:
            try:
                reason = None if self.simulated else plans.module(name).unavailable()
            except ImportError as error:
                reason = str(error)
            if reason is None and name == "cuda" and not self.simulated:
                try:
                    plans.module(name).load()  # compiled here, and not by each child
                except RuntimeError as error:
                    reason = str(error)
            if reason:
                self.say(f"{name}: {reason}")
            else:
                self.backends.append(name)
        if not self.backends:
            raise RuntimeError(f"nothing to tune on {self.name}: none of {list(wanted or fitting)} is available here")

    def save(self, **records) -> None:
        self.not_written = table.save(self.name, **records) or self.not_written

    def drop(self, backend: str, plan: dict, reason: str) -> None:
        name = table.plan_name(plan)
        with self.lock:
            self.dropped.setdefault(backend, {})[name] = reason
            self.say(f"{backend}: {name} is dropped: {reason}")
            self.note({"dropped": name, "backend": backend, "reason": reason})
            self.record(backend, {}, {name: reason})

    def record(self, backend: str, proven: dict[str, dict], dropped: dict[str, str], **more) -> None:
        now = table.conditions(backend, self.device)
        date = datetime.date.today().isoformat()
        self.save(proof={backend: now | {"date": date, "plans": proven, "dropped": dropped, **more}})

    def prove(self) -> None:
        """Every plan that is not on record yet in a dtype, several processes at a time"""
        jobs = queue.SimpleQueue()
        for backend in sorted(self.backends, key=lambda name: name != "triton"):  # what compiles takes longest
            known = table.proof(backend, self.device)
            self.dropped[backend] = dict(known["dropped"])
            for name, reason in known["dropped"].items():
                self.say(f"{backend}: {name} stays dropped: {reason}")
            for dtype in (str(dtype)[6:] for dtype in self.dtypes):
                able = plans.all_plans(backend, self.device)
                missing = [plan for plan in able if not table.proves(known, plan, dtype, self.simulated)]
                for part in _parts(backend, missing):
                    jobs.put((backend, part, dtype))
        width = 1 if self.device.type != "cuda" else max(1, min(AT_ONCE, os.cpu_count() or 1, jobs.qsize()))
        with ThreadPoolExecutor(width) as pool:
            for done in [pool.submit(self._prove_all, jobs) for _ in range(width)]:
                done.result()

    def _prove_all(self, jobs: queue.SimpleQueue) -> None:
        child = children.Child(self.worker)
        try:
            while True:
                self._prove_some(child, *jobs.get_nowait())
        except queue.Empty:
            pass
        finally:
            child.stop()

    def _prove_some(self, child, backend: str, missing: list[dict], dtype: str) -> None:
        # one that was dropped in another dtype is not tried again
        while missing := [plan for plan in missing if table.plan_name(plan) not in self.dropped[backend]]:
            seen: list[str] = []

            def on_event(event: dict) -> None:
                name = table.plan_name(event["plan"])
                seen.append(name)
                if "dropped" in event:
                    self.drop(backend, event["plan"], event["dropped"])
                else:
                    self._right(backend, name, event["cases"], dtype)

            job = {"task": "prove", "backend": backend, "plans": missing, "dtypes": [dtype]}
            job |= {"simulated": self.simulated, **self.job}
            death = child.run(job, on_event, STEP_LIMIT[backend], self.deadline)
            missing = [plan for plan in missing if table.plan_name(plan) not in seen]
            if death is None:
                return
            if death.out_of_time:
                late = f" in {dtype}: {children.LATE}"
                self.left += [f"the battery of {backend}: {table.plan_name(plan)}{late}" for plan in missing]
                return
            guilty = death.at.get("at")
            if not guilty:
                self.left += [f"the battery of {backend}: {table.plan_name(plan)}: {death.reason}" for plan in missing]
                return
            self.drop(backend, guilty, f"{death.at['case']}: {death.reason}")

    def _right(self, backend: str, name: str, cases: int, dtype: str) -> None:
        """A plan is proven in a dtype when its battery came out right there; none ran where there are no kernels."""
        none = f"the battery of {backend}: it has no kernels for {dtype} here"
        with self.lock:
            if cases and name not in self.dropped.get(backend, {}):
                self.say(f"{backend}: {name} is right in {cases} cases of {dtype}")
                self.note({"proven": name, "backend": backend, "dtype": dtype, "cases": cases})
                self.record(backend, {name: {dtype + " short" * self.simulated: cases}}, {})
            elif not cases and none not in self.left:
                self.left.append(none)

    def time(self, shapes: list[tuple]) -> None:
        child = children.Child(self.worker)
        passes = ("", None), ("_backward", table.ALL), ("_backward", FIRST_LAYER)
        jobs_of = lambda op, sizes: [
            (op + more, each, dtype, needs) for more, needs in passes for dtype in self.dtypes for each in sizes
        ]
        linear, mixed = ([shape for shape in shapes if len(shape) == count] for count in (4, 6))
        jobs = jobs_of(table.LINEAR, linear)
        if self.backends != ["cpu"]:  # there, rules hold for the other ops
            others = _other_ops(linear[:1], (1,), 1) if self.simulated else _other_ops(linear, (1, 12, 48), 12)
            jobs += [(op, sizes, dtype, None) for op, sizes in others for dtype in self.dtypes]
        each = max(0.5, min(5.0, (self.deadline - time.monotonic()) / max(1, len(jobs) or 3 * len(mixed)) / 3))
        jobs += jobs_of(table.MIXED, mixed)  # with what is left of the time
        try:
            for op, shape, dtype, needs in jobs:
                what = f"{op} {str(dtype)[6:]} {','.join(map(str, shape))}" + (f" needs {needs}" if needs else "")
                if time.monotonic() > self.deadline:
                    self.left.append(f"{what}: {children.LATE}")
                else:
                    self._time_one(child, what, op, shape, dtype, needs, each)
        finally:
            child.stop()

    def _time_one(self, child, what, op, shape, dtype, needs, budget: float) -> None:
        candidates = []
        for backend in self.backends:
            proven = table.proof(backend, self.device)
            able = [{"op": op.removesuffix("_backward")}]
            if op in (table.LINEAR, table.BACKWARD):
                able = plans.linear_plans(backend, self.device, shape[3])
            candidates += [(backend, plan) for plan in able if table.proves(proven, plan, str(dtype)[6:])]
        if not candidates and op.startswith(table.MIXED):
            self.left.append(f"{what}: no kernel for mixed batches is proven here")
            return

        def on_event(event: dict) -> None:
            if "dropped" in event:
                self.drop(event["backend"], event["plan"], event["dropped"])
            else:
                found = None
                if "cpu" not in self.backends:  # there, the instruction set is chosen at the end
                    self.save(measured={event["entry"]: {str(event["M"]): event["row"]}})
                    found = table.choice(self.device, event["entry"], event["M"])
                self.timed.append(Timed(event["entry"], event["M"], event["us"], found))
                self.say(str(self.timed[-1]))
                self.note({"op": op, "shape": shape, "needs": needs, **event, "chosen": found and found.backend})

        while True:
            job = {
                "task": "time", "op": op, "shape": shape, "dtypes": [str(dtype)[6:]],
                "needs": needs, "candidates": candidates, "budget": budget, **self.job,
            }  # fmt: skip
            death = child.run(job, on_event, max(map(STEP_LIMIT.get, self.backends)) + 5 * budget, self.deadline + 5)
            if death is None:
                return
            guilty = death.at.get("at")
            if death.out_of_time or not guilty:
                self.left.append(f"{what}: {death.reason}")
                return
            self.drop(death.at["backend"], guilty, f"{death.at['case']}: {death.reason}")
            candidates = [(b, plan) for b, plan in candidates if (b, plan) != (death.at["backend"], guilty)]

    def choose_isa(self) -> None:
        """On a CPU: the instruction set with which all that was timed takes least; plain torch where that is faster"""
        timed = [each for each in self.timed if any(name.startswith("cpu: ") for name in each.us)]
        if not timed:
            return
        names = set.intersection(*({name for name in each.us if name.startswith("cpu: ")} for each in timed))
        if not names:
            return
        torch_us = lambda each: min(us for name, us in each.us.items() if name.startswith("product"))
        best = min(sorted(names), key=lambda name: sum(min(each.us[name], torch_us(each)) for each in timed))
        plan, before = {"isa": best.removeprefix("cpu: ")}, table.recorded_isa()
        self.record("cpu", {}, {}, **plan)
        for each in timed:
            self.save(
                measured={
                    each.entry: {str(each.M): {"torch": torch_us(each), "cpu": {"us": each.us[best], "plan": plan}}}
                }
            )
        self.timed = [each._replace(choice=table.choice(self.device, each.entry, each.M)) for each in self.timed]
        self.say(f"cpu: instruction set {plan['isa']}")
        if before not in (None, plan["isa"]):
            self.say(f"cpu: what was measured with {before} counts no more; tune all sizes in one run")
        if not self.simulated:
            plans.module("cpu").set_isa(plan["isa"])

    def report(self) -> Report:
        found = {backend: table.proof(backend, self.device)["plans"] for backend in self.backends}
        proven = {b: {name: sum(cases.values()) for name, cases in of.items()} for b, of in found.items()}
        return Report(proven, self.dropped, self.timed, self.left, self.not_written)


def _other_ops(shapes: list[tuple], slices: tuple[int, ...], layers: int) -> list[tuple[str, tuple]]:
    """(op, sizes): group updates of that many slices, and the merge of `layers` layers with these Linears"""
    ops = "group_update", "group_update_backward"
    found = [(op, (S, R, R, N)) for _, _, N, R in shapes for op in ops for S in slices]
    return list(dict.fromkeys(found + [("merge_", (layers, N, K, R)) for _, K, N, R in shapes]))


def _parts(backend: str, missing: list[dict]) -> list[list[dict]]:
    """The plans of each job: one of Triton, which compiles long, or of a CPU, where what is done is kept"""
    parts = min(AT_ONCE - 2 if backend == "cuda" else len(missing), len(missing))
    return [missing[i::parts] for i in range(parts)]
