"""What is tried on a GPU for the CUDA backend: every plan that it can run, for the forward and for the backward."""

import torch

from .. import cuda as kernels
from . import table


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def gpu() -> tuple[str, str]:
    """(name, architecture class)"""
    return table.gpu(torch.cuda.current_device())


def tune_shape(tuner, inputs) -> dict[str, dict]:
    """entries for one low-rank linear, forward and backward: the plan, its time and plain torch's"""
    (x, weight, _, _, up), dy = inputs.forward, inputs.backward[0]
    # (op, its product y = x @ w, a call of it, what it must give); the backward's product is dx = dy @ weight
    jobs = [
        ("lowrank_linear", (x, weight.t()), lambda: kernels.lowrank_linear(*inputs.forward), inputs.y),
        (
            "lowrank_linear_backward",
            (dy, weight),
            lambda: kernels.lowrank_linear_backward(*inputs.backward),
            inputs.grads,
        ),
    ]
    found = {}
    for op, (x, w), call, right in jobs:
        entry = table.key(op, "half", len(x), w.shape[1], w.shape[0], len(up), exact=True)
        tried = tuner.candidates.get(op) or [plan._asdict() for plan in kernels.plans(tuner.arch, len(up))]
        # of the others the formula's would be run
        tried = [candidate for candidate in tried if kernels.allows(x, w, kernels.Plan(**candidate))]
        if best := tuner.fastest(entry, tried, call, right):
            # once more and side by side: the best of many times is a lucky one
            found[entry] = {"use": best["use"], "ms": tuner.bench(call), "torch_ms": tuner.bench(inputs.plain(op))}
    return found
