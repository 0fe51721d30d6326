"""Data sets from lists: VTAB-1K's text files, and CSV files with one or several labels per image."""

import csv
import io
import logging
import re
from pathlib import Path

from .folders import PARTS
from .images import BadImages, DataError, Files, Source, check_apart, held_out

log = logging.getLogger("efft_kernels.finetune")

# of the data sets of VTAB-1K, by the name of the folder
VTAB_CLASSES = {
    **{"cifar": 100, "caltech101": 102, "dtd": 47, "oxford_flowers102": 102, "oxford_iiit_pet": 37, "svhn": 10},
    **{"sun397": 397, "patch_camelyon": 2, "eurosat": 10, "resisc45": 45, "diabetic_retinopathy": 5},
    **{"clevr_count": 8, "clevr_dist": 6, "dmlab": 6, "kitti": 4, "dsprites_loc": 16, "dsprites_ori": 16},
    **{"smallnorb_azi": 18, "smallnorb_ele": 9},
}
_LISTS = ("train800", "val200", "train800val200", "test")
_IMAGE, _LABEL, _LABELS, _PART = (
    ("image", "path", "file", "filename", "file_name", "image_path"),
    ("label", "class"),
    ("labels", "classes", "tags"),
    ("split", "part", "subset"),
)
_NUMBERS = ("", "id", "index", "unnamed: 0")  # columns that count the lines


def is_lists(root: Path) -> bool:
    """Whether a folder has one of VTAB-1K's lists, other than test.txt, a name that many files have."""
    return any((root / f"{part}.txt").exists() for part in _LISTS if part != "test")


def read_lists(root: Path, hold_out: bool, classes: int | None) -> Source:
    """VTAB-1K as NOAH keeps it: lists of "relative/path.jpg label"

    Raises:
        DataError: a list is missing, or a line of it is wrong.
    """
    classes = classes or VTAB_CLASSES.get(root.resolve().name)
    needed = {"train": "train800", "val": "val200"} if hold_out else {"train": "train800val200"}
    read = {}
    for part, name in {**needed, "test": "test"}.items():
        if not (root / f"{name}.txt").is_file():
            others = ", ".join(_existing(root))
            raise DataError(f"{root / name}.txt does not exist, but is needed in addition to {others}")
        read[part] = _list(root, root / f"{name}.txt", classes)
    _check_exist(read)
    check_apart(read)
    if classes is None:
        _check_dense(read)
    count = classes or 1 + max(max(images.labels) for images in read.values())
    return Source(read["train"], read.get("val"), read["test"], tuple(f"class {i}" for i in range(count)))


def _check_exist(read: dict[str, Files]) -> None:
    """Raise BadImages with all images of the lists that do not exist."""
    bad = {}
    for images in read.values():
        for i, path in enumerate(images.paths):
            file = images.root / path
            if not file.is_file():
                what = "is a folder" if file.is_dir() else "is no regular file" if file.exists() else "does not exist"
                bad.setdefault(images.where(i), f"{images.where(i)} {what}")
    if bad:
        raise BadImages(list(bad.values()))


def _check_dense(read: dict[str, Files]) -> None:
    """Check that no label exceeds the number of training images, which is a typing error rather than a class."""
    most = len(read["train"])
    for images in read.values():
        if (label := max(images.labels)) >= most:
            list_, line = images.lines[images.labels.index(label)]
            raise DataError(
                f"{list_}, line {line}, has the label {label}, more than {most} training images can teach; if it is "
                "right, set classes"
            )


def _existing(root: Path) -> list[str]:
    return [f"{name}.txt" for name in _LISTS if (root / f"{name}.txt").exists()]


def _list(root: Path, path: Path, classes: int | None) -> Files:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    paths, labels, places = [], [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"(\S.*?)\s+(\d+)", line.strip())
        if not match:
            raise DataError(f"{path}, line {number}, must be 'relative/path label', got {line.strip()[:80]!r}")
        name, label = match[1], int(match[2])
        if classes is not None and label >= classes:
            raise DataError(f"{path}, line {number}, must have a label from 0 to {classes - 1}, got {label}")
        paths.append(name)
        labels.append(label)
        places.append((path, number))
    if not paths:
        raise DataError(f"{path} must list images, but is empty")
    return Files(root, tuple(paths), tuple(labels), tuple(places))


def read_csv(path: Path, test_fraction: float) -> Source:
    """A CSV file with a header and a line per image.

    Its columns are ``image``, a path that is absolute or relative to the file; either ``label``, a class, or
    ``labels``, classes separated by "|" or ";", or a column of 0 and 1 for each class; and perhaps ``split``: train,
    val or test. Other names that are understood are in the error for a header without them.

    Raises:
        DataError: the header or a line is wrong.
        BadImages: images that do not exist, all of them.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read as UTF-8: {error}") from error
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    rows = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
        lines = [(rows.line_num, [cell.strip() for cell in row]) for row in rows if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}, is not CSV: {error}") from error
    if len(lines) < 2:
        raise DataError(f"{path} must have a header and a line for each image, got {len(lines)} lines")
    columns = lines.pop(0)[1]
    if twice := [name for name in columns if name and columns.count(name) > 1]:
        raise DataError(f"{path} must have one column of each name, got {twice[0]!r} more than once")
    for n, row in lines:
        if len(row) != len(columns):
            raise DataError(f"{path}, line {n}, must have the {len(columns)} columns of the header, got {len(row)}")
    image, label, part = (_column(path, columns, *names) for names in ((_IMAGE,), (_LABEL, _LABELS), (_PART,)))
    label, labels = (label, None) if label is None or columns[label].lower() in _LABEL else (None, label)
    rest = [i for i in range(len(columns)) if i not in (image, part) and columns[i].lower() not in _NUMBERS]
    flags = label is labels is None and bool(rest) and all(row[i] in ("0", "1") for _, row in lines for i in rest)
    if image is None or (label is None and labels is None and not flags):
        raise DataError(
            f"{path} must have a header with one of {', '.join(_IMAGE)}, and with one of {', '.join(_LABEL)} (one "
            f"class per image), one of {', '.join(_LABELS)} (classes separated by '|' or ';'), or a column of 0 and 1 "
            f"for each class; got {', '.join(columns)}"
        )
    multilabel = label is None
    if flags:
        log.info(f"{path}: the classes are the columns of 0 and 1: {', '.join(columns[i] for i in rest)}")
    found = []
    for number, row in lines:
        if flags:
            mine = [columns[i] for i in rest if row[i] == "1"]
        else:
            mine = re.split(r"\s*[|;]\s*", row[labels]) if multilabel else [row[label]]
        mine = [name for name in mine if name]
        if not mine and not multilabel:
            raise DataError(f"{path}, line {number}, must have a label")
        found.append((number, row[image], mine, _part(path, number, row[part]) if part is not None else "train"))
    return _csv_source(path, found, tuple(columns[i] for i in rest) if flags else None, multilabel, test_fraction)


def _csv_source(path: Path, found: list, classes: tuple[str, ...] | None, multilabel: bool, test_fraction) -> Source:
    """The source of lines (number, image, names of classes, part)."""
    taught = {name for _, _, names, part in found if part == "train" for name in names}
    if not taught:
        raise DataError(f"{path} must have labelled images to train on")
    classes = classes or tuple(sorted(taught))
    place = {name: c for c, name in enumerate(classes)}
    read = {}
    for part in PARTS:
        lines = [line for line in found if line[3] == part]
        for number, _, names, _ in lines:
            if unknown := [name for name in names if name not in place]:
                raise DataError(f"{path}, line {number}, has {unknown[0]!r}, which is no class of a training image")
        labels = [tuple(sorted({place[name] for name in names})) for _, _, names, _ in lines]
        if lines:
            read[part] = Files(
                path.parent,
                tuple(image for _, image, _, _ in lines),
                tuple(labels if multilabel else (c for (c,) in labels)),
                tuple((path, number) for number, _, _, _ in lines),
            )
    _check_exist(read)
    check_apart(read, lambda label: " and ".join(classes[c] for c in (label if multilabel else [label])) or "none")
    train, test = read["train"], read.get("test")
    if test is None and test_fraction:
        train, test = held_out(train, test_fraction)
        if not len(test):
            raise DataError(f"{path} must have two images of a class, so that one can be held out for testing")
    return Source(train, read.get("val"), test, classes, multilabel=multilabel)


def _column(path: Path, columns: list[str], *names: tuple[str, ...]) -> int | None:
    """The number of the column that has one of these names; the first name of a tuple goes before the others."""
    at = lambda among: [i for i, name in enumerate(columns) if name.lower() in among]
    found = at([first for first, *_ in names]) or at(sum(names, ()))
    if len(found) > 1:
        got = " and ".join(columns[i] for i in found)
        raise DataError(f"{path} must have at most one column called {', '.join(sum(names, ()))}, got {got}")
    return found[0] if found else None


def _part(path: Path, number: int, name: str) -> str:
    for part, names in PARTS.items():
        if name.lower() in names:
            return part
    raise DataError(f"{path}, line {number}, must be of the split train, val or test, got {name!r}")
