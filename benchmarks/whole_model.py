"""What the benchmarks of whole models share: their options, how they measure dtype by dtype, and how they report.

harness.py has the models and the methods, timing.py how a call is timed.
"""

import argparse
import os
from collections.abc import Callable

# the first of these imports reports which packages are missing
from arguments import add_common, check_out, positive, use_device  # isort: skip

import efft_kernels
import harness
import torch
from harness import MODELS
from forward_rows import groups
from record import backends, begun, digits, installed, ratios
from shapes import layers
from timing import MEMORY, Stages, columns, memory, run

COLOURS = {
    "merged_onednn": "#9e9e9e",
    "full": "#6a51a3",
    "released_efft": "#8c2d04",
    "fact_tt": "#d9603b",
    "peft_lora": "#c28f00",
    "accelerated": "#80cdc1",
    "efft2": "#1b7837",
    "efft2_p0": "#5aae61",
    "efft2_kept": "#00441b",
    "efft1": "#a6dba0",
    "efft_lora": "#2166ac",
    "efft_fact": "#92c5de",
}


def parser(description: str, known: list[str], out: str) -> argparse.ArgumentParser:
    """The options of all benchmarks of whole models; the first of the known methods is always measured."""
    names = [backend.name for backend in efft_kernels.backends()]
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--model", choices=MODELS, default="vit_b", help="model of timm, random weights (default: vit_b)")
    p.add_argument("--batch", type=positive, default=4, metavar="B", help="images per batch (default: %(default)s)")
    p.add_argument("--image", type=positive, default=224, metavar="SIDE", help="side in pixels (default: 224)")
    p.add_argument("--rank", type=positive, default=16, metavar="R", help="rank of EFFT and FacT (default: 16)")
    p.add_argument("--lora-rank", type=positive, default=8, metavar="R", help="rank of LoRA (default: 8)")
    p.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"),
                   help="dtypes that the model is cast to (default: float32 on a CPU, bfloat16 on a GPU)")  # fmt: skip
    p.add_argument("--methods", nargs="+", choices=known, metavar="NAME",
                   help=f"measure only these and {known[0]}; out of {', '.join(known)}")  # fmt: skip
    p.add_argument("--backend", choices=names, help="backend of efft_kernels (default: its choice)")
    add_common(p, 20, 120.0, "time limit, set-up included; at least three rounds", out)
    return p


def check(p: argparse.ArgumentParser, args: argparse.Namespace, always: str, left_out: dict) -> None:
    """Check the options together, and fill in defaults; left_out is {method: why it cannot run here}."""
    use_device(p, args)
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
    check_out(p, args)
    try:
        harness.timm()
    except ImportError as error:
        p.error(f'benchmarks of whole models need timm: pip install -e ".[bench]" ({error})')


def make_record(benchmark: str, args: argparse.Namespace, meanings: dict[str, str], left_out: dict[str, str]) -> dict:
    """The record of a run before its first result, with {method: what it is} and {method: why it cannot run here}."""
    environment = {k: v for k, v in os.environ.items() if k.startswith("MALLOC_") or k == "GLIBC_TUNABLES"}
    record = begun(benchmark, args)
    return record | {
        "versions": record["versions"] | installed("timm", "peft"),
        "backends": backends(),
        "allocator": environment,
        "memory": MEMORY[args.device],
        "methods": meanings,
        "left_out": {name: {"": reason} for name, reason in left_out.items() if not args.methods},
        "results": [],
    }


def timings(
    samples: list[dict], name: str, which: slice, references: dict[str, str], *quartiles: str, whole: bool = False
) -> dict:
    """The columns of the times of some stages of a method, over the same stages of {name in the columns: method}.

    The ratios named in quartiles get these; ``whole`` divides by all stages of a reference instead.
    """
    of = lambda name, which: [round[name][which] for round in samples]
    others = {column: of(other, slice(None) if whole else which) for column, other in references.items()}
    return columns(of(name, which), others, quartiles)


def forget_packed() -> None:
    """Drop what the CPU backend packed for the previous method, so that each method shows the memory that it keeps."""
    if next(b for b in efft_kernels.backends() if b.name == "cpu").available:
        from efft_kernels.kernels import cpu

        cpu.clear_packed()


def build(args, dtype: str, makers: dict[str, Callable], left_out: dict, bar) -> tuple[dict[str, list[Stages]], dict]:
    """Build and warm up: ({label: a call for each batch}, {label: its columns besides times}); left_out gets reasons.

    Each of the makers makes the calls of a label and the columns that it knows.
    """
    calls, facts = {}, {}
    for label, make in makers.items():
        bar.set_postfix_str(f"set-up of {label}")
        try:
            torch.manual_seed(0)
            made, own = make()
            forget_packed()
            kept = memory(made[0], args.device)[1]
            sizes = {"peak_bytes": memory(made[-1], args.device)[0], "kept_bytes": max(0, kept)}
            calls[label], facts[label] = made, own() | sizes
        except (ImportError, RuntimeError) as error:
            left_out.setdefault(label, {})[dtype] = str(error).strip().partition("\n")[0]
    # pack again what forget_packed dropped, outside the timed rounds
    for made in calls.values():
        run(made[0])
    return calls, facts


def named(row: dict) -> list[str]:
    """What names the case of a row in a table."""
    size = [row["model"], f"batch {row['batch']}", f"{row['image']} x {row['image']}", row["dtype"]]
    return size + ([f"{row['rounds']} rounds"] if "rounds" in row else [])


def summary(rows: list[dict], name: Callable[[dict], str], ours: Callable[[str], bool], *keys: str) -> list[dict]:
    """Per dtype and the other keys: ms of every row by its name, and ours over each of the references."""
    found = []
    for case, of in groups(rows, "dtype", *keys):
        own = {name(row): row for row in of}
        ratio = {label: ratios(row) for label, row in own.items() if ours(label)}
        ms = {label: row.get("ms") for label, row in own.items()}
        found.append({**dict(zip(("dtype", *keys), case)), "ms": ms, "ratio": ratio})
    return found


def print_ratios(record: dict) -> None:
    """Print the times of the summary as multiples of each reference's."""
    args = record["arguments"]
    for s in record["summary"]:
        case = f"{args['model']}, batch {args['batch']}, {s['dtype']}" + (f", {s['pass']}" if "pass" in s else "")
        for name, found in s["ratio"].items():
            if against := ", ".join(f"{value:.2f} x {other}" for other, value in found.items() if other != name):
                print(f"{case}: {name} {digits(s['ms'][name])} ms = {against}")
