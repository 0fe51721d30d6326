"""Benchmark of a vision transformer that serves many adapters mixed in one batch, against the common ways.

    python benchmarks/bench_serving.py                                  # ViT-B, batch 32, 1, 8 and 64 adapters: minutes
    python benchmarks/bench_serving.py --batch 8 --adapters 1 4 --out DIR

A call serves ``batch`` images, each with the next of K adapters; if there are more adapters than images, it takes
several batches to use each. timing.py measures, results/README.md describes the files.
"""

import copy
import functools
import itertools
import sys
from collections.abc import Callable
from typing import NamedTuple

# the first of these imports reports which packages are missing
import whole_model
from whole_model import build, check, make_record, named, parser, print_ratios, timings

import efft_kernels
import harness
import torch
from arguments import positive
from torch import Tensor, nn
from tqdm import tqdm
from forward_rows import groups
from record import conclude, digits, draw, mib, report, spread_of, times
from efft_kernels import EFFTConfig, LoRAConfig, inject
from efft_kernels.serving import AdapterBank
from timing import measure_cases
from harness import Options, quiet_merge, share
from steps import make_batches

COLOURS = {
    "merged": "#9e9e9e",
    "fused": "#5b8fc7",
    "switched": "#8c2d04",
    "one_by_one": "#d9603b",
    "peft_mixed": "#c28f00",
    "bank": "#1b7837",
    "bank_lora": "#7fbc41",
}
# of the latencies of single calls, in addition to the quartiles of all benchmarks
PERCENTILES = (50, 90, 99)


class Serving(NamedTuple):
    """A model with its adapters."""

    serve: Callable[[Tensor, list[int]], object]  # (images, the adapter of each) -> logits
    held_bytes: int  # parameters of all adapters


class Method(NamedTuple):
    name: str
    meaning: str
    build: Callable[[nn.Module, Options, int], Serving]  # (base, options, number of adapters)
    single: bool = False  # one adapter for the whole batch, independent of K: a reference for the others


def _adapted(model: nn.Module, config, o: Options, seed: int) -> nn.Module:
    """Add an adapter whose factors are all nonzero, as after training; the same one for the same seed."""
    torch.manual_seed(seed)
    if hasattr(model, "efft"):
        efft_kernels.add_adapter(model, config, f"{seed}")
    else:
        inject(model, config, name=f"{seed}", head="keep", backend=o.backend)
    with torch.no_grad():
        for p in model.efft[f"{seed}"].parameters():
            p += 0.01 * torch.randn_like(p)
    return model.eval()


def _efft(o: Options) -> EFFTConfig:
    return EFFTConfig(rank=o.rank)


def _bytes(model: nn.Module, word: str) -> int:
    """Size of the parameters that have this word in their name."""
    return sum(p.nbytes for name, p in model.named_parameters() if word in name.split("."))


def merged(base: nn.Module, o: Options, K: int) -> Serving:
    model = share(base).eval()
    return Serving(lambda images, ids: model(images), 0)


def fused(base: nn.Module, o: Options, K: int) -> Serving:
    model = _adapted(share(base), _efft(o), o, 0)
    return Serving(lambda images, ids: model(images), _bytes(model, "efft"))


def bank(config: Callable) -> Callable:
    def build(base: nn.Module, o: Options, K: int) -> Serving:
        made = AdapterBank(share(base).eval(), backend=o.backend)
        for a in range(K):
            made.add(f"{a}", _adapted(share(base), config(o), o, a))

        def serve(images: Tensor, ids: list[int]) -> Tensor:
            with made.use([f"{a}" for a in ids]):
                return made.model(images)

        return Serving(serve, made.bytes())

    return build


def _several(model: nn.Module, o: Options, K: int) -> nn.Module:
    for a in range(K):
        _adapted(model, _efft(o), o, a)
    return model


def _rows(ids: list[int]) -> dict[str, list[int]]:
    """{adapter: indices of its images}"""
    return {f"{a}": [i for i, other in enumerate(ids) if other == a] for a in dict.fromkeys(ids)}


def one_by_one(base: nn.Module, o: Options, K: int) -> Serving:
    model = _several(share(base), o, K)

    def serve(images: Tensor, ids: list[int]) -> list[Tensor]:
        return [efft_kernels.set_adapter(model, name)(images[own]) for name, own in _rows(ids).items()]

    return Serving(serve, _bytes(model, "efft"))


def switched(base: nn.Module, o: Options, K: int) -> Serving:
    model = _several(copy.deepcopy(base), o, K)  # a copy, because merging changes the weights

    def serve(images: Tensor, ids: list[int]) -> list[Tensor]:
        found = []
        for name, own in _rows(ids).items():
            quiet_merge(efft_kernels.set_adapter(model, name))
            found.append(model(images[own]))
            efft_kernels.unmerge(model)
        return found

    return Serving(serve, _bytes(model, "efft"))


def peft_mixed(base: nn.Module, o: Options, K: int) -> Serving:
    harness.timm()  # transformers, which peft imports, meets the same torchvision
    import peft

    model = share(base)
    options = {"r": o.lora_rank, "lora_alpha": o.lora_rank, "target_modules": harness.adapted(model)}
    config = peft.LoraConfig(**options, init_lora_weights=False)
    model = peft.PeftModel(model, config, adapter_name="0")
    for a in range(1, K):
        model.add_adapter(f"{a}", config)
    # factors in the model's dtype: PEFT would cast x to float32 factors in every call
    model = model.to(next(base.parameters()).dtype).eval()
    held = _bytes(model, "lora_A") + _bytes(model, "lora_B")
    return Serving(lambda images, ids: model(images, adapter_names=[f"{a}" for a in ids]), held)


METHODS = [
    Method("merged", "the model without adapters, or with one merged into it", merged, True),
    Method("fused", "efft_kernels, EFFT2, one adapter for the whole batch", fused, True),
    Method("switched", "efft_kernels, EFFT2: merge, pass, unmerge, adapter by adapter", switched),
    Method("one_by_one", "efft_kernels, EFFT2: one pass for each adapter over its images", one_by_one),
    Method("peft_mixed", "LoRA on all Linears by the PEFT library, adapter_names in one pass", peft_mixed),
    Method("bank", "efft_kernels, EFFT2: AdapterBank, one pass", bank(_efft)),
    Method("bank_lora", "efft_kernels, LoRA on all matrices: AdapterBank, one pass",
           bank(lambda o: LoRAConfig(rank=o.lora_rank, targets=("attn", "mlp")))),
]  # fmt: skip


def makers(args, base: nn.Module, dtype: str, left_out: dict) -> dict[str, Callable]:
    """{"method at K": what makes its calls of each batch, and its columns}; left_out gets those that take too long."""
    batches = [images for images, _ in make_batches(args, getattr(torch, dtype))]

    def make(method: Method, K: int):
        serve, held = method.build(base, Options(args.rank, args.lora_rank, args.backend), K)
        calls = []
        for n, images in enumerate(batches):
            ids = [(n * args.batch + i) % K for i in range(args.batch)]
            calls.append((lambda _, images=images, ids=ids: serve(images, ids),))
        about = {"method": method.name, "adapters": 1 if method.single else K, "held_bytes": held}
        return calls, lambda: about

    found = {}
    for K, method in itertools.product(args.adapters, METHODS):
        if (args.methods is not None and method.name not in args.methods) or (method.single and K != args.adapters[0]):
            continue
        label = method.name if method.single else f"{method.name} at {K}"
        if method.name == "switched" and K > args.most_switches:
            left_out.setdefault(label, {})[dtype] = f"more than --most-switches {args.most_switches}"
        else:
            found[label] = functools.partial(make, method, K)
    return found


def results(args, dtype: str, samples: list[dict], facts: dict[str, dict]) -> list[dict]:
    rows = []
    for name, known in facts.items():
        references = {"merged": "merged", "fused": "fused", "bank_1": "bank at 1"}
        references["peft_mixed"] = f"peft_mixed at {known['adapters']}"
        references = {column: other for column, other in references.items() if other in facts}
        timed = timings(samples, name, slice(0, 1), references, "fused")
        walls = torch.tensor([lap.wall * 1e3 for laps in samples for lap in laps[name]], dtype=torch.float64)
        latency = {f"p{p}_ms": torch.quantile(walls, p / 100).item() for p in PERCENTILES}
        common = {"model": args.model, "batch": args.batch, "image": args.image, "dtype": dtype, "label": name}
        rows.append({**common, **timed, **latency, "images_per_s": args.batch / timed["ms"] * 1e3, **known})
    return rows


def measure(args, record: dict) -> None:
    def prepare(dtype: str, bar: tqdm):
        base = harness.backbone(args.model, args.image, getattr(torch, dtype), args.device)
        made = makers(args, base, dtype, record["left_out"])
        calls, facts = build(args, dtype, made, record["left_out"], bar)
        return calls, lambda samples: results(args, dtype, samples, facts)

    measure_cases(args, record, dict.fromkeys(args.dtype, 1.0), prepare)


HEAD = [
    "serving", "method", "K", "ms", "quartiles", "p90", "p99", "images/s", "/merged", "/fused", "/bank at 1", "/peft",
    "peak MiB", "held MiB",
]  # fmt: skip


def _line(row: dict) -> list[str]:
    return [
        row["method"],
        f"{row['adapters']}",
        *times(row),
        *(digits(row[name]) for name in ("p90_ms", "p99_ms", "images_per_s")),
        *(digits(row.get(f"ratio_{name}")) for name in ("merged", "fused", "bank_1", "peft_mixed")),
        mib(row),
        f"{row['held_bytes'] / 2**20:.1f}",
    ]


def show(record: dict) -> None:
    notes = {
        "K": "adapters; each image has the next of them, the first again after the last",
        "p90, p99": "latency of a batch, ms by the wall clock",
        "/peft": "over peft_mixed with as many adapters",
        "peak MiB": f"{record['memory']}; +: kept between calls",
        "held MiB": "parameters of all adapters",
    }
    cases = [(named(own[0]), [_line(row) for row in own]) for _, own in groups(record["results"], "dtype")]
    report(record, HEAD, cases, notes, timed=", of a batch without gradients")
    print_ratios(record)


def summary(rows: list[dict]) -> list[dict]:
    return whole_model.summary(rows, lambda row: row["label"], lambda label: label.startswith("bank"))


def panels(rows: list[dict]) -> list[tuple[str, dict]]:
    bars = {}
    for row in rows:
        if row.get("ratio_fused") and row["method"] in COLOURS:
            group = f"{row['adapters']} in a batch\n{row['dtype']}"
            bars.setdefault(group, {})[row["method"]] = spread_of(row, "fused")
    return [("a batch: time / one adapter for all of it", bars)]


def main(argv: list[str] | None = None) -> int:
    p = parser(
        "Time a vision transformer that serves many adapters, mixed in every batch. Without arguments: ViT-B, "
        "batch 32, 1, 8 and 64 adapters, float32.",
        [m.name for m in METHODS],
        "serving.csv, serving.json and serving.png",
    )
    p.add_argument("--adapters", nargs="+", type=positive, default=[1, 8, 64], metavar="K",
                   help="how many are mixed in a batch (default: 1 8 64)")  # fmt: skip
    p.add_argument("--most-switches", type=positive, default=8, metavar="K",
                   help="switched, which takes longest, is run with up to as many adapters (default: 8)")  # fmt: skip
    p.set_defaults(batch=32, seconds=600.0)
    args = p.parse_args(argv)
    check(p, args, "merged", {})
    args.adapters = sorted(set(args.adapters))
    record = make_record("serving", args, {m.name: m.meaning for m in METHODS}, {})
    run = torch.no_grad()(lambda: measure(args, record))
    drawn = lambda: draw(record, args.out, panels(record["results"]), "/ fused", COLOURS, "batch")
    return conclude(record, args.out, run, summary, show, drawn)


if __name__ == "__main__":
    sys.exit(main())
