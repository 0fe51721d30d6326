"""Adapter files, and several adapters on one model."""

import json
import os
import time

import pytest
import torch
from models import METHODS, PLAIN, gradients, images, loss_of, shake, swin, vit
from torch import nn

import efft_kernels as ek

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
    loaded = ek.load_adapter(bare(make=make), path)
    x = images()
    assert torch.equal(loaded(x), model(x))
    assert loaded.efft.state_dict().keys() == model.efft.state_dict().keys()
    trained = lambda m: {n for n, p in m.named_parameters() if p.requires_grad}
    assert trained(loaded) == trained(model)


def test_metadata_says_what_it_is(path):
    from safetensors import safe_open

    model = ek.inject(vit(), SMALL)
    ek.save_adapter(model, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        factors = {f"{group}.{factor}" for group in ("attn", "ffn") for factor in ("u", "sigma", "v")}
        assert set(file.keys()) == factors | {"head/head.weight", "head/head.bias"}
    assert metadata["version"] == ek.__version__
    assert metadata["fingerprint"] == ek.plan(vit(), SMALL).fingerprint
    assert (metadata["model"], metadata["base_model"]) == ("VisionTransformer", "vit_tiny_patch16_224")
    assert json.loads(metadata["config"])["method"] == "EFFTConfig"
    ek.save_adapter(model, path, base_model="my own")
    with safe_open(path, "pt") as file:
        assert file.metadata()["base_model"] == "my own"


def test_loading_takes_milliseconds(path):
    model = shake(ek.inject(vit("vit_base_patch16_224", depth=12), ek.EFFTConfig()))
    ek.save_adapter(model, path)
    ek.delete_adapter(model, "default")
    times = []
    for _ in range(3):
        start = time.perf_counter()
        ek.load_adapter(model, path)
        times.append(time.perf_counter() - start)
        ek.delete_adapter(model, "default")
    # some tens of milliseconds; the bound leaves room for a busy machine
    assert min(times) < 1.0


def test_device_and_mode_follow_the_model_and_factors_stay_float32(path):
    ek.save_adapter(shake(ek.inject(vit(), SMALL)), path)
    model = ek.load_adapter(vit().bfloat16().train(), path)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.efft.parameters())
    assert model.efft["default"].training


@pytest.mark.parametrize(
    "other", [lambda: vit(depth=3), lambda: vit(embed_dim=96), swin], ids=["depth", "width", "swin"]
)
def test_an_adapter_of_another_model_is_refused(other, path):
    ek.save_adapter(ek.inject(vit(), SMALL), path)
    model = other()
    with pytest.raises(ValueError, match="is an adapter of vit_tiny_patch16_224, whose Linears or shapes differ"):
        ek.load_adapter(model, path)
    assert not hasattr(model, "efft") and all(p.requires_grad for p in model.parameters())


def test_what_is_no_adapter_file_is_refused(path, tmp_path):
    from safetensors.torch import load_file, save_file

    model = ek.inject(vit(), SMALL)
    ek.save_adapter(model, path)
    good, tensors = path.read_bytes(), load_file(path)
    metadata = _metadata(path)

    def refused(says, error=ValueError):
        target = vit()
        with pytest.raises(error, match=says):
            ek.load_adapter(target, path)
        assert not hasattr(target, "efft")

    for content in (b"", good[:7], good[:100], good[:-1], good[: len(good) // 2], b"\xff" * 200, good + b"x"):
        path.write_bytes(content)
        refused("is not a complete safetensors file; it may be truncated or corrupt")
    save_file(tensors, path)
    refused("must be a file written by save_adapter")
    for damage, says in [
        ({"config": "{"}, "damaged metadata"),
        ({"config": "[]"}, "damaged metadata"),
        ({"config": json.dumps({"method": "EFFTConfig", "rank": -1})}, "rank must be"),
        ({"config": json.dumps({"method": "os.system"})}, "method must be one of"),
        ({"config": json.dumps({**SMALL.to_dict(), "new": 1})}, "has no option new in this version"),
        ({"fingerprint": "0" * 16}, "is an adapter of"),
    ]:
        save_file(tensors, path, {**metadata, **damage})
        refused(says)
    save_file({**tensors, "attn.u": tensors["attn.u"][:, :3].contiguous()}, path, metadata)
    refused(r"must hold attn.u of shape \(192, 4\), got \(192, 3\)")
    save_file({key: t for key, t in tensors.items() if key != "ffn.v"}, path, metadata)
    refused(r"must hold ffn.v of shape \(4, 768\), got None")
    path.unlink()
    refused("there is no adapter file", FileNotFoundError)


def _metadata(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_failed_write_leaves_the_old_file(path, monkeypatch):
    model = ek.inject(vit(), SMALL)
    ek.save_adapter(model, path)
    before = path.read_bytes()

    def broken(handle):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="no space left"):
        ek.save_adapter(shake(model), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_file_gets_the_permissions_of_any_other(path, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask belongs to all threads"))
    ek.save_adapter(ek.inject(vit(), SMALL), path)
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_several_adapters_switch_and_go():
    model, x = bare(), images()
    plain = model(x)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    shake(ek.inject(model, SMALL, name="first"))
    first = model(x)
    ek.add_adapter(model, OTHER, "second")
    torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-5)
    for p in model.efft["second"].parameters():
        torch.nn.init.normal_(p, std=0.1)
    second = model(x)
    trained = {
        name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad and name.startswith("efft.")
    }
    assert trained == {"second"}
    assert not torch.equal(first, second)

    assert torch.equal(ek.set_adapter(model, "first")(x), first)
    with torch.no_grad():  # cached pairs, if any, must be those of the active adapter
        for name, want in (("first", first), ("second", second), ("first", first)):
            torch.testing.assert_close(ek.set_adapter(model, name)(x), want)
    with ek.disable_adapter(model) as same:
        assert same is model and torch.equal(model(x), plain)
        with pytest.raises(ValueError, match="merge needs an active adapter"):
            ek.merge(model)
    assert torch.equal(model(x), first)

    ek.merge(model)
    torch.testing.assert_close(model(x), first, rtol=1e-4, atol=1e-5)
    ek.unmerge(model)
    ek.delete_adapter(model, "first")
    assert torch.equal(model(x), plain) and ek.adapter_parameters(model) == list(model.head.parameters())
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
    with pytest.raises(ValueError, match="already has an adapter 'first'"):
        ek.load_adapter(model, tmp_path / "first", name="first")


def test_names_that_are_not_there():
    model = ek.inject(vit(), SMALL, name="mine")
    for act in (lambda: ek.set_adapter(model, "yours"), lambda: ek.delete_adapter(model, "yours")):
        with pytest.raises(ValueError, match="name must be one of the model's adapters, 'mine', got 'yours'"):
            act()
    with pytest.raises(ValueError, match="already has an adapter 'mine'"):
        ek.add_adapter(model, OTHER, "mine")
    for act in (lambda m: ek.add_adapter(m, OTHER, "x"), lambda m: ek.set_adapter(m, "x"), ek.adapter_parameters):
        with pytest.raises(ValueError, match="must have adapters"):
            act(vit())


def test_an_error_within_disable_enables_again():
    model = ek.inject(vit(), SMALL)
    with pytest.raises(RuntimeError), ek.disable_adapter(model):
        raise RuntimeError
    assert model.efft.active == "default"


def test_switching_and_deleting_inside_disable():
    model = ek.add_adapter(ek.inject(vit(), PLAIN), PLAIN, "b")
    with ek.disable_adapter(model):
        ek.set_adapter(model, "default")
    assert model.efft.active == "default"
    ek.set_adapter(model, "b")
    with ek.disable_adapter(model):
        ek.delete_adapter(model, "b")
    assert model.efft.active is None
    assert model(images()).isfinite().all()


def test_head_and_backend_are_refused_for_an_injected_model(path):
    model = ek.inject(vit(), PLAIN)
    ek.save_adapter(model, path)
    for options in (dict(head=7), dict(backend="reference")):
        with pytest.raises(ValueError, match="head and backend can only be chosen for a plain model"):
            ek.load_adapter(model, path, name="b", **options)
    assert list(model.efft) == ["default"]


def test_a_link_stays_a_link(path):
    link = path.with_name("link.safetensors")
    link.symlink_to(path)
    ek.save_adapter(ek.inject(vit(), PLAIN), link)
    assert link.is_symlink() and path.is_file()


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
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return {key for key in file.keys() if key.startswith("head")}

    head = {"head/head.weight", "head/head.bias"}
    assert keys(ek.inject(vit(), PLAIN)) == head
    assert keys(ek.inject(vit(), PLAIN), head=False) == set()
    kept = ek.inject(vit(), PLAIN, head="keep")
    assert keys(kept) == set() and keys(kept, head=True) == head
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


def test_a_head_of_its_own_kind(path):
    make = lambda: nn.Sequential(nn.BatchNorm1d(192), nn.Linear(192, 3))
    model = ek.inject(bare(), PLAIN, head=make())
    ek.save_adapter(model.train(), path)
    assert set(ek.files.read(path)[3]) == {f"head.{key}" for key in model.head.state_dict()}
    target = bare()
    with pytest.raises(ValueError, match=r"'keep': head.0.bias must be of shape None .* got \(192,\)"):
        ek.load_adapter(target, path)
    assert not hasattr(target, "efft") and all(p.requires_grad for p in target.parameters())
    target.head = make()
    x = images()
    assert torch.equal(ek.load_adapter(target, path).eval()(x), model.eval()(x))


def test_a_head_that_does_not_fit_is_refused(path):
    from safetensors.torch import load_file, save_file

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
        save_file({key: t for key, t in {**tensors, **change}.items() if t is not None}, path, metadata)
        target = vit()
        own = target.head.weight.clone()
        with pytest.raises(ValueError, match=f"does not fit; load the adapter alone with head='keep': {says}"):
            ek.load_adapter(target, path)
        assert not hasattr(target, "efft") and torch.equal(target.head.weight, own)
        assert all(p.requires_grad for p in target.parameters())
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="does not fit; load the adapter alone with head='keep'"):
        ek.load_adapter(vit(num_classes=0), path)
    assert ek.load_adapter(vit(num_classes=0), path, head="keep")(images()).shape == (2, 192)


def test_a_file_of_format_1_is_read(path):
    from safetensors.torch import load_file, save_file

    model = shake(ek.inject(bare(), PLAIN))
    ek.save_adapter(model, path, head=False)
    save_file(load_file(path), path, {**_metadata(path), "format": "efft_kernels adapter 1"})
    x = images()
    assert torch.equal(ek.load_adapter(bare(), path)(x), model(x))
    assert ek.load_adapter(bare(), path, head=3)(x).shape == (2, 3)
    save_file(load_file(path), path, {**_metadata(path), "format": "efft_kernels adapter 3"})
    with pytest.raises(ValueError, match="must be a file written by save_adapter"):
        ek.load_adapter(bare(), path)


def test_a_second_adapter_does_not_take_the_head_of_the_first(path):
    ek.save_adapter(trained(), path)
    model = shake(ek.inject(bare(), PLAIN, name="first"))
    x = images()
    before = model(x)
    with pytest.raises(
        ValueError, match="holds a head that differs .* serves 'first'; head='keep' loads the adapter without it"
    ):
        ek.load_adapter(model, path, name="second")
    assert list(model.efft) == ["first"] and torch.equal(model(x), before)
    ek.load_adapter(model, path, name="second", head="keep")
    assert torch.equal(ek.set_adapter(model, "first")(x), before)
