"""Where a measurement goes: the machine it belongs to, a JSON file, a table, a chart. Shared by all benchmarks here."""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import tabulate
import torch

import efft_kernels

FORMAT = 1  # of the JSON file; results/README.md states it


# -- what was measured, and on what -----------------------------------------------------------------------------------

_ISA = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")


def machine() -> dict:
    cpuinfo = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            cpuinfo.setdefault(key.strip(), value.strip())
    except OSError:
        pass  # not Linux: the platform's word for the processor has to do
    flags = cpuinfo.get("flags", cpuinfo.get("Features", "")).split()
    gpu = None
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties("cuda")
        gpu = {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "memory_bytes": p.total_memory,
            "multiprocessors": p.multi_processor_count,
        }
    return {
        "cpu": cpuinfo.get("model name") or platform.processor() or platform.machine(),
        "cpu_family": " ".join(f"{k} {cpuinfo[k]}" for k in ("cpu family", "model", "stepping") if k in cpuinfo),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": [flag for flag in _ISA if flag in flags],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton,
        "efft_kernels": efft_kernels.__version__,
    }


def commit() -> dict | None:
    """{id, dirty: whether tracked files differ from it, but for what benchmarks wrote}, or None outside a repository"""

    def git(*args):
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    # a record that is written over must not make the next one dirty
    code = ":/", ":(top,exclude)benchmarks/results"
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *code)
        return {"id": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return None


# -- files ------------------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Creates the folder and writes to it once, so that what cannot be saved fails before the run and not after it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def write(path: Path, save: Callable[[Path], None]) -> None:
    """save(temporary path), then put it in place: a reader finds the old file or the whole new one."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, record: dict) -> None:
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    write(path, lambda temporary: temporary.write_text(text))


def conclude(
    record: dict,
    out: Path | None,
    measure: Callable[[], None],  # fills record["results"], round by round
    summary: Callable[[list[dict]], list[dict]],
    show: Callable[[dict], None],
    save: Callable[[], None],
) -> int:
    """The rest of a benchmark once its record is begun: measures, shows, saves. An interrupted run keeps what it has.

    Returns the exit status: 0, or 130 after an interruption.
    """
    try:
        measure()
    except KeyboardInterrupt:
        record["complete"] = False
    if not record["results"]:
        print("interrupted before the first round: nothing to show")
        return 130
    record["summary"] = summary(record["results"])
    show(record)
    if out:
        save()
    return 0 if record["complete"] else 130


# -- table and chart --------------------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list]) -> str:
    """Plain text, two columns of words and then numbers, which keep the digits they were formatted with.

    An empty row becomes a line.
    """
    tabulate.MIN_PADDING = 0  # its two spaces per column would take thirty of a line
    lines = [row or tabulate.SEPARATING_LINE for row in rows]
    align = ["left", "left", *["right"] * (len(head) - 2)]
    return tabulate.tabulate(lines, head, tablefmt="simple", disable_numparse=True, colalign=align)


def digits(value: float | None) -> str:
    """Three significant digits, without an exponent unless the value is tiny; "-" for None."""
    if value is None:
        return "-"
    if value == 0 or not 1e-3 <= abs(value):
        return f"{value:.0e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def chart(
    path: Path,
    panels: list[tuple[str, dict[str, dict[str, tuple[float, float, float]]]]],  # (title, {group: {bar: spread}})
    colours: dict[str, str],  # of the bars, in their order
    label: str,
    note: str,
    limit: float = 5.0,
) -> None:
    """Bars of medians with whiskers from quartile to quartile, panels below each other; a line marks 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(panels), 1, figsize=(10, 1.3 + 3.0 * len(panels)), dpi=110, squeeze=False)
    width = 0.9 / max(len(colours.keys() & bars.keys()) for _, groups in panels for bars in groups.values())
    for axis, (title, groups) in zip(axes[:, 0], panels):
        # an outlier is cut off and keeps its number: the others have to stay readable
        top = min(limit, 1.15 * max(q3 for bars in groups.values() for _, _, q3 in bars.values()))
        for g, bars in enumerate(groups.values()):
            names = [name for name in colours if name in bars]
            for n, name in enumerate(names):
                median, q1, q3 = bars[name]
                at = g + (n - (len(names) - 1) / 2) * width
                axis.bar(at, min(median, top), 0.9 * width, color=colours[name], label=name)
                axis.vlines(at, min(q1, top), min(q3, top), color="#333333", linewidth=0.8)
                axis.annotate(f"{median:.2f}", (at, min(q3, top)), (0, 2), textcoords="offset points", ha="center",
                              fontsize=6.5)  # fmt: skip
        axis.set_ylim(0, 1.08 * top)
        axis.set_xlim(-0.5, max(len(groups), 2) - 0.5)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(groups)), list(groups))
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    handles = {}
    for axis in axes[:, 0]:
        handles.update({text: handle for handle, text in zip(*axis.get_legend_handles_labels())})
    ordered = [name for name in colours if name in handles]
    figure.tight_layout(rect=(0, 0.75 / figure.get_figheight(), 1, 1))
    figure.legend([handles[n] for n in ordered], ordered, loc="lower center", ncols=5, frameon=False, fontsize=8,
                  bbox_to_anchor=(0.5, 0.18 / figure.get_figheight()))  # fmt: skip
    figure.text(0.5, 0.06 / figure.get_figheight(), note, ha="center", va="bottom", fontsize=7, color="#555555")
    write(path, lambda temporary: figure.savefig(temporary))
    plt.close(figure)
