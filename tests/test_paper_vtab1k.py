"""The VTAB-1K benchmark: its runs, their resumption after interruptions, its tables, and the offline experiment."""

import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from benchmark_scripts import PAPER, need, refused
from models import timm
from refusals import refuses

timm()
need("matplotlib", "tabulate", "tqdm", "accelerate", "torchmetrics")

import psutil  # accelerate needs it too
import runs
import sources
import tables
import vtab1k
from runs import Places, Run, Store

from efft_kernels import EFFTConfig
from efft_kernels.finetune import loop, methods, plots
from efft_kernels.finetune.data import SOURCES
from efft_kernels.finetune.images import Subset
from efft_kernels.finetune.lists import VTAB_CLASSES
from efft_kernels.finetune.settings import Settings

FACTS = vtab1k.FACTS
ALL = [name for members in FACTS["groups"].values() for name in members]


def run(data="svhn", method="efft2", seed=0, part="test", **settings):
    return Run(data, method, seed, part, settings)


def record(of, top1, parameters=1000):
    return {"run": asdict(of), "top1": top1, "parameters": parameters}


def test_published_rows_agree_with_their_own_means():
    assert len(ALL) == 19 and set(ALL) == set(FACTS["classes"])
    assert [len(members) for members in FACTS["groups"].values()] == [7, 4, 8]
    whole = [entry for entry in FACTS["published_means"] if "accuracy" in entry]
    assert [entry["name"] for entry in whole if entry["source"]] == ["HST", "GPS", "RepAdapter"]
    for entry in FACTS["published"] + whole:
        found = tables.published(entry, FACTS["groups"], FACTS["groups"], entry["name"])
        assert found.mean.mean == pytest.approx(entry["mean"], abs=0.051)
        assert found.group_mean.mean == pytest.approx(entry["group_mean"], abs=0.051)
    means = [tables.published_mean(entry, FACTS["groups"]) for entry in FACTS["published_means"]]
    last = tables.markdown([found, *means], FACTS["groups"]).splitlines()[3]
    assert last.startswith("| published: MLAE (arXiv 2405.18897) | – | – |") and last.endswith("| – | **78.8** |")
    numbers = [entry["arxiv"] for entry in FACTS["published_means"]]
    assert len(set(numbers)) == 7 and all(len(year) == 4 and len(n) == 5 for year, n in (t.split(".") for t in numbers))


def test_released_settings_are_whole_and_possible():
    assert FACTS["classes"] == VTAB_CLASSES and set(FACTS["methods"]) == set(methods.METHODS)
    for variant, released in FACTS["released"].items():
        assert set(released) == set(ALL)
        for rank, scale, *zero in released.values() if variant != "noah" else ():
            assert rank in (4, 8, 16, 32) and 0.01 <= scale <= 100
            if variant.startswith("efft"):
                EFFTConfig(variant, rank=rank, scale=scale, zero_init=zero[0])
    named = {entry["name"] for entry in FACTS["published"]}
    assert {m["published"] for m in FACTS["methods"].values()} <= named | {None}


def published(name):
    return next(entry for entry in FACTS["published"] if entry["name"] == name)


def test_released_sizes_of_noah_and_ranks_of_fact_give_the_published_counts():
    d, counts = 768, []
    for sizes in FACTS["released"]["noah"].values():
        assert all(len(found) == 12 and set(found) <= {1, 5, 10} for found in sizes.values())
        adapters = sum(2 * d * width + width + d for width in sizes["bottleneck"])
        counts.append(adapters + 4 * d * sum(sizes["lora_rank"]) + d * sum(sizes["tokens"]))
    assert statistics.fmean(counts) / 1e6 == pytest.approx(published("NOAH")["millions"], abs=0.001)
    counts = [2 * 768 * r + 144 * r + r**3 for r, _ in FACTS["released"]["fact-tk"].values()]
    assert statistics.fmean(counts) / 1e6 == pytest.approx(published("FacT-TK (r<=32)")["millions"], abs=0.0005)


def test_every_planned_run_has_valid_settings(tmp_path):
    (tmp_path / "ViT-B_16.npz").write_text("weights")
    checkpoint = str(tmp_path / "ViT-B_16.npz")
    args = SimpleNamespace(normalize=None, model=None, checkpoint=checkpoint, epochs=None, cores=None)
    made = [vtab1k.settings_of(m, d, args, Places()) for m in FACTS["methods"] for d in ALL]
    digest = "9a129038d9a0"
    assert {settings["checkpoint"] for settings in made} == {f"ViT-B_16.npz {digest}"}  # no path of this machine
    plan = FACTS["offline"]
    assert not set(plan["methods"]) & set(plan["optional"])
    for how in (plan["methods"] | plan["optional"]).values():
        for point in how["grid"]:
            one = plan["recipe"] | {"method": how["method"], "checkpoint": "x"} | how.get("settings", {}) | point
            made.append({key: value for key, value in one.items() if key not in ("test_images", "probe")})
    for settings in made:
        checked = Settings(data="d", out="o", **settings)
        methods.check(checked.method, checked.options)


def test_offline_methods_have_equal_budgets():
    plan = FACTS["offline"]
    assert len({len(how["grid"]) for how in plan["methods"].values()}) == 1
    assert {"full", "linear", "lora", "fact-tt", "efft1", "efft2"} <= set(plan["methods"]) and plan["seeds"] >= 3
    adapters = [plan["methods"][m]["grid"] for m in ("lora", "fact-tt", "efft1", "efft2")]
    assert all(grid == adapters[0] for grid in adapters)


def test_a_run_is_named_after_all_of_itself():
    one = run(lr=0.1, scale=2)
    assert one.name == run(scale=2, lr=0.1).name  # the order of settings does not matter
    others = [run(lr=0.1, scale=3), run(lr=0.1), run(seed=1, lr=0.1, scale=2), run(part="val", lr=0.1, scale=2),
              run(data="dtd", lr=0.1, scale=2), run(method="efft1", lr=0.1, scale=2)]  # fmt: skip
    assert len({r.name for r in [one, *others]}) == 7
    assert "/" not in run(data="../x", method="a, b").name


def test_store_keeps_every_value_and_every_environment(tmp_path):
    settings = {"lr": 1e-3, "scale": 1.0, "rank": 8, "targets": ["attn", "mlp"], "zero_init": "vu", "text": "12",
                "probe": {"epochs": 100}, "nothing": None, "flag": True, "empty": "", "ends": "a\r\n"}  # fmt: skip
    first, other = run(**settings), run(seed=1, lr=0.5)
    here, there = ({"machine": {"cpu": cpu}, "versions": {"torch": "2"}, "commit": None} for cpu in "ab")
    kept = {
        first.name: record(first, 12.3456) | {"loss": 0.413384, "train_top1": [1.25, 2.5], "diverged": "a, b"} | here,
        other.name: record(other, None) | there,
    }
    for one in (first, other):
        # two stores, as two processes that share the folder
        Store(tmp_path / "runs").put(one, kept[one.name])
    again = Store(tmp_path / "runs")
    assert {one.name: again.get(one) for one in (first, other)} == kept
    read = again.get(first)["run"]["settings"]
    assert type(read["scale"]) is float and read["text"] == "12"
    environments = json.loads((tmp_path / "runs/runs.json").read_text())["environments"]
    assert [environment["machine"]["cpu"] for environment in environments] == ["a", "b"]
    head = tmp_path / "runs/runs.json"
    head.write_text(head.read_text().replace('"benchmark"', '"removed": "some", "benchmark"'))
    again.put(first, kept[first.name] | there)  # environments keep their numbers, and the file what else it says
    assert {r["machine"]["cpu"] for r in Store(tmp_path / "runs").all()} == {"b"}
    assert json.loads(head.read_text())["environments"] == environments and "some" in head.read_text()
    again.put(first, kept[first.name])
    assert again.get(run(seed=2)) is None and len(again.all()) == 2
    path = tmp_path / "runs" / "runs.csv"
    path.write_text(path.read_text()[:-20])
    refuses(ValueError, f"{path}: expected the results of runs: .*delete the damaged lines", again.get, first)


def test_complete_does_what_is_missing_and_goes_on_after_a_failure(tmp_path, monkeypatch):
    store, done = Store(tmp_path), []

    def measure(one, places):
        done.append(one.seed)
        if one.seed == 2 and len(done) < 5:
            raise ValueError("no such thing")
        return record(one, float(one.seed))

    monkeypatch.setattr(runs, "measure", measure)
    every = [run(seed=seed) for seed in (0, 1, 2, 3, 3)]
    store.put(every[0], record(every[0], 0.0))
    found, failures = runs.complete(every, store, Places())
    assert done == [1, 2, 3] and failures == {every[2].name: "ValueError: no such thing"}
    assert [r["top1"] for r in found] == [0, 1, 3]
    done += [None] * 9
    found, failures = runs.complete(every, store, Places())
    assert done[-1] == 2 and not failures and [r["top1"] for r in found] == [0, 1, 2, 3]


def test_what_another_process_has_done_meanwhile_is_not_repeated(tmp_path, monkeypatch):
    every, done, other = [run(seed=seed) for seed in range(3)], [], Store(tmp_path)

    def measure(one, places):
        done.append(one.seed)
        if one.seed == 0:
            other.put(every[1], record(every[1], 7.0) | {"machine": {"cpu": "other"}})
        return record(one, float(one.seed))

    monkeypatch.setattr(runs, "measure", measure)
    found, _ = runs.complete(every, Store(tmp_path), Places())
    assert done == [0, 2] and [r["top1"] for r in found] == [0, 7, 2]
    read = Path.read_text

    def read_text(path, *args):  # another process adds an environment between the two reads
        text = read(path, *args)
        if not done and path.parent == tmp_path:
            done.append(path)
            other.put(run(seed=9), record(run(seed=9), 1.0) | {"machine": {"cpu": "new"}})
        return text

    done.clear()
    monkeypatch.setattr(Path, "read_text", read_text)
    assert len(Store(tmp_path).all()) in (3, 4) and done


def test_choose_takes_the_best_and_of_equals_the_first(tmp_path):
    store = Store(tmp_path)
    grid = [run(part="val", lr=lr) for lr in (1, 2, 3, 4)]
    for one, top1, loss in zip(grid, (None, 90.0, 70.0, 70.0), (0.1, 0.6, 0.5, 0.5)):
        store.put(one, record(one, top1) | {"loss": loss})
    assert runs.choose(grid, store) is grid[2]
    final = runs.tested(grid[2], 5, epochs=9)
    assert (final.part, final.seed, final.settings) == ("test", 5, {"lr": 3, "epochs": 9})
    store.put(grid[2], record(grid[2], 70.0) | {"loss": math.nan})
    assert runs.choose(grid[1:], store) is grid[3]
    store.put(grid[3], record(grid[3], 70.0))  # of an earlier version, which kept no loss
    refuses(ValueError, "all 2 settings of efft2 diverged or failed on svhn", runs.choose, grid[2:], store)


def test_what_a_run_trains_on_and_is_measured_by():
    whole = SOURCES["dsprites_loc"]()
    numbers = lambda part: {part.where(i) for i in range(len(part))}
    val = SOURCES[runs.opened(run("dsprites_loc", part="val"), Places(), None)]()
    assert numbers(val.train) == numbers(whole.train) and numbers(val.test) == numbers(whole.val)
    test = SOURCES[runs.opened(run("dsprites_loc"), Places(), 300)]()
    assert numbers(test.train) == numbers(whole.train) | numbers(whole.val)
    assert len(test.test) == 300 and numbers(test.test) < numbers(whole.test)
    again = SOURCES[runs.opened(run("dsprites_loc", seed=7), Places(), 300)]()
    assert numbers(again.test) == numbers(test.test)  # independent of the seed
    assert test.val is None and val.val is None  # nothing left to choose by


GROUPS = {"A": ["x", "y"], "B": ["z"]}


def rows_of(values):
    """Records of {data: [top-1 by seed]}."""
    return [record(run(data, seed=seed), top1) for data, found in values.items() for seed, top1 in enumerate(found)]


def test_row_means_and_deviations():
    found = tables.row("m", rows_of({"x": [10, 20, 30], "y": [50, 50, 80], "z": [90, 96, 99]}), GROUPS)
    assert found.cells["x"] == tables.Cell(20, 10, 3)
    assert found.groups["A"].mean == 40 and found.groups["A"].deviation == statistics.stdev([30, 35, 55])
    assert found.mean.mean == pytest.approx((20 + 60 + 95) / 3)
    assert found.mean.deviation == pytest.approx(statistics.stdev([150 / 3, 166 / 3, 209 / 3]))
    assert found.group_mean.mean == pytest.approx((40 + 95) / 2)
    assert found.parameters == 1000


def test_row_without_some_seeds_or_after_divergence():
    found = tables.row("m", rows_of({"x": [10, 20], "y": [50], "z": [90, None]}), GROUPS)
    assert found.cells["x"].n == 2 and found.groups["A"] == tables.Cell(30, None, 1)  # seed 0, which both have
    assert found.cells["z"] == tables.Cell(None, None, 2)
    assert found.mean == tables.Cell(50, None, 1)
    nothing = tables.row("m", rows_of({"x": [10]}), GROUPS)
    assert nothing.mean.n == 0 and nothing.cells["z"].n == 0
    refuses(ValueError, "two results for x, seed 0", tables.row, "m", rows_of({"x": [1]}) * 2, GROUPS)


def test_table_text():
    rows = [tables.row("one", rows_of({"x": [10, 20], "y": [50, 50], "z": [90, None]}), GROUPS),
            tables.row("two", rows_of({"x": [16, 16], "y": [40, 40], "z": [80, 80]}), GROUPS)]  # fmt: skip
    text = tables.markdown(rows, GROUPS).splitlines()
    assert text[0] == "| method | params (M) | x | y | z | A | B | mean | mean of groups |"
    assert text[2].startswith("| one | 0.001 | 15.0 ± 7.1 | **50.0 ± 0.0** | diverged |")
    assert text[3].startswith("| two | 0.001 | **16.0 ± 0.0** |") and len(text) == 4


def test_published_rows_beside_part_of_the_data_sets():
    groups = {"Natural": ["svhn", "dtd"], "Structured": ["kitti"]}
    found = tables.published(published("Full"), FACTS["groups"], groups, "published: Full")
    assert {name: c.mean for name, c in found.cells.items()} == {"svhn": 87.4, "dtd": 64.3, "kitti": 65.5}
    assert found.mean.mean == pytest.approx((87.4 + 64.3 + 65.5) / 3)


def test_charts(tmp_path):
    rows = [tables.row("one", rows_of({"x": [10, 20], "y": [50, 50], "z": [90, 91]}), GROUPS)]
    tables.accuracy_against_parameters(tmp_path / "a.png", rows, "t")
    tables.sweep(tmp_path / "s.png", {"x": {"m": {0.1: [1.0, 2.0], 10: [3.0], 100: [None]}}}, "scale", "t")
    assert all((tmp_path / f"{name}.png").stat().st_size > 2000 for name in "as")
    tables.sweep(tmp_path / "none.png", {}, "scale", "t")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "s.png"]  # no temporary file is left


@pytest.fixture
def lists(tmp_path, monkeypatch):
    """Two data sets of one image each, in the layout of NOAH; beside them is w.npz, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("w.npz").touch()
    for name in ("svhn", "kitti"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for part in ("train800", "val200", "train800val200", "test"):
            (tmp_path / "data" / name / f"{part}.txt").write_text("a.jpg 0\n")
    return tmp_path / "data"


@pytest.fixture
def common(lists, tmp_path):
    """Arguments of commands on these lists"""
    return ["--data", str(lists), "--checkpoint", "w.npz", "--out", str(tmp_path / "out"), "--workers", "1"]


@pytest.fixture
def measured(monkeypatch):
    """The runs that were measured, at once, with an accuracy that follows from their settings."""
    done = []
    for module in (runs, vtab1k):
        monkeypatch.setattr(module, "measure", lambda one, places: done.append(one) or fake(one, places))
    return done


def fake(one, places):
    scale, rank = one.settings.get("scale", 1), one.settings.get("rank", 0)
    return record(one, 50.0 + one.seed + 3 * (one.method == "efft2") - abs(scale - 1) + 0.1 * rank)


def test_missing_data_sets_are_named(lists, common, measured, tmp_path, monkeypatch, capsys):
    (lists / "dtd").mkdir()
    assert vtab1k.main([*common, "--methods", "linear", "efft2", "--seeds", "2"]) == 0
    said = capsys.readouterr().out
    assert f"left out: dtd: {lists / 'dtd'} has no train800.txt, val200.txt, test.txt" in said
    assert "left out: cifar" in said and "generated, so pixels differ from VTAB's: dsprites_loc, dsprites_ori" in said
    table = (tmp_path / "out/table.md").read_text()
    assert table.startswith("| method | params (M) | svhn | kitti | dsprites_loc | dsprites_ori | Natural")
    assert "| published: EFFT2 r in {8,16,32} | 0.245 | **89.6** |" in table and "published: Linear" in table
    assert "MLAE" not in table, "a mean over all data sets stands beside no mean over some"
    kept = Store(tmp_path / "out").all()
    assert len(kept) == 2 * 2 * 4
    released = next(r for r in kept if r["run"]["method"] == "efft2" and r["run"]["data"] == "svhn")["run"]["settings"]
    assert (released["rank"], released["scale"], released["zero_init"]) == (32, 80, "vu")
    assert released["init"] == "released", "the start that released scales belong to"
    # existing results are not computed again
    monkeypatch.setattr(runs, "measure", lambda *_: pytest.fail("again"))
    assert vtab1k.main([*common, "--methods", "linear", "efft2", "--seeds", "2"]) == 0
    assert vtab1k.main(["--out", str(tmp_path / "out"), "--report"]) == 0


def test_other_weights_images_or_epochs_are_other_runs(lists, common, measured, tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna")
    test = [*common, "--methods", "lora", "--seeds", "1", "--datasets", "svhn", "dsprites_loc"]
    count = lambda: (runs._digest.cache_clear(), vtab1k.main(test), len(measured), measured.clear())[1:3]
    assert count() == (0, 2) and count() == (0, 0)
    assert "Generated, so pixels differ from VTAB's: dsprites_loc." in (tmp_path / "out/table.md").read_text()
    (lists / "svhn/notes.txt").write_text("nothing that a run reads")
    assert count() == (0, 0)
    (lists / "svhn/test.txt").write_text("b.jpg 0\n")
    assert count() == (0, 1)
    (lists / "kitti").rename(lists / "dsprites_loc")  # before, it was generated
    assert count() == (0, 1)
    Path("w.npz").write_text("others")
    assert count() == (0, 2)
    swept = [*common[:6], "--methods", "lora", "--datasets", "svhn", "--sweep", "scale", "--epochs"]
    assert vtab1k.main([*swept, "1"]) == 0 and (first := len(measured)) and vtab1k.main([*swept, "2"]) == 0
    assert len(measured) == 2 * first
    drawn = []
    monkeypatch.setattr(tables, "sweep", lambda path, panels, *_: drawn.append(panels))
    vtab1k.charts_of_sweep(SimpleNamespace(out=tmp_path / "out"))
    assert set(drawn[0]["svhn"]) == {"LoRA, epochs 1", "LoRA, epochs 2"}
    assert vtab1k.main([*common[:2], "--checkpoint", "nowhere.npz", *test[4:]]) == 2
    assert "--checkpoint must be a file, 'download' or 'random', got nowhere.npz" in capsys.readouterr().err


def test_a_report_has_all_that_was_tested_and_what_was_asked_for(tmp_path, capsys):
    settings = {"checkpoint": "dinov2s_mri", "model": "m", "image_size": 56, "epochs": 5, "batch_size": 32, "lr": 0.1}
    for data, method, seed in (("digits", "lora", 0), ("digits", "efft2", 1), ("mine", "lora", 0)):
        Store(tmp_path).put(one := run(data, method, seed, **settings), record(one, 60.0))
    assert vtab1k.main(["--report", "--out", str(tmp_path)]) == 0
    table = (tmp_path / "table.md").read_text()
    assert "| digits | mine | Drawn | Others |" in table and "published" not in table and ", of " not in table
    assert vtab1k.main(["--report", "--out", str(tmp_path), "--methods", "lora", "--datasets", "digits"]) == 0
    table = (tmp_path / "table.md").read_text()
    assert "EFFT2" not in table and "mine" not in table and "seeds 0," in table
    for weights in ("w.npz 1", "w.npz 2", "random"):
        Store(tmp_path / "b").put(one := run("digits", "lora", checkpoint=weights, lr=0.1), record(one, 60.0))
    assert vtab1k.main(["--report", "--out", str(tmp_path / "b")]) == 0
    assert "| LoRA, w.npz 2 |" in (table := (tmp_path / "b/table.md").read_text()) and "published" not in table
    assert vtab1k.main(["--report", "--out", str(tmp_path), "--methods", "full"]) == 2


def test_a_signal_stops_the_series_with_a_sentence(common, tmp_path, monkeypatch, capsys):
    done = []

    def train(settings, **options):
        done.append(settings)
        raise loop.Interrupted("stopped after step 1 of 15")

    monkeypatch.setattr(loop, "train", train)
    assert vtab1k.main([*common, "--methods", "linear", "--datasets", "dsprites_loc"]) == 75
    assert "vtab1k: stopped; the same command continues" in capsys.readouterr().err
    assert len(done) == 1 and not Store(tmp_path / "out").all()


@pytest.mark.slow
def test_sweep_is_resumed_and_shared(common, measured, tmp_path, capsys):
    pytest.importorskip("optuna")
    of = ["--methods", "efft2", "--datasets", "svhn"]
    command = [*common[:6], "--sweep", "scale", "rank", *of]
    assert vtab1k.main([*command, "--trials", "4"]) == 0
    assert len(measured) == 4
    assert vtab1k.main(command) == 0
    points = {(one.settings["scale"], one.settings["rank"]) for one in measured}
    assert len(measured) == len(points) == 15 and all(one.part == "val" for one in measured)
    said = capsys.readouterr().out.replace("'scale': 1,", "'scale': 1.0,")
    assert "svhn, efft2: 56.20 % of validation with {'scale': 1.0, 'rank': 32}" in said
    assert vtab1k.main(command) == 0 and len(measured) == 15
    assert (tmp_path / "out/scale.png").exists() and (tmp_path / "out/rank.png").exists()

    # the best setting is tested, in addition to the released one
    test = [*common, "--seeds", "2", *of]
    assert vtab1k.main(test) == vtab1k.main([*test, "--tuned"]) == 0
    kept = [r["run"] for r in Store(tmp_path / "out").all() if r["run"]["part"] == "test"]
    chosen = {(r["method"], r["settings"]["scale"], r["settings"]["rank"], r["settings"]["zero_init"]) for r in kept}
    assert chosen == {("efft2", 80, 32, "vu"), ("efft2, tuned", 1, 32, "vu")} and len(kept) == 4
    assert vtab1k.main(["--out", str(tmp_path / "out"), "--report"]) == 0
    table = (tmp_path / "out/table.md").read_text()
    assert "| EFFT2, tuned |" in table and "| EFFT2 |" in table and table.count("published: EFFT2") == 1
    capsys.readouterr()
    assert vtab1k.main([*test, "--tuned", "--epochs", "3"]) == 2
    assert "--tuned needs a sweep of efft2 on svhn with the same settings" in capsys.readouterr().err


def test_offline_chooses_on_validation_and_tests_once(tmp_path, monkeypatch, capsys):
    """The experiment with an invented accuracy: best at lr 3e-3, scale 1 on validation images, worst there on test."""
    monkeypatch.setattr(sources, "weights", lambda name: sources.Weights("vit_tiny_patch16_224", tmp_path / "w.pt", ""))
    done = []

    def invented(one, places):
        done.append(one)
        lr = one.settings.get("probe", one.settings)["lr"]
        liked = (lr, one.settings.get("scale")) in ((3e-3, 1.0), (1e-4, None))
        top1 = 50.0 + 20 * liked * (1 if one.part == "val" else -1) + one.seed
        return record(one, top1) | {"loss": 100 - top1}

    monkeypatch.setattr(runs, "measure", invented)
    assert vtab1k.main(["--offline", "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    val, test = ([one for one in done if one.part == part] for part in ("val", "test"))
    assert len(val) == 2 * 6 * 3 and {one.seed for one in val} == {0}
    assert done == val + test  # nothing is tested before everything is chosen
    assert len(test) == 2 * (6 * 3 + 1) and all(one.settings["epochs"] == 5 for one in test)
    for one in test:
        wanted = {"full": (1e-4, None), "linear": (1e-4, None)}.get(one.method, (3e-3, 1.0))
        assert (one.settings.get("probe", one.settings)["lr"], one.settings.get("scale")) == wanted
    control = [one for one in test if one.settings["checkpoint"] == "random"]
    assert {one.method for one in control} == {"efft2, random weights"} and len(control) == 2
    table = (tmp_path / "out/table.md").read_text()
    assert "| EFFT2 | 0.001 | **31.0 ± 1.0** |" in table and "| EFFT2, random weights | 0.001 | 30.0 |" in table
    assert "- LoRA: lr 0.003, scale 1 (cifar10, dsprites_loc), of 3 tried" in table
    assert "published" not in table  # of other data and another model


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "--data and --checkpoint are needed"),
        (["--offline", "--data", "."], "--offline has its own data"),
        (["--quick", "--data", ".", "--checkpoint", "x"], "--quick needs --offline"),
        (["--offline", "--methods", "magic"], "--methods must be of full, "),
        (["--offline", "--methods", "magic"], ", got 'magic'"),
        (["--offline", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--offline", "--minutes", "nan"], "--minutes must be at least 1, got nan"),
        (["--offline", "--pruner", "median"], "--pruner median needs --sweep"),
        (["--data", "nowhere", "--checkpoint", "x"], "--data must be a folder, got nowhere"),
        (["--offline", "--cores", "shared"], "--offline has cores of its own"),
        (["--data", ".", "--checkpoint", "x", "--sweep", "lr", "--seeds", "2"], "--seeds is not for --sweep"),
    ],
)
def test_bad_arguments(arguments, said, capsys):
    refused(vtab1k.main, arguments, said, capsys)


def test_what_is_given_twice_is_done_once_and_a_quick_run_stays_apart():
    args = vtab1k.parse(["--offline", "--quick", "--datasets", "a", "a", "--methods", "lora", "lora"])
    assert (args.datasets, args.methods, args.out.name) == (["a"], ["lora"], "vtab1k_offline_quick")


def test_bad_data_sets(lists, tmp_path, capsys):
    common = ["--checkpoint", "x", "--out", str(tmp_path / "out"), "--workers", "1"]
    assert vtab1k.main(["--data", str(lists), *common, "--datasets", "imagenet"]) == 2
    assert "--datasets must be of cifar, caltech101" in capsys.readouterr().err
    assert vtab1k.main(["--data", str(tmp_path), *common, "--datasets", "svhn"]) == 2
    assert "must hold at least one data set" in capsys.readouterr().err


@pytest.mark.slow
def test_shares_of_torchrun():
    code = "import vtab1k; print(vtab1k.share(list(range(7))), vtab1k.os.environ.get('CUDA_VISIBLE_DEVICES'))"
    environment = os.environ | {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1"}
    environment["PYTHONPATH"] = f"{PAPER}:{os.environ.get('PYTHONPATH', '')}"
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    for seen, taken in (({}, "1"), *(({"CUDA_VISIBLE_DEVICES": all_}, own) for all_, own in (("4,6", "6"), ("", "")))):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment | seen)
        assert done.stdout.split("\n")[0] == f"[1, 4] {taken}", done.stderr


TINY = {"model": "test_vit", "checkpoint": "random", "image_size": 32, "epochs": 1, "batch_size": 64}
SERIES = """
import sys
sys.path.append({paper!r})
import runs
if __name__ == "__main__":
    todo = [runs.Run("dsprites_loc", "efft2", seed, "test", {settings!r}) for seed in range(4)]
    runs.complete(todo, runs.Store(runs.Path(sys.argv[1])), runs.Places(None, None, "cpu"), 2)
"""


@pytest.mark.slow
def test_killed_at_any_moment_a_series_goes_on_to_the_same_results(tmp_path):
    """kill -9 of the parent leaves no incomplete record and no orphan, and finished runs are not repeated."""
    script = tmp_path / "series.py"
    settings = dict(TINY, method="efft2", test_images=64, epochs=2)
    script.write_text(SERIES.format(paper=str(PAPER), settings=settings))
    out = tmp_path / "runs"
    first = subprocess.Popen([sys.executable, str(script), str(out)], stderr=subprocess.DEVNULL, start_new_session=True)
    limit = time.time() + 400
    lines = lambda: (out / "runs.csv").read_text().splitlines()[1:] if (out / "runs.csv").exists() else []
    while len(lines()) < 2 and time.time() < limit:
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    kept = lines()
    assert 2 <= len(kept) < 4
    while time.time() < limit and _alive(first.pid):
        time.sleep(0.1)
    assert not _alive(first.pid), "workers outlive the parent"
    todo = [Run("dsprites_loc", "efft2", seed, "test", settings) for seed in range(4)]
    found, failures = runs.complete(todo, Store(out), Places(None, None, "cpu"))
    assert len(found) == len(lines()) == 4 and not failures
    assert lines()[: len(kept)] == kept
    again = Run(**Store(out).all()[0]["run"])  # the result of a worker process equals the one of this process
    once = runs.measure(again, Places(None, None, "cpu"))
    assert Store(out).get(again)["loss"] == pytest.approx(once["loss"], rel=1e-5)


def _alive(session: int) -> bool:
    """Whether a process of the session is still alive."""
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
    return False


def test_divergence_is_a_result():
    settings = dict(TINY, method="linear", lr=1e36, test_images=16)
    found = runs.measure(Run("dsprites_loc", "linear", 0, "test", settings), Places(None, None, "cpu"))
    assert found["top1"] is None and "loss of step" in found["diverged"]


@pytest.mark.slow
def test_probe_learns_where_a_linear_head_can():
    settings = dict(model="vit_tiny_patch16_224", checkpoint="random", image_size=32, probe=dict(epochs=100, lr=1e-2))
    pytest.importorskip("sklearn")
    found = runs.measure(Run("digits", "linear", 0, "test", settings | {"test_images": 400}), Places(None, None, "cpu"))
    assert found["top1"] > 60  # random features separate digits; chance is 10 %
    assert found["parameters"] == 0 and found["head_parameters"] == 192 * 10 + 10


def few_images(monkeypatch, of=1000):
    """Let runs train on the first 96 of their images."""
    opened = runs.opened

    def few(*args, **options):
        found = SOURCES[name := opened(*args, **options)]()
        assert len(found.train) == of
        SOURCES[name] = lambda: replace(found, train=Subset((found.train,), tuple((0, i) for i in range(96))))
        return name

    monkeypatch.setattr(runs, "opened", few)


@pytest.mark.slow
def test_offline_quick(tmp_path, capsys, monkeypatch):
    """The whole experiment on 96 training images: weights of a package, six methods, test, table and chart."""
    few_images(monkeypatch)
    monkeypatch.setattr(plots, "as_svg", lambda figure: "")  # of the runs' reports; the chart is drawn
    monkeypatch.setattr(plots, "curves", lambda file, record: None)
    try:
        sources.weights("dinov2s_mri")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert vtab1k.main(["--offline", "--quick", "--out", str(tmp_path), "--workers", "1"]) == 0
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    for name in ("Full", "Linear", "LoRA", "FacT-TT", "EFFT1", "EFFT2"):
        assert f"| {name} |" in table
    plan = FACTS["offline"] | FACTS["offline"]["quick"]
    kept = Store(tmp_path).all()
    assert len(kept) == 6 * plan["seeds"] and all(r["run"]["part"] == "test" and r["top1"] > 0 for r in kept)
    counts = {r["run"]["method"]: r["parameters"] for r in kept}
    d, r, L = 384, 16, 12
    assert counts["efft1"] == 5 * d * r + 3 * L * r * r and counts["efft2"] == 7 * d * r + 6 * L * r * r
    assert counts["fact-tt"] == 2 * d * r + 12 * L * r * r and counts["lora"] == 2 * L * 2 * d * 8
    assert (tmp_path / "accuracy_parameters.png").stat().st_size > 2000


def test_one_setting_for_all_data_sets(tmp_path):
    """the setting with the smallest mean loss, although another one is best on one of the data sets"""
    store, losses = Store(tmp_path), {"a": (0.2, 0.9, 0.4), "b": (1.5, 0.3, 0.5)}
    grid = {data: [run(data=data, part="val", scale=scale) for scale in (1, 2, 3)] for data in losses}
    for data, found in losses.items():
        for one, loss in zip(grid[data], found):
            store.put(one, record(one, 50.0) | {"loss": loss})
    chosen = runs.choose_together(grid, store)
    assert {data: one.settings["scale"] for data, one in chosen.items()} == {"a": 3, "b": 3}
    store.put(grid["b"][2], record(grid["b"][2], None))  # a setting that diverged anywhere is not chosen
    assert {one.settings["scale"] for one in runs.choose_together(grid, store).values()} == {2}
    for one in (grid["a"][0], grid["a"][1]):
        store.put(one, record(one, None))
    refuses(ValueError, "all 3 settings of .* diverged or failed on a or b", runs.choose_together, grid, store)


def test_where_every_run_failed_the_reasons_are_said_instead_of_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vtab1k, "offline", lambda args: ([("lora", [])], {}, {"lora on cifar10": "TimeoutError: late"}))
    assert vtab1k.main(["--offline", "--out", str(tmp_path)]) == 1
    assert "lora on cifar10" in "".join(capsys.readouterr()) and not (tmp_path / "table.md").exists()


def test_a_sweep_of_other_settings_by_another_sampler(common, measured, capsys):
    pytest.importorskip("optuna")
    swept = [*common[:6], *"--datasets svhn --methods efft2 --normalize model --sweep lr drop_path scale".split()]
    assert vtab1k.main([*swept, "--sampler", "tpe", "--trials", "4"]) == 0
    assert 1 <= len(measured) <= 4 and {one.settings["normalize"] for one in measured} == {"model"}
    assert all({"lr", "drop_path", "scale"} <= set(one.settings) for one in measured)
    refused(vtab1k.main, [*swept, "--sampler", "tpe"], "--sampler tpe needs --sweep, and --trials", capsys)


@pytest.mark.parametrize("pruner", ["median", "halving"])
def test_pruned_trials_of_a_sweep(pruner, common, tmp_path, monkeypatch, capsys):
    optuna = pytest.importorskip("optuna")
    done, stop_at = [], 9
    studies = optuna.storages.InMemoryStorage()  # a database that commits to a disk takes half a minute
    monkeypatch.setattr(vtab1k, "database", lambda url: studies)
    monkeypatch.setattr(vtab1k, "charts_of_sweep", lambda args: None)

    def measure(one, places, after_epoch=None):
        top1 = fake(one, places)["top1"]
        done.append(one)
        for epoch in range(1, 11) if after_epoch else ():
            if len(done) == stop_at and epoch == 3:
                raise KeyboardInterrupt
            after_epoch(epoch, top1 * epoch / 10)
        return record(one, top1)

    monkeypatch.setattr(vtab1k, "measure", measure)
    command = [*common[:6], "--epochs", "10", "--sweep", "scale", "rank", "--methods", "efft2", "--datasets", "svhn"]
    assert vtab1k.main([*command, "--pruner", pruner]) == 75 and len(done) == stop_at
    assert vtab1k.main([*command, "--pruner", pruner]) == 0
    assert len(done) == 15 + 1, "only the point that was interrupted begins again"
    (name,) = optuna.get_all_study_names(studies)
    trials = optuna.load_study(study_name=name, storage=studies).trials
    states = [t.state.name for t in trials]
    assert states.count("FAIL") == 1 and 0 < (pruned := states.count("PRUNED")) < 15
    for t in trials:
        if t.state.name == "PRUNED":  # at the accuracy of the epoch, and not before a fifth of all epochs
            assert 2 <= max(t.intermediate_values) < 10 and t.value == t.intermediate_values[max(t.intermediate_values)]
    assert len(Store(tmp_path / "out").all()) == 15 - pruned, "a pruned trial is no result"
    said = capsys.readouterr().out
    assert "svhn, efft2: 56.20 % of validation" in said and f"{pruned} of 16 trials" in said
    assert vtab1k.main([*command, "--pruner", pruner]) == 0 and len(done) == 16
    # without a pruner, in a study of its own: the others count, and those are trained to the end
    assert vtab1k.main(command) == 0 and len(done) == 16 + pruned
    assert len(Store(tmp_path / "out").all()) == 15


@pytest.mark.slow
def test_workers_of_a_sweep_may_begin_at_once(tmp_path):
    """Several processes open a new database at the same moment."""
    code = f"""
import os, sys
sys.path[:0] = {[str(PAPER), str(PAPER.parent)]!r}
import optuna, sqlalchemy, vtab1k
for _ in range(4):
    if not os.fork():
        vtab1k.database("sqlite:///{tmp_path}/sweep.db")
        os._exit(0)
assert [os.wait()[1] for _ in range(4)] == [0] * 4
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_database_that_others_are_making_is_tried_again(monkeypatch):
    optuna, sqlalchemy = pytest.importorskip("optuna"), pytest.importorskip("sqlalchemy")
    tries, failures = [], 2

    def made(url, **options):
        tries.append(url)
        if len(tries) <= failures:
            raise sqlalchemy.exc.OperationalError("CREATE TABLE studies", None, Exception("it already exists"))
        return "storage"

    monkeypatch.setattr(optuna.storages, "RDBStorage", made)
    monkeypatch.setattr(vtab1k.time, "sleep", lambda seconds: None)
    assert vtab1k.database("x") == "storage" and len(tries) == 3
    failures = 99
    refuses(ValueError, "--storage must be a database that can be opened, got x", vtab1k.database, "x")
