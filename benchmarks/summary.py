"""The tables of README.md and docs/, made from the records in results/.

    python benchmarks/summary.py --list                # the names of the tables
    python benchmarks/summary.py train_step serving    # print some of them
    python benchmarks/summary.py --write               # refresh every page
    python benchmarks/summary.py --check               # exit status 1 if a page differs from its records

In a page a table stands between `<!-- table: NAME -->` and `<!-- end -->`, each alone on its line.
"""

import argparse
import itertools
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gpu_tables as gpu
from efft_kernels.storage import write_bytes
from forward_rows import summary
from markdown_table import RESULTS, Table
from record import digits, read_csv, read_run

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MARKERS = re.compile(r"^<!-- table: (.*?) -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)
PROCESSORS = {
    "zen5": "AMD Zen 5 (AVX-512)",
    "zen3": "AMD Zen 3 (AVX2)",
    "emerald_rapids": "Intel Emerald Rapids (AVX-512, no AMX)",
    "nvidia_h200": "NVIDIA H200",
}
VARIANTS = {
    "efft": "EFFT (this library)",
    "merged": "merged weight",
    "onednn": "merged, oneDNN",
    "unfused": "plain torch",
    "peft": "LoRA as PEFT",
    "einsum": "einsum, no dW",
    "einsum_dw": "dense dW",
}
REBUILT = "inputs_rebuilt"  # folder of training steps that rebuild in the backward what others keep
METHODS = {
    "efft2": "EFFT2 (this library)",
    REBUILT: "EFFT2, inputs rebuilt",
    "efft2_p0": "EFFT2 without dropout",
    "efft2_kept": "EFFT2, inputs kept",
    "efft1": "EFFT1",
    "efft_lora": "LoRA on these kernels",
    "efft_fact": "FacT on these kernels",
    "accelerated": "PEFT's LoRA after accelerate_lora",
    "peft_lora": "LoRA by PEFT",
    "full": "full fine-tuning",
    "released_efft": "EFFT as released (dense dW)",
    "fact_tt": "FacT in plain torch",
    "merged": "frozen, no adapter",
    "merged_onednn": "frozen, no adapter, oneDNN",
}
_BYTES = "peak_bytes", "kept_bytes", "optimizer_bytes"


# Every table is a function without arguments, its docstring what --list says of it.


def train_step() -> Table:
    """training step of ViT-B, time and memory, per processor"""
    records = ["emerald_rapids/train_vit_b", "zen5/train_vit_b_float32"]
    gpus = [folder for folder, _ in gpu.recorded()]
    kinds = [(records[0], "train_step", dtype) for dtype in ("float32", "bfloat16")]
    kinds += [(name, "train_step", None) for name in [records[1], *gpus]]
    for kind in ("train_step_graph", "train_step_compile_graph"):
        kinds += [(name, kind, None) for name in gpus if (RESULTS / name / f"{kind}.json").exists()]
    records += gpus
    head, columns, rounds = ["training step of ViT-B"], [], set()
    for name, kind, dtype in kinds:
        run, steps = _steps(name, kind, dtype)
        arguments = run["arguments"]
        mode = "" if (mode := _mode(arguments)) == "eager" else f", {mode}"
        head.append(f"{_where(name, run)}, {dtype or arguments['dtype'][0]}, batch {arguments['batch']}{mode}")
        rounds |= {row["rounds"] for row in steps.values()}
        columns.append(
            {method: f"{digits(r['ms'])} ms, {_mib(sum(r[key] for key in _BYTES))} MiB" for method, r in steps.items()}
        )
    methods = ["efft2", "peft_lora", "full", "released_efft"]
    rows = [[METHODS[method], *(column.get(method, "–") for column in columns)] for method in methods]
    note = (
        f"Medians of {min(rounds)} to {max(rounds)} rounds. Memory: the peak of a step without the model's weights, "
        "plus optimizer state and packed weights. Zen 5 and H200: earlier commits."
    )
    return Table(head, rows, note, [*dict.fromkeys(records)])


def memory_models() -> Table:
    """bytes of a training step over those of the frozen model, per model"""
    records = [path.parent for path in sorted(RESULTS.glob("*/memory_*/train_step.json"))]
    shown = ["efft2", "efft1", "efft_lora", "efft_fact", "peft_lora", "full", "released_efft"]
    rows = []
    for folder in records:
        steps = {row["method"]: row for row in read_csv(folder / "train_step.csv")}
        of = steps["merged"]
        ratios = lambda row: [f"{row[key] / of[key]:.2f}" for key in ("saved_bytes", "peak_bytes")]
        cells = [" / ".join(ratios(steps[method])) if method in steps else "–" for method in shown]
        rows.append([f"{of['model']}, {of['dtype']}, batch {of['batch']}, {of['image']} px", *cells])
    note = (
        "Bytes that the forward saves for the backward / peak of the step, both over those of the frozen model with a "
        "trained head; without weights, packed weights and the optimizer's state."
    )
    head = ["", *(METHODS[method] for method in shown)]
    return Table(head, rows, note, [f"{r.relative_to(RESULTS)}" for r in records])


def train_step_methods() -> Table:
    """training step of ViT-B, every recorded method, per processor"""
    records = ["zen5/train_vit_b_float32", "zen5/train_vit_b_bfloat16", "zen3/train_vit_b_float32"]
    records += ["zen3/train_vit_b_bfloat16", "emerald_rapids/train_vit_b"]
    columns = {}
    for name in records:
        arguments = read_run(RESULTS / name / "train_step.json")["arguments"]
        for dtype in arguments["dtype"]:
            run, steps = _steps(name, dtype=dtype)
            columns[f"{_where(name, run)}, {dtype}, batch {arguments['batch']}, {arguments['image']} px"] = steps
    return _crossed("training step of ViT-B", columns, records)


def gpu_train_step() -> Table:
    """training steps on every GPU that gpu.py recorded: eager, from CUDA graphs, compiled"""
    columns, records = {}, []
    for folder, run in gpu.recorded():
        records += [name for name in (folder, f"{folder}/{REBUILT}") if (RESULTS / name).exists()]
        name = run["machine"]["gpu"]["name"].removeprefix("NVIDIA ")
        for path in sorted((RESULTS / folder).glob("*train_step*.json")):
            run, steps = _steps(folder, path.stem)
            arguments = run["arguments"]
            if (RESULTS / folder / REBUILT / f"{path.stem}.json").exists():
                steps[REBUILT] = _steps(f"{folder}/{REBUILT}", path.stem)[1]["efft2"]
            columns[f"{name}, {gpu.MODELS[arguments['model']]}, batch {arguments['batch']}, {_mode(arguments)}"] = steps
    return _crossed("bfloat16", columns, records)


def _crossed(head: str, columns: dict[str, dict[str, dict]], records: list[str]) -> Table:
    """Methods by settings, from {setting: {method: its row of a step}}."""
    times, sizes = [], []
    for method in (method for method in METHODS if any(method in steps for steps in columns.values())):
        found = [steps.get(method) for steps in columns.values()]
        trained = " / ".join(dict.fromkeys(f"{row['trained']:,}" for row in found if row))
        ms = (f"{digits(row['ms'])} ({digits(row['ratio_merged'])})" if row else "–" for row in found)
        mib = (" + ".join(_mib(row[key]) for key in _BYTES) if row else "–" for row in found)
        times.append([METHODS[method], *ms, trained])
        sizes.append([f"MiB: {METHODS[method]}", *mib, ""])
    note = (
        "First milliseconds: median of the rounds (over the frozen model's: median of the ratios within each round). "
        "Then MiB: peak of a step beside weights and what follows, + kept between steps, such as packed weights, + the "
        "optimizer's state. Trained: numbers, of the models in their order."
    )
    return Table([head, *columns, "trained"], times + sizes, note, records)


def _mode(arguments: dict) -> str:
    modes = {"autocast": "autocast", "compile": "torch.compile", "graph": "CUDA graph"}
    return ", ".join(mode for name, mode in modes.items() if arguments.get(name)) or "eager"


def lora() -> Table:
    """PEFT's LoRA before and after accelerate_lora"""
    run, steps = _steps(name := "zen5/lora_vit_b_float32", "lora")
    where = f"{_where(name, run)}, float32, batch {run['arguments']['batch']}"
    return _crossed("training step of ViT-B", {where: steps}, [name])


def forward() -> Table:
    """ViT-B's Linears, forward: EFFT's ms and its ratio to each alternative, per processor, dtype and batch"""
    return _sums("forward", ["zen3/vit_b_float32"])


def forward_backward() -> Table:
    """the same, forward and backward together"""
    return _sums("forward+backward", ["zen3/vit_b_float32_backward", "zen3/vit_b_bfloat16_backward"])


_PARTS = ["forward", "forward+backward"]
_SUMS_NOTE = "EFFT's time over that of each alternative, of sums over all Linears of the blocks."


def _sums(part: str, zen3: list[str]) -> Table:
    rows, others = [], [name for name in VARIANTS if name != "efft"]
    zen5 = ["zen5/vit_b_float32", "zen5/vit_b_bfloat16"]
    records = [*zen5, *zen3, "emerald_rapids/vit_b"]
    for where, _, size, dtype, ms in _linears(records, [part]):
        rows.append([f"{where}, {dtype}, {size}", digits(ms["efft"]), *_over(ms, others)])
    head = [f"Linears of ViT-B, {part}", "EFFT, ms", *(f"/ {VARIANTS[name]}" for name in others)]
    return Table(head, rows, f"{_SUMS_NOTE} The runs on Zen 3 are of an earlier commit.", records)


def forward_rows() -> Table:
    """ViT-B's Linears at 1 to 197 rows, against the merged weight and plain torch"""
    records, rows = ["zen5/vit_b_rows_float32", "zen5/vit_b_rows_bfloat16"], {}
    head = ["rows"]
    for _, part, size, dtype, ms in _linears(records):
        if (column := f"{dtype} {part}, / merged weight") not in head:
            head += [column, "/ plain torch"]
        rows.setdefault(size.removeprefix("M="), []).extend(_over(ms, ["merged", "unfused"]))
    note = "EFFT's time over that of the alternative, of sums over all Linears of ViT-B's blocks, AMD Zen 5, 2 threads."
    return Table(head, [[M, *cells] for M, cells in rows.items()], note, records)


def few_rows() -> Table:
    """efft_linear of 1 to 16 rows, with its group update, against the merged weight and plain torch's best order"""
    records, rows = ["zen3/few_rows", "emerald_rapids/few_rows"], {}
    for where, _, size, dtype, ms in _linears(records):
        ratios = [f"{ms['efft_group'] / ms[other]:.2f}" for other in ("merged", "left_to_right")]
        rows.setdefault((f"{where}, {dtype}", size.removeprefix("M=")), []).extend(ratios)
    head = ["", "rows", *(part + over for part in _PARTS for over in (", / merged", ", / torch"))]
    note = (
        "Time of `efft_linear` over that of the alternative, of sums over proj and fc1 of ViT-B. Plain torch, too, "
        "multiplies from left to right."
    )
    return Table(head, [[*case, *cells] for case, cells in rows.items()], note, records)


def swin() -> Table:
    """Swin-T's Linears, against each alternative"""
    records, rows = ["zen5/swin_t_float32", "zen5/swin_t_bfloat16"], []
    others = ["merged", "onednn", "unfused", "peft"]
    for _, part, size, dtype, ms in _linears(records):
        rows.append([f"{dtype}, {size}, {part}", digits(ms["efft"]), *_over(ms, others)])
    head = ["Linears of Swin-T, AMD Zen 5", "EFFT, ms", *(f"/ {VARIANTS[name]}" for name in others)]
    return Table(head, rows, _SUMS_NOTE, records)


def accuracy() -> Table:
    """error of y and of the adapter's update against float64"""
    records, errors = ["zen5/vit_b_float32", "zen5/vit_b_bfloat16"], {}
    for at, name in enumerate(records):
        for row in read_run(RESULTS / name / "forward.json")["results"]:
            if row["variant"] in VARIANTS and row["pass"] == "forward":
                for which, error in enumerate((row["error_y"], row["error_update"])):
                    found = errors.setdefault(row["variant"], [0.0] * 4)
                    found[2 * at + which] = max(found[2 * at + which], error)
    head = ["ViT-B's Linears", "float32: y", "update", "bfloat16: y", "update"]
    rows = [[VARIANTS[name], *(f"{error:.1e}" for error in errors[name])] for name in VARIANTS if name in errors]
    note = "Largest relative error (Frobenius norm) against float64 of the four Linears; update: what the adapter adds."
    return Table(head, rows, note, records)


def inference() -> Table:
    """whole ViT-B without gradients"""
    run = read_run(RESULTS / (name := "zen5/inference_vit_b") / "inference.json")
    names = METHODS | {"base": "no adapter", "base_onednn": "no adapter, oneDNN", "merged": "EFFT2, merged"}
    head, rows = [f"ViT-B, {_where(name, run)}"], {}
    for r in (r for r in run["results"] if r["operation"] is None):
        if (first := f"{r['dtype']}, batch {r['batch']}: ms") not in head:
            head += [first, "images/s", "/ merged", "peak MiB", "kept MiB"]
        cells = [digits(r[key]) for key in ("ms", "images_per_s", "ratio_merged")]
        rows.setdefault(r["method"], []).extend([*cells, *(_mib(r[key]) for key in ("peak_bytes", "kept_bytes"))])
    note = "Median of the rounds, without gradients. Kept: between calls, such as packed weights."
    return Table(head, [[names[m], *rows[m]] for m in names if m in rows], note, [name])


def inference_operations() -> Table:
    """what it takes to load, switch, merge and unmerge an adapter of ViT-B"""
    run = read_run(RESULTS / (name := "zen5/inference_vit_b") / "inference.json")
    dtypes = run["arguments"]["dtype"]
    ms = {(r["operation"], r["dtype"]): r["ms"] for r in run["results"] if r["operation"]}
    rows = [[what, meaning, *(digits(ms[what, d]) for d in dtypes)] for what, meaning in run["operations"].items()]
    note = f"ViT-B with EFFT2, {_where(name, run)}; medians."
    return Table(["operation", "", *(f"{d}, ms" for d in dtypes)], rows, note, [name], 2)


def serving() -> Table:
    """one batch with 1, 8 and 64 adapters, AdapterBank against PEFT"""
    run = read_run(RESULTS / (name := "zen5/serving") / "serving.json")
    names = {"merged": "no adapter, or one merged", "fused": "one adapter for the batch",
             "bank": "AdapterBank", "peft_mixed": "PEFT, mixed batch"}  # fmt: skip
    rows = []
    for r in sorted(run["results"], key=lambda r: (list(names).index(r["method"]), r["adapters"])):
        cells = [digits(r[key]) for key in ("ms", "images_per_s", "p99_ms", "ratio_bank_1")]
        rows.append([names[r["method"]], f"{r['adapters']}", *cells, _mib(r["peak_bytes"]), _mib(r["held_bytes"])])
    head = ["one batch", "adapters", "ms", "images/s", "p99, ms", "/ bank of 1", "peak MiB", "adapters, MiB"]
    arguments = run["arguments"]
    note = (
        f"ViT-B, batch {arguments['batch']}, {arguments['dtype'][0]}, {_where(name, run)}; medians of "
        f"{run['results'][0]['rounds']} rounds."
    )
    return Table(head, rows, note, [name])


def load_test() -> Table:
    """minutes of load on the service"""
    run = read_run(RESULTS / (name := "zen3/load_test") / "load_test.json")
    seconds, arguments = run["seconds"], run["arguments"]
    refused = sum(r["count"] for r in run["results"] if r["request"] != "image" and r["status"] >= 400)
    latency = ", ".join(f"{1e3 * seconds[name]:.0f}" for name in ("median", "p99", "largest"))
    growth = max((replica["growth"] or 0 for replica in run["memory"]), default=0)
    rows = [
        ["requests", f"{run['sent']}, {run['rate']:g} a second for {arguments['minutes']:g} minutes"],
        ["lost", f"{run['lost']}"],
        ["wrong", f"{run['wrong']}"],
        ["malformed requests refused", f"{refused} of {run['malformed']}"],
        ["replicas, killed on the way", f"{arguments['replicas']}, {run['replicas_killed']}"],
        ["clients at once before each kill", f"{arguments['clients']}"],
        ["latency: median, p99, largest", f"{latency} ms"],
        ["growth of a replica's memory", f"at most {growth:.1%}"],
    ]  # fmt: skip
    note = f"A tiny ViT, {arguments['adapters']} adapters, {_where(name, run)}."
    return Table(["load test of the service", ""], rows, note, [name], 2)


LEARNT = "vtab1k_gpu/runs.csv"
METHODS_LEARNT = {
    "linear": "linear probe", "full": "full fine-tuning", "lora": "LoRA", "fact-tt": "FacT-TT", "efft1": "EFFT1",
    "efft2": "EFFT2", "efft2, random weights": "EFFT2 on random weights",
}  # fmt: skip
OPTIONS_LEARNT = METHODS_LEARNT | {
    "lora-dora": "LoRA with DoRA", "efft1-terms": "EFFT1, rank-1 dropout", "efft2-terms": "EFFT2, rank-1 dropout",
}  # fmt: skip


def vtab1k() -> Table:
    """offline experiment: the setting, parameters and top-1 of each method per data set"""
    from paper.tables import cell, text

    runs = [row for row in read_csv(RESULTS / LEARNT) if row["part"] == "test"]
    data = [*dict.fromkeys(row["data"] for row in runs if row["method"] == "lora")]
    rows = []
    for method, title in METHODS_LEARNT.items():
        own = [row for row in runs if row["method"] == method]
        of = {which: [row["top1"] for row in own if row["data"] == which] for which in data}
        mean = f"{statistics.fmean(map(statistics.fmean, of.values())):.1f}" if all(of.values()) else "–"
        millions = statistics.fmean(row["parameters"] for row in own) / 1e6
        setting = ", ".join(digits(own[0][key]) for key in ("settings.lr", "settings.scale") if own[0].get(key))
        cells = [text(cell(found)) for found in of.values()]
        rows.append([title, f"{millions:.3f}" if millions else "0", setting or "–", *cells, mean])
    note = (
        "Top-1 of test images (at most 2000) in %, mean ± standard deviation of three seeds, five on dsprites_loc, one "
        "where there is no deviation; parameters without the head; learning rate and scale. Chance is 6.25 % on both "
        "dSprites sets and 10 % on cifar10."
    )
    return Table(["method", "parameters (M)", "lr, scale", *data, "mean"], rows, note, [LEARNT])


def vtab1k_options() -> Table:
    """offline experiment: validation images, with options of the configs and without"""
    runs = [row for row in read_csv(RESULTS / LEARNT) if row["part"] == "val"]
    data = [*dict.fromkeys(row["data"] for row in runs if row["method"] == "lora")]
    rows = []
    for method in ("lora", "lora-dora", "fact-tt", "efft1", "efft1-terms", "efft2", "efft2-terms"):
        settings: dict[tuple, dict[str, dict]] = {}
        for row in (row for row in runs if row["method"] == method):
            settings.setdefault((row["settings.lr"], row["settings.scale"]), {})[row["data"]] = row
        loss, setting = min((statistics.fmean(one["loss"] for one in of.values()), s) for s, of in settings.items())
        found = [settings[setting][which] for which in data]
        top1 = [one["top1"] for one in found]
        cells = [f"{loss:.3f}", ", ".join(map(digits, setting)), *(f"{t:.1f}" for t in top1)]
        rows.append([OPTIONS_LEARNT[method], *cells, f"{statistics.fmean(top1):.1f}"])
    note = (
        "Mean loss and top-1 in % of 200 validation images, 10 epochs, seed 0; the setting with the smallest mean loss."
    )
    return Table(["method", "mean loss", "lr, scale", *data, "mean"], rows, note, [LEARNT])


def vtab1k_paired() -> Table:
    """offline experiment: differences between methods, image by image"""
    from paper.paired import difference, right

    found = right(RESULTS / "vtab1k_gpu")
    data = [*dict.fromkeys(which for method, which in found if method == "lora")]
    rows = []
    for method, other in itertools.product(("efft1", "efft2"), ("lora", "fact-tt")):
        gaps = [difference(found[method, which], found[other, which]) for which in data]
        names = f"{METHODS_LEARNT[method]} − {METHODS_LEARNT[other]}"
        rows.append([names, *(f"{gap.mean:+.1f} ± {gap.error:.1f}".replace("-", "−") for gap in gaps)])
    note = "Difference of top-1 in points ± its standard error, from a paired bootstrap over seeds and test images."
    return Table(["", *data], rows, note, [LEARNT, "vtab1k_gpu/labels.csv"])


def ablation() -> Table:
    """ablation of EFFT2 and EFFT1 on real weights and images"""
    from paper.changes import table

    note = (
        "Rank 16, ViT-S at 56 pixels, 1000 training images, 2 epochs (dsprites_loc: 5): top-1 of 2000 test images in % "
        "(base) and its change in points, mean ± standard deviation of two seeds, seed 0 alone where there is no "
        "deviation."
    )
    return Table(*table(read_csv(RESULTS / "ablation/runs.csv")), note, ["ablation/runs.csv"])


def subspace() -> Table:
    """similarity of the subspaces that EFFT2 learns"""
    run = read_run(RESULTS / "ablation/subspace.json")
    rows = [[row["compared"], *(f"{row[key]:.3f}" for key in list(row)[1:])] for row in run["results"]]
    head = ["compared", "phi(1, 1)", "phi(4, 4)", "phi(16, 16)", "mean over (i, j)"]
    return Table(head, rows, f"Averages over blocks {run['blocks']}.", ["ablation/subspace.csv"])


TABLES: dict[str, Callable[[], Table]] = {
    table.__name__: table
    for table in (
        train_step, memory_models, train_step_methods, lora, forward, forward_backward, forward_rows, few_rows, swin,
        accuracy, inference, inference_operations, serving, load_test, gpu.gpu_forward, gpu.gpu_backward,
        gpu_train_step, gpu.gpu_changes, gpu.gpu_passes, gpu.gpu_profile, vtab1k, vtab1k_options,
        vtab1k_paired, ablation, subspace,
    )
}  # fmt: skip


def _steps(name: str, benchmark: str = "train_step", dtype: str | None = None) -> tuple[dict, dict[str, dict]]:
    """(a record of training steps, {method: its row of the whole step}), of a dtype if the record has several"""
    run = read_run(RESULTS / name / f"{benchmark}.json")
    rows = [row for row in run["results"] if row["pass"] == "step" and dtype in (None, row["dtype"])]
    return run, {row["method"]: row for row in rows}


def _linears(records: list[str], parts: list[str] = _PARTS) -> Iterator[tuple[str, str, str, str, dict[str, float]]]:
    """(processor, pass, size, dtype, {variant: ms of all Linears of the model}) of every case of some records"""
    for name in records:
        run = read_run(RESULTS / name / "forward.json")
        cases = summary(run["results"])
        for part, case in itertools.product(parts, cases):
            if case["pass"] == part:
                yield _where(name, run), part, case["size"], case["dtype"], case["ms"]


def _over(ms: dict[str, float], others: list[str]) -> list[str]:
    ratios = [ms["efft"] / ms[name] if name in ms else None for name in others]
    return ["–" if ratio is None else f"{ratio:.{2 if ratio >= 0.1 else 3}f}" for ratio in ratios]


def _where(name: str, run: dict) -> str:
    """the processor that a record comes from"""
    processor = PROCESSORS[name.partition("/")[0]]
    on_gpu = run["arguments"].get("device") == "cuda"
    threads = run["machine"]["threads"]
    return processor if on_gpu else f"{processor}, {threads} thread{'s' * (threads > 1)}"


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f}" if size >= 10 * 2**20 or size < 2**10 else f"{size / 2**20:.1f}"


def refreshed(page: Path) -> str:
    """The text of a page with every table as the records have it.

    Raises:
        ValueError: a marker names a table that does not exist, or is not closed.
    """
    text = page.read_text()

    def table(match: re.Match) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"{page}: expected a table out of {', '.join(TABLES)}, got {name!r}")
        return f"<!-- table: {name} -->\n\n{TABLES[name]().markdown(page, RESULTS)}\n<!-- end -->"

    found = MARKERS.sub(table, text)
    if text.count("<!-- table:") != len(MARKERS.findall(text)):
        raise ValueError(f"{page}: expected an <!-- end --> on a line of its own after every <!-- table: NAME -->")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tables", nargs="*", metavar="NAME", help="tables to print; default: all")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--list", action="store_true", help="print the names of the tables")
    action.add_argument("--write", action="store_true", help="refresh the tables of README.md, docs/ and results/")
    action.add_argument("--check", action="store_true", help="exit status 1 if a table differs from its records")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.tables if name not in TABLES]:
        parser.error(f"expected tables out of {', '.join(TABLES)}, got {unknown[0]!r}")
    if args.list:
        print(*(f"{name:<22} {table.__doc__}" for name, table in TABLES.items()), sep="\n")
        return 0
    if not (args.write or args.check):
        print(*(f"{name}\n\n{TABLES[name]().markdown(ROOT / 'README.md')}" for name in args.tables or TABLES), sep="\n")
        return 0
    try:
        pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(RESULTS.glob("*.md"))]
        changed = {page: text for page in pages if (text := refreshed(page)) != page.read_text()}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for page, text in changed.items():
        if args.write:
            write_bytes(page, text.encode())
        print(f"{page.relative_to(ROOT)}: {'refreshed' if args.write else 'differs from its records, use --write'}")
    return int(args.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
