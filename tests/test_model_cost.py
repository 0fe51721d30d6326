"""What an adapted training step adds to a merged, frozen one: operations launched and activations held."""

import functools

import benchmark_scripts  # noqa: F401, puts steps on the path
import pytest
import steps
import torch
import torch.nn.functional as F
from models import images, swin, vit
from torch.utils._python_dispatch import TorchDispatchMode

import efft_kernels as ek


def launches_of(model, x) -> int:
    """of forward and backward"""
    with steps.Ops() as launches:
        F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long)).backward()
    return launches.count


def merged_frozen(model):
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    return model


def twelve_blocks():
    """ViT-B but for its width, on which the number of launches does not depend."""
    return vit(depth=12, embed_dim=48, num_heads=3)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    "options",
    [dict(variant="efft1"), dict(variant="efft2"), dict(variant="efft2", cores="shared")],
    ids=["efft1", "efft2", "efft2-shared"],
)
def test_launches_of_a_vit_b_step(options, dropout, record_property):
    model = ek.inject(twelve_blocks(), ek.EFFTConfig(**options, factor_dropout=dropout)).train()
    ek.rebuild_inputs(False)
    try:
        launches = launches_of(model, images())
    finally:
        ek.rebuild_inputs(None)
    record_property("launches", launches)
    assert launches <= (300 if dropout == 0 else 320)
    # rebuilt: the norms and the GELU of each block, but for the first norm, in front of which nothing is trained
    model.zero_grad()
    assert launches_of(model, images()) == launches + 3 * 12 - 1


@pytest.mark.parametrize(
    "config",
    [ek.FacTConfig("tt", activation_dropout=0.0), ek.FacTConfig("tk", activation_dropout=0.0), ek.LoRAConfig()]
    + [ek.LoRAConfig(targets=("attn", "mlp")), ek.VeRAConfig(rank=32, targets=("attn", "mlp"))],
    ids=["fact-tt", "fact-tk", "lora", "lora-all", "vera-all"],
)
def test_launches_of_the_relatives(config):
    model = ek.inject(twelve_blocks(), config).train()
    assert launches_of(model, images()) <= 360


def test_merged_step_is_the_baseline():
    x = images().requires_grad_()  # a gradient has to travel through all blocks, as it does with adapters
    launches = launches_of(merged_frozen(twelve_blocks()).train(), x)
    assert 280 <= launches <= 300


def test_one_group_update_per_group_and_step():
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            names.append(op._schema.name)
            return op(*args, **(kwargs or {}))

    model = ek.inject(swin(), ek.EFFTConfig(rank=4, factor_dropout=0.0)).train()
    with Names():
        model(images()).sum().backward()
    groups = len(model.efft["default"])
    assert groups == 4
    assert names.count("efft_kernels::group_update") == names.count("efft_kernels::group_update_backward") == groups


def saved_bytes(model, x, amp: bool = False) -> int:
    with (saved := steps.Saved(model)), torch.autocast("cpu", torch.bfloat16, amp):
        _out = model(x)
    return saved.bytes


def of_a_vit_b(dtype, amp: bool):
    batch = 8 if dtype == torch.float32 and not amp else 4
    return vit("vit_base_patch16_224", depth=2, img_size=224).to(dtype), images(batch, size=224, dtype=dtype)


@functools.cache
def saved_bytes_of_the_frozen(dtype, amp: bool) -> int:
    model, x = of_a_vit_b(dtype, amp)
    return saved_bytes(merged_frozen(model).train(), x.requires_grad_(), amp)


slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)
DTYPES = [(torch.float32, False), slow(torch.bfloat16, False), slow(torch.float32, True)]
CONFIGS = [ek.EFFTConfig("efft2"), slow(ek.EFFTConfig("efft1")), slow(ek.LoRAConfig(targets=("attn", "mlp")))]


@pytest.mark.parametrize("dtype, amp", DTYPES)
@pytest.mark.parametrize("config", [*CONFIGS, slow(ek.FacTConfig("tt", activation_dropout=0.0))])
def test_saved_bytes_are_those_of_the_frozen_model(config, dtype, amp):
    """At 197 tokens; two blocks are enough, because both sides grow with the number of blocks.

    Batch 8, but in bfloat16, which takes long here, batch 4: there the factors count for more than at batch 8.
    """
    model, x = of_a_vit_b(dtype, amp)
    assert saved_bytes(ek.inject(model, config).train(), x, amp) <= 1.06 * saved_bytes_of_the_frozen(dtype, amp)
