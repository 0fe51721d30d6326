"""torch's FLOP counter sees the operators as it sees their formula in plain torch."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from models import timm
from torch.utils.flop_counter import FlopCounterMode

import efft_kernels
from efft_kernels import EFFTConfig, group_update, lowrank_linear, merge_
from efft_kernels.ops import mixed_linear
from efft_kernels.ops.flops import FORMULAS


def count(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def tensors(*shapes, needs=()) -> list[torch.Tensor]:
    return [torch.randn(shape, requires_grad=i in needs) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("needs", [(), (0, 3, 4), (3, 4), (0, 1, 2, 3, 4)], ids=str)
def test_linear(needs):
    x, weight, bias, down, up = tensors((2, 7, 12), (20, 12), (20,), (12, 3), (3, 20), needs=needs)

    def run(call):
        y = call()
        if needs:
            y.sum().backward()

    want = count(lambda: run(lambda: F.linear(x, weight, bias) + (x @ down) @ up))
    assert count(lambda: run(lambda: lowrank_linear(x, weight, bias, down, up))) == want > 0
    wide = down.detach()[None].requires_grad_(down.requires_grad), up.detach()[None].requires_grad_(up.requires_grad)
    ids = torch.zeros(2, dtype=torch.int64)
    assert count(lambda: run(lambda: mixed_linear(x, weight, bias, *wide, ids))) == want


def test_group_update_and_merge():
    sigma, v = tensors((4, 3, 5), (5, 12), needs=(0, 1))
    want = count(lambda: torch.einsum("spq,qn->spn", sigma, v).sum().backward())
    assert count(lambda: group_update(sigma, v).sum().backward()) == want > 0
    weights, downs, ups = tensors((20, 12), (20, 12)), tensors((12, 3), (12, 3)), tensors((3, 20), (3, 20))
    assert count(lambda: merge_(weights, downs, ups)) == 2 * count(lambda: downs[0] @ ups[0]) > 0


def test_a_model_counts_its_adapter():
    """An adapted model counts its frozen products, too, and little more for the adapter."""
    model = timm().create_model("test_vit", img_size=32, num_classes=5).eval()
    images = torch.randn(2, 3, 32, 32)
    frozen = count(lambda: model(images))
    efft_kernels.inject(model, EFFTConfig(rank=4))
    with torch.no_grad():
        adapted = count(lambda: model(images))
    assert 1.001 * frozen < adapted < 1.5 * frozen


def test_every_operator_has_a_formula():
    names = {name.split("::")[1].partition(".")[0] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("efft_kernels::")}  # fmt: skip
    assert names == set(FORMULAS)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["efft_kernels", "torch.utils.flop_counter"])
def test_either_may_be_imported_first(first):
    code = f"import {first}, efft_kernels, torch; from torch.utils.flop_counter import flop_registry; "
    code += "assert torch.ops.efft_kernels.merge_ in flop_registry"
    subprocess.run([sys.executable, "-c", code], check=True)
