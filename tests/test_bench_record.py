"""benchmarks/record.py and summary.py: files of a run, and pages whose tables agree with the records."""

import csv
import re
import subprocess
from collections import Counter
from types import SimpleNamespace

import pytest
from benchmark_scripts import BENCHMARKS, need

need("matplotlib", "tabulate", "tqdm")
ROOT = BENCHMARKS.parent

import gpu_tables
import record
import summary


def test_a_run_is_two_files(tmp_path):
    rows = [
        {"layer": "qkv", "M": 197, "ms": 0.0123456, "q1": 12345.678, "size": "batch 4", "loss": None},
        {"layer": "a, b", "M": -1, "ms": 1e-30, "ratio_merged": 1.0, "loss": float("nan")},
    ]
    run = {"benchmark": "forward", "format": record.FORMAT, "complete": True, "results": rows, "summary": ["derived"]}
    record.write_run(tmp_path, run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["forward.csv", "forward.json"]
    found = record.read_run(tmp_path / "forward.json", "complete")
    assert found.keys() == {"benchmark", "format", "complete", "results"}
    empty = dict.fromkeys(("layer", "M", "ms", "q1", "size", "loss", "ratio_merged"))
    assert found["results"] == [
        empty | {"layer": "qkv", "M": 197, "ms": 0.01235, "q1": 12350, "size": "batch 4"},
        empty | {"layer": "a, b", "M": -1, "ms": 1e-30, "ratio_merged": 1},
    ]
    with pytest.raises(ValueError, match=r"forward.json: expected a recorded run: expected commit, got"):
        record.read_run(tmp_path / "forward.json", "complete", "commit")


def test_rows_are_kept_as_they_come(tmp_path):
    run = {"benchmark": "forward", "format": record.FORMAT, "complete": True, "results": []}
    kept = []

    def measure():
        for n in range(2):
            record.add_rows(run, [{"layer": n}], tmp_path)
            kept.append(record.read_run(tmp_path / "forward.json"))
        raise RuntimeError("as if killed")

    with pytest.raises(RuntimeError, match="as if killed"):
        record.conclude(run, tmp_path, measure, list, print, print)
    assert [len(run["results"]) for run in kept] == [1, 2] and not any(run["complete"] for run in kept)
    assert record.read_run(tmp_path / "forward.json") == kept[1]


def test_a_load_test_is_a_run_with_a_row_per_kind_of_answer(tmp_path):
    for module in ("aiohttp", "ray", "PIL"):
        pytest.importorskip(module)
    import load_test

    load = SimpleNamespace(
        seconds=[0.2, 0.1], counts=Counter(sent=2), statuses=Counter({"200": 2}), again=Counter(), problems=[],
        refusals={"empty": Counter({"400": 3}), "a line": Counter({"422": 1, "400": 1})},
        memory={7: [(0, 10), (1, 11)]},
    )  # fmt: skip
    found = load_test.summary(load, SimpleNamespace(rate=1.0), 0)
    record.write_run(tmp_path, {"benchmark": "load_test", "format": record.FORMAT, **found})
    kept = record.read_run(tmp_path / "load_test.json", "sent", "seconds", "memory")
    assert [tuple(row.values()) for row in kept["results"]] == [
        ("image", 200, 2), ("empty", 400, 3), ("a line", 422, 1), ("a line", 400, 1),
    ]  # fmt: skip
    assert found["memory_flat"] is None  # of one sample nothing is known
    for last, flat in ((100, True), (900, False)):
        load.memory[8] = [(n, last if n > 10 else 100) for n in range(15)]
        assert load_test.summary(load, SimpleNamespace(rate=1.0), 0)["memory_flat"] is flat


def test_every_page_agrees_with_the_records(capsys):
    assert summary.main(["--check"]) == 0, f"python benchmarks/summary.py --write, of: {capsys.readouterr().out}"


def test_every_table_is_made_and_every_record_in_it_is_there():
    page = ROOT / "docs" / "page.md"
    for name, table in summary.TABLES.items():
        made = table()
        assert table.__doc__ and made.rows and all(len(row) == len(made.head) for row in made.rows), name
        links = re.findall(r"\]\(([^)]*)\)", made.markdown(page))
        assert links and all((page.parent / link).exists() for link in links), name


def test_a_table_is_refreshed_between_its_markers(tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    monkeypatch.setattr(summary, "ROOT", tmp_path)
    monkeypatch.setattr(summary, "RESULTS", tmp_path / "benchmarks" / "results")
    made = summary.Table(["method", "ms"], [["one", "1.5"]], "Medians.", ["zen5/x"])
    monkeypatch.setattr(summary, "TABLES", {"some": lambda: made})
    text = "before\n\n<!-- table: some -->\nold\n<!-- end -->\n\nafter\n"
    page.write_text(text)
    assert summary.main(["--check"]) == 1 and page.read_text() == text
    assert "README.md: differs from its records" in capsys.readouterr().out
    assert summary.main(["--write"]) == 0
    assert page.read_text() == (
        "before\n\n<!-- table: some -->\n\n| method | ms |\n| --- | ---: |\n| one | 1.5 |\n\n"
        "Medians. Record: [1](benchmarks/results/zen5/x).\n\n<!-- end -->\n\nafter\n"
    )
    assert summary.main(["--check"]) == 0
    page.write_text(text.replace("some", "other"))
    assert summary.main(["--check"]) == 2 and "expected a table out of some, got 'other'" in capsys.readouterr().err
    page.write_text(text.replace("<!-- end -->", ""))
    assert summary.main(["--write"]) == 2 and "expected an <!-- end -->" in capsys.readouterr().err


def test_table_of_gpus(tmp_path, monkeypatch):
    row = {"model": "vit_b", "layer": "qkv", "M": 12608, "K": 768, "N": 2304, "pass": "forward", "variant": "auto"}
    row |= {"backend": "cuda", "ms": 0.08, "ratio_merged": 1.0, "ratio_torch": 0.8, "ratio_peft": 0.5}
    run = {"benchmark": "gpu", "format": record.FORMAT, "dry": False, "machine": {"gpu": {"name": "NVIDIA G"}}}
    for name, more in (("some_gpu", {}), ("dry", {"dry": True})):
        (tmp_path / name).mkdir()
        record.write_run(tmp_path / name, run | more | {"results": [row, row | {"variant": "merged"}]})
    monkeypatch.setattr(gpu_tables, "RESULTS", tmp_path)
    made = gpu_tables.gpu_forward()
    linear = "ViT-B qkv 768 → 2304, M = 12608"
    times = ["80.0", "160", "100", "80.0"]
    assert made.rows == [["G", linear, *times, "cuda", "1.00", "0.500", "0.800"]]
    assert made.records == ["some_gpu/gpu.csv"] and not gpu_tables.gpu_backward().rows


def test_no_chart_of_variants_without_a_colour(tmp_path):
    record.chart(tmp_path / "chart.png", [("fc1", {"M=4": {"efft_cpu": (1.0, 0.9, 1.1)}})], {"efft": "red"}, "", "")
    assert not list(tmp_path.iterdir())


def test_passes_of_a_variant_are_in_one_line(tmp_path):
    row = lambda variant, part, **measured: {"layer": "fc1", "pass": part, "variant": variant, **measured}
    rows = [
        row("a", "forward", ms=1.5, rounds=3),
        row("b", "forward", ms=2.5, rounds=3),
        row("a", "both", ms=4.5, rounds=2),
    ]
    run = {"benchmark": "forward", "format": record.FORMAT, "results": rows}
    record.write_run(tmp_path, run)
    assert len((tmp_path / "forward.csv").read_text().splitlines()) == 3
    assert record.read_run(tmp_path / "forward.json")["results"] == rows


def test_records_are_small_and_in_their_form():
    """no run without its table or its conditions, no file over 500 kB, four significant digits"""
    try:
        listed = subprocess.run(["git", "-C", ROOT, "ls-files", "benchmarks/results"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if listed.returncode or not listed.stdout:
        pytest.skip("not a repository")
    paths = [ROOT / name for name in listed.stdout.splitlines()]
    assert {path.suffix for path in paths} <= {".csv", ".json", ".md", ".png"}
    assert all(path.stat().st_size < 500_000 for path in paths if path.exists())
    several = {"first_run.json": ("timings.csv", "profile.csv")}
    for path in (path for path in paths if path.suffix == ".json" and path.stem != "tuned"):
        run = record.read_run(path) if path.name not in several and path.stem != "runs" else None
        for name in several.get(path.name, (f"{path.stem}.csv",)):
            assert record.read_csv(path.with_name(name)), name
        if run:
            assert {"benchmark", "complete", "machine", "versions", "commit"} <= run.keys(), path
            assert not run.get("dry"), path
    with (summary.RESULTS / "zen5/vit_b_float32/forward.csv").open(newline="") as file:
        assert all(len(re.sub(r"e.*|^0\.0*|\.", "", row["forward.ms"])) <= 4 for row in csv.DictReader(file))
