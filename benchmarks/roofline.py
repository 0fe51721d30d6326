"""A roofline chart of a recorded forward.json: FLOP/s over arithmetic intensity, under what the machine can do.

    python benchmarks/roofline.py benchmarks/results/NAME/forward.json                  # roofline.png beside it

A point is one Linear of the model computed by one variant. Intensity and FLOP/s count only the work that the adapted
Linear needs (shapes.py, work), whatever else the variant does: points above each other are the same Linear, and their
heights compare like their speeds. The roof is the record's `limits`; if those come from a data sheet, the measured
dense matmul and copy are drawn too.
"""

import argparse
import itertools
import math
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import arguments  # noqa: F401, reports which packages are missing
from forward_rows import COLOURS, row_work
from record import digits, read_run, write_figure


class Way(NamedTuple):
    """How a variant of bench_forward.py is drawn."""

    label: str
    colour: str
    filled: bool


WAYS = {
    "merged": Way("merged weight", "#222222", False),
    "onednn": Way("merged weight, oneDNN", COLOURS["onednn"], False),
    "unfused": Way("plain torch", COLOURS["unfused"], False),
    "efft": Way("efft_kernels", COLOURS["efft"], True),
    "efft_triton": Way("efft_kernels, triton", "#c2569b", True),
    "efft_cuda": Way("efft_kernels, cuda", "#e08214", True),
}
MARKERS = {"qkv": "o", "proj": "s", "fc1": "^", "fc2": "v"}
ROW = ("layer", "M", "K", "N", "R", "dtype", "size", "pass", "variant", "ms")


class Point(NamedTuple):
    row: dict
    intensity: float  # FLOP per byte
    gflops: float  # 1e9 FLOP per second


class Roof(NamedTuple):
    label: str
    gflops: float
    gbytes: float  # 1e9 bytes per second
    style: str


def read(path: Path) -> dict:
    """The record of bench_forward.py at path, a forward.json with its forward.csv.

    Raises:
        ValueError: it is missing or not such a record; the message names the file.
    """
    record = read_run(path, "arguments", "machine", "versions", "limits")
    if record["benchmark"] != "forward":
        raise ValueError(f"{path}: expected benchmark 'forward', got {record['benchmark']!r}")
    if not any(row.get("variant") in WAYS for row in record["results"]):
        raise ValueError(f"{path}: expected results of one of {', '.join(WAYS)}, and there are none")
    limits = record["limits"]
    for row in record["results"]:
        if missing := [key for key in ROW if row.get(key) is None]:
            raise ValueError(f"{path}: expected {', '.join(missing)} in every row of results, got {row}")
        if row["dtype"] not in limits.get("flops", {}) or not limits.get("bandwidth"):
            raise ValueError(f"{path}: expected limits with flops of {row['dtype']} and bandwidth, got {limits}")
    return record


def panels(record: dict) -> dict[tuple[str, str], list[Point]]:
    """{(dtype, pass): its points}"""
    found = {}
    for row in record["results"]:
        if row["variant"] in WAYS:
            flops, moved = row_work(row)
            point = Point(row, flops / moved, flops / row["ms"] * 1e-6)
            found.setdefault((row["dtype"], row["pass"]), []).append(point)
    return found


def roofs(record: dict, dtype: str) -> list[Roof]:
    limits = record["limits"]
    found = [Roof("limits", limits["flops"][dtype] * 1e-9, limits["bandwidth"] * 1e-9, "-")]
    if limits.get("copy"):
        found.append(Roof("dense product and copy", limits["gemm"][dtype] * 1e-9, limits["copy"] * 1e-9, "--"))
    return found


def draw(record: dict, path: Path) -> None:
    """Draw the chart to a file; it replaces the old one when it is complete."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    found = panels(record)
    dtypes, parts = (list(dict.fromkeys(names)) for names in zip(*found))
    figure = Figure((1 + 5.2 * len(parts), 1.2 + 4.2 * len(dtypes)), dpi=110)
    axes = figure.subplots(len(dtypes), len(parts), squeeze=False)
    for axis, (dtype, part) in zip(axes.flat, itertools.product(dtypes, parts)):
        panel(axis, found.get((dtype, part), []), roofs(record, dtype), f"{part}, {dtype}")
    shown = {point.row["variant"] for points in found.values() for point in points}
    kinds = {point.row["layer"].rpartition(".")[2] for points in found.values() for point in points}
    kind_of = lambda marker: {"marker": marker, "color": "#777777", "markerfacecolor": "none", "linestyle": ""}
    handles = [
        *(Line2D([], [], label=way.label, **mark(way, "D")) for name, way in WAYS.items() if name in shown),
        *(Line2D([], [], label=kind, **kind_of(marker)) for kind, marker in MARKERS.items() if kind in kinds),
    ]
    height, words = figure.get_figheight(), textwrap.wrap(note(record), int(18 * figure.get_figwidth()))
    foot = 0.1 + 0.14 * len(words)  # inches
    figure.tight_layout(rect=(0, (foot + 0.6) / height, 1, 1))
    figure.legend(handles=handles, loc="lower center", ncols=min(5, len(handles)), frameon=False, fontsize=8,
                  bbox_to_anchor=(0.5, foot / height))  # fmt: skip
    figure.text(0.5, 0.06 / height, "\n".join(words), ha="center", va="bottom", fontsize=7, color="#555555")
    write_figure(path, figure)


def mark(way: Way, marker: str) -> dict:
    """Options of matplotlib for a marker."""
    face = way.colour if way.filled else "none"
    return {"marker": marker, "color": way.colour, "markerfacecolor": face, "markersize": 6, "linestyle": ""}


def panel(axis, points: list[Point], roofs: list[Roof], title: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xscale("log")
    axis.set_yscale("log")
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
        scale.set_major_formatter("{x:g}")
        scale.set_minor_formatter(NullFormatter())
    axis.set_xlabel("FLOP / byte")
    axis.set_ylabel("GFLOP/s")
    axis.spines[["top", "right"]].set_visible(False)
    if not points:
        return
    for point in points:
        way = WAYS[point.row["variant"]]
        marker = MARKERS[point.row["layer"].rpartition(".")[2]]
        # open markers in front, because they hide nothing
        axis.plot(point.intensity, point.gflops, zorder=2.1 if way.filled else 2.2, **mark(way, marker))
    ridges = [roof.gflops / roof.gbytes for roof in roofs]
    ends = [min(*ridges, *(p.intensity for p in points)) / 1.5, max(*ridges, *(p.intensity for p in points)) * 1.5]
    for roof, ridge in zip(roofs, ridges):
        at = [ends[0], ridge, ends[1]]
        axis.plot(at, [min(x * roof.gbytes, roof.gflops) for x in at], roof.style, color="#555555", linewidth=1.2)
        text = f"{roof.label}: {digits(roof.gflops)} GFLOP/s, {digits(roof.gbytes)} GB/s"
        axis.annotate(text, (ends[1], roof.gflops), (0, 3), textcoords="offset points", ha="right", fontsize=7)
    axis.set_xlim(*ends)
    axis.set_ylim(top=1.5 * max(roof.gflops for roof in roofs))
    names(axis, points)


def names(axis, points: list[Point]) -> None:
    """Label the columns at the bottom with the stage, and with the size if there are several."""
    sizes = {point.row["size"] for point in points}
    apart = (axis.get_xlim()[1] / axis.get_xlim()[0]) ** 0.03
    groups: list[tuple[float, list[str]]] = []  # (first intensity, names of the points that overlap)
    for point in sorted(points, key=lambda point: point.intensity):
        words = [point.row["layer"].rpartition(".")[0], point.row["size"] if len(sizes) > 1 else ""]
        if not groups or point.intensity > groups[-1][0] * apart:
            groups.append((point.intensity, []))
        if (name := " ".join(filter(None, words))) and name not in groups[-1][1]:
            groups[-1][1].append(name)
    bottom = min(point.gflops for point in points)
    axis.set_ylim(bottom=bottom / 2)
    if any(found for _, found in groups):
        longest = max(len(", ".join(found)) for _, found in groups)
        decades = math.log10(axis.get_ylim()[1] / axis.get_ylim()[0])
        # a letter takes about 1/50 of the height of a panel
        axis.set_ylim(bottom=bottom / 10 ** (decades * min(0.5, 0.05 + longest / 45)))
    foot = axis.get_ylim()[0] * 1.1
    for intensity, found in groups:
        axis.annotate(", ".join(found), (intensity, foot), rotation=90, ha="center", va="bottom", fontsize=6.5,
                      color="#555555")  # fmt: skip


def note(record: dict) -> str:
    """A line about what was measured, and on which machine."""
    given, machine = record["arguments"], record["machine"]
    gpu = machine.get("gpu") if given.get("device") == "cuda" else None
    name = gpu["name"] if gpu else f"{machine.get('cpu')}, {machine.get('threads')} threads"
    sizes = list(dict.fromkeys(row["size"] for row in record["results"]))
    more = " ..." if len(sizes) > 3 else ""
    parts = [f"{given.get('model')}, {', '.join(sizes[:3])}{more}, rank {given.get('rank')}"]
    parts += [name, f"torch {record['versions'].get('torch')}", f"limits: {record['limits'].get('source')}"]
    return "; ".join(parts + [] if record.get("complete", True) else [*parts, "interrupted, partial"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("records", nargs="+", type=Path, metavar="FILE", help="forward.json of bench_forward.py")
    args = parser.parse_args(argv)
    failed = False
    for path in args.records:
        chart = path.with_name("roofline.png")
        try:
            draw(read(path), chart)
            print(f"written: {chart}")
        except (ValueError, OSError) as error:
            print(error, file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
