"""What the benchmarks of whole models share: their options, how they measure dtype by dtype, and how they report.

harness.py has the models and the methods, timing.py how a call is timed.
"""

import argparse
import os

# the first of these imports reports which packages are missing
from arguments import add_common, check_out, positive, use_device  # isort: skip

import efft_kernels
import harness
from harness import MODELS
from record import backends, begun, digits, installed
from shapes import layers
from timing import MEMORY, Stages, columns, memory

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


def memory_facts(calls: list[Stages], device: str) -> dict[str, int]:
    """The columns of what the first call keeps and of the peak of the last one."""
    forget_packed()
    kept = memory(calls[0], device)[1]
    return {"peak_bytes": memory(calls[-1], device)[0], "kept_bytes": max(0, kept)}


def named(row: dict) -> list[str]:
    """What names the case of a row in a table."""
    size = [row["model"], f"batch {row['batch']}", f"{row['image']} x {row['image']}", row["dtype"]]
    return size + ([f"{row['rounds']} rounds"] if "rounds" in row else [])


def print_ratios(record: dict) -> None:
    """Print the times of the summary as multiples of each reference's."""
    args = record["arguments"]
    for s in record["summary"]:
        for name, found in s["ratio"].items():
            against = ", ".join(f"{value:.2f} x {other}" for other, value in found.items() if other != name)
            case = f"{args['model']}, batch {args['batch']}, {s['dtype']}"
            print(f"{case}: {name} {digits(s['ms'][name])} ms = {against}")
