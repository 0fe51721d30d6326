"""Figures of runs: curves, confusion matrix, comparison; as PNG files, and as SVG for the pages."""

import base64
import io
import warnings
from collections.abc import Sequence

from ..extras import need

_NAMED = 30  # classes at most whose names and numbers fit a confusion matrix


def _figure(width: float, height: float):
    """A figure of inches that needs no display."""
    need("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, file, **options) -> None:
    with warnings.catch_warnings():
        # for each letter that matplotlib's own font lacks: a page is shown in the fonts of its reader
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure.savefig(file, **options)


def as_svg(figure) -> str:
    """A figure as a data URI for an <img>; its text is text, in the reader's own font."""
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "efft", "font.family": "sans-serif"}):
        _save(figure, file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def curves(file, record: dict) -> None:
    """Draw loss, accuracy and learning rate by epoch, side by side, as PNG.

    Args:
        file: a binary file to write to.
        record: the contents of metrics.json.
    """
    settings, result = record["settings"], record["result"]
    figure = _figure(12, 3.5)
    for axis, draw in zip(figure.subplots(1, 3), (_loss, _accuracy, _rate)):
        draw(axis, record)
    name = _label(f"{settings['method']} on {settings['model']}")
    figure.suptitle(f"{name}, {result['parameters']:,} trained parameters and the head")
    _save(figure, file, format="png", dpi=120)


def separate_curves(record: dict) -> dict[str, str]:
    """The same three figures, name -> SVG as a data URI."""
    made = {}
    for name, draw in (("loss", _loss), ("accuracy", _accuracy), ("learning rate", _rate)):
        figure = _figure(4.2, 3)
        draw(figure.subplots(), record)
        made[name] = as_svg(figure)
    return made


def accuracy_name(record: dict) -> tuple[str, str]:
    """The metric that a run is judged by, and the one that is known of training images."""
    return ("mean_ap", "exact") if record.get("multilabel") else ("top1", "top1")


def _loss(axis, record: dict) -> None:
    _lines(axis, record, "loss", "loss")
    axis.set(xlabel="epoch", ylabel="loss, nats")
    axis.legend(handles=axis.lines)


def _accuracy(axis, record: dict) -> None:
    best, training = accuracy_name(record)
    _lines(axis, record, best, training)
    value = record["result"]["metrics"].get("test", {}).get(best)
    if value is not None:
        axis.plot([record["result"]["epoch"]], [value], "k*", label=f"test, at the end: {value:.2f}")
    axis.set(xlabel="epoch", ylabel="%" if record.get("multilabel") else "top-1 accuracy, %")
    axis.legend(handles=axis.lines)


def _rate(axis, record: dict) -> None:
    history = record["history"]
    axis.plot([entry["epoch"] for entry in history], [entry["lr"] for entry in history], marker=_marker(history))
    axis.set(xlabel="epoch", ylabel="learning rate")


def _lines(axis, record: dict, val: str, train: str) -> None:
    history, names = record["history"], {"mean_ap": " (mean AP)", "exact": " (all labels right)"}
    for part, key in (("train", train), ("val", val)):
        points = _points(history, part, key)
        if points:
            axis.plot(*zip(*points), label=part + names.get(key, ""), marker=_marker(points))
    axis.xaxis.get_major_locator().set_params(integer=True)


def _points(history: Sequence[dict], part: str, key: str) -> list[tuple[int, float]]:
    return [(entry["epoch"], entry[part][key]) for entry in history if key in entry.get(part, {})]


def _marker(points: Sequence) -> str | None:
    return "o" if len(points) == 1 else None  # a line of one point would not be seen


def _label(name: str) -> str:
    """A name for matplotlib: no formula between $, ? for bytes that are not UTF-8, not hidden by a first "_"."""
    return " " * name.startswith("_") + name.encode(errors="replace").decode().replace("$", r"\$")


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """A confusion matrix as an SVG data URI: rows are labels, columns are predictions, in shares of each row."""
    import numpy as np

    counts = np.asarray(matrix, dtype=float)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    few = len(classes) <= _NAMED
    side = 2.4 + 0.36 * len(classes) if few else 7.5
    figure = _figure(max(3.6, side), max(3.2, side - 0.4))
    axis = figure.subplots()
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xlabel="predicted", ylabel="label")
    if few:
        names = [_label(name if len(name) <= 18 else name[:17] + "…") for name in classes]
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(names)), names)
        for i, j in zip(*np.nonzero(counts)):
            color = "white" if share[i, j] > 0.5 else "black"
            axis.text(j, i, f"{int(counts[i, j])}", ha="center", va="center", color=color, fontsize=8)
    return as_svg(figure)


def comparison(records: dict[str, dict]) -> dict[str, str]:
    """Figures that compare runs, name -> SVG data URI: accuracy by epoch, and the final one by trained parameters."""
    made = {}
    figure = _figure(5.2, 3.6)
    axis = figure.subplots()
    for name, record in records.items():
        best, training = accuracy_name(record)
        part, key = ("val", best) if any("val" in entry for entry in record["history"]) else ("train", training)
        points = _points(record["history"], part, key)
        if points:
            axis.plot(*zip(*points), label=_label(f"{name} ({part})"), marker=_marker(points))
    axis.set(xlabel="epoch", ylabel="accuracy, %")
    axis.legend(handles=axis.lines, fontsize=8)
    made["accuracy by epoch"] = as_svg(figure)
    figure = _figure(5.2, 3.6)
    axis = figure.subplots()
    for name, record in records.items():
        metrics = record["result"]["metrics"]
        part = next(part for part in ("test", "val", "train") if part in metrics)
        if (value := metrics[part].get(accuracy_name(record)[0])) is not None:
            axis.plot([record["result"]["parameters"]], [value], "o", label=_label(name))
    axis.set_xscale("symlog", linthresh=1000)
    axis.set(xlabel="trained parameters, without the head", ylabel="accuracy at the end, %")
    axis.legend(handles=axis.lines, fontsize=8)
    made["accuracy and trained parameters"] = as_svg(figure)
    return made
