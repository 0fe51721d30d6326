"""Tables and charts of many runs: means and deviations over seeds, group means, published numbers."""

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from record import write_figure

COLOURS = ["#3b6fb6", "#c8553d", "#5a9367", "#8d6ab8", "#d19c2f", "#4aa3a2", "#b0588e", "#7a7a7a", "#2f4858", "#9a6324",
           "#1f9e89", "#e15759", "#59a14f", "#b07aa1"]  # fmt: skip


class Cell(NamedTuple):
    """Mean and deviation over seeds. The deviation is that of a sample (n - 1); None for one seed."""

    mean: float | None
    deviation: float | None
    n: int


class Row(NamedTuple):
    name: str
    parameters: float | None  # mean over data sets, without the head
    cells: dict[str, Cell]  # by data set
    groups: dict[str, Cell]  # mean of a group's data sets, seed by seed
    mean: Cell  # of all data sets
    group_mean: Cell  # of the groups' means


def cell(values: Iterable[float | None]) -> Cell:
    """The cell of some values; a None among them, of a run that diverged, leaves no mean."""
    values = list(values)
    if not values or None in values:
        return Cell(None, None, len(values))
    return Cell(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def row(name: str, records: list[dict], groups: dict[str, list[str]]) -> Row:
    """The row of a method's records. Means over data sets use the seeds that all data sets have.

    Raises:
        ValueError: two records of one data set and seed.
    """
    found = {}
    for record in records:
        key = record["run"]["data"], record["run"]["seed"]
        if key in found:
            raise ValueError(f"{name} has two results for {key[0]}, seed {key[1]}: they differ in their settings")
        found[key] = record
    names = [data for members in groups.values() for data in members]
    seeds = {data: sorted(seed for d, seed in found if d == data) for data in names}
    common = sorted(set.intersection(*(set(s) for s in seeds.values()))) if names else []
    top1 = {key: record["top1"] for key, record in found.items()}

    mean = lambda members, seed: cell(top1[data, seed] for data in members).mean
    counts = [record["parameters"] for record in records if record.get("parameters") is not None]
    return Row(
        name,
        statistics.fmean(counts) if counts else None,
        {data: cell(top1[data, seed] for seed in seeds[data]) for data in names},
        {group: cell(mean(members, seed) for seed in common) for group, members in groups.items()},
        cell(mean(names, seed) for seed in common),
        cell(cell(mean(members, seed) for members in groups.values()).mean for seed in common),
    )


def published(entry: dict, all_groups: dict[str, list[str]], groups: dict[str, list[str]], title: str) -> Row:
    """A published row, with means over the data sets in ``groups``, so that they are comparable."""
    place = {data: i for i, data in enumerate(data for members in all_groups.values() for data in members)}
    value = {data: entry["accuracy"][place[data]] for members in groups.values() for data in members}
    by_group = {group: statistics.fmean(value[data] for data in members) for group, members in groups.items()}
    one = lambda number: Cell(number, None, 1)
    return Row(
        title,
        entry["millions"] * 1e6,
        {data: one(number) for data, number in value.items()},
        {group: one(number) for group, number in by_group.items()},
        one(statistics.fmean(value.values())),
        one(statistics.fmean(by_group.values())),
    )


def published_mean(entry: dict, groups: dict[str, list[str]]) -> Row:
    """A published row over all data sets, of which perhaps only the mean of the groups is known here."""
    name = f"published: {entry['name']} (arXiv {entry['arxiv']})"
    if "accuracy" in entry:
        return published(entry, groups, groups, name)
    none = Cell(None, None, 0)
    names = [data for members in groups.values() for data in members]
    parameters = None if entry["millions"] is None else entry["millions"] * 1e6
    mean = Cell(entry["group_mean"], None, 1)
    return Row(name, parameters, dict.fromkeys(names, none), dict.fromkeys(groups, none), none, mean)


def text(found: Cell) -> str:
    if found.n == 0:
        return "–"
    if found.mean is None:
        return "diverged"
    return f"{found.mean:.1f}" + (f" ± {found.deviation:.1f}" if found.deviation is not None else "")


def _millions(parameters: float | None) -> str:
    return "–" if parameters is None else f"{parameters / 1e6:.3f}".rstrip("0").rstrip(".")


def markdown(rows: list[Row], groups: dict[str, list[str]]) -> str:
    """A table in the paper's layout; the best mean of each column is bold."""
    names = [data for members in groups.values() for data in members]
    head = ["method", "params (M)", *names, *groups, "mean", "mean of groups"]
    columns = [[*(r.cells[d] for d in names), *(r.groups[g] for g in groups), r.mean, r.group_mean] for r in rows]
    best = [max((c[i].mean for c in columns if c[i].mean is not None), default=None) for i in range(len(head) - 2)]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for r, cells in zip(rows, columns):
        words = [f"**{text(c)}**" if c.mean is not None and c.mean == top else text(c) for c, top in zip(cells, best)]
        lines.append([r.name, _millions(r.parameters), *words])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _figure(panels: int, width: float = 4.6, height: float = 3.6):
    from matplotlib.figure import Figure

    columns = min(panels, 4)
    rows = math.ceil(panels / columns)
    figure = Figure((width * columns, height * rows), dpi=110)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[panels:]:
        axis.set_visible(False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat[:panels])


def accuracy_against_parameters(path: Path, rows: list[Row], title: str) -> None:
    """Draw a point per method: mean accuracy and deviation over trained parameters without the head."""
    shown = [r for r in rows if r.mean.mean is not None and r.parameters is not None]
    if not shown:
        return
    figure, (axis,) = _figure(1, 7, 4.6)
    for i, r in enumerate(shown):
        colour = COLOURS[i % len(COLOURS)]
        axis.errorbar(max(r.parameters, 0), r.mean.mean, r.mean.deviation, fmt="o", color=colour, capsize=3)
        axis.annotate(r.name, (r.parameters, r.mean.mean), (5, 4), textcoords="offset points", fontsize=8, color=colour)
    axis.set_xscale("symlog", linthresh=1e4)  # linear probing trains none
    axis.set_xlabel("trained parameters without the head")
    axis.set_ylabel("top-1, %")
    axis.set_title(title, fontsize=10, loc="left")
    figure.tight_layout()
    write_figure(path, figure)


def sweep(path: Path, panels: dict[str, dict[str, dict[float, list[float | None]]]], label: str, title: str) -> None:
    """Draw accuracy over a setting, a panel per data set, a line per method. {panel: {line: {setting: accuracies}}}"""
    if not panels:
        return
    figure, axes = _figure(len(panels))
    lines = list(dict.fromkeys(line for found in panels.values() for line in found))
    for axis, (name, found) in zip(axes, panels.items()):
        for line, points in found.items():
            cells = {x: cell(values) for x, values in sorted(points.items())}
            cells = {x: c for x, c in cells.items() if c.mean is not None}
            if cells:
                deviations = [c.deviation or 0 for c in cells.values()]
                colour = COLOURS[lines.index(line) % len(COLOURS)]
                axis.errorbar(list(cells), [c.mean for c in cells.values()], deviations, fmt="o-", color=colour,
                              capsize=3, markersize=4, label=line)  # fmt: skip
        axis.set_xscale("log")
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_xlabel(label)
        axis.set_ylabel("top-1 of validation, %")
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    write_figure(path, figure)
