"""benchmarks/tune_shapes.py and ship_tables.py: from sizes of models to entries, from records to what is shipped."""

import json
import re
import sys
from pathlib import Path

import pytest

for module in ("matplotlib", "tabulate", "tqdm"):
    pytest.importorskip(module)
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import ship_tables  # noqa: E402
import tune_shapes  # noqa: E402
from record import write_csv  # noqa: E402

from efft_kernels.kernels.tuning import table as measured  # noqa: E402

# -- tune_shapes ------------------------------------------------------------------------------------------------------


def test_every_linear_once():
    M = 2 * 197
    expected = [(M, 768, 2304, 8), (M, 768, 768, 8), (M, 768, 3072, 8), (M, 3072, 768, 8)]
    assert tune_shapes.sizes(["vit_b", "vit_b"], [2], [8]) == expected
    assert len(tune_shapes.sizes(["vit_b", "swin_t"], [1, 2], [8, 16])) == 2 * 2 * (4 + 16)


def test_what_is_found_is_shown(monkeypatch, capsys):
    entry = {"lowrank_linear half M512 N768 K768 R16": {"ms": 0.5, "torch_ms": 2.0}, "p half M512": {"ms": 9.0}}
    monkeypatch.setattr(tune_shapes, "tune", lambda shapes, dtype, backend: entry)
    assert tune_shapes.main(["--backend", "cuda", "--batch", "2"]) == 0
    shown = capsys.readouterr().out
    assert "half M512 N768 K768 R16" in shown and "0.25" in shown and "9.0" not in shown


def test_an_error_shows_what_was_found_before_it(monkeypatch, capsys):
    def tune(shapes, dtype, backend):
        if shapes[0][1] == 3072:
            raise RuntimeError("it is wrong")
        return {f"lowrank_linear {shapes}": {"ms": 1.0, "torch_ms": 2.0}}

    monkeypatch.setattr(tune_shapes, "tune", tune)
    assert tune_shapes.main(["--backend", "triton"]) == 1
    out, err = capsys.readouterr()
    assert err.endswith("it is wrong\n") and out.count("lowrank_linear") == 3


def test_time_is_up(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 6.0])
    monkeypatch.setattr(tune_shapes.time, "perf_counter", lambda: next(clock))
    tuned = []
    monkeypatch.setattr(tune_shapes, "tune", lambda shapes, *rest, **more: tuned.extend(shapes) or {})
    assert tune_shapes.main(["--backend", "cuda", "--seconds", "5"]) == 0
    assert tuned == [(12608, 768, 2304, 16)]
    assert "not tuned after 5 seconds: [(12608, 768, 768, 16), " in capsys.readouterr().out


# -- ship_tables ------------------------------------------------------------------------------------------------------

GPU, ENTRY = "Some GPU", {"lowrank_linear half M1 N2 K3 R16": {"use": {}, "ms": 1.0, "torch_ms": 2.0}}


class Recorded:
    """what gpu.py leaves in a folder, all of it good"""

    def __init__(self, root: Path):
        self.folder = root / "benchmarks" / "results" / "some_gpu"
        machine, commit = {"gpu": {"name": GPU}}, {"id": "a", "dirty": False}
        steps = [{"step": step, "outcome": "passed"} for step in ship_tables.CHECKS]
        self.files = {"gpu.json": {"machine": machine, "commit": commit, "steps": steps}}
        for backend in ("triton", "cuda"):
            self.files[f"tables/{backend}_configs.json"] = {"format": 1, "gpus": {GPU: {"tuned": ENTRY}}}
        row = {"layer": "qkv", "count": 12, "size": "batch 64", "dtype": "bfloat16", "pass": "forward"}
        ms = {"unfused": 2.0, "efft_triton": 1.0, "efft_cuda": 1.8}
        self.rows = [row | {"variant": name, "ms": t, "ratio_unfused": t / 2} for name, t in ms.items()]
        self.files["vit_b/forward.json"] = {
            "format": 2,
            "complete": True,
            "commit": commit,
            "machine": machine,
            "backends": [{"name": name, "available": True} for name in ("triton", "cuda")],
        }

    def ship(self) -> int:
        for name, content in self.files.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(json.dumps(content))
        if "vit_b/forward.json" in self.files:
            write_csv(self.folder / "vit_b/forward.csv", self.rows)
        return ship_tables.main([str(self.folder)])


@pytest.fixture
def recorded(tmp_path, monkeypatch) -> Recorded:
    monkeypatch.setattr(ship_tables, "ROOT", tmp_path)
    for table in ship_tables.TABLES.values():
        copy = tmp_path / table.shipped.name
        content = json.loads(table.shipped.read_text()) | {"gpus": {"Another": {"tuned": {"x": {"ms": 1}}}}}
        copy.write_text(json.dumps(content))
        monkeypatch.setattr(table, "shipped", copy)
        table.forget()
    yield Recorded(tmp_path)
    monkeypatch.undo()
    for table in ship_tables.TABLES.values():
        table.forget()


def shipped() -> dict[str, dict]:
    return {backend: json.loads(t.shipped.read_text())["gpus"] for backend, t in ship_tables.TABLES.items()}


def test_what_is_proven_is_shipped_with_its_records(recorded, capsys):
    assert recorded.ship() == 0
    record = "benchmarks/results/some_gpu"
    proven = {"tests": f"{record}/gpu.json", "benchmark": f"{record}/vit_b/forward.json"}
    for backend, gpus in shipped().items():
        assert gpus == {"Another": {"tuned": {"x": {"ms": 1}}}, GPU: {"proven": proven, "tuned": ENTRY}}
        assert ship_tables.TABLES[backend].unproven(GPU, backend) is None
    assert "cuda: 1 tuned entries of an Some GPU\n" in capsys.readouterr().out
    before = shipped()
    assert recorded.ship() == 0 and shipped() == before


def forward(recorded):
    return recorded.files["vit_b/forward.json"]


@pytest.mark.parametrize(
    "spoil, backend, missing, said",
    [
        (lambda s: s.files["gpu.json"]["steps"].pop(), "cuda", "tests", "racecheck not run"),
        (lambda s: s.files["gpu.json"]["steps"][1].update(outcome="failed"), "triton", "tests", "tests failed"),
        (lambda s: s.files["gpu.json"].update(commit={"dirty": True}), "cuda", "tests", "not of a clean commit"),
        (lambda s: forward(s).update(complete=False), "triton", "benchmark", "not a complete run"),
        (lambda s: forward(s).update(commit=None), "cuda", "benchmark", "of a clean commit"),
        (lambda s: forward(s).update(machine={"gpu": None}), "cuda", "benchmark", "not of an Some GPU"),
        (lambda s: forward(s)["backends"][1].update(available=False), "cuda", "benchmark", "cuda was not there"),
        (lambda s: s.rows[2].update(ratio_unfused=1.2), "cuda", "benchmark", "shows efft_cuda faster than plain torch"),
        (lambda s: s.rows.pop(2), "cuda", "benchmark", "shows efft_cuda faster than plain torch"),
        (lambda s: s.rows[1].update(ms=2.0), "triton", "benchmark", "took 24 ms, plain torch 24 ms"),
        (lambda s: s.rows.pop(1), "triton", "benchmark", "took None ms"),
        (lambda s: s.files.pop("vit_b/forward.json"), "cuda", "benchmark", "no .*forward.json shows"),
    ],
)  # fmt: skip
def test_what_is_not_on_record_is_not_proven(spoil, backend, missing, said, recorded, capsys):
    spoil(recorded)
    assert recorded.ship() == 0
    found = shipped()[backend][GPU]
    assert found["tuned"] == ENTRY and set(found["proven"]) == {"tests", "benchmark"} - {missing}
    assert ship_tables.TABLES[backend].unproven(GPU, backend)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{backend}: {missing} not on")]
    assert len(lines) == 1 and re.search(said, lines[0])


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("gpu.json", {"machine": {}}, "expected commit, steps, not there"),
        ("tables/cuda_configs.json", {"format": 2, "gpus": {}}, "expected format 1 and an entry for Some GPU, got"),
        ("tables/cuda_configs.json", {"format": 1, "gpus": {"B": {}}}, r"and \['B'\]"),
        ("tables/cuda_configs.json", [], "expected format, gpus, not there"),
        ("vit_b/forward.json", {"complete": True}, None),
    ],
)
def test_a_file_that_does_not_fit_ships_nothing(name, content, said, recorded, capsys):
    recorded.files[name] = content
    before = shipped()
    if said is None:  # no proof, but no harm to what was tuned
        assert recorded.ship() == 0 and "benchmark not on record" in capsys.readouterr().out
        return
    assert recorded.ship() == 1 and shipped() == before
    assert re.search(f"{recorded.folder / name}: .*{said}", capsys.readouterr().err)


def test_one_backend_alone(recorded, capsys):
    del recorded.files["tables/cuda_configs.json"]
    assert recorded.ship() == 0
    found = shipped()
    assert GPU in found["triton"] and GPU not in found["cuda"]
    assert "cuda: nothing tuned" in capsys.readouterr().out


def test_a_folder_elsewhere(tmp_path_factory, recorded, capsys):
    assert ship_tables.main([str(tmp_path_factory.mktemp("elsewhere"))]) == 1
    assert "expected a folder of" in capsys.readouterr().err


def test_the_tables_are_those_that_the_backends_read():
    from efft_kernels.kernels import cuda

    assert ship_tables.TABLES["cuda"].shipped == cuda.TABLE.shipped
    assert ship_tables.TABLES["triton"].shipped == measured.Table("triton_configs.json").shipped
