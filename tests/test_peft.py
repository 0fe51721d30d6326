"""EFFT as a method of PEFT, and PEFT's LoRA on the kernels; tests/peft_suite runs PEFT's own tests beside these."""

import copy
import subprocess
import sys
import warnings
from dataclasses import fields

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accuracy import assert_accurate
from models import assert_bits, assert_same, gradients, images, loss_of, shake, swin, timm, vit, vit_of_transformers
from refusals import refuses
from safetensors.torch import load_file
from test_attention import Beit, encoder
from torch import nn

import efft_kernels as ek

timm()  # declares what torchvision, which PEFT imports, may lack
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from efft_kernels import groups, ops
from efft_kernels.peft import EFFTPeftConfig, EFFTPeftLinear, FastLoraLinear, accelerate_lora, fused, restore_lora

SMALL = {"rank": 4, "scale": 2.0, "factor_dropout": 0.0}
FACTORS = [f"{group}.{factor}" for group in ("attn", "ffn") for factor in ("u", "sigma", "v")]


def llama(**options):
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=80, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(7)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **heads, **options})).eval()


def tokens():
    return torch.arange(14).reshape(2, 7)


def adapt(model, **options):
    """Give every factor random values."""
    torch.manual_seed(1)
    return peft.get_peft_model(model, EFFTPeftConfig(**{**SMALL, "init_weights": False, **options})).eval()


def out(model, x):
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.logits


def results(model, x):
    y = out(model, x)
    return {"y": y.detach(), **gradients(model, y.square().sum())}


def owned(model, name="default"):
    return model.base_model.efft_factors[name]


@pytest.mark.parametrize("make", [vit, swin, vit_of_transformers])
@pytest.mark.parametrize(
    "options",
    [{"variant": "efft1"}, {"variant": "efft2", "zero_init": "vu"}, {"cores": "shared", "trainable_scale": True}]
    + [{"targets": ("q", "v", "fc2")}, {"factor_dropout": 0.3}],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_outputs_and_gradients_are_those_of_inject(make, options):
    bare = make()
    model = shake(ek.inject(copy.deepcopy(bare), ek.EFFTConfig(**{**SMALL, **options}), head="keep")).train()
    tuned = peft.get_peft_model(bare, EFFTPeftConfig(**{**SMALL, **options})).train()
    owned(tuned).load_state_dict(model.efft.default.state_dict())
    x, found = images(), []
    for m in (model, tuned):
        torch.manual_seed(3)
        found.append({key.replace("base_model.efft_factors.", "efft."): t for key, t in results(m, x).items()})
    assert_bits(*found)


def test_nothing_changes_at_the_start_and_only_factors_train():
    x, model = images(), vit()
    before = model(x)
    tuned = peft.get_peft_model(model, EFFTPeftConfig(rank=4, modules_to_save=["head"])).eval()
    torch.testing.assert_close(tuned(x), before, rtol=1e-5, atol=1e-6)
    trained = {key for key, p in tuned.named_parameters() if p.requires_grad}
    heads = {f"base_model.model.head.modules_to_save.default.{key}" for key in ("weight", "bias")}
    assert trained == heads | {f"base_model.efft_factors.default.{name}" for name in FACTORS}
    count = ek.plan(vit(), ek.EFFTConfig(rank=4)).parameters
    assert sum(p.numel() for p in owned(tuned).parameters()) == count


def test_one_group_update_per_group_and_forward(monkeypatch):
    calls, update = [], groups.group_update
    monkeypatch.setattr(groups, "group_update", lambda *a, **k: calls.append(1) or update(*a, **k))
    model, x = adapt(vit()), images()
    y = model(x)
    assert len(calls) == 2
    # outside the model's forward each Linear computes its own pair
    inner = model.get_base_model()
    features = inner.forward_head(inner.forward_features(x))
    assert len(calls) == 2 + 8
    torch.testing.assert_close(features, y, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        model(x)
    model.merge_adapter()
    before = len(calls)
    model(x)
    assert len(calls) == before


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_sees_the_same_factors_and_masks(reentrant):
    grads = []
    for on in (False, True):
        torch.manual_seed(0)
        model = adapt(vit_of_transformers(), factor_dropout=0.0 if reentrant else 0.3).train()
        if on:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        x = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).requires_grad_()
        model(x).logits.square().sum().backward()
        grads.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    assert_same(*grads)


@pytest.mark.slow
def test_compiled():
    model, x = adapt(vit()), images()
    torch._dynamo.reset()
    compiled, plain = torch.compile(model, backend="aot_eager"), gradients(model, model(x).square().sum())
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert_same(gradients(model, compiled(x).square().sum()), plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_holds_every_factor_once_and_comes_back_exactly(tmp_path, low, dtype):
    torch.manual_seed(0)
    base = vit().to(dtype)
    model, x = adapt(copy.deepcopy(base)), images(dtype=dtype)
    assert {p.dtype for p in owned(model).parameters()} == {torch.float32}
    for p in owned(model).parameters():
        p.data += torch.randn_like(p) * 1e-3  # so that no factor is a bfloat16 number
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    assert sorted(tensors) == sorted(f"base_model.efft_factors.{name}" for name in FACTORS)
    assert file.stat().st_size < 4 * sum(p.numel() for p in owned(model).parameters()) + 2000
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low)
    assert loaded.peft_config["default"].peft_type == "EFFT"
    assert not any(p.requires_grad for p in loaded.parameters())
    assert_bits(owned(loaded).state_dict(), owned(model).state_dict())
    assert torch.equal(loaded(x), model(x))
    loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=low, is_trainable=True)
    assert_bits(owned(loaded, "other").state_dict(), owned(model).state_dict())
    loaded.set_adapter("other")
    assert torch.equal(loaded.eval()(x), model(x))
    how = {"low_cpu_mem_usage": low, "autocast_adapter_dtype": False}
    low_precision = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **how)
    assert {p.dtype for p in owned(low_precision).parameters()} == {dtype}


def test_a_second_adapter_is_tied_and_trained_like_the_first(tmp_path):
    model, x = adapt(vit()), images()
    first, y = copy.deepcopy(owned(model).state_dict()), model(x)
    owned(model)["attn"].u.requires_grad_(False)
    model.add_adapter("second", EFFTPeftConfig(**{**SMALL, "rank": 3, "init_weights": False, "targets": ["attn"]}))
    assert torch.equal(model(x), y)
    assert not owned(model)["attn"].u.requires_grad and owned(model)["attn"].v.requires_grad
    assert not owned(model, "second")["attn"].training
    for name, linears in ("default", 8), ("second", 4):
        layers = [layer for layer in model.modules() if isinstance(layer, EFFTPeftLinear)]
        refers = [layer for layer in layers if name in layer.efft_factors]
        assert len(refers) == linears and all(layer.efft_factors[name] is owned(model, name) for layer in refers)
    model.set_adapter("second")
    trained = [key for key, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".efft_factors.second." in key for key in trained)
    before = copy.deepcopy(owned(model, "second").state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model.train(), x).backward()
    optimizer.step()
    assert all(not torch.equal(t, before[key]) for key, t in owned(model, "second").state_dict().items())
    assert_bits(owned(model).state_dict(), first)
    model.eval()
    one = model(x)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    base = copy.deepcopy(model).unload()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "second", adapter_name="second")
    assert torch.equal(copy.deepcopy(model)(x), one) and torch.equal(loaded(x), one)
    model.delete_adapter("second")
    assert list(model.base_model.efft_factors) == ["default"] and torch.equal(model(x), y)


def test_two_active_adapters_add_up():
    model, x = adapt(vit().double()), images(dtype=torch.float64)
    model.add_adapter("second", EFFTPeftConfig(**{**SMALL, "rank": 3, "init_weights": False, "targets": ["attn"]}))
    model.eval()
    model.base_model.set_adapter(["default", "second"])
    y, layer = model(x), model.get_base_model().blocks[0].attn.qkv
    deltas = [layer.get_delta_weight(name) for name in ("default", "second")]
    weight, merged = layer.base_layer.weight.clone(), copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged.blocks[0].attn.qkv.weight, weight + deltas[0] + deltas[1])
    torch.testing.assert_close(merged(x), y)
    assert sum(p.grad is not None for p in model.parameters()) == 0
    y.square().sum().backward()
    assert all(p.grad is not None for p in model.base_model.efft_factors.parameters())


def test_names_that_keys_could_not_tell_apart():
    model = adapt(vit())
    for name in ("attn", "sigma", "efft_factors", "head", "model", "modules_to_save", "blocks", "0"):
        with pytest.raises(ValueError, match=f"adapter_name must differ from the names of groups.*, got '{name}'"):
            model.add_adapter(name, EFFTPeftConfig(**SMALL))
        assert list(model.peft_config) == list(model.base_model.efft_factors) == ["default"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("safe", [False, True], ids=["", "safe"])
def test_merge_and_exact_unmerge(dtype, safe):
    model, x = adapt(vit().to(dtype), scale=0.1), images(dtype=dtype)
    y, weights = model(x), {key: value.clone() for key, value in model.get_base_model().state_dict().items()}
    model.merge_adapter(safe_merge=safe)
    loose = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=0.1, atol=0.05)
    torch.testing.assert_close(model(x), y, **loose)
    assert not torch.equal(model.get_base_model().state_dict()["blocks.0.attn.qkv.base_layer.weight"],
                           weights["blocks.0.attn.qkv.base_layer.weight"])  # fmt: skip
    model.unmerge_adapter()
    assert_bits(dict(model.get_base_model().state_dict()), weights)
    assert torch.equal(model(x), y)
    plain = model.merge_and_unload(safe_merge=safe)
    assert type(plain.blocks[0].attn.qkv) is nn.Linear and not plain._forward_hooks and not plain._forward_pre_hooks
    torch.testing.assert_close(plain(x), y, **loose)


def test_a_weight_that_was_written_while_merged_keeps_what_was_written():
    model = adapt(vit().double())
    layer = model.get_base_model().blocks[0].mlp.fc1
    before = layer.base_layer.weight.clone()
    model.merge_adapter()
    with torch.no_grad():
        layer.base_layer.weight.add_(1.0)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, before + 1)


def test_safe_merge_refuses_what_is_not_finite_and_leaves_the_weight():
    model = adapt(vit())
    weights = {key: value.clone() for key, value in model.get_base_model().state_dict().items()}
    with torch.no_grad():
        owned(model)["ffn"].sigma[-1, 0, 0] = torch.nan  # of the last layer
    for merge in (model.merge_adapter, model.merge_and_unload):
        refuses(ValueError, "NaNs detected in the merged weights. The adapter default", merge, safe_merge=True)
        assert_bits(dict(model.get_base_model().state_dict()), weights)
        assert not any(layer.merged for layer in model.base_model._layers)


def test_a_weight_that_cannot_be_merged_into_is_refused_before_the_first_is():
    inner = nn.Sequential(nn.Linear(16, 16), nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)))
    model, x = adapt(nn.Sequential(inner), target_modules=["0.0", "0.1"]), torch.randn(3, 16)
    y = model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        refuses(TypeError, "0.1 must have a plain floating-point weight to merge into, got a Param", merge)
        assert torch.equal(model(x), y)


def test_merging_ignores_dropout_and_leaves_the_mode():
    model = adapt(vit(), factor_dropout=0.5).train()
    deltas = [model.get_base_model().blocks[0].mlp.fc2.get_delta_weight("default") for _ in range(2)]
    assert torch.equal(*deltas) and owned(model)["ffn"].training


def test_a_language_model_groups_by_role_and_shape(tmp_path):
    model = llama()
    before = model(tokens()).logits
    start = peft.get_peft_model(copy.deepcopy(model), EFFTPeftConfig(rank=4, task_type="CAUSAL_LM")).eval()
    assert torch.equal(start(tokens()).logits, before)
    tuned = adapt(model, task_type="CAUSAL_LM")
    groups = {name: [slot.site.path.rpartition(".")[2] for slot in g.spec.slots[: len(g.spec.slots) // 2]]
              for name, g in owned(tuned).items()}  # fmt: skip
    assert groups == {
        "attn_32x32": ["q_proj", "o_proj"],
        "attn_16x32": ["k_proj", "v_proj"],
        "ffn_32x80": ["gate_proj", "up_proj", "down_proj"],
    }
    assert [g.spec.cores for g in owned(tuned).values()] == [4, 4, 6]
    y = tuned(tokens()).logits
    torch.testing.assert_close(copy.deepcopy(tuned).merge_and_unload()(tokens()).logits, y, rtol=1e-4, atol=1e-5)
    llama().save_pretrained(tmp_path / "base")
    tuned.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "adapter")
    for low in (False, True):
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", low_cpu_mem_usage=low)
        torch.testing.assert_close(loaded(tokens()).logits, y)
    assert loaded.generate(tokens(), max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 9)
    tuned.train()(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in owned(tuned).parameters())


def test_shared_cores_and_efft1_of_a_language_model():
    shared = adapt(llama(), cores="shared")
    assert [g.spec.cores for g in owned(shared).values()] == [2, 2, 3]
    one = adapt(llama(intermediate_size=32, num_key_value_heads=4), variant="efft1", target_modules="all-linear")
    assert {name: g.spec.cores for name, g in owned(one).items()} == {"32x32": 14}
    two = adapt(llama(), ffn_rank=[2, 3], zero_init="vu")
    assert [g.spec.rank for g in owned(two).values()] == [(4, 4), (4, 4), (2, 3)]
    assert [g.spec.zero for g in owned(two).values()] == ["v", "v", "u"]
    assert "lm_head" not in [path for g in owned(one).values() for path in g.slots]


def test_conv1d_of_transformers():
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    before = model(tokens()).logits
    tuned = adapt(model, target_modules=["c_attn", "c_proj", "c_fc"])
    assert {name: g.spec.cores for name, g in owned(tuned).items()} == {"attn_32x32": 8, "ffn_32x128": 4}
    y = tuned(tokens()).logits
    assert not torch.allclose(y, before)
    layer = tuned.get_base_model().transformer.h[0].attn.c_attn
    assert layer.get_delta_weight("default").shape == layer.base_layer.weight.shape
    tuned.merge_adapter()
    torch.testing.assert_close(tuned(tokens()).logits, y)
    tuned.unmerge_adapter()
    with tuned.disable_adapter():
        assert torch.equal(tuned(tokens()).logits, before)


class Doubled(nn.Linear):
    """A Linear that computes something else, as quantized ones do."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("how", ["subclass", "hook", "autocast"])
def test_what_a_base_layer_does_beyond_a_product_is_kept(how):
    dtype = torch.float32 if how == "autocast" else torch.float64
    inner = nn.Sequential(Doubled(16, 24) if how == "subclass" else nn.Linear(16, 24)).to(dtype)
    seen = []
    if how == "hook":
        inner[0].register_forward_hook(lambda module, args, y: seen.append(1) or 3 * y)
    x, model = torch.randn(5, 16, dtype=dtype), adapt(nn.Sequential(inner), target_modules=["0.0"])
    layer = model.get_base_model()[0][0]
    base, delta = layer.base_layer, layer.get_delta_weight("default")
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        y = model(x)
    if how == "autocast":
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), F.linear(x, base.weight + delta, base.bias), rtol=0.05, atol=0.2)
    else:
        torch.testing.assert_close(y, base(x) + F.linear(x, delta))
        assert how != "hook" or len(seen) == 2


def test_trainer_and_accelerate(tmp_path):
    # the brighter ones are of the second class
    data = [{"pixel_values": torch.full((3, 32, 32), i / 8 - 0.5), "labels": i // 4} for i in range(8)]
    model = peft.get_peft_model(vit_of_transformers(), EFFTPeftConfig(rank=4, modules_to_save=["classifier"]))
    arguments = transformers.TrainingArguments(
        tmp_path, num_train_epochs=12, per_device_train_batch_size=8, learning_rate=0.01, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    start = trainer.evaluate(data)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(data)["eval_loss"] < 0.8 * start
    trainer.save_model(tmp_path / "saved")
    x = images()
    again = peft.PeftModel.from_pretrained(trainer.model.get_base_model().__class__(model.config), tmp_path / "saved")
    assert_bits(owned(again).state_dict(), owned(model).state_dict())

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(prepared(x, labels=torch.tensor([0, 1])).loss)
    optimizer.step()
    state = peft.get_peft_model_state_dict(accelerator.unwrap_model(prepared))
    assert sum("efft_factors" in key for key in state) == 6


def test_what_cannot_be_adapted_is_refused_and_left_alone():
    conv, tied = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 4)), vit()
    tied.blocks[1].mlp.fc1.weight = tied.blocks[0].mlp.fc1.weight
    grouped = vit()
    grouped.blocks[0].attn.qkv = nn.Linear(192, 288)
    for model, options, error, says in [
        (vit(), {"rank": 500}, ValueError, "rank must be at most 192 in group"),
        (vit(), {"targets": ["attn"], "target_modules": ["fc1"]}, ValueError, "targets must name blocks.0.mlp.fc1"),
        (vit(), {"blocks": [1], "target_modules": ["fc1"]}, ValueError, "blocks must name blocks.0.mlp.fc1"),
        (conv, {"target_modules": ["0"]}, TypeError, "0 must be an nn.Linear or a Conv1D of transformers, got Conv2d"),
        (conv, {}, ValueError, "target_modules"),
        (conv, {"target_modules": ["nothing"]}, ValueError, "nothing"),
        (tied, {}, ValueError, "blocks.1.mlp.fc1 and blocks.0.mlp.fc1 share one weight"),
        (grouped, {}, ValueError, "blocks.0.attn.qkv must hold q, k and v of equal width, got 288 outputs"),
    ]:
        types = [type(module) for module in model.modules()]
        refuses(error, says, peft.get_peft_model, model, EFFTPeftConfig(**{**SMALL, **options}))
        assert [type(module) for module in model.modules()] == types
        assert all(p.requires_grad for p in model.parameters()) and not model._forward_hooks


def test_a_config_is_checked():
    refuses(ValueError, "variant must be one of", EFFTPeftConfig, variant="efft3")
    refuses(ValueError, "rank must be an int of at least 1", EFFTPeftConfig, rank=0)
    refuses(ValueError, "targets must be a non-empty tuple out of", EFFTPeftConfig, targets=["everything"])
    refuses(ValueError, "factor_dropout must be a number in", EFFTPeftConfig, factor_dropout=1.0)
    refuses(ValueError, "dora must be False here", EFFTPeftConfig, dora=True)
    refuses(ValueError, "layers_pattern='blocks' needs layers_to_transform", EFFTPeftConfig, layers_pattern="blocks")


@pytest.mark.parametrize(
    "options",
    [
        {"blocks": [1]},
        {"init": "released"},
        {"rank_weights": True, "rank_stabilized": True, "rank_dropout": 0.5},
        {"channel_scale": True, "variant": "efft1", "targets": ["q", "v", "mlp"]},
    ],
)
def test_every_option_of_the_library_is_one_in_peft(options, tmp_path):
    theirs, ours = ({option.name: option.default for option in fields(c)} for c in (EFFTPeftConfig, ek.EFFTConfig))
    assert ours.pop("dora") is False  # PEFT has DoRA of its own, LoraConfig(use_dora=True), which export_lora writes
    assert theirs | {"targets": ("attn", "mlp")} == theirs | ours
    base, x = vit(), images()
    tuned = adapt(copy.deepcopy(base), **options)
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    model = ek.inject(copy.deepcopy(base), ek.EFFTConfig(**SMALL, **given), head="keep").eval()
    model.efft["default"].load_state_dict(owned(tuned).state_dict())
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(out(tuned, x), want)
        tuned.save_pretrained(tmp_path)
        torch.testing.assert_close(out(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval(), x), want)
        assert not torch.allclose(want, base(x))


def test_attentions_that_call_no_linear():
    for model, x, options in (
        (Beit(), torch.randn(2, 3, 16), {}),
        (Beit("function"), torch.randn(2, 3, 16), {}),
        (encoder(), torch.randn(2, 3, 16), {"target_modules": ["out_proj", "linear1"]}),
    ):
        with torch.no_grad():
            before, tuned = model(x), adapt(model, **options)
            after = tuned(x)
            assert not torch.allclose(before, after)
            torch.testing.assert_close(tuned.merge_and_unload()(x), after, rtol=1e-4, atol=1e-5)


def test_a_config_of_numpy_scalars_is_saved(tmp_path):
    EFFTPeftConfig(scale=np.float32(2), factor_dropout=np.float32(0)).save_pretrained(tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert (config.scale, config.factor_dropout) == (2.0, 0.0)


def test_mixed_batches_and_injection_without_a_tuner_are_refused():
    refuses(ValueError, "adapter_names must be None", adapt(vit()), images(), adapter_names=["default", "__base__"])
    refuses(ValueError, "shared state", peft.inject_adapter_in_model, EFFTPeftConfig(**SMALL), vit())


def test_blocks_are_chosen_as_elsewhere_in_peft():
    model = adapt(vit(depth=3), layers_to_transform=[0, 2], layers_pattern="blocks")
    assert {slot.site.block for g in owned(model).values() for slot in g.spec.slots} == {0, 2}


def test_what_targets_leave_out_of_the_blocks_is_said():
    unknown, ff = nn.Sequential(nn.Linear(16, 16)), nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16))
    for model, says in ((nn.ModuleDict({"net": nn.ModuleList([unknown, ff])}), r"net.\*.\*"), (encoder(), "in_proj")):
        with pytest.warns(UserWarning, match=f"layers of its adapted blocks are not adapted .*{says}"):
            adapt(model)


@pytest.mark.slow
def test_without_peft_the_extra_is_named():
    code = "import sys; sys.modules['peft'] = None; import efft_kernels.peft"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'efft_kernels.peft needs PEFT: pip install "efft_kernels[peft]"' in done.stderr


TARGETS = ["qkv", "attn.proj", "fc1", "fc2"]


def lora(model=None, name="default", **options):
    """A ViT with PEFT's LoRA, both factors random."""
    torch.manual_seed(2)
    fixed = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False}
    config = peft.LoraConfig(**{**fixed, **options})
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config)
        return model
    return peft.get_peft_model(vit() if model is None else model, config).eval()


@pytest.fixture
def passes(monkeypatch):
    """A list with one entry per call of the kernel."""
    calls = []
    monkeypatch.setattr(fused, "lowrank_linear", lambda *a, **k: calls.append(1) or ops.lowrank_linear(*a, **k))
    return calls


def halve(model):
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.scale_layer(0.5)
    return model


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": ["qkv", "fc2"]}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lora_is_the_same_to_rounding(dtype, options, passes):
    model = lora(vit().to(dtype), **options)
    # the error of one output enters every gradient of its loss, so a single batch proves little
    batches = [torch.randn_like(images(dtype=dtype)) for _ in range(8)]

    def stacked(model, dtype):
        found = [results(model, x.to(dtype)) for x in batches]
        return {key: torch.stack([one[key] for one in found]) for key in found[0]}

    plain, exact = stacked(model, dtype), stacked(copy.deepcopy(model).double(), torch.float64)
    fast = stacked(accelerate_lora(model), dtype)
    assert len(passes) == 8 * 2 * len(options.get("target_modules", TARGETS)) and fast.keys() == plain.keys()
    for key in fast:
        assert_accurate(fast[key], plain[key], exact[key], key, exact[key].abs().sum())
    again = accelerate_lora(model, backend="reference").modules()
    assert {layer.efft_backend for layer in again if isinstance(layer, FastLoraLinear)} == {"reference"}
    restore_lora(model)
    assert_bits(stacked(model, dtype), plain)


def test_lora_with_factors_of_another_dtype_than_the_base(passes):
    model, x = lora(vit().bfloat16()), images(dtype=torch.bfloat16)
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    exact = results(copy.deepcopy(model).double(), x.double())
    # as PEFT computes it with factors in the dtype of the base
    plain, fast = results(copy.deepcopy(model).bfloat16(), x), results(accelerate_lora(model), x)
    assert len(passes) == 8
    for key in fast:
        assert fast[key].dtype == (torch.bfloat16 if key == "y" else torch.float32)
        own, error = (r[key].double() - exact[key] for r in (plain, fast))
        assert error.norm() <= 2 * own.norm(), key


def test_several_lora_adapters_are_one_pass(passes):
    model, x = lora(lora(vit().double()), "second", r=3, use_rslora=True), images(dtype=torch.float64)
    model.base_model.set_adapter(["default", "second"])
    plain = results(model.eval(), x)
    assert len(plain) == 1 + 2 * 2 * 8
    fast = results(accelerate_lora(model), x)
    assert len(passes) == 8
    assert_same(fast, plain, rtol=1e-10, atol=1e-10)
    model.set_adapter("second")
    restored = results(model, x)
    assert_same(restored, results(restore_lora(model), x), rtol=1e-10, atol=1e-10)


def test_lora_follows_its_parameters_scales_and_merges(passes, tmp_path):
    fast, plain = (lora(vit().double()) for _ in range(2))
    fast.load_state_dict(plain.state_dict())
    accelerate_lora(fast)
    x = images(dtype=torch.float64)
    same = lambda: torch.testing.assert_close(fast(x), plain(x), rtol=1e-10, atol=1e-10)
    for model in (fast, plain):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()
    same()
    for model in (fast, plain):
        model.load_state_dict({key: value * 1.1 for key, value in model.state_dict().items()})
    same()
    halve(fast), halve(plain)
    same()
    for call in ("merge_adapter", "unmerge_adapter", "disable_adapter_layers", "enable_adapter_layers"):
        for model in (fast, plain):
            getattr(model, call)()
        before = len(passes)
        same()
        assert len(passes) - before == (8 if call in ("unmerge_adapter", "enable_adapter_layers") else 0), call
    fast.save_pretrained(tmp_path)
    loaded = halve(accelerate_lora(peft.PeftModel.from_pretrained(copy.deepcopy(plain).unload(), tmp_path)))
    torch.testing.assert_close(loaded(x), plain(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(copy.deepcopy(fast).merge_and_unload()(x), plain(x), rtol=1e-9, atol=1e-9)
    assert_same(results(copy.deepcopy(fast), x), results(plain, x), rtol=1e-9, atol=1e-9)


def test_a_merge_past_the_version_counter_is_seen_by_the_packed_weights():
    # PEFT writes through weight.data; the layers are wide enough to be packed
    model, x = lora(vit(embed_dim=192)), images(8)
    plain = model(x)
    accelerate_lora(model)
    for _ in range(2):
        torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-4)
        model.merge_adapter()
        torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()


def test_what_the_kernel_cannot_take_is_left_to_peft(passes):
    x, dropped = images(), lora(lora_dropout=0.4).train()
    torch.manual_seed(0)
    plain = results(dropped, x)
    accelerate_lora(dropped)
    torch.manual_seed(0)
    assert_bits(results(dropped, x), plain)
    assert not passes
    dropped.eval()(x)
    assert len(passes) == 8

    mixed, names = lora(lora(), "second").eval(), ["default", "second"]
    plain = mixed(x, adapter_names=names)
    accelerate_lora(mixed)
    passes.clear()
    assert torch.equal(mixed(x, adapter_names=names), plain) and not passes
    hooked = accelerate_lora(lora())
    hooked.get_base_model().blocks[0].mlp.fc1.lora_A["default"].register_forward_hook(lambda *a: None)
    hooked(x)
    assert len(passes) == 7
    lora(mixed, "dora", use_dora=True)
    mixed.set_adapter("dora")
    passes.clear()
    expected = restore_lora(copy.deepcopy(mixed)).eval()(x)
    assert torch.equal(mixed.eval()(x), expected) and not passes


def test_lora_layers_that_gain_nothing_are_refused_by_name(passes):
    for function in (accelerate_lora, restore_lora):
        refuses(TypeError, "model must be an nn.Module, got int", function, 3)
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model, says in [
            (lora(use_dora=True), "blocks.0.attn.qkv: adapter 'default' has DoraLinearVariant"),
            (lora(lora_bias=True), "adapter 'default' has lora_bias=True.* and 3 more; strict=False"),
            (lora(lora(), "second", use_dora=True), "adapter 'second' has DoraLinearVariant"),
            (lora(transformers.GPT2LMHeadModel(config), target_modules=["c_attn"]), "c_attn: a Linear around Conv1D"),
            (lora(target_modules=["patch_embed.proj"]), "patch_embed.proj: a Conv2d around Conv2d"),
            (adapt(vit()), "PeftModel has no LoRA layer of PEFT"),
            (vit(), "VisionTransformer has no LoRA layer of PEFT"),
        ]:
            refuses(ValueError, says, accelerate_lora, model)
            assert not any(isinstance(module, FastLoraLinear) for module in model.modules())
        both = lora(target_modules=["patch_embed.proj", "fc1"])
        y = both(images(2))
        accelerate_lora(both, strict=False)
    torch.manual_seed(0)
    assert sum(isinstance(module, FastLoraLinear) for module in both.modules()) == 2
    x = images()
    torch.testing.assert_close(both(x), restore_lora(copy.deepcopy(both))(x), rtol=1e-4, atol=1e-4)
    assert len(passes) == 2 and y.shape == (2, 10)


@pytest.mark.slow
def test_lora_under_autocast_and_compiled(passes):
    model, x = lora(), images()
    with torch.autocast("cpu", torch.bfloat16):
        plain, fast = model(x), accelerate_lora(model)(x)
    assert len(passes) == 8 and fast.dtype == plain.dtype
    torch.testing.assert_close(fast, plain, rtol=0.05, atol=0.05)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x), rtol=1e-4, atol=1e-4)
