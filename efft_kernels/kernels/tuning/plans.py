"""The plans that are proven and timed: how each backend may compute an op."""

import contextlib
import importlib
from collections.abc import Iterator

import torch

from . import table

OPS = ("group_update", "merge_")  # each backend has one way for these; "mixed_linear" is Triton's alone


def module(backend: str):
    return importlib.import_module(f"efft_kernels.kernels.{backend}")


def linear_plans(backend: str, device: torch.device, R: int = 16) -> list[dict]:
    """Every way in which a backend can compute a low-rank linear of this rank on this device."""
    if backend == "cuda":
        cuda = module("cuda")
        return [plan._asdict() for plan in cuda.plans(cuda.arch(device), R)]
    if backend == "triton":
        return [{"way": way} for way in module("triton").WAYS]
    return [{"isa": isa} for isa in module("cpu").isas()]


def all_plans(backend: str, device: torch.device) -> list[dict]:
    """The plans of the linear, then one for each other op; what a proof is made of."""
    ops = [*OPS, *(["mixed_linear"] if backend != "cuda" else [])]
    if backend == "cpu":
        return linear_plans(backend, device)
    return linear_plans(backend, device) + [{"op": op} for op in ops]


@contextlib.contextmanager
def active(backend: str, plan: dict) -> Iterator[None]:
    """Calls of the backend go by this plan; on a CPU that is an instruction set, which the whole process shares."""
    if backend != "cpu":
        with table.override(backend, plan):
            yield
        return
    cpu = module("cpu")
    before = cpu.isa()
    if before == plan["isa"]:
        yield
        return
    cpu.set_isa(plan["isa"])
    try:
        yield
    finally:
        cpu.set_isa(before)


def takes(backend: str, plan: dict, op: str, tensors: tuple, needs: list[bool] | None) -> bool:
    """Whether a plan, and not another in its place, would compute this call."""
    kernels = module(backend)
    if kernels.unsupported(op, *tensors):
        return False
    if "op" in plan:
        return True
    x, weight = tensors[0], tensors[1 if op == table.LINEAR else 2]
    R = tensors[4].shape[0]
    if backend == "cuda":
        w = weight.t() if op == table.LINEAR else weight
        wanted = kernels.KernelPlan(**plan)
        return wanted in kernels.plans(kernels.arch(x.device), R) and kernels.allows(x, w, wanted)
    if backend == "triton" and plan["way"] == "single_pass":
        with table.override("triton", plan):
            return kernels.planned_single_pass(op, x, weight, R, needs)
    return True
