"""Adapter files, and several adapters on one model."""

import json
import os
import time

import pytest
import torch
from models import METHODS, PLAIN, images, shake, swin, vit

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
        assert set(file.keys()) == {f"{group}.{factor}" for group in ("attn", "ffn") for factor in ("u", "sigma", "v")}
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


def test_dtype_and_mode_follow_the_model(path):
    ek.save_adapter(shake(ek.inject(vit(), SMALL)), path)
    model = ek.load_adapter(vit().bfloat16().train(), path)
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in model.efft.parameters())
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
        refused("is no whole safetensors file, it may be truncated or corrupt")
    save_file(tensors, path)
    refused("must be a file of save_adapter")
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
    with torch.no_grad():  # kept pairs are those of the active adapter
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
        with pytest.raises(ValueError, match="head and backend are for a plain model"):
            ek.load_adapter(model, path, name="b", **options)
    assert list(model.efft) == ["default"]


def test_a_link_stays_a_link(path):
    link = path.with_name("link.safetensors")
    link.symlink_to(path)
    ek.save_adapter(ek.inject(vit(), PLAIN), link)
    assert link.is_symlink() and path.is_file()
