"""Benchmark of a training step of a vision transformer with PEFT's LoRA, before and after accelerate_lora.

    python benchmarks/bench_lora.py                                     # ViT-B on this machine, under 3 minutes
    python benchmarks/bench_lora.py --lora-rank 16 --seconds 600 --out DIR

harness.py defines the methods, timing.py measures, results/README.md describes the files.
"""

import sys

# the first of these imports reports which packages are missing
from whole_model import (
    COLOURS, check, draw, make_record, parser, print_meanings,
)  # fmt: skip  # isort: skip

import harness
import torch
from bench_train_step import measure, panels
from torch import nn
from record import conclude, cpu_ratio, digits, print_notes, print_table, ratios
from timing import MEMORY
from harness import Method, Options

COLOURS.setdefault("accelerated", "#2166ac")


def accelerated(base: nn.Module, o: Options) -> nn.Module:
    model = harness.peft_lora(base, o)
    from efft_kernels.peft import accelerate_lora

    return accelerate_lora(model, backend=o.backend)


def variants(device: str) -> tuple[list[Method], dict[str, str]]:
    """The methods of this benchmark, and {name: why} for those that cannot run on a device."""
    known = {method.name: method for method in harness.methods(device)[0]}
    meaning = "peft_lora after efft_kernels.peft.accelerate_lora: the same layers, parameters and optimizer"
    fast = Method("accelerated", meaning, accelerated, True)
    return [known["merged"], known["peft_lora"], fast, known["efft2_p0"]], {}


HEAD = [
    "step", "method", "ms", "quartiles", "/peft", "(cpu)", "no opt.", "/merged", "ops", "saved", "peak MiB", "trained",
]  # fmt: skip


def lines(rows: list[dict]) -> list[list[str]]:
    table = []
    bare = {(row["dtype"], row["method"]): row for row in rows if row["pass"] == "forward+backward"}
    steps = {(row["dtype"], row["method"]): row for row in rows if row["pass"] == "step"}
    for (dtype, method), row in steps.items():
        other = bare[dtype, method]
        kept = f"+{row['kept_bytes'] / 2**20:.0f} " if row["kept_bytes"] >= 2**20 else ""
        table.append(
            [
                f"{row['model']} batch {row['batch']} {dtype}",
                method,
                digits(row["ms"]),
                f"{digits(row['q1'])}-{digits(row['q3'])}",
                digits(row.get("ratio_peft_lora")),
                digits(cpu_ratio(row, steps.get((dtype, "peft_lora")))),
                digits(other.get("ratio_peft_lora")),
                digits(row.get("ratio_merged")),
                f"{other['ops']}",
                f"{row['saved_bytes'] / 2**20:.0f}",
                f"{kept}{row['peak_bytes'] / 2**20:.0f}",
                f"{row['trained']:,}",
            ]
        )
    return table


def show(record: dict) -> None:
    rows = record["results"]
    print_table(record, HEAD, lines(rows))
    print_meanings(record, {row["method"] for row in rows})
    notes = {
        "ms": "median of the rounds; /: median of the ratios within each round; (cpu): ratio of CPU times",
        "no opt.": "forward and backward without AdamW, over peft_lora's",
        "ops": "of forward and backward, views excluded: on a GPU each launches at least one kernel",
        "saved": "MiB that the forward saves for the backward, each storage once, without parameters",
        "peak MiB": f"{MEMORY[record['arguments']['device']]}; +: kept between steps, without the optimizer's state",
    }
    print_notes(record, notes)


def summary(rows: list[dict]) -> list[dict]:
    """Per dtype, for the step with and without the optimizer: ms by method, and accelerated over each reference."""
    found = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for part in ("step", "forward+backward"):
            own = {row["method"]: row for row in rows if (row["dtype"], row["pass"]) == (dtype, part)}
            ms, ratio = {name: row["ms"] for name, row in own.items()}, ratios(own.get("accelerated", {}))
            found.append({"dtype": dtype, "pass": part, "ms": ms, "accelerated_ratio": ratio})
    return found


def main(argv: list[str] | None = None) -> int:
    p = parser(
        "Time a training step of a vision transformer with LoRA on all Linears by PEFT, before and after "
        "efft_kernels.peft.accelerate_lora. Without arguments: ViT-B, batch 4, float32.",
        [method.name for method in variants("cpu")[0]],
        "lora.csv, lora.json and lora.png",
    )
    p.set_defaults(autocast=False)  # of bench_train_step, which measures
    args = p.parse_args(argv)
    found, left_out = variants(args.device)
    check(p, args, "merged", left_out)
    if args.threads:
        torch.set_num_threads(args.threads)
    record = make_record("lora", args, {m.name: m.meaning for m in found}, left_out)
    drawn = lambda: draw(record, args.out, panels(record["results"]), "/ merged")
    return conclude(record, args.out, lambda: measure(args, record, found), summary, show, drawn)


if __name__ == "__main__":
    sys.exit(main())
