"""Files that are whole or not there at all, and the states that a run resumes from."""

import contextlib
import errno
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from ..storage import PARTIAL, write

_NAME = "state-{:09d}.pt"


class StorageError(OSError):
    """A disk that does not take what has to be written; the message says what is safe."""


def tidy(folder: Path) -> None:
    """Remove what interrupted writes left."""
    for path in folder.glob(f"{PARTIAL}*"):
        path.unlink(missing_ok=True)


def states(folder: Path) -> list[Path]:
    """The complete states, oldest first."""
    return sorted(folder.glob("state-*.pt"))


def save(folder: Path, step: int, state: dict, keep: int = 2) -> Path:
    """Write a state, and then remove all but the last ``keep``.

    Raises:
        StorageError: it could not be written; the earlier ones are still there.
    """
    path = folder / _NAME.format(step)
    try:
        write(path, lambda file: torch.save(state, file))
    except OSError as error:
        raise StorageError(error.errno, _sentence(folder, f"the state of step {step}", error)) from error
    for old in states(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def load(folder: Path, warn: Callable[[str], None]) -> dict | None:
    """The newest state that can be read, or None; says which are skipped as damaged."""
    for path in reversed(states(folder)):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, KeyError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            warn(f"{path} is damaged and skipped: {first}")
    return None


def clear(folder: Path) -> None:
    """Remove all states."""
    for path in states(folder):
        path.unlink()


def _sentence(folder: Path, what: str, error: OSError) -> str:
    left = states(folder)
    safe = f"the state of step {int(left[-1].stem[6:])} is complete; " if left else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(folder).free / 2**20
        why, then = f"no space left in {folder} ({free:.1f} MiB free)", "make room and run the same command again"
    else:
        why, then = f"{error.strerror or error} ({folder})", "run the same command again when it can be written"
    return f"{why}: {what} could not be written; {safe}{then}"


@contextlib.contextmanager
def storing(folder: Path, what: str):
    """Turns an OSError into a StorageError with a sentence about what could not be written."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(error.errno, _sentence(folder, what, error)) from error


@contextlib.contextmanager
def alone(folder: Path):
    """Refuses a folder that another process is writing a run into."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"out must be a folder of its own, but another process is training into {folder}"
            ) from error
        yield
