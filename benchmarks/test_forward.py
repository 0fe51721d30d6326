"""The cases of bench_forward.py under pytest-benchmark: ViT-B, one image, float32.

    pytest benchmarks --benchmark-only

The variants of a layer form a group but are not interleaved. bench_forward.py gives ratios that hold on a busy machine,
and has torch.compile, other models, dtypes and devices.
"""

import itertools

import pytest
import torch
from baselines import make_inputs, variants
from bench_forward import stages
from timing import copies, run
from shapes import layers, work

R = 16


@pytest.fixture(scope="module")
def data():
    """The same copies of the inputs for all variants of a case: {(layer, backward): [Inputs]}"""
    made = {}

    def get(layer, backward):
        if (layer, backward) not in made:
            made.clear()  # pytest runs the cases layer by layer
            moved = work(layer.tokens, layer.K, layer.N, R, 4)["forward"][1]
            made[layer, backward] = [
                make_inputs(layer.tokens, layer, R, torch.float32, "cpu", grad=backward, seed=seed)
                for seed in range(copies(moved, "cpu"))
            ]
        return made[layer, backward]

    return get


@pytest.mark.parametrize("variant", [v for v in variants("cpu")[0] if not v.compiled], ids=lambda v: v.name)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("layer", layers("vit_b"), ids=lambda layer: layer.name)
def test_linear(benchmark, data, layer, backward, variant):
    what = "forward + backward" if backward else "forward"
    benchmark.group = f"vit_b {layer.name} {layer.K}->{layer.N}, M={layer.tokens}, {what}"
    with torch.set_grad_enabled(backward):
        inputs = data(layer, backward)
        calls = [stages(variant.build(i), i, backward) for i in inputs]
        for call in calls if variant.name.startswith("efft") else calls[:2]:
            run(call)
        turn = itertools.cycle(calls)
        benchmark.pedantic(run, setup=lambda: ((next(turn),), {}), rounds=10)
