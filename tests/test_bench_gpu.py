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


def test_every_step_names_what_is_there(tmp_path, monkeypatch):
    # as on a machine with a GPU: the benchmarks' own command lines take what they are given
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    steps = gpu.steps(tmp_path)
    assert [s.name for s in steps[:4]] == ["build", "tests", "memcheck", "racecheck"]
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


def test_outcomes(tmp_path):
    run = lambda code, **more: gpu.run(gpu.Step("x", [sys.executable, "-c", code], **more))
    passed = run("import os; print('a'); print(os.environ['HOW'])", environment={"HOW": "so"})
    assert (passed["outcome"], passed["end"]) == ("passed", "a\nso")
    assert run("print(*range(99), sep='\\n'); raise SystemExit(3)")["outcome"] == "failed"
    assert run("print(*range(99), sep='\\n')")["end"].splitlines() == [str(i) for i in range(99 - gpu.LAST_LINES, 99)]
    missing = run("", needs="no-such-program")
    assert missing["outcome"] == "not run" and "no-such-program is not on PATH" in missing["end"]


def test_table_of_the_ratios(tmp_path):
    rows = [{"size": "batch 64", "dtype": "bfloat16", "pass": "forward", "efft_ratio": {"merged": 1.25, "peft": 0.5}}]
    (tmp_path / "vit_b").mkdir()
    (tmp_path / "vit_b" / "forward.json").write_text(json.dumps({"summary": rows}))
    assert gpu.ratios(tmp_path) == [["vit_b/forward.json", "batch 64 bfloat16 forward", "1.25 x merged, 0.50 x peft"]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "expected a GPU and a CUDA build of torch" in capsys.readouterr().err
