"""What programs do to a model besides training it, before and after it is injected: the adapter works or says why."""

import copy
import dataclasses
import warnings
from contextlib import nullcontext
from types import MethodType, SimpleNamespace

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from models import DROPPED, LOW_RANK, METHODS, PLAIN, adapted, assert_same, gradients, images, shake, vit
from refusals import refuses
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import efft_kernels as ek
from efft_kernels.serving import AdapterBank


class Half(nn.Module):
    def forward(self, t):
        return t * 0.5


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_parametrization_is_taken_off_an_injected_model(when):
    model, x = vit(), images()
    linears = [model.blocks[0].mlp.fc1, model.blocks[1].attn.qkv]
    if when == "after":
        shake(ek.inject(model, PLAIN))
    for linear in linears:
        parametrizations.weight_norm(linear)
    parametrize.register_parametrization(linears[0], "bias", Half())
    if when == "before":
        shake(ek.inject(model, PLAIN))
    want = model(x)
    parametrize.remove_parametrizations(linears[0], "weight")
    torch.testing.assert_close(model(x), want)
    parametrize.remove_parametrizations(linears[0], "bias")
    parametrize.remove_parametrizations(linears[1], "weight")
    torch.testing.assert_close(model(x), want)
    want = model(x)
    torch.testing.assert_close(ek.merge(model)(x), want, rtol=1e-4, atol=1e-5)
    ek.delete_adapter(ek.unmerge(model), "default")
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("leave", ["delete", "merge", "release"])
def test_a_parametrization_put_on_after_inject_stays_when_the_adapter_leaves(part, leave):
    model, x = vit(), images()
    if leave == "release":
        bank = AdapterBank(model)
        bank.add("a", adapted(PLAIN))
    else:
        ek.inject(model, PLAIN)
    linear = model.blocks[0].attn.qkv
    parametrize.register_parametrization(linear, part, Half())
    want = model(x)
    if leave == "delete":
        ek.delete_adapter(model, "default")
    elif leave == "merge":
        ek.merge(model, dequantize=True)
        assert not any(m.training for m in model.modules())
        ek.unmerge(model.train()).eval()
        ek.unmerge(ek.merge(model.train(), dequantize=True).eval())
        assert not any(m.training for m in model.modules())
    else:
        bank.release()
    torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(copy.deepcopy(model)(x), want)
    assert parametrize.is_parametrized(linear, part)
    parametrize.remove_parametrizations(linear, part)
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("method", METHODS)
def test_reset_parameters_makes_groups_new_again(method):
    with torch.device("meta"):
        model = ek.inject(vit(), METHODS[method])
    model.to_empty(device="cpu")
    with torch.no_grad():
        for t in (*model.efft.parameters(), *model.efft.buffers()):
            t.fill_(float("nan"))
    model.load_state_dict(vit().state_dict(), strict=False)
    reset = [module for module in model.efft.modules() if hasattr(module, "reset_parameters")]
    assert {id(p) for m in reset for p in m.parameters()} == {id(p) for p in model.efft.parameters()}
    if method == "lora-xs" or method not in LOW_RANK:
        refuses(RuntimeError, "cannot be initialised without the weights", reset[0].reset_parameters)
        return
    for module in reset:
        module.reset_parameters()
    x = images()
    want = model.eval()(x).detach()
    with ek.disable_adapter(model):
        torch.testing.assert_close(model(x), want)
    shake(model)
    assert not torch.allclose(model(x), want)


@pytest.mark.parametrize("method", ["efft2", "fact-tk", "lora-xs", "vera"])
def test_what_is_made_under_inference_mode_can_be_trained(method, tmp_path):
    config, model, other, x = METHODS[method], vit(), vit(), images()
    with torch.inference_mode():
        ek.inject(model, config, head=4)
        ek.add_adapter(model, config, "b")
        ek.save_adapter(model, tmp_path / "a.safetensors")
        loaded = ek.load_adapter(other, tmp_path / "a.safetensors")
        layer = ek.EFFTLinear.from_linear(nn.Linear(8, 8), rank=2)
    assert not any(p.is_inference() for p in (layer.u, layer.sigma, layer.v))
    for made in (model, loaded):
        made.train()(x).sum().backward()
        trained = ek.adapter_parameters(made)
        assert all(p.grad is not None for p in trained) and made.head.weight.grad is not None


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("around", [lambda model: nullcontext(), ek.disable_adapter])
@pytest.mark.parametrize(
    "config", [DROPPED, *(dataclasses.replace(METHODS[name], rank_dropout=0.5) for name in ("efft2", "lora-all"))]
)
def test_a_recomputed_block_has_the_masks_of_its_forward(config, around, frozen):
    model, x, found = vit().train(), images(), []
    model.register_forward_hook(lambda module, args, y: SimpleNamespace(found=[{"logits": y}]))
    shake(ek.inject(model, config, train=("patch_embed",)))
    model.efft.requires_grad_(not frozen)
    assert all(group.drops for group in model.efft["default"].values())
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(0)
        logits = model(x).found[0]["logits"]
        with around(model):
            logits.square().sum().backward()
        found.append(gradients(model))
        model.zero_grad()
    assert_same(*found)


def test_a_sequential_calls_its_modules_and_not_the_adapter():
    model, x = nn.Sequential(vit(), nn.Linear(10, 3)), images()
    before = model(x)
    torch.testing.assert_close(ek.inject(model, PLAIN, train=("1",))(x), before)
    want = shake(model)(x)
    torch.testing.assert_close(ek.merge(model)(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, options", [("head", {}), ("extra", {"head": "keep", "train": ("extra",)})])
def test_a_frozen_weight_that_would_be_trained_elsewhere_is_refused(name, options):
    model = vit()
    setattr(model, name, nn.Linear(192, 768))
    getattr(model, name).weight = model.blocks[0].mlp.fc1.weight
    with pytest.raises(ValueError, match="blocks.0.mlp.fc1.weight stays frozen, but is also a parameter of what is"):
        ek.inject(model, PLAIN, **options)
    assert not hasattr(model, "efft") and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("features", [False, True])
def test_two_adapters_in_one_loss_get_the_gradients_of_two_models(features):
    model = ek.inject(vit(), PLAIN, name="a")
    ek.add_adapter(model, PLAIN, "b")
    shake(model)
    x = images()
    run = (lambda m: m.forward_features(x).mean(1)) if features else (lambda m: m(x))
    alone = {name: copy.deepcopy(ek.set_adapter(model, name)) for name in "ab"}
    sum_of = lambda one, two: (one - 2 * two).square().sum()
    sum_of(*(run(alone[name]) for name in "ab")).backward()
    for _ in range(2):
        outputs = [run(ek.set_adapter(model, name)) for name in "ab"]
        sum_of(*outputs).backward()
        for name in "ab":
            for key, p in model.efft[name].named_parameters():
                torch.testing.assert_close(p.grad, alone[name].efft[name].get_parameter(key).grad)
                assert p.requires_grad == (name == "b"), "frozen again after the backward"
        model.zero_grad()
    ek.set_adapter(model, "a")
    assert not any(p.requires_grad or p.grad is not None for p in model.efft["b"].parameters())
    run(model).sum().backward()
    assert all(p.grad is not None and p.requires_grad for p in model.efft["a"].parameters())
    assert not any(p.grad is not None for p in model.efft["b"].parameters())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("method", ["efft2", "fact-tk", "lora"])
def test_a_traced_model_holds_the_operators_and_the_factors(method, grad, tmp_path):
    model = adapted(METHODS[method])
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, images())
    torch.jit.save(traced, tmp_path / "traced.pt")
    loaded, x = torch.jit.load(tmp_path / "traced.pt"), images(3)
    assert str(traced.inlined_graph).count("efft_kernels::lowrank_linear") == sum(map(len, slots(model)))
    for run in (traced, loaded):
        torch.testing.assert_close(run(x), model(x))
    shake(model)
    torch.testing.assert_close(traced(x), model(x), msg="factors are parameters, not constants")
    got = torch.autograd.grad(traced(x).square().sum(), list(model.efft.parameters()))
    want = torch.autograd.grad(model(x).square().sum(), list(model.efft.parameters()))
    torch.testing.assert_close(got, want)


def slots(model):
    return [group.slots for group in model.efft["default"].values()]


def _own_formula(linear):
    linear.forward = lambda x: F.linear(x, linear.weight, linear.bias)


def _compiled_forward(linear):
    linear.forward = torch.compile(linear.forward, backend="eager")


def _method_of_another_function(linear):
    linear.forward = MethodType(lambda self, x: x, linear)


@pytest.mark.parametrize("hide", [_own_formula, _compiled_forward, _method_of_another_function])
def test_a_forward_on_the_instance_that_would_hide_the_adapter_is_refused(hide, tmp_path):
    model = vit()
    hide(model.blocks[1].mlp.fc2)
    ek.save_adapter(ek.inject(vit(), PLAIN), tmp_path / "a.safetensors")
    for attempt in (
        lambda: ek.plan(model, PLAIN),
        lambda: ek.inject(model, PLAIN),
        lambda: ek.load_adapter(model, tmp_path / "a.safetensors"),
        lambda: AdapterBank(model).add("a", tmp_path / "a.safetensors"),
    ):
        refuses(TypeError, r"blocks.1.mlp.fc2 has a forward of its own, .* set on the instance", attempt)
        if hasattr(model, "efft"):
            model.efft.release()
    assert type(model.blocks[0].mlp.fc2) is nn.Linear
    refuses(TypeError, "has a forward of its own", ek.EFFTLinear.from_linear, model.blocks[1].mlp.fc2, rank=2)


def _bound(model):
    for linear in (m for m in model.modules() if isinstance(m, nn.Linear)):
        linear.forward = linear.forward  # as accelerate leaves it when it removes its hooks


def _align_devices(model):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.attach_align_device_hook(model, execution_device=torch.device("cpu"))
    for module in model.modules():
        if not hasattr(module, "_hf_hook"):
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu"))


def _offload(model):
    pytest.importorskip("accelerate").cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("prepare", [_bound, _align_devices, _offload])
def test_forwards_that_other_programs_put_on_the_instance_run_the_adapter(prepare):
    plain, x = vit(), images()
    before, want = plain(x), shake(ek.inject(copy.deepcopy(plain), PLAIN))
    model = copy.deepcopy(plain)
    prepare(model)
    if prepare is _offload:
        refuses(ValueError, "head is offloaded by accelerate and cannot be trained", ek.inject, model, PLAIN)
    ek.inject(model, PLAIN, head="keep" if prepare is _offload else "train")
    assert not any(p.is_meta for p in model.efft.parameters())
    model.efft.load_state_dict(want.efft.state_dict())
    torch.testing.assert_close(model(x), want(x))
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.efft.parameters())
    if prepare is _offload:
        refuses(ValueError, r"blocks.0.attn.qkv.weight is on the meta device", ek.merge, model)
        low_rank = ek.LoRAXSConfig(rank=2)
        ek.add_adapter(model, low_rank, "xs")
        xs = ek.inject(copy.deepcopy(plain), low_rank)
        torch.testing.assert_close(model.efft["xs"].state_dict(), xs.efft["default"].state_dict())
        ek.delete_adapter(model, "xs")
    else:
        torch.testing.assert_close(ek.merge(model)(x), want(x), rtol=1e-4, atol=1e-5)
        ek.unmerge(model)
    ek.delete_adapter(model, "default")
    torch.testing.assert_close(model(x), before)
    bank = AdapterBank(model)
    bank.add("a", want)
    with bank.use(["a", None]):
        mixed = bank.model(x)
    torch.testing.assert_close(mixed, torch.stack([want(x)[0], before[1]]))
    bank.release()
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("remove", ["while injected", "after"])
def test_hooks_of_accelerate_come_and_go(remove):
    hooks = pytest.importorskip("accelerate.hooks")
    model, x = vit(), images()
    before = model(x)
    hooks.add_hook_to_module(model.blocks[0].mlp.fc1, hooks.AlignDevicesHook("cpu"))
    shake(ek.inject(model, PLAIN))
    hooks.add_hook_to_module(model.blocks[1].mlp.fc1, hooks.AlignDevicesHook("cpu"))
    want = model(x)
    if remove == "while injected":
        hooks.remove_hook_from_module(model, recurse=True)
        assert torch.equal(model(x), want)
    ek.delete_adapter(model, "default")
    torch.testing.assert_close(model(x), before)
    hooks.remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(model(x), before)
    assert not torch.allclose(shake(ek.inject(model, PLAIN))(x), before)


def test_nothing_is_loaded_into_a_model_without_values(tmp_path):
    ek.save_adapter(adapted(), path := tmp_path / "a.safetensors")
    model = vit()
    model.head.to("meta")
    with pytest.raises(ValueError, match=r"head.weight is on the meta device, where the head of .* would be lost"):
        ek.load_adapter(model, path)
    with pytest.raises(ValueError, match="head is on the meta device, where .* would be lost"):
        AdapterBank(copy.deepcopy(model)).add("a", path)
    with pytest.raises(ValueError, match="blocks.0.attn.qkv is on the meta device, where .* would be lost"):
        ek.load_adapter(model.to("meta"), path, head="keep")


def test_a_forward_set_after_inject_must_reach_the_adapter():
    model, x = adapted(), images()
    want, linear = model(x), model.blocks[0].mlp.fc1
    reached, linear.forward = linear.forward, lambda x: reached(x) + 0
    torch.testing.assert_close(model(x), want)
    _own_formula(linear)
    for _ in range(2):
        refuses(RuntimeError, "forward set on the instance blocks.0.mlp.fc1 does not call the one", model, x)
    del linear.forward
    torch.testing.assert_close(model(x), want)


def test_linears_that_a_forward_passes_by_are_named_once():
    model, x = adapted(), images()
    mlp = model.blocks[1].mlp
    mlp.forward = lambda x: mlp.fc2(mlp.act(F.linear(x, mlp.fc1.weight, mlp.fc1.bias)))
    for mode in (True, False):
        model.train(mode)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(x), model(x)
        said = [str(w.message) for w in caught]
        assert len(said) == mode and all(
            "did not call blocks.1.mlp.fc1, so their updates had no effect" in s for s in said
        )
    bank = AdapterBank(vit())
    bank.add("a", adapted())
    bank.model.blocks[1].mlp.forward = lambda x: x
    with (
        bank.use(["a", None]),
        pytest.warns(UserWarning, match="did not call blocks.1.mlp.fc1 and 1 more adapted Linears"),
    ):
        bank.model(x)
    with warnings.catch_warnings(), bank.use(["a", None]):
        warnings.simplefilter("error")
        bank.model(x)


def test_a_forward_that_fails_names_no_linears():
    model = adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((RuntimeError, AssertionError)):
            model(torch.randn(2, 3, 7, 7))


def _replace(model):
    model.blocks[0].mlp.fc1 = nn.Linear(192, 768)


def _prune(model):
    model.prune_intermediate_layers([0], prune_norm=False, prune_head=False)


@pytest.mark.parametrize("change, path", [(_replace, "blocks.0.mlp.fc1"), (_prune, "blocks.1.attn.qkv")])
@pytest.mark.filterwarnings("ignore:the forward of this")
def test_a_module_is_replaced_in_an_injected_model(change, path, tmp_path):
    model, x = adapted(), images()
    change(model)
    want, before = model(x), {key: t.clone() for key, t in model.state_dict().items()}
    refuses(ValueError, f"{path} must be the Linear that inject adapted, but .* is there now", ek.merge, model)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    with pytest.warns(UserWarning, match=f"the file holds all factors of the adapter, but {path} must be"):
        ek.save_adapter(model, tmp_path / "a.safetensors")
    torch.testing.assert_close(model(x), want)
    ek.delete_adapter(model, "default")
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}


def test_a_bank_releases_what_is_left_of_its_model():
    model = vit()
    bank = AdapterBank(model)
    bank.add("a", adapted())
    old, fc1 = model.head, model.blocks[0].mlp.fc1
    model.reset_classifier(7)
    _replace(model)
    bank.release()
    assert type(old) is type(fc1) is nn.Linear and not hasattr(model, "efft")
    assert model(images()).shape == (2, 7)
    AdapterBank(model).release()


@pytest.mark.parametrize("head", ["train", 3, nn.Sequential(nn.LayerNorm(192), nn.Linear(192, 4)), "keep"], ids=str)
@pytest.mark.parametrize("train", [(), ("patch_embed", "head", "patch_embed.proj")], ids=str)
def test_disable_adapter_gives_the_model_before_inject_with_its_head(head, train, tmp_path):
    model, x = vit(), images(4)
    before, state = model(x).detach(), {key: t.clone() for key, t in model.state_dict().items()}
    ek.inject(model, PLAIN, head=head, train=train)
    optimizer = torch.optim.AdamW(ek.adapter_parameters(model), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(4) % 3).backward()
        optimizer.step()
    trained = model(x).detach()
    for twice in range(2):
        with ek.disable_adapter(model):
            assert torch.equal(model(x), before) and model.num_classes == 10
            assert {key: t.shape for key, t in model.state_dict().items() if "efft" not in key} == {
                key: t.shape for key, t in state.items()
            }
        assert torch.equal(model(x), trained)
        if not twice:
            model = copy.deepcopy(model)
    model.train()
    (part := [*model.head.modules()][-1]).eval()  # a mode of its own
    with ek.disable_adapter(model):
        pass
    assert not part.training
    part.train()
    with ek.disable_adapter(model):
        assert model.head.training and not any(p.requires_grad for p in model.head.parameters())
        model.eval().double()  # what is done to the model within is done to what comes back, too
        torch.testing.assert_close(model(x.double()).float(), before)
    assert (head == "keep" and not train) or all(p.requires_grad for p in model.head.parameters())
    assert not model.head.training
    torch.testing.assert_close(model(x.double()).float(), trained)
    with ek.disable_adapter(model):
        torch.testing.assert_close(model(x.double()).float(), before)
    ek.save_adapter(model.float(), tmp_path / "a.safetensors")
    if not isinstance(head, nn.Module):
        base = vit()
        base.load_state_dict(state)
        loaded = ek.load_adapter(base, tmp_path / "a.safetensors")
        torch.testing.assert_close(loaded(x), trained)
        with ek.disable_adapter(loaded):
            assert torch.equal(loaded(x), before)
            ek.delete_adapter(loaded, "default")
        assert torch.equal(loaded(x), before)
    own = model.head
    ek.delete_adapter(model, "default")
    assert torch.equal(model(x), before) and all(p.requires_grad for p in model.parameters())
    assert model.num_classes == 10 and (model.head is own) == isinstance(head, str)


def test_adapters_of_equal_shapes_share_one_graph():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, x = vit(depth=1), images()
    ek.inject(model, PLAIN, name="a0")
    compiled, graphs = torch.compile(model, backend="eager", fullgraph=True), []
    for i in range(4):
        if i:
            ek.add_adapter(model, PLAIN, f"a{i}")
        shake(model)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == graphs[:1] * 4
    ek.delete_adapter(model, "a3")
    ek.set_adapter(model, "a1")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs[0]


def test_a_shared_head_that_was_trained_is_told(tmp_path):
    model = ek.inject(vit(), PLAIN)
    nn.init.ones_(model.head.weight)  # within disable_adapter there is the head of before
    ek.add_adapter(model, PLAIN, "second")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ek.set_adapter(copy.deepcopy(ek.set_adapter(model, "default")), "second")
        ek.save_adapter(ek.set_adapter(model, "second"), tmp_path / "second", name="default")
        with ek.disable_adapter(model):
            ek.set_adapter(model, "default")
        model.head.load_state_dict(model.head.state_dict())
        ek.delete_adapter(ek.set_adapter(model, "second"), "default")
        nn.init.zeros_(model.head.weight)
        ek.set_adapter(ek.add_adapter(model, PLAIN, "default"), "second")  # not the "default" that was deleted
        nn.init.ones_(model.head.bias)
        ek.save_adapter(model, tmp_path / "second")  # the active one
    said = "head, which all adapters of a model share, changed since 'default' was active"
    model.head.weight.data[:2] = torch.tensor([[1.0], [-1.0]])  # of the same sum
    with pytest.warns(UserWarning, match=said):
        ek.save_adapter(model, tmp_path / "default", name="default")
    nn.init.zeros_(model.head.weight)
    optimizer = torch.optim.AdamW(model.head.parameters(), fused=True)  # its writes do not count as versions
    model(images()).sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=said):
        ek.set_adapter(model, "default")
    with ek.disable_adapter(ek.add_adapter(model, PLAIN, "third")):
        ek.set_adapter(model, "second")
    nn.init.ones_(model.head.weight)
    with pytest.warns(UserWarning, match="changed since 'third' was active"):
        ek.set_adapter(model, "third")
