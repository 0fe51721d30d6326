"""Benchmark of a training step of a whole vision transformer: efft_kernels against the common ways to adapt it.

    python benchmarks/bench_train_step.py                                     # ViT-B on this machine, under 3 minutes
    python benchmarks/bench_train_step.py --dtype float32 bfloat16 --seconds 1500 --out DIR
    python benchmarks/bench_train_step.py --device cuda --batch 64 --graph    # the device's time without the host's
    python benchmarks/bench_train_step.py --model swin_t --memory --out DIR   # bytes alone, in seconds

harness.py defines the methods, steps.py the step, timing.py measures, results/README.md describes the files.
"""

import itertools
import math
import sys
from typing import NamedTuple

# the first of these imports reports which packages are missing
import whole_model
from whole_model import COLOURS, check, forget_packed, make_record, named, parser, print_ratios, timings

import harness
import torch
from harness import Method, Options
from forward_rows import groups
from record import add_rows, conclude, cpu_ratio, digits, draw, mib, report, spread_of, times
from steps import BATCHES, Saved, Step, count_ops, make_batches, reason
from timing import Stages, measure_cases, memory, run
from tqdm import tqdm

# methods that all times are divided by, round by round
REFERENCES = ("merged", "merged_onednn", "full", "peft_lora", "released_efft", "fact_tt", "efft2_kept")
# stages of a step that make up a pass: forward with loss, backward, AdamW with the gradients cleared
PASSES = {
    "forward": slice(0, 1),
    "backward": slice(1, 2),
    "optimizer": slice(2, 3),
    "forward+backward": slice(0, 2),
    "step": slice(0, 3),
}


class Built(NamedTuple):
    """One method, ready to be timed."""

    step: Step
    calls: list[Stages]  # a step with each batch, warm
    facts: dict  # what is known of the step besides its time


def build(
    args, dtype: str, found: list[Method], left_out: dict, bar: tqdm, graph: bool = False, compile: bool = False
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
            model = method.build(base, options)
            step = Step(model, batches, compile=compile, capturable=graph, autocast=args.autocast)
            if method.ours:
                forget_packed()
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


def about(args, dtype: str, part: str, method: str) -> dict:
    """The columns that name a row."""
    dtype += " autocast" * args.autocast
    names = {"model": args.model, "batch": args.batch, "image": args.image}
    return {**names, "dtype": dtype, "pass": part, "method": method}


def _saved_bytes(step: Step) -> int:
    saved = Saved(step.model)
    with saved:
        run(step.stages())
    return saved.bytes


def results(args, dtype: str, samples: list[dict], built: dict[str, Built], graph: bool) -> list[dict]:
    """Make a row per pass and method from the complete rounds. A captured step is one pass, which cannot be divided."""
    rows, passes = [], {"step": slice(0, 1)} if graph else PASSES
    for (part, which), (name, (step, _, facts)) in itertools.product(passes.items(), built.items()):
        references = {other: other for other in REFERENCES if other in built}
        timed = timings(samples, name, which, references, "merged", "efft2_kept")
        loss = step.loss.item()
        own = {"ops": facts["ops"][part], "loss": loss if math.isfinite(loss) else None}
        rows.append(about(args, dtype, part, name) | timed | facts | own)
    return rows


def measure_memory(args, record: dict, found: list[Method]) -> None:
    """Add a row per method with the operations and bytes of a step; nothing is timed."""
    for dtype in args.dtype:
        with tqdm(desc=f"{args.model} {dtype}", disable=None) as bar:
            built = build(args, dtype, found, record["left_out"], bar)
        facts = {name: of.facts | {"ops": of.facts["ops"]["step"]} for name, of in built.items()}
        add_rows(record, [about(args, dtype, "step", name) | own for name, own in facts.items()], args.out)


def measure(args, record: dict, found: list[Method], graph: bool = False, compile: bool = False) -> None:
    def prepare(dtype: str, bar: tqdm):
        built = build(args, dtype, found, record["left_out"], bar, graph, compile)
        if not built:
            reasons = {name: by_dtype.get(dtype) for name, by_dtype in record["left_out"].items()}
            why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
            raise RuntimeError(f"no method can run in {dtype}: {why}")
        calls = {name: method.calls for name, method in built.items()}
        return calls, lambda samples: results(args, dtype, samples, built, graph)

    measure_cases(args, record, dict.fromkeys(args.dtype, 1.0), prepare)


def summary(rows: list[dict]) -> list[dict]:
    """The step with and without the optimizer; a captured step is not divided."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    shown = [row for row in rows if row["pass"] in ("step", "forward+backward")]
    shown.sort(key=lambda row: (dtypes.index(row["dtype"]), row["pass"] != "step"))
    return whole_model.summary(shown, lambda row: row["method"], lambda name: name == "efft2", "pass")


HEAD = [
    "step", "method", "ms", "quartiles", "/merged", "(cpu)", "no opt.", "/full", "/peft", "/released", "ops", "saved",
    "/merged", "peak MiB", "trained",
]  # fmt: skip


def lines(rows: list[dict]) -> list[tuple[list[str], list[list[str]]]]:
    cases = []
    for _, case in groups(rows, "dtype"):
        steps = {row["method"]: row for row in case if row["pass"] == "step"}
        bare = {row["method"]: row for row in case if row["pass"] == "forward+backward"}
        cases.append((named(case[0]), []))
        for row in steps.values():
            other, floor = bare.get(row["method"], {}), steps.get("merged", {}).get("saved_bytes")
            cases[-1][1].append(
                [
                    row["method"],
                    *times(row),
                    digits(row.get("ratio_merged")),
                    digits(cpu_ratio(row, steps.get("merged")) if "ms" in row else None),
                    digits(other.get("ratio_merged")),
                    *(digits(row.get(f"ratio_{name}")) for name in ("full", "peft_lora", "released_efft")),
                    count(other.get("ops")),
                    count(row["saved_bytes"] and round(row["saved_bytes"] / 2**20)),
                    digits(row["saved_bytes"] / floor if floor else None),
                    mib(row),
                    f"{row['trained']:,}",
                ]
            )
    return cases


def count(value: int | None) -> str:
    return "-" if value is None else f"{value}"


def show(record: dict) -> None:
    notes = {
        "no opt.": "forward and backward without AdamW, over merged's",
        "ops": "of forward and backward, views excluded: on a GPU each launches at least one kernel",
        "saved": "MiB that the forward saves for the backward, each storage once, without parameters; over merged's",
        "peak MiB": f"{record['memory']}; +: kept between steps, without the optimizer's state",
        "trained": f"parameters, including the head of {harness.CLASSES} classes",
    }
    report(record, HEAD, lines(record["results"]), notes)
    print_ratios(record)
    for row in record["results"]:
        if row["pass"] == "step" and row.get("loss", 0) is None:
            what = f"{row['method']} in {row['dtype']}"
            print(f"warning: the loss of {what} is not finite any more; its time may be misleading")


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
    p.add_argument("--autocast", action="store_true", help="run every forward under autocast to bfloat16")
    p.add_argument("--memory", action="store_true", help="count operations and bytes of one step, and time nothing")
    args = p.parse_args(argv)
    found, left_out = harness.methods(args.device)
    check(p, args, "merged", left_out)
    if args.memory and (args.graph or args.compile):
        p.error("argument --memory: expected neither --graph nor --compile beside it")
    if args.graph and args.device != "cuda":
        p.error(f"argument --graph: expected --device cuda, got --device {args.device}")
    record = make_record("train_step", args, {m.name: m.meaning for m in found}, left_out)
    found = [m for m in found if args.methods is None or m.name in args.methods]
    if args.memory:
        return conclude(record, args.out, lambda: measure_memory(args, record, found), summary, show, lambda: None)
    measured = lambda: measure(args, record, found, args.graph, args.compile)
    drawn = lambda: draw(record, args.out, panels(record["results"]), "/ merged", COLOURS, "batch")
    return conclude(record, args.out, measured, summary, show, drawn)


if __name__ == "__main__":
    sys.exit(main())
