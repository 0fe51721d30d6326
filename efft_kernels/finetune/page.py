"""The pages that show runs to people: self-contained HTML, readable on a phone, without a network."""

import base64
import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path

from ..extras import need
from . import plots
from .data import Data
from .images import DataError
from .predictions import Row
from .settings import Settings

NAME = "report.html"
_MISTAKES, _CONFUSIONS = 24, 10
_SIDE = 224  # pixels of a shown picture, at most
_LONG = 300  # classes at most that a confusion matrix is drawn for
_LABELS = {
    **{"top1": "top-1 accuracy", "mean_class": "mean over classes", "loss": "loss, nats"},
    **{"mean_ap": "mean average precision", "f1": "F1, mean over classes", "exact": "all labels right"},
}

# of an identity, what its digests are of
_DIGESTS = {"data": "images", "contents": "contents of images", "weights": "frozen weights"}


def loader(data: Data) -> Callable[[Row], object]:
    """A function that finds the picture of a row in the data of its run, or None if it cannot be read."""
    places = {}
    for name, part in data.parts().items():
        places |= {(name, part.images.file_name(i)): (part.images, i) for i in range(len(part))}

    def load(row: Row):
        images, i = places.get((row.part, row.image), (None, 0))
        try:
            return images and images.load(i)
        except DataError:
            return None

    return load


def build(record: dict, rows: Sequence[Row], load: Callable[[Row], object]) -> str:
    """The report of a run as HTML.

    Args:
        record: the contents of metrics.json; what an earlier version did not record is left out.
        rows: the predictions; empty for a run of an earlier version.
        load: the picture of a row, or None.
    """
    result, settings = record["result"], record["settings"]
    part = next(name for name in ("test", "val", "train") if name in result["metrics"])
    shown, classes, several = [row for row in rows if row.part == part], record["classes"], record.get("multilabel")
    run = record.get("run", {})
    per_class, matrix = _per_class(shown, classes, several), None
    if shown and not several and len(classes) <= _LONG:
        place = {name: c for c, name in enumerate(classes)}
        matrix = [[0] * len(classes) for _ in classes]
        for row in shown:
            matrix[place[row.label[0]]][place[row.predicted[0]]] += 1
    wrong = [row for row in shown if row.wrong]
    wrong.sort(key=lambda row: -row.error if several else -row.probability[0])
    confused = Counter((row.label[0], row.predicted[0]) for row in wrong) if not several else Counter()
    total = run.get("parameters_of_model")
    return _template("report.html.j2").render(
        title=f"{settings['method']} on {settings['model']}",
        part=part,
        metrics={n: {_LABELS[k]: v for k, v in m.items() if k in _LABELS} for n, m in result["metrics"].items()},
        curves=plots.separate_curves(record),
        matrix=plots.confusion(matrix, classes) if matrix else None,
        confused=[(*pair, n) for pair, n in confused.most_common(_CONFUSIONS)],
        per_class=per_class,
        several=several,
        mistakes=[(row, _picture(load(row))) for row in wrong[:_MISTAKES]],
        wrong=len(wrong),
        shown=len(shown),
        result=result,
        run=run,
        share=100 * (result["parameters"] + result["head_parameters"]) / total if total else None,
        time=_duration(run["seconds"]) if "seconds" in run else None,
        memory=_bytes(run["peak_memory"]) if run.get("peak_memory") else None,
        settings=_chosen(settings),
        versions=record["versions"],
    )


def _per_class(rows: Sequence[Row], classes: Sequence[str], several: bool) -> list[tuple[str, int, float]]:
    """(class, images of it, accuracy in %, or with several labels F1 in %), the worst first."""
    images, right, said = Counter(), Counter(), Counter()
    for row in rows:
        images.update(row.label)
        said.update(row.predicted)
        right.update(set(row.label) & set(row.predicted))
    found = []
    for name in classes:
        if images[name]:
            whole = (images[name] + said[name]) / 2 if several else images[name]
            found.append((name, images[name], 100 * right[name] / whole))
    return sorted(found, key=lambda entry: (entry[2], entry[0]))


def compare(records: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """A table of runs: (header, rows of cells), with a column for each setting and digest that differs between them."""
    every = {name: None for record in records.values() for name in record["settings"]}
    hidden = {"out", "device", "workers", "memory", "save_every", "resume", "trackers"}
    values = {name: {repr(record["settings"].get(name)) for record in records.values()} for name in every}
    differing = [name for name in every if name not in hidden and len(values[name]) > 1]
    digests = {what: found for name, what in _DIGESTS.items() if (found := _digests(records.values(), name))}
    measured = [found for record in records.values() for found in record["result"]["metrics"].values()]
    metrics = list(dict.fromkeys(key for found in measured for key in found if key in _LABELS))
    header = ["run", *differing, *digests, *(_LABELS[name] for name in metrics)]
    header += ["part", "epoch", "trained", "time", "memory"]
    rows = []
    for i, (name, record) in enumerate(records.items()):
        result, run = record["result"], record.get("run", {})
        part = next(part for part in ("test", "val", "train") if part in result["metrics"])
        found = result["metrics"][part]
        cells = [name, *(_cell(record["settings"].get(setting)) for setting in differing)]
        cells += [found[i] for found in digests.values()]
        for key in metrics:
            value = found.get(key)
            cells.append("" if value is None else f"{value:.4g}" if key == "loss" else f"{value:.2f} %")
        cells += [part, f"{result['epoch']}", f"{result['parameters']:,}"]
        cells += [_duration(run["seconds"]) if "seconds" in run else "", _bytes(run.get("peak_memory"))]
        rows.append(cells)
    return header, rows


def _digests(records: Iterable[dict], name: str) -> list[str]:
    """The beginning of a digest of each run, "" where none is recorded; an empty list if all are the same."""
    # which weights are frozen depends on the method: those of two methods are not compared
    method = lambda record: record["settings"]["method"] if name == "weights" else ""
    found = [(method(record), record.get("identity", {}).get(name, "")) for record in records]
    differ = len(set(found)) > len({method for method, _ in found})
    return [digest[:8] for _, digest in found] if differ else []


def build_comparison(records: dict[str, dict]) -> str:
    """The comparison of runs as HTML."""
    header, rows = compare(records)
    return _template("compare.html.j2").render(header=header, rows=rows, figures=plots.comparison(records))


def _template(name: str):
    jinja2 = need("jinja2")
    folder = Path(__file__).parent / "templates"
    loader = jinja2.FileSystemLoader(folder)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.finalize = _printable
    return environment.get_template(name)


def _printable(value):
    """A text without the bytes that are not UTF-8, which a file name may hold and a page may not."""
    if isinstance(value, str) and not value.isascii():
        return type(value)(value.encode(errors="replace").decode())  # type: Markup stays Markup
    return value


def _picture(image) -> str | None:
    """A picture as a data URI of a small JPEG."""
    if image is None:
        return None
    image = image.copy()
    image.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _chosen(settings: dict) -> list[tuple[str, str, bool]]:
    """(name, value, whether it differs from the default) of all settings, those first."""
    defaults = {field.name: field.default for field in fields(Settings)}
    cells = [(name, _cell(v), _cell(v) != _cell(defaults.get(name))) for name, v in settings.items() if v is not None]
    return sorted(cells, key=lambda cell: not cell[2])


def _cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _bytes(n: int | None) -> str:
    if not n:
        return ""
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"
