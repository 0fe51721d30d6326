"""Benchmark of a whole vision transformer at inference: merged, with its adapter on, and changing adapters.

    python benchmarks/bench_inference.py                                # ViT-B on this machine, under 3 minutes
    python benchmarks/bench_inference.py --batch 1 --dtype bfloat16 --out DIR

harness.py defines the methods, timing.py measures, results/README.md describes the files.
"""

import copy
import functools
import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# the first of these imports reports which packages are missing
import whole_model
from whole_model import COLOURS, build, check, make_record, named, parser, print_ratios, timings

import efft_kernels
import harness
import torch
from torch import Tensor, nn
from tqdm import tqdm
from forward_rows import groups
from record import conclude, cpu_ratio, digits, draw, mib, report, spread_of, text_table, times
from efft_kernels import EFFTConfig, add_adapter, delete_adapter, inject, load_adapter, save_adapter, set_adapter
from timing import Stages, measure_cases, run
from harness import Method, Options, quiet_merge, share
from steps import count_ops, make_batches

REFERENCES = ("base", "base_onednn", "merged", "peft_lora", "released_efft")
# the stages of a call; a stage named None is not reported
OPERATIONS = {
    "switch": ("set_adapter", "forward after set_adapter"),
    "load": ("load_adapter", "forward after load_adapter", None),
    "save": ("save_adapter",),
    "merge": ("merge", "unmerge", "forward after unmerge"),
    "inject": ("inject", None),
}
MEANINGS = {
    "set_adapter": "to another adapter of the model",
    "forward after set_adapter": "the first one, which computes the low-rank pairs of the new adapter",
    "load_adapter": "from a file, in addition to the adapters of the model",
    "forward after load_adapter": "the first one",
    "save_adapter": "to a file, until it is on the disk",
    "merge": "into the weights, keeping a copy of them",
    "unmerge": "restores the copy",
    "forward after unmerge": "the first one, which packs the weights again if the backend packs them",
    "inject": "a new adapter into a plain model",
}


def _shaken(model: nn.Module) -> nn.Module:
    """Add noise to the factors, so that none is zero, as after training."""
    with torch.no_grad():
        for p in efft_kernels.adapter_parameters(model):
            p += 0.01 * torch.randn_like(p)
    return model


def _merged(base: nn.Module, o: Options) -> nn.Module:
    model = inject(copy.deepcopy(base), EFFTConfig(rank=o.rank), backend=o.backend)
    return quiet_merge(_shaken(model), keep_weights=False)


def variants(device: str) -> tuple[list[Method], dict[str, str]]:
    """All methods, and {name: why} for those that cannot run on a device."""
    found, left_out = harness.methods(device)
    known = {method.name: method for method in found}
    chosen = [Method("base", "the model without adapters", known.pop("merged").build)]
    if "merged_onednn" in known:
        meaning = "as base, the blocks' Linears by oneDNN instead of torch's default library"
        chosen.append(Method("base_onednn", meaning, known.pop("merged_onednn").build))
    chosen.append(Method("merged", "efft2, merged into the weights by efft_kernels", _merged))
    for name in ("peft_lora", "released_efft", "fact_tt", "efft2", "efft1", "efft_lora", "efft_fact"):
        chosen.append(known[name])
    return chosen, {"base_onednn": reason for reason in left_out.values()}  # noqa: B035  at most one


def operations(base: nn.Module, o: Options, image: Tensor, folder: Path) -> dict[str, Stages]:
    """Calls that change the adapter of a model, with the stages named in OPERATIONS."""
    config, file = EFFTConfig(rank=o.rank), folder / "adapter.safetensors"

    def forward(model: nn.Module) -> Callable:
        return lambda _: model(image)

    switched = _shaken(inject(share(base), config, name="a", backend=o.backend).eval())
    _shaken(add_adapter(switched, config, "b"))
    save_adapter(switched, file, name="a")
    names = itertools.cycle("ab")
    merging = _shaken(inject(copy.deepcopy(base), config, backend=o.backend).eval())
    plain = share(base).eval()

    def unload(_) -> None:
        delete_adapter(switched, "loaded")
        set_adapter(switched, "a")

    return {
        "switch": (lambda _: set_adapter(switched, next(names)), forward(switched)),
        "load": (lambda _: load_adapter(switched, file, name="loaded"), forward(switched), unload),
        "save": (lambda _: save_adapter(switched, folder / "saved.safetensors", name="a"),),
        "merge": (lambda _: quiet_merge(merging), lambda _: efft_kernels.unmerge(merging), forward(merging)),
        "inject": (lambda _: inject(plain, config, backend=o.backend), lambda _: delete_adapter(plain, "default")),
    }


def makers(args, base: nn.Module, dtype: str) -> dict[str, Callable]:
    """{method: what makes its forwards of each batch, and their number of operations}"""
    images = [image for image, _ in make_batches(args, getattr(torch, dtype))]

    def make(method: Method):
        model = method.build(base, Options(args.rank, args.lora_rank, args.backend)).eval()
        forwards = [(lambda _, image=image: model(image),) for image in images]
        return forwards, lambda: {"ops": sum(count_ops(forwards[0]))}

    chosen = [m for m in variants(args.device)[0] if args.methods is None or m.name in args.methods]
    return {method.name: functools.partial(make, method) for method in chosen}


def results(args, dtype: str, samples: list[dict], facts: dict[str, dict]) -> list[dict]:
    """Make a row per method, then a row per operation, from the complete rounds."""
    common = {"model": args.model, "batch": args.batch, "image": args.image, "dtype": dtype}
    rows = []
    for name, known in facts.items():
        timed = timings(samples, name, slice(0, 1), {other: other for other in REFERENCES if other in facts}, "base")
        speed = args.batch / timed["ms"] * 1e3
        rows.append({**common, "method": name, "operation": None, **timed, "images_per_s": speed, **known})
    for variant, names in OPERATIONS.items():
        for at, name in enumerate(names):
            if name:
                references = {"efft2": "efft2"} if "efft2" in facts else {}
                timed = timings(samples, variant, slice(at, at + 1), references, "efft2", whole=True)
                rows.append({**common, "method": "efft2", "operation": name, **timed})
    return rows


def measure(args, record: dict, folder: Path) -> None:
    def prepare(dtype: str, bar: tqdm):
        base = harness.backbone(args.model, args.image, getattr(torch, dtype), args.device)
        calls, facts = build(args, dtype, makers(args, base, dtype), record["left_out"], bar)
        image = make_batches(args, getattr(torch, dtype))[0][0]
        options = Options(args.rank, args.lora_rank, args.backend)
        for name, stages in operations(base, options, image, folder).items():
            run(stages)
            calls[name] = [stages]
        record["adapter_bytes"][dtype] = (folder / "adapter.safetensors").stat().st_size
        return calls, lambda samples: results(args, dtype, samples, facts)

    measure_cases(args, record, dict.fromkeys(args.dtype, 1.0), prepare)


HEAD = [
    "forward", "method", "ms", "quartiles", "/base", "(cpu)", "/merged", "/peft", "/released", "images/s", "ops",
    "peak MiB",
]  # fmt: skip


def show(record: dict) -> None:
    cases, changes = [], []
    for (dtype,), own in groups(record["results"], "dtype"):
        forwards = [row for row in own if row["operation"] is None]
        cases.append((named(own[0]), [_forward_line(row, forwards[0]) for row in forwards]))
        changes += [[]] if changes else []
        for row in own[len(forwards) :]:
            changes.append([dtype, row["operation"], *times(row), digits(row.get("ratio_efft2"))])
    notes = {
        "ops": "of the forward, views excluded: on a GPU each launches at least one kernel",
        "peak MiB": f"{record['memory']}; +: kept between forwards",
        **record["operations"],
        "file": ", ".join(f"{size:,} bytes in {dtype}" for dtype, size in record["adapter_bytes"].items()),
    }
    more = f"{text_table(['efft2', 'operation', 'ms', 'quartiles', '/forward'], changes)}\n\n"
    report(record, HEAD, cases, notes, timed=", without gradients", more=more, width=26)
    print_ratios(record)


def _forward_line(row: dict, base: dict) -> list[str]:
    return [
        row["method"],
        *times(row),
        digits(row["ratio_base"]),
        digits(cpu_ratio(row, base)),
        *(digits(row.get(f"ratio_{name}")) for name in ("merged", "peft_lora", "released_efft")),
        digits(row["images_per_s"]),
        f"{row['ops']}",
        mib(row),
    ]


def summary(rows: list[dict]) -> list[dict]:
    name = lambda row: row["operation"] or row["method"]
    return whole_model.summary(rows, name, lambda label: label in ("merged", "efft2"))


def panels(rows: list[dict]) -> list[tuple[str, dict]]:
    forwards, changes = {}, {}
    for row in rows:
        if row["operation"] is None:
            name = {"base_onednn": "merged_onednn"}.get(row["method"], row["method"])  # one colour in both benchmarks
            forwards.setdefault(row["dtype"], {})[name] = spread_of(row, "base")
        elif row.get("ratio_efft2"):
            label = f"{row['operation'].replace(' after ', chr(10) + 'after ')}\n{row['dtype']}"
            changes[label] = {"efft2": spread_of(row, "efft2")}
    found = [("forward: time / base", forwards)]
    return [*found, ("changing adapters: time / forward of efft2", changes)] if changes else found


def main(argv: list[str] | None = None) -> int:
    known = list(dict.fromkeys(m.name for device in ("cpu", "cuda") for m in variants(device)[0]))
    p = parser(
        "Time a vision transformer at inference: without adapters, merged, with its adapter on; and switching, "
        "loading, merging and unmerging adapters. Without arguments: ViT-B, batch 4, float32.",
        known,
        "inference.csv, inference.json and inference.png",
    )
    args = p.parse_args(argv)
    found, left_out = variants(args.device)
    check(p, args, "base", left_out)
    record = make_record("inference", args, {m.name: m.meaning for m in found}, left_out)
    record |= {"operations": MEANINGS, "adapter_bytes": {}}

    def run() -> None:
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            measure(args, record, Path(folder))

    drawn = lambda: draw(record, args.out, panels(record["results"]), "ratio", COLOURS, "batch")
    return conclude(record, args.out, run, summary, show, drawn)


if __name__ == "__main__":
    sys.exit(main())
