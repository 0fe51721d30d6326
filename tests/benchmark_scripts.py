"""benchmarks/ and benchmarks/paper/ on the path, for the tests of what is there."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PAPER = BENCHMARKS / "paper"
sys.path += [str(BENCHMARKS), str(PAPER)]


def need(*modules: str) -> None:
    """Skip the test module where one of these is not installed."""
    for module in modules:
        pytest.importorskip(module)


def refused(main, arguments: list[str], sentence: str, capsys) -> None:
    """A command line ends with a sentence of argparse."""
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2 and sentence in capsys.readouterr().err


def unmeasured(monkeypatch) -> None:
    """Neither the limits of the machine nor inputs past its cache matter in tests, and both take seconds."""
    import bench_forward
    import timing

    limits = timing.Limits(
        {"float32": 1e11, "bfloat16": 1e11}, {"float32": 9e10, "bfloat16": 1e10}, 2e10, "a test", 1e10
    )
    monkeypatch.setattr(bench_forward, "limits", lambda device, dtypes: limits)
    monkeypatch.setattr(bench_forward, "copies", lambda moved, device: 2)
    monkeypatch.delenv("EFFT_BACKEND", raising=False)


def interrupt(monkeypatch, rounds: int) -> None:
    """Let benchmarks get Ctrl-C after some rounds."""
    import timing

    interleave = timing.interleave

    def interrupted(calls, lap, most, deadline):
        yield from interleave(calls, lap, rounds, deadline)
        raise KeyboardInterrupt

    monkeypatch.setattr(timing, "interleave", interrupted)


def check_files(folder: Path, name: str, tmp_path: Path) -> dict:
    """The run that a benchmark left in a folder: record, rows and chart, and no folder of this machine in them."""
    from record import read_run

    text = (folder / f"{name}.json").read_text() + (folder / f"{name}.csv").read_text()
    assert str(tmp_path) not in text and str(BENCHMARKS.parent) not in text
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.csv", f"{name}.json", f"{name}.png"]
    run = read_run(folder / f"{name}.json")
    assert (run["benchmark"], run["format"], run["complete"]) == (name, 2, True)
    return run
