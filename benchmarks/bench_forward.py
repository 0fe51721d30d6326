"""Benchmark of one adapted Linear, forward and backward: efft_kernels against the common implementations.

    python benchmarks/bench_forward.py                                        # ViT-B on this machine, about a minute
    python benchmarks/bench_forward.py --model swin_t --backward --out DIR    # results/README.md describes the files

baselines.py defines the variants, timing.py measures them, shapes.py has the models.
"""

import argparse
import itertools
import math
import sys
import textwrap
import time
from collections.abc import Callable
from typing import NamedTuple

# the first of these imports reports which packages are missing
from arguments import add_common, check_out, positive, use_device  # isort: skip

import torch
from baselines import SCALE, UPDATE, Call, Inputs, Variant, make_inputs, truth, variants
from forward_rows import COLOURS, floor_share, groups, raise_limits, row_work, slower, summary
from record import backends, begun, conclude, cpu_ratio, digits, draw, mib, report, spread_of, times
from shapes import KINDS, MODELS, Layer, layers, work
from timing import MEMORY, Limits, Stages, columns, copies, evict, limits, measure_cases, memory, run
from torch import Tensor
from tqdm import tqdm

# variants that all times are divided by, round by round
REFERENCES = ("merged", "onednn", "einsum_dw", "einsum", "peft", "unfused")


class Case(NamedTuple):
    layer: Layer
    M: int
    dtype: str
    size: str  # where M comes from: "batch 4" or "M=788"

    def __str__(self) -> str:
        return f"{self.layer.name} {self.dtype} M={self.M}"


FORWARD, BACKWARD = 1, 3  # indices of the timed stages of a call with a backward


def stages(call: Call, i: Inputs, backward: bool, between: Callable[[], None] = lambda: None) -> Stages:
    """(forward,) without a backward, otherwise (between, forward, between, backward)."""
    if not backward:
        return (lambda _: call.forward(),)
    wanted = (i.x, *call.trained)
    other = lambda y: between() or y
    return other, (lambda _: call.forward()), other, (lambda y: torch.autograd.grad(y, wanted, i.dy))


def other_layers(variant: Variant, args, dtype: torch.dtype) -> Callable[[], None]:
    """Imitate the other layers of a model, which run between two passes: evict the weight, keep the code warm."""
    if variant.compiled:  # compiling for another shape would take too long
        return lambda: evict(args.device)
    width = max(96, 3 * args.rank)
    i = make_inputs(16, Layer("other", width, width, 1, 16, 1), args.rank, dtype, args.device, grad=True)
    small = stages(variant.build(i), i, True)

    def between():
        evict(args.device)
        run(small)

    return between


def errors(variant: Variant, y: Tensor, i: Inputs, true: Tensor, added: Tensor, rows: slice) -> dict:
    """Relative errors (Frobenius norm) against float64 of y and of what the adapter adds to it; None if not finite.

    The adapter's part is measured by a call with zero weight and bias. Variants that round w + dW lose a part of the
    update there, so for these it is x (merged weight - weight) in float64.
    """
    if variant.merged:
        got = i.x.detach()[rows].double() @ (i.merged.double() - i.weight.double()).t()
    else:
        bare = i._replace(weight=torch.zeros_like(i.weight), bias=torch.zeros_like(i.bias))
        got = variant.build(bare).forward().detach()[rows].double()
    found = {"error_y": (y.detach()[rows].double(), true), "error_update": (got, added)}
    found = {name: ((got - true).norm() / true.norm()).item() for name, (got, true) in found.items()}
    return {name: error if math.isfinite(error) else None for name, error in found.items()}


def build(case: Case, args, found: list[Variant], left_out: dict) -> tuple[dict[str, list[Stages]], dict[str, dict]]:
    """Build and warm up every variant: ({variant: its call on each copy of the inputs}, {variant: its facts}).

    Facts are the columns besides times. A variant that raises is left out, and left_out gets the reason.
    """
    dtype = getattr(torch, case.dtype)
    moved = work(case.M, case.layer.K, case.layer.N, args.rank, dtype.itemsize)["forward"][1]
    data = [
        make_inputs(case.M, case.layer, args.rank, dtype, args.device, grad=args.backward, seed=seed)
        for seed in range(copies(moved, args.device))
    ]
    rows = slice(None, None, max(1, case.M // 256))  # float64 products of all rows would take longer than the timing
    true, added = truth(data[0], rows)
    calls, facts = {}, {}
    for variant in found:
        try:
            built = [variant.build(i) for i in data]
            between = other_layers(variant, args, dtype) if args.backward else lambda: None
            first, *others = (stages(call, i, args.backward, between) for call, i in zip(built, data))
            start = time.perf_counter()
            y = value = None
            for number, stage in enumerate(first):
                value = stage(value)
                y = value if number == FORWARD * args.backward else y
            seconds = time.perf_counter() - start
            fact = errors(variant, y, data[0], true, added, rows)
            fact["peak_bytes"], _ = memory(stages(built[0], data[0], args.backward), args.device)
            fact["kept_bytes"] = 0
            if variant.name.startswith("efft"):
                # the first call with a weight packs it; make that call here, outside the timing
                new = data[0]._replace(weight=data[0].weight.clone())
                fact["kept_bytes"] = memory(stages(variant.build(new), new, args.backward), args.device)[1]
                for other in others:
                    run(other)
            fact["copies"] = len(data)
            fact["compile_s"] = seconds if variant.compiled else None
            calls[variant.name], facts[variant.name] = [first, *others], fact
        except RuntimeError as error:
            # the first sentence of the first line; the rest of torch's messages is about tools and builds
            reason = str(error).strip().partition("\n")[0].partition(". ")[0]
            left_out.setdefault(variant.name, {})[str(case)] = reason
    return calls, facts


def results(case: Case, args, samples: list[dict], facts: dict[str, dict]) -> list[dict]:
    """Make a row per pass and variant from the complete rounds."""
    layer = case.layer
    parts = {"forward": (0,)}
    if args.backward:
        parts = {"forward": (FORWARD,), "backward": (BACKWARD,), "forward+backward": (FORWARD, BACKWARD)}
    rows = []
    for (part, laps), name in itertools.product(parts.items(), facts):
        of = lambda name, laps=laps: [[round[name][lap] for lap in laps] for round in samples]
        references = {other: of(other) for other in REFERENCES if other in facts}
        row = {"layer": layer.name, "M": case.M, "K": layer.K, "N": layer.N, "R": args.rank, "slices": layer.slices}
        row |= {"dtype": case.dtype, "size": case.size, "count": layer.count, "pass": part, "variant": name}
        rows.append(row | columns(of(name), references, ("merged", "unfused")) | facts[name])
    return rows


def measure(cases: list[Case], args, record: dict, limit: Limits) -> None:
    needed = [work(c.M, c.layer.K, c.layer.N, args.rank, getattr(torch, c.dtype).itemsize)["forward"] for c in cases]
    costs = {c: max(flops / limit.gemm[c.dtype], b / limit.bandwidth) for c, (flops, b) in zip(cases, needed)}

    def prepare(case: Case, bar: tqdm):
        found, _ = variants(args.device)  # again, so that nothing compiled for the previous case is reused
        compile = args.compile == "all" or (args.compile == "first" and case == cases[0])
        found = [v for v in found if v.name in (args.variants or [v.name]) and (compile or not v.compiled)]
        if any(v.compiled for v in found):
            torch._dynamo.reset()
        calls, facts = build(case, args, found, record["left_out"])
        return calls, lambda samples: results(case, args, samples, facts)

    measure_cases(args, record, costs, prepare)


HEAD = [
    "layer", "variant", "ms", "quartiles", "/merged", "(cpu)", "/onednn", "/einsum_dw", "/unfused", "GFLOP/s", "GB/s",
    "floor", "MiB", "error y", "error dW",
]  # fmt: skip


def lines(rows: list[dict], limits: dict) -> list[tuple[list[str], list[list[str]]]]:
    cases = []
    for _, group in groups(rows, "layer", "dtype", "size", "pass"):
        r = group[0]
        label = [f"{r['layer']} {r['K']}->{r['N']}", f"{r['dtype']}, M={r['M']}", r["pass"], f"{r['rounds']} rounds"]
        cases.append((label, []))
        merged = next((row for row in group if row["variant"] == "merged"), None)
        for row in group:
            flops, moved = row_work(row)
            cases[-1][1].append(
                [
                    row["variant"],
                    *times(row),
                    digits(row.get("ratio_merged")),
                    digits(cpu_ratio(row, merged)),
                    *(digits(row.get(f"ratio_{other}")) for other in ("onednn", "einsum_dw", "unfused")),
                    digits(flops / row["ms"] * 1e-6),
                    digits(moved / row["ms"] * 1e-6),
                    f"{floor_share(row, limits):.0%}",
                    mib(row, 1),
                    *("not finite" if e is None else f"{e:.0e}" for e in (row["error_y"], row["error_update"])),
                ]
            )
    return cases


def show(record: dict) -> None:
    rows, args = record["results"], record["arguments"]
    limit = record["limits"]
    flops = ", ".join(f"{digits(value * 1e-9)} GFLOP/s {dtype}" for dtype, value in limit["flops"].items())
    notes = {
        "GFLOP/s": "and GB/s: work and traffic that the fused layer needs, over the time of the variant",
        "floor": f"share of the time that this work takes at {flops}, {digits(limit['bandwidth'] * 1e-9)} GB/s",
        "": limit["source"],
        "MiB": f"{record['memory']}; +: kept between calls",
        "error dW": "of what the adapter adds: of a call with zero weight and bias, or of x (w + dW - w) if w + dW is "
        "rounded",
    }
    report(record, HEAD, lines(rows, limit), notes)
    for s in record["summary"]:
        order = ("merged", "onednn", "onednn_packed", "unfused", "peft", "einsum", "einsum_dw")
        if against := [f"{s['efft_ratio'][name]:.2f} x {name}" for name in order if name in s["efft_ratio"]]:
            which = "all Linears" if len(s["layers"]) == len(layers(args["model"])) else f"all {', '.join(s['layers'])}"
            print(f"{args['model']}, {s['size']}, {s['dtype']}, {s['pass']}, sum of {which} of the blocks:")
            print(f"    efft {digits(s['ms']['efft'])} ms = {', '.join(against)}")
    if any(row["variant"] == "efft" and row.get("ratio_unfused") for row in rows):
        print(textwrap.fill(f"slower than unfused torch: {'; '.join(slower(rows)) or 'nowhere'}", 120))


def panels(rows: list[dict]) -> list[tuple[str, dict]]:
    """One panel with all cases of a pass if they are few, otherwise one per dtype and size for every four Linears."""
    found = []
    for (part,), group in groups(rows, "pass"):
        cases = groups(group, "layer", "dtype", "M")
        chunks = [cases]
        if len(cases) > 6:
            chunks = []
            for _, same in groups(group, "dtype", "size"):
                layers = groups(same, "layer", "dtype", "M")
                chunks += [layers[at : at + 4] for at in range(0, len(layers), 4)]
        for chunk in chunks:
            bars = {
                f"{layer} {own[0]['K']}→{own[0]['N']}\n{dtype}, M = {M}": {
                    row["variant"]: spread_of(row, "merged") for row in own
                }
                for (layer, dtype, M), own in chunk
            }
            found.append((part, bars))
    return found


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[Case]]:
    kinds = [f"stage{s}.{kind}" for s in range(1, 5) for kind in KINDS]
    known = [v.name for device in ("cpu", "cuda") for v in variants(device)[0]]
    p = argparse.ArgumentParser(
        description="Time one adapted Linear in every way it is done today. Without arguments: the four Linears of "
        "ViT-B, batch 4, float32, and one small case in bfloat16."
    )
    p.add_argument("--model", choices=MODELS, default="vit_b", help="whose Linears (default: vit_b)")
    p.add_argument("--layer", nargs="+", choices=[*KINDS, "all", *kinds], default=["all"], metavar="LAYER",
                   help="qkv, proj, fc1, fc2 (in Swin: of all stages), stage1.qkv ... stage4.fc2, or all")  # fmt: skip
    size = p.add_mutually_exclusive_group()
    size.add_argument("--batch", nargs="+", type=positive, metavar="B", help="images; M = B * tokens (default: 4)")
    size.add_argument("--rows", nargs="+", type=positive, metavar="M", help="M itself")
    p.add_argument("--rank", type=positive, default=16, metavar="R", help="of the adapter (default: 16)")
    p.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16", "float16"),
                   help="default: float32 and one small bfloat16 case on a CPU, bfloat16 on a GPU")  # fmt: skip
    p.add_argument("--backward", action="store_true",
                   help="forward, backward and both: dx and the gradients of the factors, weight frozen")  # fmt: skip
    p.add_argument("--variants", nargs="+", choices=dict.fromkeys(known), metavar="NAME",
                   help=f"only these, and merged: {', '.join(dict.fromkeys(known))}")  # fmt: skip
    p.add_argument("--compile", choices=("first", "all", "none"), default="first",
                   help="cases in which the formulas run under torch.compile too (default: the first)")  # fmt: skip
    limited = "for all cases, set-up included; a case gets three rounds at least"
    add_common(p, 25, 60.0, limited, "forward.csv, forward.json and forward.png")
    args = p.parse_args(argv)

    use_device(p, args)
    model = layers(args.model)
    chosen = [layer for layer in model if {"all", layer.kind, layer.name} & set(args.layer)]
    if missing := [name for name in args.layer if name not in ("all", *KINDS, *(layer.name for layer in model))]:
        p.error(f"argument --layer: expected a layer of {args.model}, got {missing[0]!r}")
    for layer in chosen:
        if args.rank > (largest := min(layer.K, layer.N // layer.slices)):
            p.error(f"argument --rank: expected at most {largest} for {args.model} {layer.name}, got {args.rank}")
    if args.variants is not None:
        args.variants = ["merged", *args.variants]
    check_out(p, args)

    if args.rows:
        sizes = [(f"M={M}", lambda layer, M=M: M) for M in args.rows]
    else:
        sizes = [(f"batch {B}", lambda layer, B=B: B * layer.tokens) for B in args.batch or [4]]
    dtypes = args.dtype or ["float32" if args.device == "cpu" else "bfloat16"]
    cases = [
        Case(layer, rows(layer), dtype, size) for dtype, (size, rows), layer in itertools.product(dtypes, sizes, chosen)
    ]
    if args.device == "cpu" and not (args.dtype or args.batch or args.rows):
        small = chosen[KINDS.index("proj")] if len(chosen) > 1 else chosen[0]
        cases.append(Case(small, small.tokens, "bfloat16", "batch 1"))
    return args, list(dict.fromkeys(cases))  # a size or dtype that is given twice is measured once


def main(argv: list[str] | None = None) -> int:
    args, cases = parse(argv)
    found, left_out = variants(args.device)
    limit = limits(args.device, list(dict.fromkeys(case.dtype for case in cases)))
    record = begun("forward", args) | {
        "backends": backends(),
        "limits": limit._asdict() | {"flops": dict(limit.flops)},
        "memory": MEMORY[args.device],
        "data": {"scale": SCALE, "update_over_weight": UPDATE},
        "variants": {variant.name: variant.meaning for variant in found},
        "left_out": {name: {"": reason} for name, reason in left_out.items() if not args.variants},
        "results": [],
    }
    if args.compile == "first" and len(cases) > 1:
        for variant in found:
            if variant.compiled and (args.variants is None or variant.name in args.variants):
                record["left_out"][variant.name] = {f"all but {cases[0]}": "compiling takes its time; --compile all"}

    def run() -> None:
        try:
            with torch.set_grad_enabled(args.backward):
                measure(cases, args, record, limit)
        finally:
            raise_limits(record)

    drawn = lambda: draw(record, args.out, panels(record["results"]), "time / merged", COLOURS, limit=5.0)
    return conclude(record, args.out, run, summary, show, drawn)


if __name__ == "__main__":
    sys.exit(main())
