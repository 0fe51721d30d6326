"""Runs of the paper's benchmarks that are trained in one pass, and the file of images and weights for them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benchmark_scripts import need
from models import timm

library = timm()
need("tqdm", "accelerate", "torchmetrics")

import bundle
import paired
import runs
import sources
import together
from record import read_run
from runs import Places, Run, Store

from efft_kernels.finetune.data import SOURCES, Source
from efft_kernels.finetune.images import Arrays
from efft_kernels.finetune.settings import Settings


def images(classes, seed, n=24):
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), np.uint8)
    return Arrays(f"seed {seed}", pixels, [i % classes for i in range(n)])


@pytest.fixture(autouse=True)
def data(monkeypatch):
    """Two data sets, of three and of five classes."""
    for name, classes in (("three", 3), ("five", 5)):
        parts = [images(classes, seed) for seed in range(3)]
        found = Source(*parts, tuple(map(str, range(classes))), protocol=True)
        monkeypatch.setitem(SOURCES, name, lambda found=found: found)
    together.read.cache_clear()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "w.pt"
    torch.save(library.create_model("test_vit").state_dict(), path)
    return str(path)


def planned(method="efft2", **own):
    settings = {"model": "test_vit", "checkpoint": "w", "image_size": 32, "epochs": 3, "batch_size": 8,
                "drop_path": 0.0, "method": method, "lr": 1e-2, "scale": 1.0, "rank": 4}  # fmt: skip
    return settings | ({"factor_dropout": 0.0} if method.startswith("efft") else {}) | own


@pytest.mark.slow
def test_watching_a_run_changes_no_result(weights):
    one, places, seen = Run("three", "m", 0, "val", planned()), Places(None, weights, "cpu"), {}
    plain, watched = runs.measure(one, places), runs.measure(one, places, seen.__setitem__)
    assert list(seen) == [1, 2, 3] and seen[3] == pytest.approx(watched["top1"])
    assert all(plain[name] == watched[name] for name in ("top1", "loss", "train_top1"))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "options"), [
    ("efft2", {}),
    ("efft1", {"rank_weights": True, "channel_scale": True}),
    ("lora", {"clip_grad": 0.1, "dora": True}),
    ("fact-tt", {"activation_dropout": 0.0}),
])  # fmt: skip
def test_runs_of_one_pass_learn_what_they_learn_alone(weights, method, options):
    settings = planned(method, **options) | ({"model": "vit_tiny_patch16_224"} if method == "efft1" else {})
    if method == "efft1":  # which needs an FFN of four times the width
        settings |= {"checkpoint": "random"}
    seeds = (0, 0) if method == "efft1" else (0, 1)  # random weights depend on the seed
    planned_runs = [
        Run("three", "m", seeds[0], "test", settings),
        Run("five", "m", seeds[1], "test", settings | {"lr": 3e-3, "scale": 2.0, "lr_ratio": 4.0}),
        Run("three", "m", seeds[1], "test", settings | {"head_init": "probe", "rank": 2}),
    ]
    places = Places(None, weights, "cpu")
    if method == "efft1":
        planned_runs.pop(1)
    found = runs.measure_together(planned_runs, places)
    for run, record in zip(planned_runs, found):
        alone = runs.measure(run, places)
        assert record["loss"] == pytest.approx(alone["loss"], rel=2e-4) and record["top1"] == alone["top1"]
        assert record["train_top1"] == alone["train_top1"] and record["together"] == len(planned_runs)
        assert record["parameters"] == alone["parameters"] and record["head_parameters"] == alone["head_parameters"]
        classes = 3 if run.data == "three" else 5
        right = sum(int(c) == i % classes for i, c in enumerate(record["predictions"]))
        assert 100 * right / 24 == pytest.approx(record["top1"], abs=1e-3)


def test_what_can_be_trained_together():
    base = planned()
    made = [Run("three", "a", 0, "val", base), Run("five", "a", 1, "val", base | {"lr": 1.0}),
            Run("three", "a", 0, "test", base), Run("three", "b", 0, "val", base | {"drop_path": 0.1}),
            Run("three", "c", 0, "val", base | {"checkpoint": "random"}), Run("three", "a", 2, "val", base),
            Run("three", "d", 0, "val", planned("full")),
            Run("three", "e", 0, "val", base | {"probe": {"lr": 1}})]  # fmt: skip
    names = [[made.index(run) for run in group] for group in runs.passes(made, 2)]
    assert names == [[0, 1], [5], [2], [3], [4], [6], [7]]


def test_settings_that_a_pass_does_not_know_are_refused(weights):
    run = Run("three", "m", 0, "test", planned(label_smoothing=0.1))
    with pytest.raises(ValueError, match="label_smoothing must have its default in runs that are trained together"):
        runs.measure_together([run], Places(None, weights, "cpu"))


@pytest.mark.slow
def test_nothing_is_started_or_finished_after_the_deadline(weights, tmp_path):
    # of 27 steps: it reckons after 20
    run, store = Run("three", "m", 0, "test", planned(epochs=9)), Store(tmp_path)
    for deadline, why in ((1.0, "no time was left"), (2e9, None)):
        _, failures = runs.complete([run], store, Places(None, weights, "cpu", None, deadline), together=4)
        assert failures == ({run.name: f"TimeoutError: {why}"} if why else {})
    run = Run("three", "m", 1, "test", planned(epochs=9))
    settings = Settings(**run.settings | {"checkpoint": weights}, data="three", out="none", seed=1, device="cpu")
    made = together.Pass([settings], [together.read("three", 32, "bicubic", "cpu")], "cpu")
    with pytest.raises(TimeoutError, match="s more than there are left for 1 runs"):
        made.train(deadline=1.0)


def test_a_bundle_gives_the_same_images_and_weights(weights, tmp_path, monkeypatch):
    monkeypatch.setitem(sources.WEIGHTS, "dinov2s_mri", lambda: sources.Weights("test_vit", Path(weights), "about"))
    grey = Arrays("grey", np.arange(20 * 64, dtype=np.uint32).astype(np.uint8).reshape(20, 8, 8), [0, 1] * 10)
    monkeypatch.setitem(SOURCES, "grey", lambda: Source(grey, grey, grey, ("a", "b"), protocol=True))
    wanted = {name: runs.opened(Run(name, "m", 0, "test", {}), Places(), 9) for name in ("three", "grey")}
    wanted = {name: together.read(found, 16, "bicubic", "cpu") for name, found in wanted.items()}
    path = tmp_path / "b.zip"
    bundle.make(path, 16, ["three", "grey"], {"": 9})
    monkeypatch.setattr(bundle, "_used", {})
    together.read.cache_clear()
    for name in wanted:
        SOURCES.pop(name)
    for name, before in wanted.items():
        found = runs.opened(Run(name, "m", 0, "test", {}), Places(bundle=str(path)), 9)
        after = together.read(found, 16, "bicubic", "cpu")
        assert all(torch.equal(x, y) for x, y in zip(before[:4], after[:4])) and before.classes == after.classes
        assert len(after.test) == 9
    for size, most, said in ((17, {}, "images of 16 pixels, 17"), (16, {"grey": 10}, "9 test images of grey at most")):
        with pytest.raises(ValueError, match=f"--bundle has {said}"):
            bundle.use(path, size, most)
    with pytest.raises(ValueError, match="--bundle must be a file that this version of bundle.py wrote, got "):
        bundle.use(Path(weights))
    state, there = torch.load(weights), torch.load(bundle.use(path).path)
    assert set(state) == set(there) and all(torch.equal(t.bfloat16().float(), there[key]) for key, t in state.items())


def test_paired_differences(tmp_path):
    paired.write_labels(tmp_path / "labels.csv", {"x": "01" * 50})
    rows = [("a", 0, "01" * 50), ("a", 1, "01" * 40 + "00" * 10), ("b", 0, "00" * 50), ("b", 1, "00" * 50),
            ("b", 2, "01" * 50), ("c", 5, "00" * 50)]  # fmt: skip
    lines = [f'{method},x,test,{seed},"""{text}"""' for method, seed, text in rows]
    (tmp_path / "runs.csv").write_text("\n".join(["method,data,part,seed,predictions", *lines]) + "\n")
    found = paired.right(tmp_path)
    gap = paired.difference(found["a", "x"], found["b", "x"])
    assert gap.mean == pytest.approx((50 + 40) / 2) and gap.seeds == 2 and 3 < gap.error < 8
    same = paired.difference(found["a", "x"], found["a", "x"])
    assert (same.mean, same.error) == (0, 0) and paired.difference(found["a", "x"], found["c", "x"]) is None
    assert "| a | b | +45.0 ± " in paired.table(tmp_path, ["b"]) and "| c |" not in paired.table(tmp_path, ["b"])
    for against in ("c", "nosuch"):
        with pytest.raises(ValueError, match=f"--against: expected methods that share .*, got '{against}'"):
            paired.table(tmp_path, ["b", against])
    paired.plot(tmp_path, tmp_path / "a.png", ["b"], ("a", "c"))  # c has no seed that b has
    assert (tmp_path / "a.png").stat().st_size > 1000
    with (tmp_path / "runs.csv").open("a") as file:
        file.write(lines[0] + "\n")
    with pytest.raises(ValueError, match="a has two results for x, seed 0"):
        paired.right(tmp_path)
    (tmp_path / "labels.csv").write_text("data,labels\nx,01\n")
    assert paired.main([str(tmp_path)]) == 2


def test_images_per_second_are_recorded(weights, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bundle, "use", lambda path: SimpleNamespace(model="test_vit", path=weights))
    monkeypatch.setitem(SOURCES, "dsprites_loc", SOURCES["three"])
    options = ["--bundle", "b.zip", "--together", "1", "3", "--steps", "2", "--image-size", "32", "--batch-size", "4"]
    together.main([*options, "--device", "cpu", "--out", str(tmp_path)])
    rows = read_run(tmp_path / "together.json")["results"]
    assert [row["adapters"] for row in rows] == [1, 3] and "b.zip" not in (tmp_path / "together.json").read_text()
    for row in rows:
        assert row["images_per_s"] == pytest.approx(4e3 * row["adapters"] / row["ms"], rel=1e-3)
