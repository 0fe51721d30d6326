"""The mean of several adapters as one adapter."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from models import LOW_RANK, METHODS, adapted, images, others, shake, swin, vit
from refusals import refuses

import efft_kernels as ek
from efft_kernels.adapter_file import write
from efft_kernels.inject import build
from efft_kernels.plans import make_plan
from efft_kernels.serving import AdapterBank

EXACT = [m for m in LOW_RANK if m not in ("vera", "efft2-options")]


def written(folder, configs, make=vit, seed=7, train=()):
    """adapters of one base model in float64, with heads of their own: (models, files)"""
    models, files = [], []
    for i, config in enumerate(configs):
        torch.manual_seed(seed)
        base = make().double()
        torch.manual_seed(i)
        model = shake(ek.inject(base, config, train=train), 0.1)
        with torch.no_grad():
            for part in (model.get_classifier(), *map(model.get_submodule, train)):
                part.weight.add_(torch.randn_like(part.weight))
        models.append(model)
        files.append(folder / f"{i}.safetensors")
        ek.save_adapter(model, files[-1])
    torch.manual_seed(seed)
    return make().double(), models, files


def updates(model):
    return {key: down @ up for key, (down, up) in ek.updates(model).items()}


# the rank of a narrow stage is rounded, so the sum of three is not the rank of three times as much
STAGES = [ek.EFFTConfig(rank=3, scale=2.0, factor_dropout=0.0)] * 3, swin, None
other = lambda config: replace(others(config), rank_weights=True)
CASES = {"stages": STAGES} | {m: ([METHODS[m], other(METHODS[m]), METHODS[m]], vit, [1, 2, 1]) for m in EXACT}


@pytest.mark.parametrize("case", CASES)
def test_the_update_is_the_mean_of_the_updates(case, tmp_path):
    configs, make, weights = CASES[case]
    plain, models, files = written(tmp_path, configs, make, train=("patch_embed.proj",))
    before = {key: t.clone() for key, t in plain.state_dict().items()}
    ek.average_adapters(plain, files, tmp_path / "mean", weights=weights)
    weights = weights or [1, 1, 1]
    assert all(torch.equal(t, before[key]) for key, t in plain.state_dict().items()) and not hasattr(plain, "efft")
    ek.load_adapter(plain, tmp_path / "mean", factor_dtype=torch.float64)
    parts = [updates(model) for model in models]
    for key, update in updates(plain).items():
        want = sum(w * part[key] for w, part in zip(weights, parts)) / sum(weights)
        # the file holds float32 beside float64 weights only if its factors were float32
        torch.testing.assert_close(update, want, rtol=1e-10, atol=1e-12, msg=lambda m: f"{key}: {m}")
    for part in ("head.fc" if case == "stages" else "head", "patch_embed.proj"):
        want = sum(w * model.get_submodule(part).weight for w, model in zip(weights, models)) / sum(weights)
        torch.testing.assert_close(plain.get_submodule(part).weight, want)
    x = images(dtype=torch.float64)
    y = plain(x)
    torch.testing.assert_close(ek.merge(plain)(x), y, rtol=1e-8, atol=1e-10)


def test_the_mean_is_served_beside_others_and_trains_on(tmp_path):
    config = METHODS["efft2"]
    plain, _, files = written(tmp_path, [config] * 3)
    ek.average_adapters(plain, files, tmp_path / "mean")
    alone = ek.load_adapter(written(tmp_path, [config])[0], tmp_path / "mean")
    assert ek.plan(vit(), alone.efft["default"].plan.config).groups[0].rank == (12, 18)
    x, bank = images(dtype=torch.float64), AdapterBank(plain)
    bank.add("one", files[0])
    bank.add("mean", tmp_path / "mean")
    with pytest.warns(UserWarning, match="trained on other weights"):
        ek.average_adapters(vit(), files, tmp_path / "other")
    with torch.no_grad(), bank.use(["mean", "one"]):
        torch.testing.assert_close(plain(x)[0], alone(x)[0])
    alone.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in ek.adapter_parameters(alone))


def test_adapters_without_an_effect_have_a_mean_without_one(tmp_path):
    plain, _, files = written(tmp_path, [ek.EFFTConfig(rank=4, scale=0.0)] * 2)
    ek.average_adapters(plain, files, tmp_path / "mean")
    assert not any(update.any() for update in updates(ek.load_adapter(plain, tmp_path / "mean")).values())


def test_files_of_version_0_1_have_a_mean(tmp_path):
    model = vit("xcit_nano_12_p8_224", embed_dim=32, num_heads=2, cls_attn_layers=1)
    groups = build(make_plan(model, METHODS["efft2"], by_structure=False), model)
    for p in groups.parameters():
        torch.nn.init.normal_(p, std=0.1)
    write(tmp_path / "old", model, groups, {})
    ek.average_adapters(model, [tmp_path / "old"] * 2, tmp_path / "mean")
    old, mean = (updates(ek.load_adapter(copy.deepcopy(model), tmp_path / name)) for name in ("old", "mean"))
    torch.testing.assert_close(mean, old)
    assert {t.dtype for t in ek.read_adapter(tmp_path / "mean").factors.values()} == {torch.float32}


@pytest.mark.parametrize("head", ["train", "keep", False])
def test_the_mean_states_what_all_files_state(head, tmp_path):
    model = ek.inject(vit(num_classes=3), METHODS["lora"], head=head or "train")
    files = [tmp_path / f"{i}.x" for i in range(5)]
    for i, path in enumerate(files):
        about = {"classes": list("bac" if i == 3 else "abc"), "multilabel": i != 4, "head": None if head else False}
        ek.save_adapter(model, path, preparation=ek.Preparation((32, 32), crop_pct=0.8 if i == 2 else 0.9), **about)

    def average(i):
        ek.average_adapters(model, [files[0], files[i]], tmp_path / "mean")
        mean = ek.read_adapter(tmp_path / "mean")
        assert ("head.weight" in json.loads(mean.frozen)) == (head == "keep") and mean.multilabel
        return mean.classes, mean.preparation and mean.preparation.crop_pct

    assert average(1) == (tuple("abc"), 0.9)
    with pytest.warns(UserWarning, match="the mean states no preparation, in which .*0.x and .*2.x differ"):
        assert average(2) == (tuple("abc"), None)
    refuses(ValueError, r"4.x must have the multilabel of .*0.x, True, got False", average, 4)
    of_heads = pytest.raises(ValueError, match=r"3.x must have the classes of .*0.x, \('a', .* got \('b'")
    with of_heads if head == "train" else pytest.warns(UserWarning, match="the mean states no classes"):
        average(3)
    if head == "keep":
        model.head.requires_grad_(True)
        ek.save_adapter(model, files[4], head=False, multilabel=True)  # which was trained beside another head
        with pytest.warns(UserWarning, match="the mean states no "):
            ek.average_adapters(model, files[::4], tmp_path / "mean")
        assert "head.weight" not in json.loads(ek.read_adapter(tmp_path / "mean").frozen)


def test_what_has_no_mean_is_named(tmp_path):
    plain, _, files = written(tmp_path, [METHODS["efft2"], METHODS["lora"], METHODS["efft1"]])
    mean = tmp_path / "mean"
    for paths, words in (
        ([], "paths must be a non-empty sequence"),
        (str(files[0]), "paths must be a non-empty sequence"),
        (files[:2], "1.safetensors must be of the method and for the Linears of .*0.safetensors"),
        ([files[0], files[2]], "must be of the method and for the Linears"),
    ):
        refuses(ValueError, words, ek.average_adapters, plain, paths, mean)
    for weights in ([1.0], [1, -1], [1, float("nan")], [None, 1], "12", {"a": 1, "b": 1}, 5):
        with pytest.raises(ValueError, match="weights must be 2 finite numbers"):
            ek.average_adapters(plain, [files[0]] * 2, mean, weights=weights)
    for method, what in (("vera", "VeRA"), ("efft2-options", "channel_scale"), ("lora-dora", "dora=True")):
        plain, _, files = written(tmp_path, [METHODS[method]])
        refuses(ValueError, f"cannot be averaged: the mean of .*{what}", ek.average_adapters, plain, files * 2, mean)
    plain, _, files = written(tmp_path, [ek.EFFTConfig("efft1", rank=100)] * 2)
    refuses(ValueError, "rank must be at most 192", ek.average_adapters, plain, files, mean)
    model = adapted(METHODS["efft1"])
    ek.save_adapter(model, tmp_path / "headless", head=False)
    plain, _, files = written(tmp_path, [METHODS["efft1"]])
    with pytest.raises(ValueError, match=r"headless must hold head head\.\w+ of shape .*, got None"):
        ek.average_adapters(plain, [files[0], tmp_path / "headless"], mean)
    assert not mean.exists()
