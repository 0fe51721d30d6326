"""Adapter files, and several adapters on one model."""

import copy
import json
import os
import random
import stat
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from models import METHODS, PLAIN, gradients, images, loss_of, shake, swin, vit
from refusals import refuses
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.prune import random_unstructured

import efft_kernels as ek
from efft_kernels.serving import AdapterBank

SMALL = ek.EFFTConfig(rank=4, factor_dropout=0.0)
OTHER = ek.LoRAConfig(rank=2, targets=("fc1", "proj"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


def bare(seed: int = 0, make=vit, **options):
    torch.manual_seed(seed)
    return make(**options)


@pytest.mark.parametrize("make", [vit, swin])
@pytest.mark.parametrize("method", METHODS)
def test_a_file_brings_the_outputs_back(make, method, path):
    model = shake(ek.inject(bare(make=make), METHODS[method]))
    ek.save_adapter(model, path)
    loaded, x = ek.load_adapter(bare(make=make), path), images()
    assert torch.equal(loaded(x), model(x)) and loaded.efft.state_dict().keys() == model.efft.state_dict().keys()
    trained = lambda m: {n for n, p in m.named_parameters() if p.requires_grad}
    assert trained(loaded) == trained(model)


def test_metadata_says_what_it_is(path):
    model = ek.inject(vit(), SMALL)
    ek.save_adapter(model, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        factors = {f"{group}.{factor}" for group in ("attn", "ffn") for factor in ("u", "sigma", "v")}
        assert set(file.keys()) == factors | {"head/head.weight", "head/head.bias"}
    assert metadata["version"] == ek.__version__ and metadata["fingerprint"] == ek.plan(vit(), SMALL).fingerprint
    assert (metadata["model"], metadata["base_model"]) == ("VisionTransformer", "vit_tiny_patch16_224")
    assert json.loads(metadata["config"])["method"] == "EFFTConfig"
    written = [(ek.save_adapter(model, path, base_model="own \u00e9"), path.read_bytes())[1] for _ in range(3)]
    assert len({*written}) == 1, "equal contents are equal files"
    assert _metadata(path)["base_model"] == "own \u00e9"


def test_device_and_mode_follow_the_model_and_factors_stay_float32(path):
    ek.save_adapter(shake(ek.inject(vit(), SMALL)), path)
    model = ek.load_adapter(vit().bfloat16().train(), path)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.efft.parameters())
    assert model.efft["default"].training


@pytest.mark.parametrize("other", [lambda: vit(depth=3), lambda: vit(embed_dim=96), swin], ids=["deep", "wide", "swin"])
def test_an_adapter_of_another_model_is_refused(other, path):
    ek.save_adapter(ek.inject(vit(), SMALL), path)
    model = other()
    with pytest.raises(ValueError, match="is an adapter of vit_tiny_patch16_224, whose Linears or shapes differ"):
        ek.load_adapter(model, path)
    assert not hasattr(model, "efft") and all(p.requires_grad for p in model.parameters())


def test_what_is_no_adapter_file_is_refused(path, tmp_path):
    model = ek.inject(vit(), SMALL)
    for call in (ek.save_adapter, ek.load_adapter, lambda _, path: ek.read_adapter(path)):
        refuses(TypeError, "path must be that of a file, got None", call, model, None)
    ek.save_adapter(model, path)
    good = path.read_bytes()

    def refused(says, error=ValueError):
        target = vit()
        refuses(error, says, ek.load_adapter, target, path)
        assert not hasattr(target, "efft")

    for content in (b"", good[:7], good[:100], good[:-1], good[: len(good) // 2], b"\xff" * 200, good + b"x"):
        path.write_bytes(content)
        refused("is not a complete safetensors file; it may be truncated or corrupt")
    path.write_bytes(good)
    for metadata in (None, {**_metadata(path), "format": "efft_kernels adapter 4"}):  # of no format, of a later one
        save_file(load_file(path), path, metadata)
        refused("must be a file written by save_adapter")
    path.unlink()
    refused("there is no adapter file", FileNotFoundError)


def _save(tensors, path, metadata):
    """Write a changed file, with the digest of its contents."""
    ek.tensor_file.write_tensors(path, tensors, metadata)


def _metadata(path):
    with safe_open(path, "pt") as file:
        return {key: text for key, text in file.metadata().items() if key != "digest"}


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda m: mock.patch.object(os, "fsync", side_effect=OSError("no space left")), "no space left"),
        (lambda m: m.efft["default"]["attn"].u.data.fill_(torch.nan), "finite numbers, but attn.u has NaN or infinity"),
        (lambda m: m.patch_embed.proj.weight.data.fill_(torch.inf), "numbers, but patch_embed.proj.weight has NaN or"),
        (lambda m: m.efft.to("meta"), "attn.u is on the meta device, offloaded or not loaded"),
        (lambda m: weight_norm(m.efft["default"]["ffn"], "v"), "group 'ffn' must be plain parameters"),
        (lambda m: random_unstructured(m.efft["default"]["ffn"], "v", 0.5) and None, "'ffn' must be plain parameters"),
        (ek.disable_adapter, "must be called outside of disable_adapter"),
    ],
)
def test_what_cannot_be_saved_leaves_the_old_file(spoil, says, path):
    model = ek.inject(vit(), SMALL, train=("patch_embed.proj",))
    ek.save_adapter(model, path)
    before, within = path.read_bytes(), spoil(model)
    with within if hasattr(within, "__enter__") else nullcontext(), pytest.raises((OSError, ValueError), match=says):
        ek.save_adapter(model, path, name="default")
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_parametrized_factor_merges():
    model, x = shake(ek.inject(vit(), PLAIN)), images()
    weight_norm(model.efft["default"]["attn"], "u")
    torch.testing.assert_close(model(x), ek.merge(model)(x), rtol=1e-4, atol=1e-5)


def test_several_adapters_switch_and_go():
    model, x = bare(), images()
    plain, weights = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    shake(ek.inject(model, SMALL, name="first"))
    first = model(x)
    ek.add_adapter(model, OTHER, "second")
    torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-5)
    for p in model.efft["second"].parameters():
        torch.nn.init.normal_(p, std=0.1)
    second = model(x)
    trained = {n.split(".")[1] for n, p in model.named_parameters() if p.requires_grad and n.startswith("efft.")}
    assert trained == {"second"} and not torch.equal(first, second)

    assert torch.equal(ek.set_adapter(model, "first")(x), first)
    with torch.no_grad():  # cached pairs, if any, must be those of the active adapter
        for name, want in (("first", first), ("second", second), ("first", first)):
            torch.testing.assert_close(ek.set_adapter(model, name)(x), want)
    with ek.disable_adapter(model) as same:
        assert same is model and torch.equal(model(x), plain)
        refuses(ValueError, "merge needs an active adapter", ek.merge, model)
    assert torch.equal(model(x), first)

    ek.merge(model)
    torch.testing.assert_close(model(x), first, rtol=1e-4, atol=1e-5)
    ek.unmerge(model)
    ek.delete_adapter(model, "first")
    assert torch.equal(model(x), plain)
    refuses(ValueError, "adapter_parameters needs an active adapter", ek.adapter_parameters, model)
    torch.testing.assert_close(ek.set_adapter(model, "second")(x), second)
    ek.delete_adapter(model, "second")
    assert torch.equal(model(x), plain)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert model.state_dict().keys() == weights.keys() and not hasattr(model, "efft")
    assert all(type(m) is torch.nn.Linear for m in model.modules() if isinstance(m, torch.nn.Linear))
    ek.inject(model, SMALL)


def test_files_of_two_adapters_load_beside_each_other(tmp_path):
    x, outputs = images(), {}
    for name, config in (("first", SMALL), ("second", OTHER)):
        model = shake(ek.inject(bare(), config, name=name))
        outputs[name] = model(x)
        ek.save_adapter(model, tmp_path / name, name=name)
    model = bare()
    for name in outputs:
        ek.load_adapter(model, tmp_path / name, name=name)
    for name, want in outputs.items():
        assert torch.equal(ek.set_adapter(model, name)(x), want)
    refuses(ValueError, "already has an adapter 'first'", ek.load_adapter, model, tmp_path / "first", name="first")


def test_names_that_are_not_there():
    model = ek.inject(vit(), SMALL, name="mine")
    for act in (lambda: ek.set_adapter(model, "yours"), lambda: ek.delete_adapter(model, "yours")):
        refuses(ValueError, "name must be one of the model's adapters, 'mine', got 'yours'", act)
    refuses(TypeError, r"name must be a str, got \['mine'\]", ek.set_adapter, model, ["mine"])
    refuses(ValueError, "already has an adapter 'mine'", ek.add_adapter, model, OTHER, "mine")
    for act in (lambda m: ek.add_adapter(m, OTHER, "x"), lambda m: ek.set_adapter(m, "x"), ek.adapter_parameters):
        refuses(ValueError, "must have adapters", act, vit())


def test_switching_deleting_and_an_error_inside_disable():
    model = ek.add_adapter(ek.inject(vit(), PLAIN), PLAIN, "b")
    with ek.disable_adapter(model):
        ek.set_adapter(model, "default")
    assert model.efft.active == "default"
    ek.set_adapter(model, "b")
    with pytest.raises(RuntimeError), ek.disable_adapter(model):
        raise RuntimeError
    assert model.efft.active == "b"
    with ek.disable_adapter(model):
        ek.delete_adapter(model, "b")
    assert model.efft.active is None and model(images()).isfinite().all()


def trained(make=vit, head="train", **options):
    """A model after a step that changed its factors and head."""
    model = shake(ek.inject(bare(make=make, **options), PLAIN, head=head))
    loss_of(model, images()).backward()
    torch.optim.SGD(ek.adapter_parameters(model), lr=0.5).step()
    model.zero_grad()
    return model


@pytest.mark.parametrize("make", [vit, swin])
@pytest.mark.parametrize("classes", ["train", 3], ids=["same", "other"])
def test_a_file_brings_the_trained_head_back(make, classes, path):
    model, x = trained(make, classes), images()
    ek.save_adapter(model, path)
    with pytest.warns(UserWarning, match="trained on other weights"):
        loaded = ek.load_adapter(bare(1, make).double().train(), path)
    loaded.float().eval()
    weight = lambda m: m.head.fc.weight if make is swin else m.head.weight
    assert torch.equal(weight(loaded), weight(model)) and weight(loaded).requires_grad
    assert loaded.num_classes == model.num_classes
    # the base weights differ; with those of the first model the outputs are equal
    base = {key: t for key, t in model.state_dict().items() if not key.startswith("head")}
    loaded.load_state_dict(base, strict=False)
    assert torch.equal(loaded(x), model(x))
    ours, theirs = gradients(loaded, loss_of(loaded, x)), gradients(model, loss_of(model, x))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_decides_whether_a_file_gets_the_head(path):
    def keys(model, **options):
        ek.save_adapter(model, path, **options)
        with safe_open(path, "pt") as file:
            return {key for key in file.keys() if key.startswith("head")}

    head = {"head/head.weight", "head/head.bias"}
    assert keys(ek.inject(vit(), PLAIN)) == head and keys(ek.inject(vit(), PLAIN), head=False) == set()
    kept = ek.inject(vit(), PLAIN, head="keep")
    assert keys(kept) == set() and keys(kept, head=True) == head
    assert keys(trained().requires_grad_(False)) == head
    headless = ek.inject(vit(num_classes=0), PLAIN)
    assert keys(headless) == set()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="head must not be True for this VisionTransformer, which has none"):
        ek.save_adapter(headless, path, head=True)
    assert path.read_bytes() == before


def test_whoever_loads_may_leave_the_head_of_the_file(path):
    ek.save_adapter(trained(), path)
    plain = bare(1)
    own = plain.head.weight.clone()
    ek.load_adapter(plain, path, head="keep")
    assert torch.equal(plain.head.weight, own) and not plain.head.weight.requires_grad
    assert ek.load_adapter(vit(), path, head=4)(images()).shape == (2, 4)
    module = nn.Linear(192, 6)
    assert ek.load_adapter(vit(), path, head=module).head is module and module.weight.requires_grad
    ek.save_adapter(trained(), path, head=False)
    assert ek.load_adapter(vit(), path, head=3)(images()).shape == (2, 3)


def test_a_head_of_its_own_kind(path):
    make = lambda: nn.Sequential(nn.BatchNorm1d(192), nn.Linear(192, 3))
    model = ek.inject(bare(), PLAIN, head=make())
    ek.save_adapter(model.train(), path)
    assert set(ek.read_adapter(path).head) == {f"head.{key}" for key in model.head.state_dict()}
    target = bare()
    refuses(ValueError, r"'keep': head.0.bias must be of shape None .* got \(192,\)", ek.load_adapter, target, path)
    assert not hasattr(target, "efft") and all(p.requires_grad for p in target.parameters())
    target.head = make()
    x = images()
    assert torch.equal(ek.load_adapter(target, path).eval()(x), model.eval()(x))


def test_a_head_that_does_not_fit_is_refused(path):
    ek.save_adapter(trained(), path)
    tensors, metadata = load_file(path), _metadata(path)
    wide = torch.zeros(10, 193)
    for change, says in [
        ({"head/head.weight": wide}, r"head.weight must be of shape \(10, 192\) .* got \(10, 193\)"),
        ({"head/head.bias": torch.zeros(9)}, r"head.bias must be of shape \(10,\) .* got \(9,\)"),
        ({"head/head.bias": None}, r"head.bias must be of shape \(10,\) .* got None"),
        ({"head/other": wide}, r"other must be of shape None .* got \(10, 193\)"),
        ({"head/head.weight": torch.tensor(1.0)}, r"head.weight must be of shape \(10, 192\) .* got \(\)"),
    ]:
        _save({key: t for key, t in {**tensors, **change}.items() if t is not None}, path, metadata)
        target = vit()
        own = target.head.weight.clone()
        with pytest.raises(ValueError, match=f"does not fit; load the adapter alone with head='keep': {says}"):
            ek.load_adapter(target, path)
        assert not hasattr(target, "efft") and torch.equal(target.head.weight, own)
        assert all(p.requires_grad for p in target.parameters())
    _save(tensors, path, metadata)
    weight_norm(target.head)
    refuses(ValueError, r"original0 must be of shape \(10, 1\) .* got None", ek.load_adapter, target, path)
    _save(tensors, path, metadata)
    with pytest.raises(ValueError, match="does not fit; load the adapter alone with head='keep'"):
        ek.load_adapter(vit(num_classes=0), path)
    assert ek.load_adapter(vit(num_classes=0), path, head="keep")(images()).shape == (2, 192)


@pytest.mark.parametrize("number", [1, 2])
def test_a_file_that_an_earlier_version_wrote(number):
    files = Path(__file__).with_name("files")  # written by the commits that had these formats, with what merge added
    base = vit(embed_dim=16, num_heads=2, num_classes=3)
    before = {key: t.clone() for key, t in base.state_dict().items()}
    model = ek.load_adapter(base, files / f"format{number}.safetensors", **({"head": "keep"} if number == 1 else {}))
    assert (number == 1) == torch.equal(model.head.weight, before["head.weight"])
    after = ek.merge(model).state_dict()
    for key, update in load_file(files / "updates.safetensors").items():
        torch.testing.assert_close(after[key] - before[key], update, rtol=1e-5, atol=1e-5)


def test_a_second_adapter_does_not_take_the_head_of_the_first(path):
    ek.save_adapter(trained(), path)
    model, x = shake(ek.inject(bare(), PLAIN, name="first")), images()
    before = model(x)
    says = "holds a head that differs .* serves 'first'; head='keep' loads the adapter without it"
    refuses(ValueError, says, ek.load_adapter, model, path, name="second")
    for options in (dict(head=7), dict(backend="reference")):
        with pytest.raises(ValueError, match="head and backend can only be chosen for a plain model"):
            ek.load_adapter(model, path, name="second", **options)
    assert list(model.efft) == ["first"] and torch.equal(model(x), before)
    ek.load_adapter(model, path, name="second", head="keep")
    assert torch.equal(ek.set_adapter(model, "first")(x), before)


def test_other_weights_of_the_same_shapes_are_noticed(path):
    ek.save_adapter(shake(ek.inject(bare(), PLAIN)), path, base_model="first")
    other = bare(1)
    says = "trained on other weights of first than this VisionTransformer has: .* sampled tensors differ, such as "
    refuses(ValueError, says, ek.load_adapter, other, path, strict=True)
    assert not hasattr(other, "efft") and all(p.requires_grad for p in other.parameters())
    with pytest.warns(UserWarning, match=says):
        ek.load_adapter(other, path)
    one = bare()
    with torch.no_grad():
        one.blocks[1].mlp.fc2.weight.mul_(1.5)
    with pytest.raises(ValueError, match="1 of 30 sampled tensors differ, such as blocks.1.mlp.fc2.weight"):
        ek.load_adapter(one, path, strict=True)
    for name, options in {"reg_token": {"reg_tokens": 4}, "cls_token": dict(class_token=False, global_pool="")}.items():
        tokens = vit(**options)
        tokens.load_state_dict({k: t for k, t in bare().state_dict().items() if k != "pos_embed"}, strict=False)
        refuses(ValueError, f"sampled tensors differ, such as {name}", ek.load_adapter, tokens, path, strict=True)


def test_the_same_weights_in_other_hands_are_the_same(path):
    ek.save_adapter(shake(ek.inject(bare(), PLAIN)), path)
    ready = bare().requires_grad_(False)
    ready.reset_classifier(3)  # the head is no frozen weight
    for model in (bare().bfloat16(), bare().half(), bare().double(), ready, vit(img_size=48)):
        if model.patch_embed.img_size == (48, 48):  # the table of places is of another shape
            model.load_state_dict({k: t for k, t in bare().state_dict().items() if k != "pos_embed"}, strict=False)
        ek.load_adapter(model, path, strict=True)
    ek.save_adapter(shake(ek.inject(bare().bfloat16(), PLAIN)), path)
    ek.load_adapter(bare(), path, strict=True)
    nn.init.constant_((model := bare()).norm.bias, torch.nan)
    ek.save_adapter(ek.inject(copy.deepcopy(model), PLAIN), path)
    ek.load_adapter(model, path, strict=True)


def test_a_frozen_head_is_a_frozen_weight(path):
    model, says = shake(ek.inject(bare(), PLAIN, head="keep")), "tensors differ, such as head"
    ek.save_adapter(model, path, classes=list("abcdefghij"), multilabel=True)
    other, narrow, bank = bare(), bare(), AdapterBank(bare())
    other.head.weight.data.normal_()
    narrow.reset_classifier(3)
    for m in (other, narrow, kept := ek.inject(copy.deepcopy(other), PLAIN, head="keep")):
        refuses(ValueError, says, ek.load_adapter, m, path, name="b", strict=True)
    refuses(ValueError, says, bank.add, "b", kept, strict=True)
    with pytest.warns(UserWarning, match=says):
        ek.load_adapter(narrow, path, head="keep")
    with pytest.warns(UserWarning, match=says):
        (elsewhere := AdapterBank(copy.deepcopy(other))).add("a", path)
    assert elsewhere.labels("a") is None and not elsewhere.multilabel("a")
    bank.add("a", path, strict=True)
    bank.save("a", path)
    ek.save_adapter(ek.load_adapter(bare(), path, head="keep", strict=True), path)
    loaded, replaced = ek.load_adapter(bare(), path, strict=True), ek.load_adapter(other, path, head=10, strict=True)
    with pytest.warns(UserWarning, match=says):
        ek.load_adapter(kept, path, name="b", head="keep")
    found = [own for m in (loaded, replaced, narrow, kept) for own in m.efft.values()]
    stated = [(own.classes, own.multilabel, own.beside_head) for own in found]
    # the last but one was never in a file
    assert stated == [(tuple("abcdefghij"), True, True), *[(None, False, at == 2) for at in range(4)]]
    ek.save_adapter(loaded, path, multilabel=False)
    assert not ek.read_adapter(path).multilabel


PREPARATION = ek.Preparation((32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear", 0.9, "center")


def test_a_file_states_its_preparation_and_classes(path):
    model = ek.inject(bare(), PLAIN, head=3)
    ek.save_adapter(model, path, preparation=PREPARATION, classes=["cat", "dog", "fish"], multilabel=True)
    file = ek.read_adapter(path)
    assert (file.format, file.preparation, file.classes) == (3, PREPARATION, ("cat", "dog", "fish"))
    loaded = ek.load_adapter(bare(), path, strict=True)
    ek.save_adapter(loaded, path)  # what is not said again is kept
    assert (ek.read_adapter(path).preparation, ek.read_adapter(path).classes) == (file.preparation, file.classes)
    ek.save_adapter(loaded, path.with_name("headless"), head=False)
    assert ek.read_adapter(path.with_name("headless")).classes is None
    kept = ek.load_adapter(bare(), path, head="keep").efft["default"]
    assert (kept.preparation, kept.classes, kept.multilabel) == (PREPARATION, None, False)
    wide = bare(img_size=64)
    wide.load_state_dict({key: t for key, t in bare().state_dict().items() if key != "pos_embed"}, strict=False)
    with pytest.raises(ValueError, match="images of 32 x 32 pixels, but this VisionTransformer takes 64 x 64"):
        ek.load_adapter(wide, path, strict=True)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="classes must name the 3 classes of the head, got 2 names"):
        ek.save_adapter(model, path, classes=["cat", "dog"])
    wrong = {"preparation": {}, "base_model": Path("a"), "multilabel": "no", "classes": {"cat", "dog", "fish"}}
    for key, value in (*wrong.items(), ("classes", 3), ("classes", iter("abc"))):
        with pytest.raises(TypeError, match=f"{key} must be (of type|a sequence of names).*, got "):
            ek.save_adapter(model, path, **{key: value})
    assert path.read_bytes() == before


def test_what_happens_to_a_file_does_not_reach_the_loaded_adapter(path):
    model, x = shake(ek.inject(bare(), PLAIN)), images()
    ek.save_adapter(model, path)
    loaded, bank = ek.load_adapter(bare(), path), AdapterBank(bare())
    bank.add("a", path)
    with bank.use(["a", "a"]), torch.no_grad():
        want = loaded(x), bank.model(x)
    with open(path, "r+b") as file:
        file.write(os.urandom(path.stat().st_size))
    os.truncate(path, 10)
    path.unlink()
    with bank.use(["a", "a"]), torch.no_grad():
        assert torch.equal(loaded(x), want[0]) and torch.equal(bank.model(x), want[1])
    assert str(path) not in open("/proc/self/maps").read()


def test_every_flipped_bit_is_noticed(path):
    ek.save_adapter(shake(ek.inject(bare(), ek.EFFTConfig(rank=2))), path, head=False)
    good, draw = path.read_bytes(), random.Random(0)
    for place in draw.sample(range(8 * len(good)), 200):
        data = bytearray(good)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        refuses(ValueError, "is not a complete|is damaged|must be a file", ek.read_adapter, path)
    path.write_bytes(good.replace(b'"F32"', b'"I32"'))  # the same bytes as other numbers
    refuses(ValueError, "is damaged", ek.read_adapter, path)


def test_hostile_files_are_refused_and_leave_the_model_alone(path):
    ek.save_adapter(ek.inject(bare(), SMALL, head=7), path)
    tensors, metadata = load_file(path), _metadata(path)
    cast = lambda dtype: {k: t if k.startswith("head") else t.to(dtype) for k, t in tensors.items()}
    headless = {k: t[:0] if k.startswith("head") else t for k, t in tensors.items()}
    infinite = lambda key: {**tensors, key: tensors[key] / 0}
    cases = [
        (infinite("attn.u"), {}, "must hold finite numbers, but attn.u has NaN or infinity"),
        (infinite("head/head.weight"), {}, "must hold finite numbers, but head.weight has"),
        (headless, {}, "at least one class, got 0"),
        ({**tensors, "head/head.weight": tensors["head/head.weight"].to(torch.complex64)}, {}, "got torch.complex64"),
        ({**tensors, "attn.u": tensors["attn.u"][:, :3].clone()}, {}, r"attn.u of shape \(192, 4\), got \(192, 3\)"),
        ({k: t for k, t in tensors.items() if k != "ffn.v"}, {}, r"must hold ffn.v of shape \(4, 768\), got None"),
        (tensors, {"fingerprint": "0" * 16}, "is an adapter of"),
        (tensors, {"config": "{"}, "damaged metadata"),
        (tensors, {"config": "[]"}, "damaged metadata"),
        (tensors, {"config": json.dumps({"method": "EFFTConfig", "rank": -1})}, "rank must be"),
        (tensors, {"config": json.dumps({"method": "os.system"})}, "method must be one of"),
        (tensors, {"config": json.dumps({**SMALL.to_dict(), "new": 1})}, "has no option new in this version"),
        (tensors, {"config": "[" * 100_000}, "damaged metadata"),
        (tensors, {"frozen": "[" * 100_000}, "samples of the frozen weights cannot be read"),
        (tensors, {"frozen": json.dumps({"norm.weight": ["float32", [192], "AAAA"]})}, "frozen weights cannot be read"),
        (tensors, {"preparation": "[" * 100_000}, "damaged metadata"),
        (tensors, {"preparation": json.dumps({"size": [10**9, 10**9]})}, "each from 1 to 4096"),
        (tensors, {"classes": "7"}, "classes must be a list of names"),
        (tensors, {"classes": "[7]"}, "classes must be a list of names"),
        (tensors, {"train": "[7]"}, "train must be a list of"),
    ]
    dtypes = (torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn)
    cases += [(cast(dtype), {}, f"got {str(dtype)[6:]}") for dtype in dtypes]
    target, bank = bare(), AdapterBank(bare())
    modules = [type(m) for m in target.modules()]
    for content, change, says in cases:
        _save(content, path, {**metadata, **change})
        for load in (lambda: ek.load_adapter(target, path), lambda: bank.add("x", path)):
            refuses(ValueError, says, load)
    assert [type(m) for m in target.modules()] == modules and all(p.requires_grad for p in target.parameters())
    assert len(bank) == 0


def test_what_is_no_regular_file_is_neither_read_nor_replaced(tmp_path):
    model = ek.inject(bare(), SMALL)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    kinds = {"fifo": "a FIFO", "folder": "a folder"}
    if os.geteuid() == 0:
        os.mknod(tmp_path / "device", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        kinds["device"] = "a device"
    for name, kind in kinds.items():
        with pytest.raises(ValueError, match=f"{name} cannot be read: must be a regular file, got {kind}"):
            ek.load_adapter(bare(), tmp_path / name)
        refuses(OSError, f"cannot be written, it is {kind}", ek.save_adapter, model, tmp_path / name)
        assert not (tmp_path / name).is_file()
    with pytest.raises(FileNotFoundError, match="there is no folder to write a file into: .*nowhere"):
        ek.save_adapter(model, tmp_path / "nowhere" / "a.safetensors")


def test_a_file_without_a_head_and_the_head_of_its_model(tmp_path):
    """It states classes, and samples a head, only of the one that the adapter was trained beside."""
    path, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    base = vit()
    other = copy.deepcopy(base)
    nn.init.normal_(other.head.weight)
    ek.save_adapter(shake(ek.inject(copy.deepcopy(base), ek.EFFTConfig(rank=4))), path, head=False)
    bank = AdapterBank(copy.deepcopy(other))
    bank.add("a", path, strict=True)
    bank.save("a", again)
    ek.load_adapter(copy.deepcopy(base), again, strict=True)
    loaded = ek.load_adapter(copy.deepcopy(other), path, head="keep", strict=True)
    AdapterBank(copy.deepcopy(base)).add("a", loaded, strict=True)
    ek.save_adapter(loaded, again, head=False)
    ek.load_adapter(copy.deepcopy(base), again, strict=True)

    names = dict(enumerate("abcdefghij"))
    ek.save_adapter(
        shake(ek.inject(copy.deepcopy(base), ek.EFFTConfig(rank=4), head="keep")), path, classes=names.values()
    )
    assert ek.load_adapter(copy.deepcopy(base), path, strict=True).efft["default"].classes == tuple(names.values())
    with pytest.raises(ValueError, match="sampled tensors differ, such as head.weight"):
        ek.load_adapter(copy.deepcopy(other), path, strict=True)
    with pytest.warns(UserWarning, match="such as head.weight"):
        assert ek.load_adapter(other, path).efft["default"].classes is None
    headless = copy.deepcopy(base)
    headless.reset_classifier(0)
    ek.load_adapter(headless, path, head="keep", strict=True)
