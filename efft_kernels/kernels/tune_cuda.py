"""What is tried on a GPU for the CUDA backend: every plan that it can run, for the forward and for the backward."""

import torch

from . import cuda as kernels
from . import measured


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def gpu() -> tuple[str, str]:
    """(name, architecture class)"""
    return measured.gpu(torch.cuda.current_device())


def tune_shape(tuner, inputs) -> dict[str, dict]:
    """entries for one low-rank linear, forward and backward: the plan, its time and plain torch's"""
    x, weight, _, down, up = inputs.forward
    (M, K), (R, N) = x.shape, up.shape
    plans = kernels.plans(tuner.arch, R, kernels.on_16_bytes(x, weight, down, up))
    # the backward goes by the sizes of its product, dx [M, K] = dy [M, N] @ weight
    jobs = {
        "lowrank_linear": ((M, N, K, R), lambda: kernels.lowrank_linear(*inputs.forward), inputs.y),
        "lowrank_linear_backward": (
            (M, K, N, R), lambda: kernels.lowrank_linear_backward(*inputs.backward), inputs.grads,
        ),
    }  # fmt: skip
    found = {}
    for op, (sizes, call, right) in jobs.items():
        entry = measured.key(op, "half", *sizes)
        best = tuner.fastest(entry, tuner.candidates.get(op) or [plan._asdict() for plan in plans], call, right)
        # once more and side by side: the best of many times is a lucky one
        found[entry] = {"use": best["use"], "ms": tuner.bench(call), "torch_ms": tuner.bench(inputs.plain(op))}
    return found
