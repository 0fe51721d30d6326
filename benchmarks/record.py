"""A recorded run: the machine that it ran on, its NAME.csv and NAME.json, its table and chart.

All benchmarks here write this form, and everything that uses their results reads it; results/README.md has the columns.
"""

import argparse
import csv
import datetime
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import re
import subprocess
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch

import efft_kernels
from efft_kernels.kernels.tuning.table import lines
from efft_kernels.storage import write_bytes

FORMAT = 2  # of the files; results/README.md describes it

_ISA = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")


def machine() -> dict:
    cpuinfo = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            cpuinfo.setdefault(key.strip(), value.strip())
    except OSError:
        pass  # not Linux: the name that platform gives the processor is used
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
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **installed("triton"),
        "efft_kernels": efft_kernels.__version__,
    }


def installed(*packages: str) -> dict[str, str | None]:
    """The version of each package, None if it is not installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def backends() -> dict[str, str]:
    """What can be chosen here: {backend: automatic, on request or absent}"""
    states = lambda found: "automatic" if found.automatic else "on request" if found.available else "absent"
    return {found.name: states(found) for found in efft_kernels.backends()}


def commit() -> dict | None:
    """{id, dirty: whether tracked files other than records differ from it}, or None if it is not known.

    On a machine that got a copy of the sources, EFFT_COMMIT names the commit, whatever repository is around them; a
    "-dirty" at its end says that the sources differ from it.
    """
    if given := os.environ.get("EFFT_COMMIT"):
        return {"id": given.removesuffix("-dirty"), "dirty": given.endswith("-dirty")}

    def git(*args):
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    # rewriting a record must not make the next one dirty
    code = ":/", ":(top,exclude)benchmarks/results"
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *code)
        return {"id": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return None


def prepare_folder(folder: Path) -> None:
    """Create the folder and write to it once, so that a folder that cannot be written fails before the run."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def write_json(path: Path, content: dict) -> None:
    write_bytes(path, (lines(content) + "\n").encode())


def write_csv(path: Path, rows: list[dict]) -> None:
    """A line per row, a column per key. Floats get four significant digits; None and what is not finite is empty."""
    columns, text = dict.fromkeys(key for row in rows for key in row), io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(columns)
    lines.writerows([_cell(row.get(column)) for column in columns] for row in rows)
    write_bytes(path, text.getvalue().encode())


def write_figure(path: Path, figure) -> None:
    """Write a figure of matplotlib as PNG."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_bytes(path, image.getvalue())


def _cell(value: str | int | float | None) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else ""
    return "" if value is None else str(value)


_NUMBER = re.compile(r"-?\d+(\.\d*)?(e[+-]?\d+)?")


def read_csv(path: Path) -> list[dict]:
    """The rows of write_csv: numbers as int or float, empty cells as None, everything else as str."""

    def value(text: str) -> str | int | float | None:
        if not _NUMBER.fullmatch(text):
            return text or None
        return int(text) if text.removeprefix("-").isdecimal() else float(text)

    with path.open(newline="") as file:
        return [{column: value(text) for column, text in row.items()} for row in csv.DictReader(file, strict=True)]


# What write_run does not store: the rows, which are in the CSV file, what is computed from them, and the meanings of
# names, which are in the sources of the commit.
_NOT_STORED = ("results", "summary", "methods", "variants")
_WIDE = "forward"  # the benchmark whose CSV file has a line for a variant, with all of its passes


def write_run(folder: Path, run: dict) -> None:
    """Write a run as NAME.csv, its results, and NAME.json, everything else; NAME is run["benchmark"]."""
    path = folder / f"{run['benchmark']}.json"
    write_json(path, {key: value for key, value in run.items() if key not in _NOT_STORED})
    write_csv(path.with_suffix(".csv"), _passes_beside(run["benchmark"], run["results"]))


def _passes_beside(benchmark: str, rows: list[dict]) -> list[dict]:
    """Rows of one variant that differ in their pass as one row, with what was measured as PASS.NAME."""
    if benchmark != _WIDE or not all("pass" in row and "variant" in row for row in rows):
        return rows
    joined = {}
    for row in rows:
        names = list(row)
        last = names.index("variant") + 1
        case = {name: row[name] for name in names[:last] if name != "pass"}
        measured = {f"{row['pass']}.{name}": row[name] for name in names[last:]}
        joined.setdefault(tuple(case.values()), case).update(measured)
    return list(joined.values())


def _passes_apart(benchmark: str, rows: list[dict]) -> list[dict]:
    """The rows that _passes_beside joined, those of a case by pass."""
    if benchmark != _WIDE or not all("variant" in row and "pass" not in row for row in rows):
        return rows
    found = {}
    for row in rows:
        case = {name: value for name, value in row.items() if "." not in name}
        shared = tuple(value for name, value in case.items() if name != "variant")
        for part in dict.fromkeys(name.partition(".")[0] for name in row if "." in name):
            measured = {name.partition(".")[2]: row[name] for name in row if name.startswith(f"{part}.")}
            if any(value is not None for value in measured.values()):
                found.setdefault((shared, part), []).append(case | {"pass": part} | measured)
    cases = dict.fromkeys(shared for shared, _ in found)
    passes = dict.fromkeys(part for _, part in found)
    return [row for shared in cases for part in passes for row in found.get((shared, part), ())]


def read_run(path: Path, *keys: str) -> dict:
    """The run that write_run wrote to path, a NAME.json, with NAME.csv beside it as its results.

    Raises:
        ValueError: a file is missing or malformed, or one of the keys is missing from it.
    """
    try:
        run = json.loads(path.read_text())
        if not isinstance(run, dict):
            raise ValueError(f"expected an object, got {type(run).__name__}")
        if run.get("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}, got {run.get('format')!r}")
        if missing := [key for key in keys if key not in run]:
            raise ValueError(f"expected {', '.join(missing)}, got {sorted(run)}")
        return run | {"results": _passes_apart(run["benchmark"], read_csv(path.with_suffix(".csv")))}
    except OSError as error:
        raise ValueError(f"{error.filename}: expected a file of a recorded run: {error.strerror}") from error
    except (ValueError, csv.Error) as error:  # json.JSONDecodeError is a ValueError
        raise ValueError(f"{path}: expected a recorded run: {error}") from error


def ratios(row: dict) -> dict[str, float]:
    """{reference: the row's time over that of the reference, the median of the rounds}"""
    parts = ((name.removeprefix("ratio_"), value) for name, value in row.items() if name.startswith("ratio_"))
    return {name: value for name, value in parts if value is not None and not name.endswith(("_q1", "_q3"))}


def spread_of(row: dict, reference: str) -> tuple[float, float, float]:
    """The row's time over that of a reference: (median, first quartile, third quartile) of the rounds"""
    return tuple(row[f"ratio_{reference}{end}"] for end in ("", "_q1", "_q3"))


def cpu_ratio(row: dict, reference: dict | None) -> float | None:
    """Process CPU time over that of the reference's row; None without one, or if its clock did not tick."""
    return row["cpu_ms"] / reference["cpu_ms"] if reference and reference["cpu_ms"] else None


def add_rows(run: dict, rows: list[dict], folder: Path | None) -> None:
    """Append rows to the results and rewrite the files, so that a run that is killed keeps every row it added."""
    run["results"] += rows
    if folder and run["results"]:
        write_run(folder, run)


def begun(benchmark: str, args: argparse.Namespace) -> dict:
    """The record of a run before its first result."""
    return {
        "benchmark": benchmark,
        "format": FORMAT,
        "complete": False,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "arguments": {name: value for name, value in vars(args).items() if name != "out"},
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
    }


def conclude(
    run: dict,
    out: Path | None,
    measure: Callable[[], None],  # calls add_rows(run, rows, out) as rows become known
    summary: Callable[[list[dict]], list[dict]],
    show: Callable[[dict], None],
    draw: Callable[[], None],  # the chart, if there is an --out
) -> int:
    """Measure, show and save a run. Until all of it is measured, and after an interruption, complete is false.

    Returns:
        The exit status: 0, or 130 after an interruption.
    """
    run["complete"] = False
    try:
        measure()
        run["complete"] = True
    except KeyboardInterrupt:
        pass
    if not run["results"]:
        print("interrupted before the first round: nothing to show")
        return 130
    run["summary"] = summary(run["results"])
    show(run)
    if out:
        write_run(out, run)
        draw()
    return 0 if run["complete"] else 130


def report(
    run: dict, head: list[str], cases: list[tuple], notes: dict[str, str], *, timed: str = "", more: str = "", width=16
) -> None:
    """Print a run: whether it was interrupted, its table, what names and columns mean, the machine and versions.

    Args:
        cases: of the table: (what names it, word by word, the lines beside these words).
        notes: {column: what it means}; timed is added to that of ms.
        more: text between the table and the meanings.
    """
    if not run["complete"]:
        print("\ninterrupted: what follows is partial")
    table = []
    for words, beside in cases:
        table += [[]] if table else []
        for word, line in itertools.zip_longest(words, beside):
            table.append([word or "", *(line or [""] * (len(head) - 1))])
    print(f"\n{text_table(head, table)}\n\n{more}", end="")
    names, meanings = ("method", run["methods"]) if "methods" in run else ("variant", run["variants"])
    for name in (name for name in meanings if any(row[names] == name for row in run["results"])):
        print(f"{name:<16} {meanings[name]}")
    for name, reasons in run["left_out"].items():
        for reason in dict.fromkeys(reasons.values()):
            where = [case for case, text in reasons.items() if case and text == reason]
            others = f" and {len(where) - 3} more" if len(where) > 3 else ""
            print(f"{name:<16} left out{' of ' if where else ''}{', '.join(where[:3])}{others}: {reason}")
    print()
    m, v, on_gpu = run["machine"], run["versions"], run["arguments"]["device"] == "cuda"
    ms = f"median of the rounds, {'on the device' if on_gpu else 'by the wall clock'}{timed}; /: median of the ratios "
    ms += f"within each round{'; (cpu): ratio of CPU times' * ('(cpu)' in head)}"
    for name, note in {"ms": ms, **notes}.items():
        print(textwrap.fill(note, 120, initial_indent=f"{name:<{width}} ", subsequent_indent=" " * (width + 1)))
    gpu = f", {m['gpu']['name']}" if on_gpu else ""
    print(f"\n{m['cpu']}, {m['threads']} threads{gpu}, torch {v['torch']}, efft_kernels {v['efft_kernels']}\n")


def times(row: dict) -> list[str]:
    """The cells of a row's median and quartiles."""
    return [digits(row.get("ms")), f"{digits(row['q1'])}-{digits(row['q3'])}" if "ms" in row else "-"]


def mib(row: dict, places: int = 0) -> str:
    """The cell of a row's memory, kept and peak."""
    kept, peak = (f"{row[key] / 2**20:.{places}f}" for key in ("kept_bytes", "peak_bytes"))
    return f"+{kept} {peak}" if float(kept) else peak


def text_table(head: list[str], rows: list[list]) -> str:
    """A table in plain text: two columns of words, then numbers as they are formatted. An empty row draws a line."""
    import tabulate

    tabulate.MIN_PADDING = 0  # its two spaces per column add up to thirty characters a line
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


def draw(
    run: dict, folder: Path, panels: list[tuple[str, dict]], label: str, colours: dict[str, str], *sizes: str, limit=8.0
) -> None:
    """Draw the chart of a run, and print the names of its files; the note below has these sizes, and the rank."""
    args, m, path = run["arguments"], run["machine"], folder / f"{run['benchmark']}.csv"
    name = m["gpu"]["name"] if args["device"] == "cuda" else f"{m['cpu']}, {m['threads']} threads"
    words = [args["model"], *(f"{size} {args[size]}" for size in (*sizes, "rank")), name]
    note = f"{', '.join(words)}, torch {run['versions']['torch']}; whiskers: quartiles"
    note += "" if run["complete"] else "; interrupted, partial"
    drawn = chart(path.with_suffix(".png"), panels, colours, label, note, limit)
    print(f"written: {path}, {path.with_suffix('.json')}" + f", {path.with_suffix('.png')}" * drawn)


def chart(
    path: Path,
    panels: list[tuple[str, dict[str, dict[str, tuple[float, float, float]]]]],  # (title, {group: {bar: spread}})
    colours: dict[str, str],  # of the bars, in their order
    label: str,
    note: str,
    limit: float = 5.0,
) -> bool:
    """Draw bars of medians with whiskers from quartile to quartile, one panel below the other; a line marks 1.

    Bars without a colour are left out. Returns whether there is a chart, which there is not if none has one.
    """
    panels = [panel for panel in panels if any(colours.keys() & bars.keys() for bars in panel[1].values())]
    if not panels:
        return False
    from matplotlib.figure import Figure

    figure = Figure((10, 1.3 + 3.0 * len(panels)), dpi=110)
    axes = figure.subplots(len(panels), 1, squeeze=False)
    width = 0.9 / max(len(colours.keys() & bars.keys()) for _, groups in panels for bars in groups.values())
    for axis, (title, groups) in zip(axes[:, 0], panels):
        # clip outliers, which keep their number, so that the other bars stay readable
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
    write_figure(path, figure)
    return True
