"""benchmarks/bench_serving.py: what is compared computes the same, and the script runs from arguments to files."""

import pytest
import torch
from benchmark_scripts import check_files, interrupt
from test_bench_model import RECORD, SIZES, small  # noqa: F401, which makes the models small

import bench_serving  # found because benchmark_scripts put benchmarks/ on the path
import harness

from record import ratios

OPTIONS = harness.Options(rank=4, lora_rank=2)


def test_all_ways_compute_the_same():
    base = harness.backbone("vit_b", 32, torch.float32, "cpu").eval()
    images, ids = torch.randn(5, 3, 32, 32), [0, 1, 2, 0, 1]
    with torch.no_grad():
        bank, fused, singly = (
            build(base, OPTIONS, 3).serve(images, ids)
            for build in (bench_serving.bank(bench_serving._efft), bench_serving.fused, bench_serving.one_by_one)
        )
        swapped = bench_serving.switched(base, OPTIONS, 3).serve(images, ids)
        plain = bench_serving.merged(base, OPTIONS, 3).serve(images, ids)
    torch.testing.assert_close(bank[[0, 3]], fused[[0, 3]], rtol=1e-4, atol=1e-5)
    for a, b, rows in zip(singly, swapped, ([0, 3], [1, 4], [2])):
        torch.testing.assert_close(a, bank[rows], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b, bank[rows], rtol=1e-4, atol=1e-5)
    assert [len(part) for part in singly] == [2, 2, 1]
    assert not torch.allclose(bank, plain) and not torch.allclose(bank[1], fused[1])


@pytest.mark.slow
def test_serving(tmp_path, capsys):
    options = ["--adapters", "4", "1", "2", "--most-switches", "2", "--out", str(tmp_path / "run")]
    assert bench_serving.main([*SIZES, *options]) == 0
    shown = capsys.readouterr().out
    assert "AdapterBank, one pass" in shown and "more than --most-switches 2" in shown
    record = check_files(tmp_path / "run", "serving", tmp_path)
    assert record.keys() == RECORD
    rows = {row["label"]: row for row in record["results"]}
    several = {f"{name} at {K}" for name in ("one_by_one", "bank", "bank_lora", "peft_mixed") for K in (1, 2, 4)}
    assert rows.keys() >= {"merged", "fused", "switched at 1", "switched at 2"} | several - set(record["left_out"])
    bank = rows["bank at 4"]
    assert bank["p50_ms"] <= bank["p90_ms"] <= bank["p99_ms"]
    assert bank["held_bytes"] == 2 * rows["bank at 2"]["held_bytes"] == 4 * rows["fused"]["held_bytes"] > 0
    assert {"merged", "fused", "bank_1"} <= ratios(bank).keys()
    banks = {f"{name} at {K}" for name in ("bank", "bank_lora") for K in (1, 2, 4)}
    assert bench_serving.summary(record["results"])[0]["ratio"].keys() == banks


def test_interrupted_before_a_round(tmp_path, monkeypatch, capsys):
    interrupt(monkeypatch, 0)
    assert bench_serving.main([*SIZES, "--adapters", "1", "--methods", "merged", "--out", str(tmp_path)]) == 130
    assert "nothing to show" in capsys.readouterr().out and not list(tmp_path.glob("*.json"))
