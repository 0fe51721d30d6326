"""The methods of bench_train_step.py under pytest-benchmark: ViT-B, one image, float32, a whole step with AdamW.

    pytest benchmarks/test_train_step.py --benchmark-only

Methods are not interleaved here. bench_train_step.py gives ratios that hold on a busy machine, memory and operations,
and has other models, dtypes and devices.
"""

from types import SimpleNamespace

import pytest
import torch
from steps import Step, make_batches
from timing import run
from harness import Options, backbone, methods

SIZE = SimpleNamespace(batch=1, image=224, device="cpu")


@pytest.fixture(scope="module")
def base():
    return backbone("vit_b", SIZE.image, torch.float32, SIZE.device)


@pytest.mark.parametrize("method", methods("cpu")[0], ids=lambda method: method.name)
def test_step(benchmark, base, method):
    if method.name == "peft_lora":
        pytest.importorskip("peft")
    benchmark.group = "training step of vit_b, one image"
    stages = Step(method.build(base, Options()), make_batches(SIZE, torch.float32)).stages()
    benchmark.pedantic(run, (stages,), rounds=5, warmup_rounds=1)
