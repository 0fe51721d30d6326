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
        chosen = (self.choice and self.choice.backend) or "plain torch"
        plain = min(us for name, us in self.us.items() if name.startswith("product"))
        times = f"plain torch {plain:.4g} us, fastest {best} {self.us[best]:.4g} us"
        return f"{self.entry} M{self.M}: {times}, chosen: {chosen}"


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
    proven before, with the same sources, driver, torch and triton, is not proven again. Then each shape is timed, plans
    and both orders of plain torch in turn, and the fastest is chosen if it gains 3 % at least. Records go to
    ``tuned.json`` in $EFFT_CACHE or the user's cache folder; deleting that file undoes the choice.

    Args:
        shapes: (M, K, N, R), positive integers; of a mixed batch also the numbers of its adapters and of its samples,
            which have M / B rows each.
        dtypes: of the activations; a backend skips those that it has no kernels for.
        backends: of "cuda", "triton" and "cpu"; default: all that this device has.
        device: default: the current GPU if there is one, else the CPU.
        minutes: after this time nothing new is started.
        worker: the command of a child process, for tests.
        simulated: a short battery, for a simulator or an interpreter.
        say: called with each line of progress.
        note: called with each result as soon as it is known, {"proven" or "dropped" or "entry": ...}.

    Raises:
        ValueError: a bad argument. RuntimeError: none of the backends can run on this device.
    """
    shapes, dtypes = [tuple(shape) for shape in shapes], list(dtypes)
    for shape in shapes:
        B = shape[5] if len(shape) == 6 else 1
        if len(shape) not in (4, 6) or not all(isinstance(n, int) and n > 0 for n in shape) or shape[0] % B:
            of = "(M, K, N, R) or (M, K, N, R, A, B), positive integers, M a multiple of B"
            raise ValueError(f"shapes must be of {of}, got {shape}")
    if not isinstance(minutes, int | float) or not minutes > 0:
        raise ValueError(f"minutes must be a positive number, got {minutes!r}")
    for name in backends or ():
        if name not in BACKENDS:
            raise ValueError(f"backends must be of {BACKENDS}, got {name!r}")
    tuner = _Tuner(
        _device(device), dtypes, time.monotonic() + 60 * minutes, worker or children.WORKER, simulated, say, note
    )
    tuner.use(backends)
    tuner.prove()
    tuner.time(shapes)
    tuner.choose_isa()
    table.invalidate()
    return tuner.report()


def _device(device) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


class _Tuner:
    def __init__(self, device, dtypes, deadline, worker, simulated, say, note):
        self.device, self.dtypes, self.deadline = device, dtypes, deadline
        self.worker, self.simulated, self.say, self.note = worker, simulated, say, note
        self.name = table.device_name(device)
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

    def record(self, backend: str, proven: dict[str, int], dropped: dict[str, str]) -> None:
        now = table.conditions(backend, self.device)
        date = datetime.date.today().isoformat()
        self.save(proof={backend: now | {"date": date, "plans": proven, "dropped": dropped}})

    def prove(self) -> None:
        """Every plan that is not on record yet, several processes at a time"""
        jobs = queue.SimpleQueue()
        for backend in sorted(self.backends, key=lambda name: name != "triton"):  # what compiles takes longest
            known = table.proof(backend, self.device)
            done = known["plans"].keys() | known["dropped"].keys()
            self.dropped[backend] = dict(known["dropped"])
            for name, reason in known["dropped"].items():
                self.say(f"{backend}: {name} stays dropped: {reason}")
            missing = [plan for plan in plans.all_plans(backend, self.device) if table.plan_name(plan) not in done]
            for part in _parts(backend, missing, self.dtypes):
                jobs.put((backend, *part))
        width = 1 if self.device.type != "cuda" else max(1, min(AT_ONCE, os.cpu_count() or 1, jobs.qsize()))
        self.partial: dict[tuple, list] = {}
        with ThreadPoolExecutor(width) as pool:
            for done in [pool.submit(self._prove_all, jobs) for _ in range(width)]:
                done.result()

    def _prove_all(self, jobs: queue.SimpleQueue) -> None:
        child = children.Child(self.worker)
        try:
            while True:
                backend, missing, dtypes, parts = jobs.get_nowait()
                self._prove_some(child, backend, missing, dtypes, parts)
        except queue.Empty:
            pass
        finally:
            child.stop()

    def _prove_some(self, child, backend: str, missing: list[dict], dtypes, parts: int) -> None:
        while missing:
            seen: list[str] = []

            def on_event(event: dict) -> None:
                name = table.plan_name(event["plan"])
                seen.append(name)
                if "dropped" in event:
                    self.drop(backend, event["plan"], event["dropped"])
                else:
                    self._right(backend, name, event["cases"], parts)

            job = {
                "task": "prove", "backend": backend, "device": str(self.device), "plans": missing,
                "dtypes": [str(dtype)[6:] for dtype in dtypes], "simulated": self.simulated,
            }  # fmt: skip
            death = child.run(job, on_event, STEP_LIMIT[backend], self.deadline)
            missing = [plan for plan in missing if table.plan_name(plan) not in seen]
            if death is None:
                return
            if death.out_of_time:
                self.left += [f"the battery of {backend}: {table.plan_name(plan)}" for plan in missing]
                return
            guilty = death.at.get("at")
            if not guilty:
                self.left += [f"the battery of {backend}: {table.plan_name(plan)}: {death.reason}" for plan in missing]
                return
            self.drop(backend, guilty, f"{death.at['case']}: {death.reason}")
            missing = [plan for plan in missing if plan != guilty]

    def _right(self, backend: str, name: str, cases: int, parts: int) -> None:
        """A plan is proven when each part of its battery came out right, in the dtypes that the backend has."""
        with self.lock:
            found = self.partial.setdefault((backend, name), [])
            found.append(cases)
            if len(found) == parts and any(found) and name not in self.dropped.get(backend, {}):
                self.say(f"{backend}: {name} is right in {sum(found)} cases")
                self.note({"proven": name, "backend": backend, "cases": sum(found)})
                self.record(backend, {name: sum(found)}, {})
            elif len(found) == parts and not any(found):
                self.left.append(f"the battery of {backend}: {name}: {backend} has no kernels for these dtypes here")

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
                    self.left.append(what)
                else:
                    self._time_one(child, what, op, shape, dtype, needs, each)
        finally:
            child.stop()

    def _time_one(self, child, what, op, shape, dtype, needs, budget: float) -> None:
        candidates = []
        for backend in self.backends:
            proven = table.proof(backend, self.device)["plans"]
            able = [{"op": op.removesuffix("_backward")}]
            if op in (table.LINEAR, table.BACKWARD):
                able = plans.linear_plans(backend, self.device, shape[3])
            candidates += [(backend, plan) for plan in able if table.plan_name(plan) in proven]
        if not candidates and op.startswith(table.MIXED):
            self.left.append(f"{what}: no kernel for mixed batches is proven here")
            return

        def on_event(event: dict) -> None:
            if "dropped" in event:
                self.drop(event["backend"], event["plan"], event["dropped"])
            else:
                self.save(measured={event["entry"]: {str(event["M"]): event["row"]}})
                found = table.choice(self.device, event["entry"], event["M"])
                self.timed.append(Timed(event["entry"], event["M"], event["us"], found))
                self.say(str(self.timed[-1]))
                self.note({"op": op, "shape": shape, "needs": needs, **event, "chosen": found and found.backend})

        while True:
            job = {
                "task": "time", "device": str(self.device), "op": op, "shape": shape, "dtypes": [str(dtype)[6:]],
                "needs": needs, "candidates": candidates, "budget": budget,
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
        plan = {"isa": best.removeprefix("cpu: ")}
        for each in timed:
            self.save(
                measured={
                    each.entry: {str(each.M): {"torch": torch_us(each), "cpu": {"us": each.us[best], "plan": plan}}}
                }
            )
        self.timed = [each._replace(choice=table.choice(self.device, each.entry, each.M)) for each in self.timed]
        self.say(f"cpu: instruction set {plan['isa']}")
        if not self.simulated:
            plans.module("cpu").set_isa(plan["isa"])

    def report(self) -> Report:
        proven = {backend: table.proof(backend, self.device)["plans"] for backend in self.backends}
        return Report(proven, self.dropped, self.timed, self.left, self.not_written)


def _other_ops(shapes: list[tuple], slices: tuple[int, ...], layers: int) -> list[tuple[str, tuple]]:
    """(op, sizes): group updates of that many slices, and the merge of `layers` layers with these Linears"""
    ops = "group_update", "group_update_backward"
    found = [(op, (S, R, R, N)) for _, _, N, R in shapes for op in ops for S in slices]
    return list(dict.fromkeys(found + [("merge_", (layers, N, K, R)) for _, K, N, R in shapes]))


def _parts(backend: str, missing: list[dict], dtypes) -> list[tuple[list[dict], list, int]]:
    """[(plans, dtypes, into how many parts a plan's battery is split)] for the processes of the battery"""
    if not missing:
        return []
    if backend == "triton":  # compiling takes most of the time: one process for each plan and dtype
        return [([plan], [dtype], len(dtypes)) for plan in missing for dtype in dtypes]
    parts = min(AT_ONCE - 2, len(missing)) if backend == "cuda" else 1
    return [(missing[i::parts], list(dtypes), 1) for i in range(parts)]
