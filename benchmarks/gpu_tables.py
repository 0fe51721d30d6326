"""The tables of what was measured on GPUs, for summary.py."""

from collections.abc import Iterator

from markdown_table import RESULTS, Table
from record import digits, read_csv, read_run

FIRST, KERNEL, TUNE = "nvidia_h200/first_run", "nvidia_h200/hopper_kernel", "nvidia_h200/tune"
MODELS = {"vit_b": "ViT-B", "swin_t": "Swin-T"}


def recorded() -> Iterator[tuple[str, dict]]:
    """(folder, run) of every GPU that gpu.py recorded"""
    for path in sorted(RESULTS.glob("*/gpu.json")):
        run = read_run(path)
        if not run.get("dry"):
            yield path.parent.name, run


def gpu_forward() -> Table:
    """forward of every Linear on every GPU that gpu.py recorded, as it is chosen there"""
    return _chosen("forward", {"merged": "merged weight", "peft": "LoRA as PEFT", "torch": "plain torch"})


def gpu_backward() -> Table:
    """the same, backward"""
    return _chosen("backward", {"merged": "dx, merged weight", "torch": "plain torch"})


def _chosen(part: str, others: dict[str, str]) -> Table:
    rows, records = [], []
    for folder, run in recorded():
        records.append(f"{folder}/gpu.csv")
        for row in (row for row in run["results"] if row["variant"] == "auto" and row["pass"] == part):
            linear = f"{MODELS[row['model']]} {row['layer']} {row['K']} → {row['N']}, M = {row['M']}"
            ratios = [row.get(f"ratio_{other}") for other in others]
            times = [digits(1e3 * row["ms"] / ratio) for ratio in ratios]
            about = [run["machine"]["gpu"]["name"].removeprefix("NVIDIA "), linear, *times]
            rows.append([*about, digits(1e3 * row["ms"]), row["backend"], *map(digits, ratios)])
    head = ["GPU", f"{part}, bfloat16, R = 16", *others.values(), "EFFT", "backend"]
    head += [f"/ {name.removesuffix(' weight')}" for name in others.values()]
    more = "" if part == "forward" else " EFFT and plain torch: dx and the gradients of both factors."
    note = f"Microseconds per call, batch 64, in turns.{more} Plain torch: its faster order."
    return Table(head, rows, note, records, 2)


def gpu_passes() -> Table:
    """H200, backward: the passes over dy and x of the first version and of now"""
    now = {
        (row["M"], row["K"], row["N"]): 1e3 * row["ms"]
        for row in read_csv(RESULTS / "nvidia_h200/gpu.csv")
        if row["variant"] == "auto" and row["pass"] == "backward"
    }
    tuned = {
        (row["M"], row["K"], row["N"]): row["cuda_us"]
        for row in read_csv(RESULTS / TUNE / "tune.csv")
        if (row["op"], row["needs"]) == ("lowrank_linear_backward", "x down up")
    }
    sums = {}
    for row in read_csv(RESULTS / TUNE / "plain_torch.csv"):
        if (row["pass"], row["variant"]) == ("backward", "merged"):
            stage, _, linear = row["layer"].rpartition(".")
            linears, times = sums.setdefault(f"{MODELS[row['model']]} {stage}".strip(), ([], []))
            linears.append(linear)
            times.append((1e3 * row["ms"], *(of[row["M"], row["K"], row["N"]] for of in (tuned, now))))
    rows = []
    for name, (linears, times) in sums.items():
        dx, before, after = map(sum, zip(*times))
        change = f"{after / before - 1:+.0%}".replace("-", "−")
        rows.append([f"{name}: {', '.join(linears)}", *map(digits, (dx, before, after)), change])
    head = ["backward, bfloat16, R = 16", "dx, merged weight", "former passes", "now", "change"]
    records = [f"{TUNE}/tune.csv", f"{TUNE}/plain_torch.csv", "nvidia_h200/gpu.csv"]
    return Table(head, rows, "Microseconds of one call each, batch 64, best CUDA plan; two runs on two days.", records)


CHANGES = [  # what it is, what was expected, the run (None: the first one), the variant with it and the one without it
    ("p inside the product of y", "−4 to −7 %", None, "v192p", "h192p"),
    ("the second consumer starts two steps later, tile 192", "−5 to −8 % at K = 768", 1, "a192p", "b192p"),
    ("the same, tile 128", "the same", 1, "a128p", "b128p"),
    ("programmatic launches", "not written down", 1, "a192p", "d192p"),
    ("tiles of 128 in clusters of two", "not written down", 1, "c128p", "a128p"),
    ("two consumers alternate between tiles of 128", "−5 to −8 % at K = 768; p costs twice", 2, "f128p", "a128p"),
    ("these in clusters of two, where K ≥ 512", "not written down", 2, "e128p", "f128p"),
]


def gpu_changes() -> Table:
    """H200: changes of the forward, what was expected and what was measured"""
    layers, rows = ["qkv", "proj", "fc1", "fc2", "stage1.qkv", "stage2.qkv"], []
    for what, expected, run, one, other in CHANGES:
        us = _us(f"{KERNEL}/hopper_kernel.csv", "forward", run) if run else _us(f"{FIRST}/timings.csv", "forward")
        cells = [f"{us[layer][one] / us[layer][other] - 1:+.1%}".replace("-", "−") for layer in layers]
        rows.append([what, expected, f"`{one}`, `{other}`", *cells])
    note = (
        "Change of the time of a forward, both variants in one run: bfloat16, rank 16, batch 64. A letter is a library "
        "of hopper_kernel.json or a variant of the first run, a number the columns of a tile."
    )
    records = [f"{FIRST}/timings.csv", f"{KERNEL}/hopper_kernel.csv"]
    return Table(["change", "expected", "with, without", *layers], rows, note, records, 3)


def gpu_profile() -> Table:
    """Nsight Compute on the forward of the H200, first version and now"""
    records = [f"{FIRST}/profile.csv", f"{KERNEL}/profile.csv"]
    profiles = [row for name in records for row in read_csv(RESULTS / name) if row["variant"] != "v192p"]
    figures = {
        "duration, µs": lambda p: digits(1e3 * p["ms"]),
        "multiprocessors busy": lambda p: f"{p['sm_busy_percent']:.0f} %",
        "tensor pipe": lambda p: f"{p['tensor_pipe_percent']:.0f} %",
        "L2 throughput": lambda p: f"{p['l2_percent']:.0f} %",
        "L2 hits": lambda p: f"{p['l2_hit_percent']:.0f} %",
        "DRAM": lambda p: f"{p['dram_percent']:.0f} %, {p['dram_gbytes']:.0f} GB/s",
        "registers per thread": lambda p: f"{p['registers']}",
        "shared memory per block": lambda p: f"{p['shared_bytes'] / 1024:.0f} KiB",
    }
    rows = [[name, *(figure(p) for p in profiles)] for name, figure in figures.items()]
    note = "Nsight Compute, one launch, clocks not fixed; percentages of the peak."
    head = ["forward of ViT-B's qkv, bfloat16", *(f"`{p['variant']}`" for p in profiles)]
    return Table(head, rows, note, records)


def _us(name: str, part: str, run: int | None = None) -> dict[str, dict[str, float]]:
    """{layer: {variant: microseconds}} of a record, which may hold several runs"""
    found = {}
    for row in read_csv(RESULTS / name):
        if row["pass"] == part and row.get("run") == run:
            found.setdefault(row["layer"], {})[row["variant"]] = 1e3 * row["ms"]
    return found
