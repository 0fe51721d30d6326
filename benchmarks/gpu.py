"""Everything that needs a GPU, in one run: build, tests, sanitizers, tuning, benchmarks, and a table of the results.

    python benchmarks/gpu.py                            # hours; benchmarks/results/<gpu>/
    python benchmarks/gpu.py --only build tests         # some of the steps

results/README.md describes what the benchmarks write; gpu.json has the command, outcome and time of every step. Steps
run even if an earlier one failed, except after a failed build; the exit status is 1 if one failed. With --only, the
other steps keep their outcome in gpu.json if commit, machine and versions are the same.

What is proven and tuned goes to <gpu>/tables/tuned.json instead of the user's own file; later benchmarks use it.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch

try:
    from record import FORMAT, commit, machine, prepare_folder, read_run, text_table, versions, write_json
except ModuleNotFoundError as error:
    sys.exit(f'the benchmarks need efft_kernels, tqdm, tabulate and matplotlib: pip install -e ".[bench]" ({error})')

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("vit_b", "vit_l", "swin_t")
LAST_LINES = 15  # of the output of a step, which are recorded


class Step(NamedTuple):
    name: str
    command: list[str]
    environment: dict[str, str] = {}
    needs: str | None = None  # a program that may be missing
    limit: float = 3600  # seconds, because a kernel that deadlocks never ends


def steps(out: Path) -> list[Step]:
    """All steps, in their order. `kernels` selects the tests that run kernels on the GPU."""
    python, here = sys.executable, "benchmarks"
    kernels = [python, "-m", "pytest", "-q", "tests/test_cuda.py", "tests/test_triton.py", "-k", "gpu or test_triton"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "1", "--target-processes", "all"]
    sizes = ["--device", "cuda", "--dtype", "bfloat16", "--batch", "64"]
    forward = [python, f"{here}/bench_forward.py", *sizes, "--backward", "--compile", "all", "--seconds", "600"]
    train = [python, f"{here}/bench_train_step.py", *sizes, "--seconds", "300"]
    tuning = [python, "-m", "efft_kernels.tune", "--model", *MODELS, "--batch", "64", "--rank", "16"]
    # use what is tuned here, and ignore the user's own tables
    tables = {"EFFT_CACHE": str(out / "tables")}
    # without torch's caching allocator every tensor is a separate allocation with checked bounds
    apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Step("build", [python, "setup.py", "build_ext", "--inplace"], {"EFFT_CUDA": "1"}),
        # first, so that a kernel that hangs is noticed within minutes
        Step("kernels", [python, "-m", "pytest", "-q", "-x", "tests/test_cuda.py", "-k", "gpu"], limit=600),
        Step("tests", [python, "-m", "pytest", "-q"]),
        Step("memcheck", [*sanitizer, "--tool", "memcheck", *kernels], apart, "compute-sanitizer"),
        Step("racecheck", [*sanitizer, "--tool", "racecheck", *kernels], {}, "compute-sanitizer"),
        Step("tune", [*tuning, "--minutes", "20"], tables),
        *(
            Step(f"forward_{model}", [*forward, "--model", model, "--out", str(out / model)], tables)
            for model in MODELS
        ),
        Step("roofline", [python, f"{here}/roofline.py", *(str(out / model / "forward.json") for model in MODELS)]),
        *(
            Step(f"train_step_{name}", [*train, *backend, "--out", str(out / f"train_{name}")], tables)
            for name, backend in (("auto", []), ("triton", ["--backend", "triton"]), ("cuda", ["--backend", "cuda"]))
        ),
    ]


def run(step: Step) -> dict:
    """{step, command, outcome: "passed", "failed", "stopped" or "not run", seconds, end: the last lines of output}"""
    record = {"step": step.name, "command": shlex.join(step.command), "outcome": "not run", "seconds": 0.0, "end": ""}
    if step.needs and shutil.which(step.needs) is None:
        return record | {"end": f"{step.needs} is not on PATH: it comes with the CUDA toolkit"}
    print(f"\n== {step.name}: {record['command']}", flush=True)
    start, lines, late = time.perf_counter(), [], threading.Event()
    pipe = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    with subprocess.Popen(step.command, cwd=ROOT, env=os.environ | step.environment, **pipe) as process:

        def stop():
            with contextlib.suppress(ProcessLookupError):  # the group: the step and its children
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(step.limit, lambda: (late.set(), stop()))
        timer.start()
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                lines = [*lines[1 - LAST_LINES :], line.rstrip()]
            process.wait()
        finally:
            timer.cancel()
            stop()
    outcome = "stopped" if late.is_set() else "failed" if process.returncode else "passed"
    if late.is_set():
        lines.append(f"stopped after {step.limit:.0f} s")
    return record | {"outcome": outcome, "seconds": round(time.perf_counter() - start, 1), "end": "\n".join(lines)}


def earlier(path: Path, record: dict) -> dict[str, dict]:
    """{step: its record} from an earlier run under the same conditions."""
    try:
        found = json.loads(path.read_text())
        same = all(found[key] == record[key] for key in ("format", "machine", "versions", "commit"))
        return {step["step"]: step for step in found["steps"]} if same else {}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a file that this script wrote, or none: {error!r}") from error


def ratios(folder: Path) -> list[list[str]]:
    """[file, size and pass, ratio to each reference] of every forward and training step recorded in the folder."""
    import bench_forward
    import bench_train_step

    rows, summaries = [], {"forward": bench_forward.summary, "train_step": bench_train_step.summary}
    for path in sorted(folder.glob("*/*.json")):
        if path.stem not in summaries:
            continue
        for summary in summaries[path.stem](read_run(path)["results"]):
            found = summary.get("efft_ratio") or summary.get("efft2_ratio") or {}
            what = " ".join(str(summary[key]) for key in ("size", "dtype", "pass") if key in summary)
            against = ", ".join(f"{value:.2f} x {name}" for name, value in found.items())
            rows.append([str(path.relative_to(folder)), what, against])
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [step.name for step in steps(Path())]
    parser.add_argument("--only", nargs="+", choices=names, metavar="STEP", help=f"of {', '.join(names)}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/ and the GPU's name")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("expected a GPU and a CUDA build of torch, and torch sees none")
    here = machine()
    slug = re.sub(r"\W+", "_", here["gpu"]["name"]).strip("_").lower()
    out = (args.out or ROOT / "benchmarks" / "results" / slug).resolve()
    prepare_folder(out)
    record = {"benchmark": "gpu", "format": FORMAT, "machine": here, "versions": versions()}
    record |= {"commit": commit(), "steps": []}
    try:
        done = earlier(out / "gpu.json", record) if args.only else {}
    except ValueError as error:
        parser.error(str(error))
    for step in steps(out):
        if args.only and step.name not in args.only:
            continue
        done[step.name] = run(step)
        record["steps"] = [done[name] for name in names if name in done]
        write_json(out / "gpu.json", record)
        if step.name == "build" and done["build"]["outcome"] == "failed":
            break
    rows = [[s["step"], s["outcome"], f"{s['seconds']:.0f} s", s["end"].rpartition("\n")[2]] for s in record["steps"]]
    print("\n" + text_table(["step", "outcome", "time", "last line"], rows))
    if measured := ratios(out):
        print("\n" + text_table(["file", "case", "ours over"], measured))
    print(f"\nwritten: {out}")
    return int(any(s["outcome"] in ("failed", "stopped") for s in record["steps"]))


if __name__ == "__main__":
    sys.exit(main())
