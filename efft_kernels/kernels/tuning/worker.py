"""What a child process of the tuner runs: jobs from its standard input, events as lines on its standard output.

A kernel under trial may hang or take the process with it. So each event that says what comes next is written before it
is tried; the parent (children.py) then knows what to drop.
"""

import json
import os
import sys
from collections.abc import Iterator

import torch

from . import plans, prove, table, timing


def events(job: dict) -> Iterator[dict]:
    torch.set_num_threads(job["threads"])
    device = torch.device(job["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtypes = [getattr(torch, name) for name in job["dtypes"]]
    if job["task"] == "prove":
        backend, given = job["backend"], job["plans"]
        able = [dtype for dtype in dtypes if _supported(backend, dtype, device)]
        if not able:
            yield from ({"plan": plan, "cases": 0} for plan in given)
            return
        linear = [plan for plan in given if "op" not in plan]
        if linear:
            yield from prove.prove_linear(backend, linear, able, device, job["simulated"])
        for plan in given:
            if "op" in plan:
                yield from prove.prove_op(backend, plan, able, device, job["simulated"])
        return
    candidates = [(backend, plan) for backend, plan in job["candidates"]]
    sizes = tuple(job["shape"])
    for dtype in dtypes:
        if job["op"].removesuffix("_backward") in (table.LINEAR, table.MIXED):
            yield from timing.time_linear(job["op"], sizes, dtype, device, job["needs"], candidates, job["budget"])
        else:
            yield from timing.time_op(job["op"], sizes, dtype, device, candidates, job["budget"])


def _supported(backend: str, dtype: torch.dtype, device: torch.device) -> bool:
    sample = [torch.zeros(size, dtype=dtype, device=device) for size in ((8, 8), (8, 8), (8,), (8, 8), (8, 8))]
    return plans.module(backend).unsupported(table.LINEAR, *sample) is None


def main() -> None:
    # what libraries print must not get between the events
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        for event in events(json.loads(line)):
            print(json.dumps(event), file=out, flush=True)
        print(json.dumps({"done": True}), file=out, flush=True)


if __name__ == "__main__":
    main()
