"""Where and how files are written: complete or not at all, and caches in one folder."""

import contextlib
import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path

PARTIAL = ".partial-"  # prefix of a file that is being written; a killed process leaves it behind


def cache_folder() -> Path:
    """The folder of everything that can be computed or downloaded again: $EFFT_CACHE, or efft_kernels in the user's
    cache directory. It may not exist yet.
    """
    if folder := os.environ.get("EFFT_CACHE"):
        return Path(folder)
    from platformdirs import user_cache_path

    return user_cache_path("efft_kernels", appauthor=False)


class _Watched:
    """A file that remembers why a write failed; torch.save reports only that one did."""

    def __init__(self, file):
        self.file, self.error = file, None

    def write(self, data) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write(path: Path, fill: Callable) -> None:
    """Write a file atomically: a reader, or a machine that loses power, finds the old file or the complete new one.

    The data goes to a temporary file in the same folder, is flushed to the disk, and the file is renamed over path. A
    symbolic link keeps pointing to its target, which is replaced.

    Args:
        path: the file.
        fill: called with a binary file that has write() and flush().

    Raises:
        OSError: the disk is full or another error; the old file is unchanged.
    """
    path = Path(path).resolve()
    partial = path.with_name(f"{PARTIAL}{path.name}-{secrets.token_hex(4)}")
    file = open(partial, "xb")  # tempfile's files would be readable by their owner only
    try:
        with file:
            watched = _Watched(file)
            try:
                fill(watched)
            except Exception as error:
                raise watched.error or error
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write data to a file atomically, as :func:`write` does."""
    write(path, lambda file: file.write(data))


def _sync_folder(folder: Path) -> None:
    """Flush a rename to the disk, where the system can open a folder."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(handle)
