"""The predictions of a run, image by image, as a CSV file."""

import csv
import io
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from .data import Pictures
from .evaluation import Prediction
from .images import Label

NAME = "predictions.csv"
_COLUMNS = ("part", "image", "label", "predicted", "probability", "error")


@dataclass(frozen=True)
class Row:
    """An image with its labels and what was predicted, by the names of classes."""

    part: str
    image: str
    label: tuple[str, ...]
    predicted: tuple[str, ...]
    probability: tuple[float, ...]  # of each predicted class
    error: float  # largest distance of a class's probability from the truth

    @property
    def wrong(self) -> bool:
        return self.label != self.predicted


def rows_of(name: str, part: Pictures, predictions: list[Prediction], classes: tuple[str, ...]) -> list[Row]:
    """The rows of a part of the data.

    Args:
        name: of the part.
        predictions: of its images, in any order.
        classes: the names of all classes.
    """

    def named(label: Label) -> tuple[str, ...]:
        return tuple(classes[c] for c in (label if isinstance(label, tuple) else (label,)))

    file, labels = part.images.file_name, part.labels
    return [
        Row(name, file(p.image), named(labels[p.image]), named(p.classes), p.probabilities, p.error)
        for p in predictions
    ]


def to_csv(rows: Iterable[Row]) -> bytes:
    """The contents of a CSV file; several classes of an image are separated by "|"."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in rows:
        probabilities = "|".join(f"{p:.5f}" for p in row.probability)
        labels = "|".join(row.label), "|".join(row.predicted)
        writer.writerow([row.part, row.image, *labels, probabilities, f"{row.error:.5f}"])
    return file.getvalue().encode(errors="surrogateescape")


def from_csv(path: Path, multilabel: bool, classes: Collection[str] | None = None) -> list[Row]:
    """The rows of a file of :func:`to_csv`.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is another file, or names what is none of ``classes``.
    """
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    try:
        lines = csv.reader(io.StringIO(text, newline=""))
        if tuple(next(lines)) != _COLUMNS:
            raise ValueError("other columns")
        split = (lambda cell: tuple(cell.split("|")) if cell else ()) if multilabel else (lambda cell: (cell,))
        rows = [
            Row(part, image, split(label), split(predicted), tuple(float(p) for p in p.split("|") if p), float(error))
            for part, image, label, predicted, p, error in lines
        ]
        for row in rows:
            if classes is not None and (unknown := {*row.label, *row.predicted} - set(classes)):
                raise ValueError(f"{min(unknown)!r} of {row.image} is no class of the run")
            if len(row.probability) != len(row.predicted):
                raise ValueError(f"{row.image} must have a probability for each predicted class")
        return rows
    except (ValueError, StopIteration, csv.Error) as error:
        raise ValueError(f"{path} is not a file of predictions that a run leaves: {error}") from error
