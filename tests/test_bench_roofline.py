"""benchmarks/roofline.py: a chart of a record that bench_forward.py made, and what it says of one that is none."""

import json
from pathlib import Path

import pytest
import torch
from benchmark_scripts import BENCHMARKS, need, unmeasured

need("matplotlib", "tabulate", "tqdm")

import bench_forward
import roofline
from record import read_run, write_csv


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> Path:
    """a run of moments: two Linears, both passes"""
    folder = tmp_path_factory.mktemp("forward")
    options = "--model swin_t --layer stage1.qkv stage2.proj --rows 5 --rank 3 --backward --compile none --repeats 3"
    options += " --variants unfused efft einsum --seconds 600"
    with pytest.MonkeyPatch.context() as patch:
        unmeasured(patch)
        with torch.random.fork_rng():
            assert bench_forward.main([*options.split(), "--out", str(folder)]) == 0
    return folder / "forward.json"


def test_points_are_those_of_the_record(record):
    found = read_run(record)
    panels = roofline.panels(found)
    assert set(panels) == {("float32", part) for part in ("forward", "backward", "forward+backward")}
    roof, reached = roofline.roofs(found, "float32")
    assert (reached.gflops, reached.gbytes) == (90, 10)
    for (_, part), points in panels.items():
        assert {p.row["variant"] for p in points} == {"merged", "unfused", "efft"} and len(points) == 6
        for point in points:
            assert point.row["pass"] == part
            flops, moved = bench_forward.row_work(point.row)
            assert point.gflops == pytest.approx(flops / point.row["ms"] * 1e-6)
            assert point.gflops / point.intensity == pytest.approx(moved / point.row["ms"] * 1e-6)
            # times have four digits
            assert point.gflops <= min(roof.gflops, roof.gbytes * point.intensity) * 1.001


def test_the_chart_shows_every_point_under_the_roof(record, monkeypatch):
    drawn, panel = [], roofline.panel
    monkeypatch.setattr(roofline, "panel", lambda axis, *rest: (panel(axis, *rest), drawn.append(axis)))
    before = record.read_bytes()
    assert roofline.main([str(record)]) == 0 and record.read_bytes() == before
    image = record.with_name("roofline.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 10_000
    points = roofline.panels(read_run(record))
    for axis, expected in zip(drawn, points.values(), strict=True):
        marks = [line.get_xydata()[0] for line in axis.lines if line.get_marker() not in ("None", None)]
        assert [tuple(mark) for mark in marks] == [(p.intensity, p.gflops) for p in expected]
        (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
        assert all(left < x < right and low < y < high for x, y in marks)
        assert len(axis.lines) == len(marks) + 2  # the limits, and what was reached
        words = " ".join(text.get_text() for text in axis.texts)
        assert "stage1" in words and "stage2" in words and "limits: 100 GFLOP/s, 20.0 GB/s" in words


def test_committed_records_draw():
    for path in BENCHMARKS.glob("results/*/*/forward.json"):
        record = roofline.read(path)
        assert all(roofline.roofs(record, dtype) for dtype, _ in roofline.panels(record))
        assert roofline.note(record)


def without(key, record):
    return {name: value for name, value in record.items() if name != key}


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda r: None, "expected a file of a recorded run: No such file"),
        (lambda r: "{", "expected a recorded run: Expecting property name"),
        (lambda r: [r], "expected an object, got list"),
        (lambda r: r | {"format": 1}, "expected format 2, got 1"),
        (lambda r: r | {"benchmark": "serving"}, "expected benchmark 'forward', got 'serving'"),
        (lambda r: r | {"results": [row | {"variant": "x"} for row in r["results"]]}, "one of merged, .*efft"),
        (lambda r: r | {"results": [without("ms", row) for row in r["results"]]}, "expected ms in every row"),
        (lambda r: without("limits", r), "expected limits, got"),
        (lambda r: r | {"limits": {}}, "expected limits with flops of float32 and bandwidth, got {}"),
    ],
)  # fmt: skip
def test_what_is_no_record(spoil, said, record, tmp_path):
    path, spoiled = tmp_path / "forward.json", spoil(read_run(record))
    if isinstance(spoiled, dict):
        write_csv(path.with_suffix(".csv"), spoiled.pop("results"))
    if spoiled is not None:
        path.write_text(spoiled if isinstance(spoiled, str) else json.dumps(spoiled))
    with pytest.raises(ValueError, match=f"{path}: .*{said}"):
        roofline.read(path)


def test_a_bad_record_keeps_no_good_one_from_its_chart(record, tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(roofline, "draw", lambda record, path: drawn.append(path))
    assert roofline.main([str(tmp_path / "none.json"), str(record)]) == 1
    assert drawn == [record.with_name("roofline.png")]
    assert f"{tmp_path / 'none.json'}: expected a file of a recorded run" in capsys.readouterr().err
