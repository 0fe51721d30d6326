"""bench_forward.py's variants and bench_train_step.py's methods under pytest-benchmark: ViT-B, one image, float32.

    pytest benchmarks --benchmark-only

They are not interleaved here: the scripts give ratios that hold on a busy machine, and have torch.compile, memory,
operations, other models, dtypes and devices.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from baselines import make_inputs, variants
from bench_forward import stages
from harness import Options, backbone, methods
from shapes import layers, work
from steps import Step, make_batches
from timing import copies, run


@pytest.fixture(scope="module")
def base():
    return backbone("vit_b", 224, torch.float32, "cpu")


@pytest.mark.parametrize("variant", [v for v in variants("cpu")[0] if not v.compiled], ids=lambda v: v.name)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("layer", layers("vit_b"), ids=lambda layer: layer.name)
def test_linear(benchmark, layer, backward, variant, R=16):
    benchmark.group = f"vit_b {layer.name} {layer.K}->{layer.N}, M={layer.tokens}{', and backward' * backward}"
    moved = work(layer.tokens, layer.K, layer.N, R, 4)["forward"][1]
    with torch.set_grad_enabled(backward):
        inputs = [
            make_inputs(layer.tokens, layer, R, torch.float32, "cpu", grad=backward, seed=seed)
            for seed in range(copies(moved, "cpu"))
        ]
        calls = [stages(variant.build(i), i, backward) for i in inputs]
        for call in calls if variant.name.startswith("efft") else calls[:2]:
            run(call)
        turn = itertools.cycle(calls)
        benchmark.pedantic(run, setup=lambda: ((next(turn),), {}), rounds=10)


@pytest.mark.parametrize("method", methods("cpu")[0], ids=lambda method: method.name)
def test_step(benchmark, base, method):
    if method.name in ("peft_lora", "accelerated"):
        pytest.importorskip("peft")
    benchmark.group = "training step of vit_b, one image"
    batches = make_batches(SimpleNamespace(batch=1, image=224, device="cpu"), torch.float32)
    benchmark.pedantic(run, (Step(method.build(base, Options()), batches).stages(),), rounds=5, warmup_rounds=1)
