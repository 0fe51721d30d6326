"""benchmarks/gpu.py without a GPU: a dry run of every step, what a step that hangs leaves, the table of the goals."""

import csv
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmark_scripts import BENCHMARKS, need, refused

need("matplotlib", "tabulate", "tqdm")
sys.path.append(str(Path(__file__).parent / "cuda"))

import gpu
import simulator

from efft_kernels.kernels.tuning import table


@pytest.mark.slow
def test_a_dry_run_exercises_every_step(tmp_path):
    if simulator.compiler() is None:
        pytest.skip("the simulator needs a C++ compiler")
    pytest.importorskip("triton")
    out, run = tmp_path / "out", gpu.Run(tmp_path, 15)
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry", "--minutes", "10", "--out", str(out), "--no-train"]
    before = table.SHIPPED.read_bytes()
    run.step("dry", command, 900)
    (end,) = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert end["outcome"] == "passed", end
    lines = [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]
    assert {"info", "tune", "ratios", "stress", "small"} == {line["step"] for line in lines}
    assert len([line for line in lines if "A2 B4" in line.get("entry", "")]) == 3  # mixed batches, with their backward
    assert not [line for line in lines if line.get("outcome", "passed") != "passed"]
    record = json.loads((out / "gpu.json").read_text())
    assert record["dry"] and record["proven"]["cuda"].keys() >= {"single_pass tile64", "hopper tile128", "merge_"}
    assert record["proven"]["triton"].keys() >= {"single_pass", "extended_k"} and not any(record["dropped"].values())
    assert {each["backend"] for each in record["stress"]} == {"cuda", "triton"}
    assert not any(each["differ"] for each in record["stress"])
    rows = [*csv.DictReader((out / "gpu.csv").open())]
    variants = {row["variant"] for row in rows}
    assert variants == {"product first", "product last", "auto", "merged", "peft"}
    assert {row["pass"] for row in rows} == {"forward", "backward"}
    assert sorted(path.name for path in out.iterdir()) == ["gpu.csv", "gpu.json", "gpu.jsonl", "tuned.json"]
    table._checked(json.loads((out / "tuned.json").read_text())["devices"])
    assert table.SHIPPED.read_bytes() == before  # of a simulator nothing is shipped


def test_a_step_that_hangs_or_fails_ends_alone(tmp_path, monkeypatch):
    run = gpu.Run(tmp_path, 5)
    never = "import subprocess; print('@@{\"a\": 1}\\nb', flush=True); subprocess.run(['sleep', '600'])"
    assert run.step("hangs", [sys.executable, "-c", never], 5) == [{"a": 1}]
    assert run.step("fails", [sys.executable, "-c", "raise SystemExit('why')"], 60) == []
    run.end = run.start
    assert run.step("late", [sys.executable, "-c", ""], 60) == []
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [(line["step"], line.get("outcome"), line.get("end")) for line in lines] == [
        ("hangs", None, None), ("hangs", "stopped", "b"), ("fails", "failed", "why"), ("late", "no time left", None)
    ]  # fmt: skip


def test_where_every_step_fails_nothing_is_complete_measured_or_lost(tmp_path, monkeypatch):
    old = {"proof": {}, "measured": {"lowrank_linear bfloat16 K8 N8 R16": {"8": {"torch": 1.0}}}}
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "shipped.json")
    table.SHIPPED.write_text(json.dumps({"format": table.FORMAT, "devices": {"other": old}}))
    monkeypatch.setenv("EFFT_CACHE", str(tmp_path / "cache"))
    new = {name.replace("8", "9"): rows for name, rows in old["measured"].items()}

    def tune(*args, **options):
        table.save("this", measured=new)
        return gpu.run.Report({}, {}, [], [], None)

    monkeypatch.setattr(gpu.run, "tune", tune)
    monkeypatch.setattr(gpu.Run, "step", lambda self, name, *_: self.note(name, outcome="failed") or [])
    earlier = [{"model": "vit_b", "pass": "step", "method": name, "ms": 1.0} for name in ("efft2", "merged")]
    gpu.record.write_csv(tmp_path / "train_step.csv", earlier)
    args = SimpleNamespace(dry=False, minutes=0.5, no_train=False)
    assert gpu.everything(gpu.Run(tmp_path, 0.5), tmp_path, args) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert not found["complete"] and {"info: failed", "ratios: failed", "train_step: failed"} <= set(found["not_done"])
    assert not any(goal["cases"] for goal in found["goals"])
    assert json.loads(table.SHIPPED.read_text())["devices"] == {"other": old, "this": {"proof": {}, "measured": new}}


def test_table_of_the_goals():
    size = dict(model="vit_b", M=8, K=4, N=4, R=2, slices=1, dtype="bfloat16", count=12, backend="cuda")
    us = {"lorafusion a": 50.0, "lorafusion b": 40.0, "product first": 30.0, "product last": 25.0}
    us |= {"auto": 20.0, "merged": 16.0, "peft": 40.0}
    kinds = itertools.product(("qkv", "proj"), ("forward", "backward"))
    cases = [{**size, "layer": layer, "pass": kind, "us": us} for layer, kind in kinds]
    cases[2]["us"] = us | {"auto": 26.0}
    rows = gpu.rows_of(cases)
    steps = [
        {"file": "train_step", "model": "vit_b", "pass": "step", "method": method, "ms": ms, "peak_bytes": peak}
        for method, ms, peak in (("merged", 10.0, 5), ("peft_lora", 30.0, 8), ("efft2", 12.0, 6))
    ]
    found = {(goal["goal"], goal["what"].partition(",")[0]): goal["measured"] for goal in gpu.goals(rows, steps)}
    values = {name: value for (name, _), value in found.items()}
    assert values["G1"] == 1.25 and values["G2"] == 26 / 16 and values["G3"] is None
    assert values["G4"] == (20 + 20 + 26 + 20) / (4 * 16) and values["G14"] == 26 / 25
    assert values["G5"] == 1.2 and values["G6"] == 0.4 and values["G10b"] == 0.75
    assert values["G7"] is None  # not measured
    assert values["G8"] == 26 / 40


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    refused(gpu.main, [], "expected a GPU and a CUDA build of torch", capsys)
