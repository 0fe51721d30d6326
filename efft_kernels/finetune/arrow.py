"""Data sets that the datasets library of Hugging Face wrote to a folder (save_to_disk)."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from ..extras import need
from .folders import PARTS
from .images import DataError, Files, Images, Label, Source, decode, held_out


@dataclass(frozen=True)
class Rows(Images):
    """The rows of a dataset."""

    root: Path
    part: str
    rows: object  # datasets.Dataset; its column of images is not decoded
    image: str  # name of that column
    labels: tuple[Label, ...]

    def load(self, i: int):
        cell = self.rows[i][self.image]
        if cell is None:
            raise DataError(f"{self.where(i)} has no image")
        try:
            return decode(io.BytesIO(cell["bytes"]) if cell.get("bytes") else cell["path"])
        except MemoryError:
            raise
        except Exception as error:  # decoders raise any exception for a damaged file
            raise DataError(f"{self.where(i)} cannot be read as an image: {' '.join(str(error).split())}") from error

    def where(self, i: int) -> str:
        return f"row {i} of {self.part} in {self.root}"

    def key(self, i: int) -> str:
        return f"{self.part} {self.rows._fingerprint} {i}"

    def digest(self, i: int) -> bytes:
        cell = self.rows[i][self.image] or {}
        if cell.get("bytes"):
            return sha256(cell["bytes"]).digest()
        return Files(Path(), (cell.get("path") or "",), (0,)).digest(0)


def is_dataset(root: Path) -> bool:
    """Whether a folder was written by save_to_disk."""
    return (root / "dataset_dict.json").is_file() or (root / "dataset_info.json").is_file()


def read_dataset(root: Path, test_fraction: float) -> Source:
    """A Dataset or DatasetDict on disk, with a column of images and a column ``label`` or ``labels``.

    Raises:
        DataError: it cannot be read, or lacks such a column.
    """
    library = need("datasets", None)
    try:
        found = library.load_from_disk(str(root))
    except Exception as error:  # from pyarrow, json and others
        raise DataError(f"{root} cannot be read as a dataset: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        found = {"train": found}
    parts = {part: next((found[n] for n in names if n in found), None) for part, names in PARTS.items()}
    if parts["train"] is None:
        raise DataError(f"{root} must have a split train, but has {', '.join(found)}")
    features = parts["train"].features
    image = next((name for name, kind in features.items() if isinstance(kind, library.Image)), None)
    label = next((name for name in ("label", "labels", "class", "fine_label") if name in features), None)
    if image is None or label is None:
        raise DataError(
            f"{root} must have a column of images and a column label or labels, but has {', '.join(features)}"
        )
    kind = features[label]
    inner = getattr(kind, "feature", None)
    multilabel = inner is not None or isinstance(kind, list)
    inner = (kind[0] if isinstance(kind, list) else inner) if multilabel else kind
    names = getattr(inner, "names", None)
    values: dict[str, Sequence] = {part: rows[label] for part, rows in parts.items() if rows is not None}
    cells = [cell for column in values.values() for cell in column if cell is not None]
    widths = {len(cell) for cell in cells} if multilabel else set()
    # lists of one length, more than one, that hold 0 and 1 alone: flags, for no list of classes is like that
    if len(widths) == 1 and max(widths) > 1 and not any({*cell} - {0, 1} for cell in cells):
        if names is None or {len(names)} == widths:
            names = names or [*range(max(widths))]
            flags = lambda cell: cell and [i for i, is_set in enumerate(cell) if is_set]
            values = {part: [*map(flags, column)] for part, column in values.items()}
    if names is None:
        taught = {value for cell in values["train"] for value in (cell if multilabel and cell is not None else [cell])}
        if wrong := [value for value in taught if not isinstance(value, int | str)]:
            raise DataError(f"{root} must have a class in each row of {label!r}, got {wrong[0]!r}")
        names = sorted(taught)
    place = {value: c for c, value in enumerate(names)} | {c: c for c in range(len(names)) if hasattr(inner, "names")}
    made = {}
    for part, cells in values.items():
        labels = []
        for i, cell in enumerate(cells):
            if cell is None or any(value not in place for value in (cell if multilabel else [cell])):
                raise DataError(f"row {i} of {part} in {root} has {cell!r}, which is no class of a training image")
            labels.append(tuple(sorted({place[value] for value in cell})) if multilabel else place[cell])
        rows = parts[part].cast_column(image, library.Image(decode=False)).select_columns([image])
        made[part] = Rows(root, part, rows, image, tuple(labels))
    train, test = made["train"], made.get("test")
    if test is None and test_fraction:
        train, test = held_out(train, test_fraction)
    return Source(train, made.get("val"), test, tuple(map(str, names)), multilabel=multilabel)
