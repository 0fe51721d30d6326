"""What a few minutes of a GPU are best spent on: proof, tuning and the numbers that the GPU goals are about.

    python benchmarks/gpu.py --minutes 9 --out DIR
    python benchmarks/gpu.py --dry --out DIR          # every step without a GPU: simulator and interpreter, small sizes

Each step is a process of its own with a limit, so that a hang or an illegal address ends that step and not the run, and
each result is a line of gpu.jsonl as soon as it is known. At the end stand gpu.csv and gpu.json (results/README.md),
tuned.json, which `python -m efft_kernels.tune` uses and the package ships, and a CSV and a JSON for each kind of
training step: eager, under autocast, replayed from CUDA graphs, compiled, compiled and replayed. With LORAFUSION=DIR in
the environment, a checkout of its repository, its kernels are timed beside ours. The time that is left goes to other
batches. The libraries travel prebuilt: nothing is compiled here but Triton's kernels and, for compiled steps, models.
"""

import argparse
import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F

try:
    import lorafusion_kernels
    import record
    from shapes import Layer, layers
except ModuleNotFoundError as error:
    sys.exit(f'the benchmarks need efft_kernels, tqdm, tabulate and matplotlib: pip install -e ".[bench]" ({error})')

from efft_kernels.kernels import build, reference
from efft_kernels.kernels.tuning import children, plans, prove, run, table, timing

ROOT = Path(__file__).resolve().parents[1]
BATCH, R = 64, 16
MIXED = [(8, 8), (8, 64), (64, 64)]  # adapters and samples of mixed batches of ViT-B
DRY = [Layer("qkv", 48, 72, 3, 10, 12)]  # instead of real layers
# goal, what it is, which layers or methods, and at most what ratio
GOALS = [
    ("G1", "forward / merged, qkv and fc1", ("forward", ("qkv", "fc1"), "merged"), 1.15),
    ("G2", "forward / merged, proj and fc2", ("forward", ("proj", "fc2"), "merged"), 1.25),
    ("G3", "forward / merged, Swin stages 1 and 2", ("forward", ("stage1", "stage2"), "merged"), 1.10),
    ("G3", "forward / PEFT's formula, Swin stages 1 and 2", ("forward", ("stage1", "stage2"), "peft"), 0.25),
    ("G4", "forward + backward / merged forward + dx, ViT-B", ("both", ("qkv", "proj", "fc1", "fc2"), "merged"), 1.30),
    ("G5", "training step / merged, frozen", "merged", 1.20),
    ("G6", "training step / PEFT's LoRA", "peft_lora", 0.70),
    ("G7", "training step / the released EFFT's way", "released_efft", 0.50),
    ("G8", "kernel time / LoRAFusion's, ViT-B", "lorafusion", 1.00),
    ("G10b", "peak memory of a step / PEFT's LoRA", "peak", 0.75),
    ("G14", "worst / plain torch in its better order", "worst", 1.00),
]  # fmt: skip
RIVALS = ("merged", "peft", lorafusion_kernels.NAME)  # what else our time is divided by
METHODS = ["merged", "peft_lora", "released_efft", "efft2"]
TRAIN = {  # name of the files -> options beside the methods
    "train_step": [],
    "train_step_graph": ["--graph"],
    "swin_t_train_step": ["--model", "swin_t"],
    "swin_t_train_step_graph": ["--model", "swin_t", "--graph"],
    "train_step_compile_graph": ["--compile", "--graph"],
    "train_step_autocast": ["--dtype", "float32", "--autocast"],
    "train_step_compile": ["--compile"],
}
OTHER_BATCHES = [1, 8, 32, 128, 16, 256]  # tuned with what is left of the time, in this order
SMALL = [(197, 96, 288, 16), (70, 200, 1000, 13), (330, 768, 72, 32)]  # M, K, N, R for the memory checker


class Run:
    """The lines of gpu.jsonl, and processes with limits."""

    def __init__(self, out: Path, minutes: float):
        self.start, self.out = time.monotonic(), out
        self.end = self.start + 60 * minutes
        self.not_passed: list[str] = []  # steps
        self.file = (out / "gpu.jsonl").open("w")
        self.lock = threading.Lock()

    def note(self, step: str, **found) -> None:
        with self.lock:
            if found.get("outcome", "passed") != "passed":
                self.not_passed.append(f"{step}: {found['outcome']}")
            line = {"step": step, "at": round(time.monotonic() - self.start, 1), **found}
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())

    def left(self) -> float:
        return self.end - time.monotonic()

    def step(self, name: str, command: list[str], limit: float) -> list[dict]:
        """Run a command; its lines that start with @@ are results, noted as they come"""
        limit, begun, found, last = min(limit, self.left()), time.monotonic(), [], ""
        if limit < 5:
            self.note(name, outcome="no time left")
            return found
        print(f"\n== {name}", flush=True)
        paths = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH"))))
        pipe = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
        with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, **pipe) as process:
            lines: queue.Queue = queue.Queue()
            threading.Thread(target=lambda: [*map(lines.put, process.stdout), lines.put(None)], daemon=True).start()
            outcome = "stopped"
            with contextlib.suppress(queue.Empty):
                while (line := lines.get(timeout=max(0.01, begun + limit - time.monotonic()))) is not None:
                    if line.startswith("@@"):
                        found.append(json.loads(line[2:]))
                        self.note(name, **found[-1])
                    else:
                        print(line, end="", flush=True)
                    last = line.strip() or last
                outcome = "failed" if process.wait() else "passed"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        failed = {} if outcome == "passed" else {"end": last[:400]}
        self.note(name, outcome=outcome, seconds=round(time.monotonic() - begun, 1), **failed)
        return found


def emit(**found) -> None:
    print("@@" + json.dumps(found), flush=True)


def chosen_layers(dry: bool) -> list[tuple[str, Layer]]:
    if dry:
        return [("dry", layer) for layer in DRY]
    swin = [layer for layer in layers("swin_t") if layer.name.startswith(("stage1", "stage2", "stage3"))]
    return [("vit_b", layer) for layer in layers("vit_b")] + [("swin_t", layer) for layer in swin]


def info(dry: bool) -> None:
    """The GPU, what it can do, and which backends there are"""
    import efft_kernels

    found = {"backends": [str(backend) for backend in efft_kernels.backends()], "machine": record.machine()}
    if not dry:
        a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
        source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        calls = {"gemm": lambda *_: a @ b, "copy": lambda *_: target.copy_(source)}
        us = timing.interleaved(calls, [()], torch.device("cuda", 0), 5)
        found |= {"tflops": 2 * 8192**3 / us["gemm"] * 1e-6, "copy_tbs": 2 * source.numel() / us["copy"] * 1e-6}
    emit(**found)


def ratios(dry: bool) -> None:
    """What a user gets at each layer now, beside the merged weight, PEFT's formula and plain torch in both orders"""
    device = torch.device("cpu") if dry else torch.device("cuda", 0)
    dtype = torch.float16 if dry else torch.bfloat16
    for backward in (False, True):
        op, needs = (table.BACKWARD, table.ALL) if backward else (table.LINEAR, None)
        for model, layer in chosen_layers(dry):
            M = layer.tokens * (4 if dry else BATCH)
            copies = timing.linear_copies(op, (M, layer.K, layer.N, R), dtype, device, needs)
            found = table.choice(device, table.key(op, dtype, layer.K, layer.N, R, needs), M)
            backend = found and found.backend
            kernels = plans.module(backend) if backend else reference
            auto = getattr(kernels, op)
            variants = timing.plain_orders(op, needs) | {"auto": (lambda *x: auto(*x, needs)) if needs else auto}
            if backward:
                variants["merged"] = lambda dy, x, w, *rest: dy @ w
            else:
                variants["merged"] = lambda x, w, b, *rest: F.linear(x, w, b)
                variants["peft"] = lambda x, w, b, down, up: F.linear(x, w, b) + (x @ down) @ up * 1.5
            if (checkout := os.environ.get("LORAFUSION")) and model == "vit_b":
                variants |= lorafusion_kernels.variants(Path(checkout), backward)
            if dry and backend == "cuda":
                simulate()
            us = timing.interleaved(variants, copies, device, 3)
            size = {"model": model, "layer": layer.name, "M": M, "K": layer.K, "N": layer.N, "R": R}
            size |= {"slices": layer.slices, "dtype": str(dtype)[6:], "count": layer.count}
            emit(**size, **{"pass": "backward" if backward else "forward"}, backend=backend or "torch", us=us)


def simulate() -> None:
    """Let the CUDA backend run in the simulator of tests/cuda"""
    sys.path.insert(0, str(ROOT / "tests" / "cuda"))
    import simulator

    from efft_kernels.kernels import cuda

    torch.ops.load_library(str(simulator.built()))
    cuda.load = lambda: torch.ops.efft_cuda_sim
    cuda.unavailable, cuda._unsupported_device = lambda: None, lambda device: None
    few = [cuda.KernelPlan(True, False, 64), cuda.KernelPlan(False, True, 128), cuda.KernelPlan(True, True, 192)]
    cuda.plans = lambda arch, R: few  # each takes seconds there


def worker() -> None:
    """A child of the tuner in a dry run"""
    from efft_kernels.kernels.tuning import worker

    torch.set_num_threads(1)
    simulate()
    worker.main()


def stress(dry: bool) -> None:
    """Many runs of what was chosen for ViT-B's qkv, bit for bit, while another stream takes memory and time"""
    device = torch.device("cpu") if dry else torch.device("cuda", 0)
    dtype, count = (torch.float16, 2) if dry else (torch.bfloat16, 500)
    layer = DRY[0] if dry else layers("vit_b")[0]
    if dry:
        simulate()
    given = prove.linear_inputs(layer.tokens * (4 if dry else BATCH), layer.K, layer.N, R, dtype, device)[:5]
    for backend in ("cuda", "triton"):
        proven = table.proof(backend, device)["plans"]
        for plan in plans.linear_plans(backend, device):
            if table.plan_name(plan) not in proven or not plans.takes(backend, plan, table.LINEAR, given, None):
                continue
            with table.override(backend, plan):
                differ = _differing(backend, given, count, dry)
                emit(backend=backend, plan=table.plan_name(plan), runs=count, differ=differ)


def _differing(backend: str, given: tuple, count: int, dry: bool) -> int:
    function = plans.module(backend).lowrank_linear
    first = [t.clone() for t in function(*given)]
    differ = torch.zeros((), dtype=torch.int64, device=given[0].device)
    if not dry:
        noise, side = torch.empty(1 << 28, dtype=torch.uint8, device="cuda"), torch.cuda.Stream()
    for number in range(count):
        if not dry and number % 7 == 0:
            with torch.cuda.stream(side):
                noise.add_(1)
        differ += sum((a != b).any() for a, b in zip(function(*given), first))
    return int(differ)


def small(dry: bool) -> None:
    """Every plan of the CUDA kernels once, forward and backward, for a checker of memory accesses"""
    device, dtype = (torch.device("cpu"), torch.float16) if dry else (torch.device("cuda", 0), torch.bfloat16)
    if dry:
        simulate()
    for shape in SMALL:
        x, weight, bias, down, up, dy = prove.linear_inputs(*shape, dtype, device)
        for plan in plans.linear_plans("cuda", device):
            for op, given, needs in (
                (table.LINEAR, (x, weight, bias, down, up), None),
                (table.BACKWARD, (dy, x, weight, down, up, x @ down), table.ALL),
            ):
                if plans.takes("cuda", plan, op, given, needs):
                    with table.override("cuda", plan):
                        getattr(plans.module("cuda"), op)(*given, *([needs] if needs else []))
                    prove.wait(device)
    emit(shapes=SMALL)


def rows_of(found: list[dict]) -> list[dict]:
    """The rows of gpu.csv"""
    rows = []
    for case in found:
        us, plain = case["us"], _fastest(case["us"], "product")
        others = us | {lorafusion_kernels.NAME: _fastest(us, lorafusion_kernels.NAME)}
        size = {key: case[key] for key in ("model", "layer", "M", "K", "N", "R", "slices", "dtype", "count", "pass")}
        for name, value in us.items():
            ratio = {f"ratio_{other}": value / others[other] for other in RIVALS if others.get(other)}
            chosen = {"backend": case["backend"] if name == "auto" else None}
            rows.append({**size, "variant": name, **chosen, "ms": value * 1e-3, **ratio, "ratio_torch": value / plain})
    return rows


def _fastest(us: dict[str, float], beginning: str) -> float | None:
    return min((value for name, value in us.items() if name.startswith(beginning)), default=None)


def goals(rows: list[dict], step: list[dict]) -> list[dict]:
    """[{goal, what, goal's ratio, measured, cases}] of what was measured; measured is the worst of the cases"""
    found = []
    for name, what, of, limit in GOALS:
        values: dict[str, float] = {}
        auto = [row for row in rows if row["variant"] == "auto"]
        if of == "worst":
            values = {f"{row['layer']} {row['pass']}": row["ratio_torch"] for row in auto}
        elif of == lorafusion_kernels.NAME:
            column = f"ratio_{of}"
            values = {f"{row['layer']} {row['pass']}": row[column] for row in auto if row.get(column)}
        elif isinstance(of, tuple):
            kind, names, other = of
            cases = [row for row in auto if row["layer"].startswith(names)]
            if kind != "both":
                values = {row["layer"]: row[f"ratio_{other}"] for row in cases if row["pass"] == kind}
            elif cases:
                times = [(row["count"] * row["ms"], row["count"] * row["ms"] / row["ratio_merged"]) for row in cases]
                values = {"all": sum(ours for ours, _ in times) / sum(merged for _, merged in times)}
        else:
            values = _step_ratios(step, of)
        worst = max(values.values(), default=None)
        found.append({"goal": name, "what": what, "at_most": limit, "cases": values, "measured": worst})
    return found


def _step_ratios(step: list[dict], other: str) -> dict[str, float]:
    """our method's step over another's; "peak": its peak memory over that of PEFT's LoRA"""
    rows = {(row["file"], row["method"]): row for row in step if row["pass"] == "step" and row["model"] == "vit_b"}
    found = {}
    for (file, method), row in rows.items():
        against = rows.get((file, "peft_lora" if other == "peak" else other))
        if method == "efft2" and against:
            column = "peak_bytes" if other == "peak" else "ms"
            if row.get(column) and against.get(column):
                found[file] = row[column] / against[column]
    return found


def train(found: Run, out: Path, dry: bool, backend: str | None) -> list[dict]:
    """The rows of all training steps, with the file's name"""
    device = ["--device", "cpu", "--batch", "1", "--dtype", "float32", "--image", "32"] if dry else [
        "--device", "cuda", "--batch", str(BATCH), "--dtype", "bfloat16"
    ]  # fmt: skip
    rows = []
    for name, more in TRAIN.items():
        if dry and more:
            continue
        command = [sys.executable, "benchmarks/bench_train_step.py", *device, *more, "--methods", *METHODS]
        command += ["--seconds", "5" if dry else "45", *(["--backend", backend] if backend else [])]
        for suffix in (".csv", ".json"):  # those of an earlier run are not what this step measures
            (out / f"{name}{suffix}").unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=out) as folder:
            found.step(name, [*command, "--out", folder], 300 if dry else 110)
            for path in (Path(folder, "train_step.csv"), Path(folder, "train_step.json")):
                if path.exists():
                    path.replace(out / f"{name}{path.suffix}")
        if (out / f"{name}.csv").exists():
            rows += [{"file": name, **row} for row in record.read_csv(out / f"{name}.csv")]
    return rows


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--minutes", type=float, default=9.0, help="nothing new is started after this time (default: 9)")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/ and the GPU's name")
    p.add_argument("--dry", action="store_true", help="without a GPU: every step, small, in simulator and interpreter")
    p.add_argument("--no-train", action="store_true", help="without whole training steps")
    p.add_argument("--step", choices=("info", "ratios", "stress", "small", "worker"), help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.step:
        worker() if args.step == "worker" else globals()[args.step](args.dry)
        return 0
    if not args.minutes > 0:
        p.error(f"argument --minutes: expected a positive number, got {args.minutes}")
    if not args.dry and not torch.cuda.is_available():
        p.error("expected a GPU and a CUDA build of torch, and torch sees none; --dry runs without")
    name = "dry" if args.dry else torch.cuda.get_device_name()
    out = (args.out or ROOT / "benchmarks" / "results" / name.replace(" ", "_").lower()).resolve()
    record.prepare_folder(out)
    build.own_cache(out / "cache")  # not the records of the person who runs this
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"
        simulate()
    table.invalidate()
    return everything(Run(out, args.minutes), out, args)


def everything(found: Run, out: Path, args) -> int:
    here = [sys.executable, str(Path(__file__).resolve()), *(["--dry"] if args.dry else []), "--step"]
    patience = 10 if args.dry else 1
    begun = record.begun("gpu", args)  # with the commit, before the shipped record changes
    about = found.step("info", [*here, "info"], 60 * patience)
    sizes = [(layer.tokens * (4 if args.dry else BATCH), layer.K, layer.N, R) for _, layer in chosen_layers(args.dry)]
    of = [layer for model, layer in chosen_layers(args.dry) if model != "swin_t"]
    several = [(2, 4)] if args.dry else MIXED
    sizes += [(layer.tokens * B, layer.K, layer.N, R, A, B) for A, B in several for layer in of]
    report = run.tune(
        dict.fromkeys(sizes),
        [torch.float16] if args.dry else [torch.bfloat16, torch.float16][: 1 + (args.minutes > 12)],
        backends=("cuda", "triton"), device="cpu" if args.dry else None, minutes=max(0.1, min(5.0, found.left() / 110)),
        worker=[*here, "worker"] if args.dry else children.WORKER, simulated=args.dry,
        say=lambda line: print(line, flush=True), note=lambda event: found.note("tune", **event),
    )  # fmt: skip
    measured = found.step("ratios", [*here, "ratios"], 120 * patience)
    stressed = found.step("stress", [*here, "stress"], 60 * patience)
    checker = shutil.which("compute-sanitizer")
    checked = [checker, "--tool", "memcheck", "--error-exitcode", "3"] if checker and not args.dry else []
    found.step("memcheck" if checked else "small", [*checked, *here, "small"], 90 * patience)
    step = [] if args.no_train else train(found, out, args.dry, "reference" if args.dry else None)
    for batch in () if args.dry else OTHER_BATCHES:  # as `python -m efft_kernels.tune` would, for what is shipped
        if found.left() < 60:
            break
        sizes = [(layer.tokens * batch, layer.K, layer.N, R) for _, layer in chosen_layers(False)]
        run.tune(
            dict.fromkeys(sizes), [torch.bfloat16], backends=("cuda", "triton"), minutes=found.left() / 60,
            say=lambda line: print(line, flush=True), note=lambda event: found.note("tune", **event),
        )  # fmt: skip
    if table.user_file().exists():
        shutil.copyfile(table.user_file(), out / "tuned.json")
        if not args.dry:
            ship(out / "tuned.json")
    shutil.rmtree(out / "cache", ignore_errors=True)
    rows = rows_of([case for case in measured if "us" in case])
    not_done = [*report.left, *found.not_passed]
    reached = goals(rows, step)
    record.write_run(out, begun | {
        "dry": args.dry, "complete": not not_done, "info": about, "proven": report.proven, "dropped": report.dropped,
        "not_done": not_done, "stress": stressed, "goals": reached, "results": rows,
    })  # fmt: skip
    lines = [
        [g["goal"], g["what"], g["at_most"], "not measured" if g["measured"] is None else f"{g['measured']:.3f}",
         ", ".join(f"{name} {value:.2f}" for name, value in g["cases"].items())]
        for g in reached
    ]  # fmt: skip
    print("\n" + record.text_table(["goal", "what", "at most", "worst", "cases"], lines))
    for backend, found_plans in report.proven.items():
        dropped = report.dropped.get(backend) or "nothing"
        print(f"{backend}: proven {', '.join(found_plans) or 'nothing'}; dropped {dropped}")
    print("".join(f"not done: {what}\n" for what in not_done) + f"\nwritten: {out}")
    wrong = any(report.dropped.values()) or any(each.get("differ") for each in stressed)
    return int(wrong or bool(found.not_passed))


def ship(tuned: Path) -> None:
    """Add the devices of a table to the one that ships with the package, which has other devices too"""
    shutil.copyfile(table.SHIPPED, table.user_file())  # save() adds to the user's file, here one in DIR/cache
    for device, found in json.loads(tuned.read_text())["devices"].items():
        if reason := table.save(device, **found):
            raise OSError(f"the shipped table stays as it was: {reason}")
    shutil.copyfile(table.user_file(), table.SHIPPED)


if __name__ == "__main__":
    sys.exit(main())
