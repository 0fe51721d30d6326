"""Benchmark of a training step of a whole vision transformer: efft_kernels against the common ways to adapt it.

    python benchmarks/bench_train_step.py                                     # ViT-B on this machine, under 3 minutes
    python benchmarks/bench_train_step.py --dtype float32 bfloat16 --seconds 1500 --out DIR
    python benchmarks/bench_train_step.py --device cuda --batch 64 --graph    # the device's time without the host's

harness.py defines the methods, steps.py the step, timing.py measures, results/README.md describes the files.
"""

import argparse
import datetime
import gc
import itertools
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

# first, because it names the missing package if one is not installed
from bench_forward import positive, seconds  # isort: skip

from tqdm import tqdm

import efft_kernels
import harness
from record import (
    FORMAT,
    add_rows,
    chart,
    commit,
    conclude,
    cpu_ratio,
    digits,
    machine,
    prepare_folder,
    ratios,
    spread_of,
    text_table,
    versions,
    write_run,
)
from timing import MEMORY, Stages, columns, interleave, memory, run, timer
from harness import MODELS, Method, Options
from shapes import layers
from steps import BATCHES, Saved, Step, count_ops, make_batches, reason

# methods that all times are divided by, round by round
REFERENCES = ("merged", "merged_onednn", "full", "peft_lora", "released_efft", "fact_tt")
COLOURS = {
    "merged_onednn": "#9e9e9e",
    "full": "#6a51a3",
    "released_efft": "#8c2d04",
    "fact_tt": "#d9603b",
    "peft_lora": "#c28f00",
    "efft2": "#1b7837",
    "efft2_p0": "#5aae61",
    "efft1": "#a6dba0",
    "efft_lora": "#2166ac",
    "efft_fact": "#92c5de",
}
# stages of a step that make up a pass: forward with loss, backward, AdamW with the gradients cleared
PASSES = {
    "forward": slice(0, 1),
    "backward": slice(1, 2),
    "optimizer": slice(2, 3),
    "forward+backward": slice(0, 2),
    "step": slice(0, 3),
}
KEEP_EVERY = 10.0  # seconds between two writes of the record during a dtype


class Built(NamedTuple):
    """One method, ready to be timed."""

    step: Step
    calls: list[Stages]  # a step with each batch, warm
    facts: dict  # what is known of the step besides its time


def build(
    args, dtype: str, found: list[Method], left_out: dict, bar: tqdm, graph: bool, compile: bool
) -> dict[str, Built]:
    """Build every method in one dtype; left_out gets the reason of each that fails."""
    base = harness.backbone(args.model, args.image, getattr(torch, dtype), args.device)
    batches = make_batches(args, getattr(torch, dtype))
    options = Options(args.rank, args.lora_rank, args.backend)
    pool, stream = (torch.cuda.graph_pool_handle(), torch.cuda.Stream()) if graph else (None, None)
    built = {}
    for method in found:
        bar.set_postfix_str(f"set-up of {method.name}")
        try:
            torch.manual_seed(0)
            step = Step(method.build(base, options), batches, compile=compile, capturable=graph)
            if method.ours:
                _forget_packed()
            if compile:
                run(step.stages())  # compiles, which is not what the memory of a step is about
            _, kept = memory(step.stages(), args.device)
            peak, _ = memory(step.stages(), args.device)
            # the modes that count switch the compiler off
            counts, saved = (None, None) if compile else (count_ops(step.stages()), _saved_bytes(step))
            calls = step.capture(pool, stream) if graph else [step.stages(batch) for batch in range(BATCHES)]
        except (ImportError, RuntimeError) as error:
            left_out.setdefault(method.name, {})[dtype] = reason(error)
            pool = torch.cuda.graph_pool_handle() if graph else None
            continue
        head = sum(p.numel() for p in step.model.head.parameters())
        trained = sum(p.numel() for p in step.trained)
        facts = {
            "trained": trained,
            "trained_without_head": trained - head,
            "ops": {part: counts and sum(counts[which]) for part, which in PASSES.items()},
            "saved_bytes": saved,
            "peak_bytes": peak,
            "optimizer_bytes": step.state_bytes(),
            "kept_bytes": max(0, kept - step.state_bytes()),
        }
        built[method.name] = Built(step, calls, facts)
    return built


def _saved_bytes(step: Step) -> int:
    saved = Saved(step.model)
    with saved:
        run(step.stages())
    return saved.bytes


def _forget_packed() -> None:
    """Drop what the CPU backend packed for the previous method, so that each method shows the memory that it keeps."""
    if next(b for b in efft_kernels.backends() if b.name == "cpu").available:
        from efft_kernels.kernels import cpu

        cpu.clear_packed()


def results(args, dtype: str, samples: list[dict], built: dict[str, Built], graph: bool) -> list[dict]:
    """Make a row per pass and method from the complete rounds. A captured step is one pass, which cannot be divided."""
    rows, passes = [], {"step": slice(0, 1)} if graph else PASSES
    for (part, which), (name, (step, _, facts)) in itertools.product(passes.items(), built.items()):
        timed = timings(samples, name, which, {other: other for other in REFERENCES if other in built}, "merged")
        loss = step.loss.item()
        rows.append(
            {
                "model": args.model,
                "batch": args.batch,
                "image": args.image,
                "dtype": dtype,
                "pass": part,
                "method": name,
                **timed,
                **facts,
                "ops": facts["ops"][part],
                "loss": loss if math.isfinite(loss) else None,
            }
        )
    return rows


def timings(
    samples: list[dict], name: str, which: slice, references: dict[str, str], quartiles: str, whole: bool = False
) -> dict:
    """The columns of the times of some stages of a method.

    Args:
        references: {name in the columns: method}.
        quartiles: the reference whose ratio gets quartiles.
        whole: whether to divide by the time of all stages of a reference instead of the same stages.
    """
    of = lambda name, which: [round[name][which] for round in samples]
    others = {column: of(other, slice(None) if whole else which) for column, other in references.items()}
    return columns(of(name, which), others, (quartiles,))


def measure(args, record: dict, found: list[Method], graph: bool = False, compile: bool = False) -> None:
    found = [m for m in found if args.methods is None or m.name in args.methods]

    def prepare(dtype: str, bar: tqdm):
        built = build(args, dtype, found, record["left_out"], bar, graph, compile)
        if not built:
            reasons = {name: by_dtype.get(dtype) for name, by_dtype in record["left_out"].items()}
            why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
            raise RuntimeError(f"no method can run in {dtype}: {why}")
        calls = {name: method.calls for name, method in built.items()}
        return calls, lambda samples: results(args, dtype, samples, built, graph)

    by_dtype(args, record, prepare)


def by_dtype(args, record: dict, prepare: Callable[[str, tqdm], tuple[dict[str, list[Stages]], Callable]]) -> None:
    """Add the rows of one dtype after the other, so that an interrupted run keeps what is complete.

    A killed one keeps it too: files are also rewritten during a dtype, at most every KEEP_EVERY seconds.

    Args:
        prepare: (dtype, bar) -> (the calls, warm; a function from the complete rounds to the dtype's rows).
    """
    lap, setup, end = timer(args.device), 0.0, time.perf_counter() + args.seconds
    with tqdm(total=len(args.dtype) * args.repeats, unit="round", disable=None) as bar:
        for n, dtype in enumerate(args.dtype):
            bar.set_description(f"{args.model} {dtype}")
            setup -= time.perf_counter()
            calls, rows = prepare(dtype, bar)
            now, samples = time.perf_counter(), []
            setup, kept = setup + now, now
            bar.set_postfix_str("")
            # share the time that the set-up of later dtypes leaves in equal parts
            later = len(args.dtype) - n - 1
            deadline = now + (end - now - setup / (n + 1) * later) / (later + 1)
            try:
                for laps in interleave(calls, lap, args.repeats, deadline):
                    samples.append(laps)
                    bar.update()
                    if args.out and len(samples) >= 3 and time.perf_counter() > kept + KEEP_EVERY:
                        partial = {**record, "results": [*record["results"], *rows(samples)]}
                        write_run(args.out, partial)
                        kept = time.perf_counter()
            finally:
                if samples:
                    add_rows(record, rows(samples), args.out)
            bar.update(args.repeats - len(samples))
            del calls, rows
            gc.collect()  # models and their hooks form reference cycles


def summary(rows: list[dict]) -> list[dict]:
    """Per dtype, for the step with and without the optimizer: ms by method, and ours over each reference."""
    found = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for part in ("step", "forward+backward"):
            own = {row["method"]: row for row in rows if (row["dtype"], row["pass"]) == (dtype, part)}
            if not own:
                continue  # a captured step is not divided
            ms = {name: row["ms"] for name, row in own.items()}
            found.append({"dtype": dtype, "pass": part, "ms": ms, "efft2_ratio": ratios(own.get("efft2", {}))})
    return found


HEAD = [
    "step", "method", "ms", "quartiles", "/merged", "(cpu)", "no opt.", "/full", "/peft", "/released", "ops", "saved",
    "/merged", "peak MiB", "trained",
]  # fmt: skip


def lines(rows: list[dict]) -> list[list[str]]:
    table = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        case = [row for row in rows if row["dtype"] == dtype]
        steps = {row["method"]: row for row in case if row["pass"] == "step"}
        bare = {row["method"]: row for row in case if row["pass"] == "forward+backward"}
        r = case[0]
        label = [r["model"], f"batch {r['batch']}", f"{r['image']} x {r['image']}", dtype, f"{r['rounds']} rounds"]
        table += [[]] if table else []
        for words, row in itertools.zip_longest(label, steps.values(), fillvalue=None):
            if row is None:
                table.append([words, *[""] * (len(HEAD) - 1)])
                continue
            other, floor = bare.get(row["method"], {}), steps.get("merged", {}).get("saved_bytes")
            kept = f"+{row['kept_bytes'] / 2**20:.0f} " if row["kept_bytes"] >= 2**20 else ""
            table.append(
                [
                    words or "",
                    row["method"],
                    digits(row["ms"]),
                    f"{digits(row['q1'])}-{digits(row['q3'])}",
                    digits(row.get("ratio_merged")),
                    digits(cpu_ratio(row, steps.get("merged"))),
                    digits(other.get("ratio_merged")),
                    *(digits(row.get(f"ratio_{name}")) for name in ("full", "peft_lora", "released_efft")),
                    count(other.get("ops")),
                    count(row["saved_bytes"] and round(row["saved_bytes"] / 2**20)),
                    digits(row["saved_bytes"] / floor if floor else None),
                    f"{kept}{row['peak_bytes'] / 2**20:.0f}",
                    f"{row['trained']:,}",
                ]
            )
    return table


def count(value: int | None) -> str:
    return "-" if value is None else f"{value}"


def show(record: dict) -> None:
    rows, args = record["results"], record["arguments"]
    if not record["complete"]:
        print("\ninterrupted: what follows is partial")
    print(f"\n{text_table(HEAD, lines(rows))}\n")
    show_meanings(record, {row["method"] for row in rows})
    where = "by the wall clock" if args["device"] == "cpu" else "on the device"
    notes = {
        "ms": f"median of the rounds, {where}; /: median of the ratios within each round; (cpu): ratio of CPU times",
        "no opt.": "forward and backward without AdamW, over merged's",
        "ops": "of forward and backward, views excluded: on a GPU each launches at least one kernel",
        "saved": "MiB that the forward saves for the backward, each storage once, without parameters; over merged's",
        "peak MiB": f"{record['memory']}; +: kept between steps, without the optimizer's state",
        "trained": f"parameters, including the head of {harness.CLASSES} classes",
    }
    print()
    for name, note in notes.items():
        print(textwrap.fill(note, 120, initial_indent=f"{name:<16} ", subsequent_indent=" " * 17))
    print(machine_line(record))
    for s in record["summary"]:
        if s["efft2_ratio"]:
            against = ", ".join(f"{value:.2f} x {name}" for name, value in s["efft2_ratio"].items())
            print(f"{args['model']}, batch {args['batch']}, {s['dtype']}, {s['pass']}:")
            print(f"    efft2 {digits(s['ms']['efft2'])} ms = {against}")
    for row in rows:
        if row["pass"] == "step" and row["loss"] is None:
            what = f"{row['method']} in {row['dtype']}"
            print(f"warning: the loss of {what} is not finite any more; its time may be misleading")


def show_meanings(record: dict, shown: set[str]) -> None:
    for name, meaning in record["methods"].items():
        if name in shown:
            print(f"{name:<16} {meaning}")
    for name, reasons in record["left_out"].items():
        for dtype, reason in reasons.items():
            print(f"{name:<16} left out{f' of {dtype}' if dtype else ''}: {reason}")


def machine_line(record: dict) -> str:
    m, v = record["machine"], record["versions"]
    gpu = f", {m['gpu']['name']}" if record["arguments"]["device"] == "cuda" else ""
    return f"\n{m['cpu']}, {m['threads']} threads{gpu}, torch {v['torch']}, efft_kernels {v['efft_kernels']}\n"


def panels(rows: list[dict]) -> list[tuple[str, dict]]:
    found = []
    for title, part in (("training step", "step"), ("without the optimizer", "forward+backward")):
        bars = {}
        for row in rows:
            if row["pass"] == part and row.get("ratio_merged"):
                bars.setdefault(row["dtype"], {})[row["method"]] = spread_of(row, "merged")
        found.append((f"{title}: time", bars))
    steps = {row["dtype"]: {} for row in rows}
    for row in rows:
        if row["pass"] == "forward+backward":
            steps[row["dtype"]][row["method"]] = row
    exact = {}
    for dtype, own in steps.items():
        for label, key in (("saved bytes", "saved_bytes"), ("operations", "ops")):
            if own.get("merged", {}).get(key):
                ratios = {name: row[key] / own["merged"][key] for name, row in own.items()}
                exact[f"{label}, {dtype}"] = {name: (ratio,) * 3 for name, ratio in ratios.items()}
    return [*found, ("forward and backward: memory and operations", exact)]


def draw(
    record: dict, folder: Path, panels: list[tuple[str, dict]], label: str, colours: dict[str, str] = COLOURS
) -> None:
    name, written = record["benchmark"], ["csv", "json"]
    # the divisor itself is not drawn, so a run without other methods has no chart
    drawn = [(title, bars) for title, bars in panels if any(bar in colours for group in bars.values() for bar in group)]
    if drawn:
        chart(folder / f"{name}.png", drawn, colours, label, chart_note(record), limit=8.0)
        written.append("png")
    print(f"written: {', '.join(str(folder / f'{name}.{ending}') for ending in written)}")


def chart_note(record: dict) -> str:
    args, m = record["arguments"], record["machine"]
    name = m["gpu"]["name"] if args["device"] == "cuda" else f"{m['cpu']}, {m['threads']} threads"
    note = f"{args['model']}, batch {args['batch']}, rank {args['rank']}, {name}, torch {record['versions']['torch']}"
    return f"{note}; whiskers: quartiles" + ("" if record["complete"] else "; interrupted, partial")


def parser(description: str, known: list[str], out: str) -> argparse.ArgumentParser:
    """The options that all benchmarks of whole models share. known: names of methods; the first one always runs."""
    names = [backend.name for backend in efft_kernels.backends()]
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--model", choices=MODELS, default="vit_b", help="of timm, random weights (default: vit_b)")
    p.add_argument("--batch", type=positive, default=4, metavar="B", help="images (default: 4)")
    p.add_argument("--image", type=positive, default=224, metavar="SIDE", help="in pixels (default: 224)")
    p.add_argument("--rank", type=positive, default=16, metavar="R", help="of EFFT and FacT (default: 16)")
    p.add_argument("--lora-rank", type=positive, default=8, metavar="R", help="of LoRA (default: 8)")
    p.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"),
                   help="the model is cast to it (default: float32 on a CPU, bfloat16 on a GPU)")  # fmt: skip
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--methods", nargs="+", choices=known, metavar="NAME",
                   help=f"only these, and {known[0]}: {', '.join(known)}")  # fmt: skip
    p.add_argument("--backend", choices=names, help="of efft_kernels (default: its own choice)")
    p.add_argument("--threads", type=positive, metavar="T", help="of torch (default: its own choice)")
    p.add_argument("--repeats", type=positive, default=20, metavar="N", help="rounds at most (default: 20)")
    p.add_argument("--seconds", type=seconds, default=120.0, metavar="S",
                   help="for everything, set-up included; at least three rounds are run (default: 120)")  # fmt: skip
    p.add_argument("--out", type=Path, metavar="DIR", help=f"write {out} there")
    return p


def check(p: argparse.ArgumentParser, args: argparse.Namespace, always: str, left_out: dict) -> None:
    """Check options that depend on each other, and fill in the defaults that depend on other options.

    always: the method that always runs. left_out: {method: why it cannot run here}.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("argument --device: expected a device that torch can use, got 'cuda' without a GPU or a CUDA torch")
    if os.environ.get("EFFT_BACKEND"):
        p.error(f"EFFT_BACKEND: expected unset, as --backend chooses here, got {os.environ['EFFT_BACKEND']!r}")
    if args.backend:
        backend = next(b for b in efft_kernels.backends() if b.name == args.backend)
        if not backend.available:
            p.error(f"argument --backend: expected an available backend, got {args.backend!r}: {backend.note}")
    if args.image % (side := MODELS[args.model][2]):
        p.error(f"argument --image: expected a multiple of {side} for {args.model}, got {args.image}")
    width = max(layer.K for layer in layers(args.model) if layer.kind == "proj")
    for name in ("rank", "lora_rank"):
        if (rank := getattr(args, name)) > width:
            p.error(f"argument --{name.replace('_', '-')}: expected at most {width} for {args.model}, got {rank}")
    args.dtype = list(dict.fromkeys(args.dtype or ["float32" if args.device == "cpu" else "bfloat16"]))
    if args.methods is not None:
        args.methods = list(dict.fromkeys([always, *args.methods]))
        for name in args.methods:
            if reason := left_out.get(name):
                p.error(f"argument --methods: expected methods that can run here, got {name!r}: {reason}")
    if args.out is not None:
        try:
            prepare_folder(args.out)
        except OSError as error:
            p.error(f"argument --out: expected a folder that can be written, got {str(args.out)!r}: {error.strerror}")
    try:
        harness.timm()
    except ImportError as error:
        p.error(f'benchmarks of whole models need timm: pip install -e ".[bench]" ({error})')


def make_record(benchmark: str, args: argparse.Namespace, meanings: dict[str, str], left_out: dict[str, str]) -> dict:
    environment = {k: v for k, v in os.environ.items() if k.startswith("MALLOC_") or k == "GLIBC_TUNABLES"}
    return {
        "benchmark": benchmark,
        "format": FORMAT,
        "complete": False,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "arguments": {name: value for name, value in vars(args).items() if name != "out"},
        "machine": machine(),
        "versions": {**versions(), **harness.versions()},
        "commit": commit(),
        "backends": [backend._asdict() for backend in efft_kernels.backends()],
        "allocator": environment,
        "memory": MEMORY[args.device],
        "methods": meanings,
        "left_out": {name: {"": reason} for name, reason in left_out.items() if not args.methods},
        "results": [],
    }


def main(argv: list[str] | None = None) -> int:
    known = list(dict.fromkeys(m.name for device in ("cpu", "cuda") for m in harness.methods(device)[0]))
    p = parser(
        "Time a training step of a vision transformer adapted in every way it is done today, with its memory and its "
        "operations. Without arguments: ViT-B, batch 4, float32.",
        known,
        "train_step.csv, train_step.json and train_step.png",
    )
    p.add_argument("--graph", action="store_true",
                   help="replay every step from a CUDA graph, as one pass (GPU only)")  # fmt: skip
    p.add_argument("--compile", action="store_true",
                   help="run every model through torch.compile; ops and saved bytes are not counted")  # fmt: skip
    args = p.parse_args(argv)
    found, left_out = harness.methods(args.device)
    check(p, args, "merged", left_out)
    if args.graph and args.device != "cuda":
        p.error(f"argument --graph: expected --device cuda, got --device {args.device}")
    if args.threads:
        torch.set_num_threads(args.threads)
    record = make_record("train_step", args, {m.name: m.meaning for m in found}, left_out)
    drawn = lambda: draw(record, args.out, panels(record["results"]), "/ merged")
    measured = lambda: measure(args, record, found, args.graph, args.compile)
    return conclude(record, args.out, measured, summary, show, drawn)


if __name__ == "__main__":
    sys.exit(main())
