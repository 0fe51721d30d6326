"""benchmarks/gpu.py without a GPU: what it would run, how an outcome is kept, and the table of what was measured."""

import json
import sys
from pathlib import Path

import pytest
import torch

for module in ("matplotlib", "tabulate", "tqdm"):
    pytest.importorskip(module)
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import bench_forward  # noqa: E402
import bench_train_step  # noqa: E402
import gpu  # noqa: E402
from record import FORMAT, write_run  # noqa: E402


def test_every_step_names_what_is_there(tmp_path, monkeypatch):
    # as on a machine with a GPU: the benchmarks' own command lines take what they are given
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    steps = gpu.steps(tmp_path)
    checks = ["build", "kernels", "tests", "memcheck", "racecheck"]
    models = [f"forward_{model}" for model in gpu.MODELS]
    assert [s.name for s in steps[:10]] == [*checks, "tune", *models, "roofline"]
    for step in steps[5:]:
        # the benchmarks go by what was tuned, and nothing else does
        assert step.name == "roofline" or step.environment == {"EFFT_CACHE": str(tmp_path / "tables")}
    for step in steps:
        files = [part for part in step.command if part.endswith(".py")]
        assert all((gpu.ROOT / file).exists() for file in files), files
        arguments = step.command[step.command.index(files[0]) + 1 :] if files else []
        if step.name.startswith("forward"):
            args, cases = bench_forward.parse(arguments)
            assert args.backward and all(case.dtype == "bfloat16" for case in cases)
        elif step.name.startswith("train_step"):
            known = ["merged", "efft2"]
            assert bench_train_step.parser("", known, "").parse_args(arguments).device == "cuda"
    written = [part for step in steps if step.name in models for part in step.command if part.startswith(str(tmp_path))]
    assert steps[9].command[-3:] == [f"{folder}/forward.json" for folder in written]


def test_outcomes(tmp_path):
    run = lambda code, **more: gpu.run(gpu.Step("x", [sys.executable, "-c", code], **more))
    passed = run("import os; print('a'); print(os.environ['HOW'])", environment={"HOW": "so"})
    assert (passed["outcome"], passed["end"]) == ("passed", "a\nso")
    assert run("print(*range(99), sep='\\n'); raise SystemExit(3)")["outcome"] == "failed"
    assert run("print(*range(99), sep='\\n')")["end"].splitlines() == [str(i) for i in range(99 - gpu.LAST_LINES, 99)]
    # a step that never ends, nor does what it started
    never = "import subprocess, sys; print('a', flush=True); subprocess.run(['sleep', '600'])"
    stopped = run(never, limit=2)
    assert stopped["outcome"] == "stopped" and stopped["end"] == "a\nstopped after 2 s" and stopped["seconds"] < 60
    missing = run("", needs="no-such-program")
    assert missing["outcome"] == "not run" and "no-such-program is not on PATH" in missing["end"]


def test_steps_that_are_not_run_again_keep_their_outcome(tmp_path, monkeypatch, capsys):
    machine = {"gpu": {"name": "Some GPU"}}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "machine", lambda: machine)
    monkeypatch.setattr(gpu, "run", lambda step: {"step": step.name, "outcome": outcome, "seconds": 0.0, "end": ""})
    commit = {"id": "a", "dirty": False}
    monkeypatch.setattr(gpu, "commit", lambda: commit)

    def outcomes(*only):
        code = gpu.main(["--out", str(tmp_path), *(("--only", *only) if only else ())])
        steps = json.loads((tmp_path / "gpu.json").read_text())["steps"]
        return code, {step["step"]: step["outcome"] for step in steps}

    outcome = "passed"
    assert outcomes("roofline", "tests") == (0, {"tests": "passed", "roofline": "passed"})
    outcome = "failed"
    assert outcomes("memcheck") == (1, {"tests": "passed", "memcheck": "failed", "roofline": "passed"})
    commit["id"] = "b"
    outcome = "passed"
    assert outcomes("memcheck") == (0, {"memcheck": "passed"})
    code, found = outcomes()
    assert code == 0 and list(found) == [step.name for step in gpu.steps(tmp_path)]
    (tmp_path / "gpu.json").write_text("[]")
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--only", "tests"])
    assert "gpu.json: expected a file that this script wrote" in capsys.readouterr().err


def test_table_of_the_ratios(tmp_path):
    row = {"layer": "qkv", "count": 12, "size": "batch 64", "dtype": "bfloat16", "pass": "forward"}
    rows = [row | {"variant": name, "ms": ms} for name, ms in (("merged", 0.8), ("peft", 2.0), ("efft", 1.0))]
    (tmp_path / "vit_b").mkdir()
    write_run(tmp_path / "vit_b", {"benchmark": "forward", "format": FORMAT, "results": rows})
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "cuda_configs.json").write_text(json.dumps({"format": 1, "gpus": {}}))
    assert gpu.ratios(tmp_path) == [["vit_b/forward.json", "batch 64 bfloat16 forward", "1.25 x merged, 0.50 x peft"]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "expected a GPU and a CUDA build of torch" in capsys.readouterr().err
