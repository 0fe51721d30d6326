"""DoRA beside test_model_dense.py, which compares it with a dense W + dW: dtypes, zeros, merging, refusals."""

import copy
import sys

import pytest
import torch
from models import METHODS, adapted, assert_bits, assert_same, gradients, images, loss_of, shake, vit
from refusals import refuses
from torch import nn
from torch.nn.utils import parametrizations

import efft_kernels as ek
from efft_kernels import dora


def test_norms_are_float32_beside_bfloat16():
    weight, down, up, magnitude = (torch.randn(s).bfloat16() for s in ((64, 96), (96, 4), (4, 64), (64,)))
    exact = dora.gain(*(t.double() for t in (weight, down, up, magnitude)))
    with torch.autocast("cpu", torch.bfloat16):
        got = dora.gain(weight, down, up, magnitude.float())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    model = ek.inject(vit().bfloat16(), METHODS["lora-dora"])
    assert {p.dtype for p in model.efft.parameters()} == {torch.float32}
    x = images(dtype=torch.bfloat16)
    with ek.disable_adapter(model):
        before = model(x)
    assert torch.equal(model(x), before)


def test_rows_of_zeros_keep_the_update_alone():
    base = vit().double()
    with torch.no_grad():
        base.blocks[0].attn.qkv.weight[:5] = 0
    model, x = ek.inject(base, METHODS["lora-dora"]), torch.randn(3, 192, dtype=torch.float64)
    grads = gradients(model, loss_of(model, images(dtype=x.dtype)))
    assert all(g.isfinite().all() for g in grads.values())
    shake(model)
    linear, (group,) = model.blocks[0].attn.qkv, model.efft.groups()
    with torch.no_grad():
        group.magnitude[:5] = 0  # shake moved them
        pair = group.low_rank_pairs()["blocks.0.attn.qkv"]
        torch.testing.assert_close(linear(x)[:, :5], (x @ pair.down @ pair.up + linear.bias)[:, :5])
    refuses(RuntimeError, "magnitudes of dora=True cannot be initialised without the weights", group.reset_parameters)


def test_an_update_that_cancels_the_weight_leaves_finite_norms():
    down, up = torch.randn(96, 4), torch.randn(4, 640)
    assert dora.row_norms(-(down @ up).T.contiguous(), down, up).isfinite().all()


@pytest.mark.parametrize("method", ["lora-dora", "efft2-dora"])
def test_recomputation(method):
    model, x = adapted(METHODS[method]).double().train(), images(dtype=torch.float64)
    grads = gradients(model, loss_of(model, x))
    model.set_grad_checkpointing(True)
    assert_same(gradients(model, loss_of(model, x)), grads)


def test_merging_rounds_once():
    model = adapted(METHODS["lora-dora"]).bfloat16()
    linear, pair = model.blocks[0].attn.qkv, model.efft.groups()[0].low_rank_pairs()["blocks.0.attn.qkv"]
    update = dora.dense_update(linear.weight, pair.down, pair.up, pair.magnitude)
    want = (linear.weight.double() + update.double()).bfloat16()
    with pytest.warns(UserWarning, match="of the update to rounding"):
        ek.merge(model)
    assert torch.equal(model.blocks[0].attn.qkv.weight, want)


def test_a_merge_that_fails_midway_changes_nothing(monkeypatch):
    model, merging = adapted(METHODS["lora-dora"]), sys.modules["efft_kernels.merge"]
    before, updates = copy.deepcopy(model.state_dict()), [merging._update]
    monkeypatch.setattr(merging, "_update", lambda *given: updates.pop()(*given))  # fails at the second weight
    with pytest.raises(IndexError):
        ek.merge(model, keep_weights=False)
    assert_bits(model.state_dict(), before)


def test_attention_of_torch(tmp_path):
    make = lambda: nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2, batch_first=True)})
    model = nn.ModuleDict({"blocks": nn.ModuleList([make()])}).double().eval()
    attention, (x, z) = model["blocks"][0]["attn"], torch.randn(2, 2, 4, 16, dtype=torch.float64)
    shake(ek.inject(model, METHODS["lora-dora"], head="keep"), 0.3)
    found = [attention(*inputs)[0] for inputs in ((x, x, x), (x, z, z))]
    refuses(ValueError, "where PEFT has no dora", ek.export_lora, model, tmp_path)
    ek.merge(model)
    for inputs, want in zip(((x, x, x), (x, z, z)), found):
        torch.testing.assert_close(attention(*inputs)[0], want)


def test_refusals(tmp_path):
    model = vit()
    parametrizations.weight_norm(model.blocks[0].attn.qkv)
    plain, config = "dora=True needs a plain weight in blocks.0.attn.qkv", METHODS["lora-dora"]
    refuses(ValueError, plain, ek.inject, model, config)
    wide = "dora=True needs factor_dtype=torch.float32 or wider"
    refuses(ValueError, wide, ek.inject, vit(), config, factor_dtype=torch.bfloat16)
    with torch.no_grad():
        (model := vit()).blocks[1].attn.qkv.weight[3] = 0
    with pytest.raises(ValueError, match="row of zeros, for which PEFT's dora gives NaN"):
        ek.export_lora(ek.inject(model, METHODS["lora-dora"]), tmp_path / "lora")
    refuses(TypeError, "dora", ek.VeRAConfig, dora=True)
    linear, wrapped = adapted(METHODS["lora-dora"]).blocks[0].attn.qkv, type("Wrapped", (torch.Tensor,), {})
    wrapped.__tensor_flatten__ = None  # as a quantized weight has it, which a module around the Linear reads
    refuses(ValueError, plain, linear.add_to, torch.randn(2, 192), linear.weight.detach().as_subclass(wrapped))
