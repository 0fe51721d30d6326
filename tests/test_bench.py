"""benchmarks/: the shapes, every baseline against float64, and the command line from arguments to files."""

import subprocess
import sys

import pytest
import torch
from benchmark_scripts import BENCHMARKS, check_files, interrupt, need, refused, unmeasured

need("matplotlib", "tabulate", "tqdm")

import baselines
import bench_forward
import record
import shapes
import timing

TINY = ["--model", "swin_t", "--layer", "stage1.qkv", "--rows", "5", "--rank", "3"]
TINY += ["--repeats", "4", "--seconds", "600"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    unmeasured(monkeypatch)


def test_vit_b():
    found = {layer.name: layer[1:] for layer in shapes.layers("vit_b")}
    assert found == {
        "qkv": (768, 2304, 3, 197, 12),
        "proj": (768, 768, 1, 197, 12),
        "fc1": (768, 3072, 1, 197, 12),
        "fc2": (3072, 768, 1, 197, 12),
    }


@pytest.mark.parametrize(
    ("model", "millions", "count"),  # weights of the transformer blocks' Linears alone
    [("vit_b", 84.9, 48), ("vit_l", 302.0, 96), ("vit_h", 629.1, 128), ("swin_t", 25.9, 48), ("swin_b", 83.8, 96)],
)
def test_models_have_their_known_size(model, millions, count):
    layers = shapes.layers(model)
    assert sum(layer.K * layer.N * layer.count for layer in layers) / 1e6 == pytest.approx(millions, abs=0.1)
    assert sum(layer.count for layer in layers) == count


def test_swin_stages():
    found = {layer.name: layer for layer in shapes.layers("swin_b")}
    assert found["stage1.qkv"] == shapes.Layer("stage1.qkv", 128, 384, 3, 3136, 2)
    assert found["stage4.fc2"] == shapes.Layer("stage4.fc2", 4096, 1024, 1, 49, 2)
    assert found["stage3.fc1"].count == 18 and found["stage3.fc1"].kind == "fc1"


def test_work():
    work = shapes.work(M=3, K=5, N=7, R=2, itemsize=4)
    assert work["forward"] == (2 * 3 * (5 * 7 + 5 * 2 + 2 * 7), 4 * (3 * 5 + 7 * 5 + 7 + 5 * 2 + 2 * 7 + 3 * 7))
    # dx, dp up, dup, dp down, ddown; reads dy, x, p, w, down, up, writes dx, ddown, dup
    assert work["backward"] == (2 * 3 * (5 * 7 + 2 * 2 * 7 + 2 * 2 * 5), 4 * (21 + 15 + 6 + 35 + 24 + 15 + 24))
    assert work["forward+backward"][0] == work["forward"][0] + work["backward"][0]


VARIANTS = [v for v in baselines.variants("cpu")[0] if not v.compiled]


@pytest.mark.parametrize("kind", shapes.KINDS)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_variants_agree_with_float64(variant, kind):
    K, N, S = {"qkv": (40, 72, 3), "proj": (40, 40, 1), "fc1": (40, 96, 1), "fc2": (96, 40, 1)}[kind]
    i = baselines.make_inputs(11, shapes.Layer(kind, K, N, S, 11, 1), 3, torch.float32, "cpu", grad=True)
    call = variant.build(i)
    y = call.forward()
    true, added = baselines.truth(i, slice(None))
    assert (y - true).norm() < 2e-6 * true.norm()
    assert (added.norm() / true.norm()).item() == pytest.approx(baselines.UPDATE, rel=0.5)

    dx, *grads = torch.autograd.grad(y, (i.x, *call.trained), i.dy)
    dy, dw = i.dy.double(), baselines.update(i.u, i.sigma, i.v).detach()
    want = dy @ (i.weight.double() + dw.t())
    assert (dx - want).norm() < 2e-6 * want.norm()
    # of any factors, <factor, gradient> is <dW, x.T dy>, as dW is linear in each
    inner = (dw * (i.x.detach().double().t() @ dy)).sum().item()
    size = dw.norm().item() * (i.x.detach().double().t() @ dy).norm().item()
    for factor, grad in zip(call.trained, grads):
        assert (factor.double() * grad).sum().item() == pytest.approx(inner, abs=2e-6 * size)


def test_variants_are_named_once_and_explained():
    found, left_out = baselines.variants("cpu")
    names = [v.name for v in found]
    assert len(set(names)) == len(names) and not set(names) & set(left_out)
    assert {"merged", "einsum_dw", "peft", "unfused", "efft"} <= set(names) and all(v.meaning for v in found)
    assert "efft_triton" in left_out and "efft_cuda" in left_out
    on_gpu = {v.name: v for v in baselines.variants("cuda")[0]}
    assert "peft_autotuned" in set(on_gpu) - set(names) and on_gpu["peft_autotuned"].compiled


def test_interleave_turns_the_order_and_the_copies():
    calls, variants = [], {name: [(name, copy) for copy in range(2)] for name in "abc"}
    rounds = list(timing.interleave(variants, lambda call: calls.append(call) or [], 4))
    assert len(rounds) == 4 and all(set(laps) == set("abc") for laps in rounds)
    order = ["".join(name for name, _ in calls[at : at + 3]) for at in range(0, 12, 3)]
    assert order == ["abc", "acb", "cab", "cba"]
    assert [copy for _, copy in calls] == [0, 1] * 6


def test_interleave_stops_at_the_deadline_after_three_rounds():
    assert len(list(timing.interleave({"a": [()]}, lambda call: [], 9, deadline=0.0))) == 3


def test_memory_counts_what_a_call_allocates():
    x = torch.ones(1000, 1000)
    peak, kept = timing.memory((lambda _: x + 1, lambda y: y + 1), "cpu")
    assert 8e6 <= peak < 8.1e6 and kept == 0


@pytest.mark.slow
def test_command_line(tmp_path, capsys):
    folder = tmp_path / "new" / "run"
    options = ["--backward", "--dtype", "float32", "bfloat16", "--compile", "none", "--out", str(folder)]
    assert bench_forward.main([*TINY, *options]) == 0
    shown = capsys.readouterr().out
    for text in ("stage1.qkv 96->288", "einsum_dw", "forward+backward", "left out", "slower than unfused torch"):
        assert text in shown

    run = check_files(folder, "forward", tmp_path)
    assert {"machine", "versions", "commit", "arguments", "backends", "limits", "left_out"} <= run.keys()
    rows = run["results"]
    assert len({(row["dtype"], row["pass"]) for row in rows}) == 2 * 3
    for row in rows:
        assert row["M"] == 5 and row["R"] == 3 and row["rounds"] == 4
        assert 0 < row["q1"] <= row["ms"] <= row["q3"]
        assert row["error_y"] < (1e-5 if row["dtype"] == "float32" else 2e-2)
        assert row["variant"] != "merged" or record.spread_of(row, "merged") == (1, 1, 1)
    summary = bench_forward.summary(rows)
    assert {s["pass"] for s in summary} == {"forward", "backward", "forward+backward"}
    assert "unfused" in summary[0]["efft_ratio"]


def test_interrupted(tmp_path, capsys, monkeypatch):
    interrupt(monkeypatch, 2)
    assert bench_forward.main([*TINY, "--variants", "efft", "--out", str(tmp_path)]) == 130
    assert "interrupted: what follows is partial" in capsys.readouterr().out
    run = record.read_run(tmp_path / "forward.json")
    assert run["complete"] is False
    found = [(row["layer"], row["variant"], row["rounds"]) for row in run["results"]]
    assert found == [("stage1.qkv", "merged", 2), ("stage1.qkv", "efft", 2)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "resnet"], "argument --model: invalid choice: 'resnet'"),
        (["--layer", "stage1.qkv"], "argument --layer: expected a layer of vit_b, got 'stage1.qkv'"),
        (["--batch", "0"], "argument --batch: expected a positive integer, got '0'"),
        (["--rows", "1.5"], "argument --rows: expected a positive integer, got '1.5'"),
        (["--rows", "8", "--batch", "1"], "argument --batch: not allowed with argument --rows"),
        (["--rank", "769"], "argument --rank: expected at most 768 for vit_b qkv, got 769"),
        (["--dtype", "float64"], "argument --dtype: invalid choice: 'float64'"),
        (["--seconds", "nan"], "argument --seconds: expected a positive number of seconds, got 'nan'"),
        (["--variants", "efft9"], "argument --variants: invalid choice: 'efft9'"),
        (["--out", f"{__file__}/x"], "argument --out: expected a folder that can be written, got"),
        pytest.param(
            ["--device", "cuda"],
            "argument --device: expected a device that torch can use, got 'cuda'",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_arguments(arguments, sentence, capsys):
    refused(bench_forward.main, arguments, sentence, capsys)


@pytest.mark.parametrize("sizes", [["--rows", "40", "40"], ["--batch", "4", "4", "--dtype", "float32", "float32"]])
def test_a_case_that_is_given_twice_is_one(sizes):
    assert len(bench_forward.parse(["--layer", "qkv", *sizes])[1]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("script", "option"), [("forward", "--backward"), ("inference", "--lora-rank")])
def test_runs_from_anywhere(script, option, tmp_path):
    command = [sys.executable, str(BENCHMARKS / f"bench_{script}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and option in done.stdout, done.stderr


def test_limits_are_raised_to_what_a_variant_reached():
    row = {"dtype": "float32", "M": 64, "K": 64, "N": 64, "R": 1, "pass": "forward"}
    flops, moved = bench_forward.row_work(row)
    rows = [row | {"ms": 1e3 * seconds} for seconds in (1.0, 4.0)]
    run = {"results": rows, "limits": {"flops": {"float32": flops / 4}, "bandwidth": moved, "source": "measured"}}
    bench_forward.raise_limits(run)
    assert run["limits"] == {
        "flops": {"float32": flops}, "bandwidth": moved, "source": "measured; more where a variant showed more",
    }  # fmt: skip
    assert [bench_forward.floor_share(row, run["limits"]) for row in rows] == [1.0, 0.25]
    run["limits"] |= {"flops": {"float32": flops / 4}, "bandwidth": moved / 2}  # both are too low
    bench_forward.raise_limits(run)
    assert run["limits"]["flops"] == {"float32": flops} and run["limits"]["bandwidth"] == moved


def test_a_record_is_dirty_by_the_code_and_not_by_other_records(tmp_path, monkeypatch):
    files = {name: tmp_path / "benchmarks" / name for name in ("record.py", "results/a.json")}
    monkeypatch.setattr(record, "__file__", str(files["record.py"]))
    monkeypatch.delenv("EFFT_COMMIT", raising=False)
    assert record.commit() is None  # there is no repository yet
    for file in files.values():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1")
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "a"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    assert record.commit()["dirty"] is False
    files["results/a.json"].write_text("2")
    assert record.commit()["dirty"] is False
    files["record.py"].write_text("2")
    assert record.commit()["dirty"] is True
    monkeypatch.setenv("EFFT_COMMIT", "12ab")  # this is a copy of the sources, whatever repository is around it
    assert record.commit() == {"id": "12ab", "dirty": False}
    monkeypatch.setenv("EFFT_COMMIT", "12ab-dirty")
    assert record.commit() == {"id": "12ab", "dirty": True}
