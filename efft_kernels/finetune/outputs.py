"""Where a command may write: over no file that it reads, and over none that others left in the folder of a run."""

import json
import os
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path

from ..storage import target
from . import checkpoints
from .finished import read_record

# of a finished run, in the order in which they are written: metrics.json means that all are there
FILES = ("adapter.safetensors", "curves.png", "predictions.csv", "report.html", "metrics.json")


def check_file(path: Path, suffix: str, read: Iterable[str | Path]) -> None:
    """Raise ValueError if no file can be at ``path``, it has another kind of name, or it is one of ``read``."""
    try:
        place = target(path)
    except OSError as error:
        raise ValueError(f"out must be a file that can be written, got {path}: {error.strerror}") from error
    if place.suffix.lower() != suffix and (place.exists() or suffix == ".safetensors"):  # --out *.png without quotes
        raise ValueError(f"out must end in {suffix}, got {place if path.is_symlink() else path}")
    check_unread((path,), read)


def check_unread(written: Iterable[Path], read: Iterable[str | Path], name: str = "out") -> None:
    """Raise ValueError, which says that the setting ``name`` is wrong, if a file would be written that is read."""
    for path, file in product([path for path in written if path.exists()], read):
        if os.path.exists(file) and os.path.samefile(path, file):
            raise ValueError(f"{name} must not lead to a file that is read and written, but {path} is {file}")


def read_by(run: str, checkpoint: str | None = None, data: str | None = None) -> Iterator[Path]:
    """What a command reads of a finished run, and the weights and the list of images, also where they moved to."""
    settings = read_record(run, later=True)["settings"]
    yield from (Path(run, name) for name in FILES if name not in ("curves.png", "report.html"))
    yield from (Path(place) for place in (data, settings["data"]) if place)
    for place in filter(None, (checkpoint, settings["checkpoint"], settings["model"].partition(":")[2])):
        yield Path(place)
        yield from Path(place).glob("*")  # of the folder of a model


def check_folder(out: Path, resume: bool = True, **read: str | None) -> None:
    """Raise ValueError if a run would write over what it reads, named by setting, or over a file that no run left.

    All processes of the run find the same: none of them writes such a file before all have joined.
    """
    there, states = [name for name in FILES if os.path.lexists(out / name)], checkpoints.states(out)
    for name, file in read.items():
        check_unread([*(out / name for name in there), *states], [file] if file else [], name)
    if "metrics.json" in there or (there and not states and not (out / ".lock").exists()):  # a run's
        try:
            read_record(out)
        except (OSError, ValueError) as error:
            if (other := _is_record(out / "metrics.json")) and not resume:
                return
            what = f"{out} holds {', '.join(there)} of no run{' that this version can read' * other}: {error}"
            what += "; remove these files, or set resume=false" * other
            raise ValueError(f"out must be an empty folder or that of a run, but {what}") from error


def _is_record(path: Path) -> bool:
    """Whether a file is the record of a run of any version."""
    try:
        return {"settings", "result"} <= set(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def make_folder(out: Path) -> None:
    """Make a folder. Raises ValueError if none can be there, checkpoints.StorageError if the disk is full or fails."""
    with checkpoints.storing(next(filter(Path.is_dir, (out, *out.absolute().parents))), f"the folder {out}"):
        try:
            out.mkdir(parents=True, exist_ok=True)
        except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"out must be a folder, but {out} cannot be one: {error.strerror}") from error
