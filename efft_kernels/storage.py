"""Where and how files are written: complete or not at all, and caches in one folder."""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".efft_partial-"  # prefix of a file that is being written; a killed process leaves it behind


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
    symbolic link keeps pointing to its target, which is replaced. Temporary files that killed processes have left in
    the folder are removed.

    Args:
        path: the file.
        fill: called with a binary file that has write() and flush().

    Raises:
        OSError: as :func:`target`, the disk is full, or another error; the old file is unchanged.
    """
    path = target(path)
    remove_partial(path.parent)
    file, partial = _open_partial(path.parent)
    try:
        with file:
            watched = _Watched(file)
            try:
                fill(watched)
            except Exception as error:
                raise watched.error or error
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":  # an open file cannot be renamed there, and has no lock
                file.close()
            os.replace(partial, path)  # while the lock is held: without it the file would look left behind
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def target(path: Path) -> Path:
    """The file that :func:`write` replaces, with links followed.

    Raises:
        OSError: there is no folder for it, or it is no regular file (a device, a FIFO, a folder).
    """
    place = Path(path).absolute()
    for _ in range(40):  # links one by one
        place = Path(os.path.realpath(place.parent), place.name)
        # /dev/stdout is a link to a file, but to one that is open: whoever opened it wants its contents kept
        if place.parts[:2] in (("/", "dev"), ("/", "proc")) and place.parts[2:3] != ("shm",):
            raise OSError(errno.EINVAL, "cannot be written, it is a device or an open file", str(path))
        if not place.is_symlink():
            break
        place = place.parent / os.readlink(place)
    if not place.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no folder to write a file into", str(place.parent))
    if place.exists() and not place.is_file():
        raise OSError(errno.EINVAL, f"cannot be written, it is {_kind(place.stat().st_mode)}", str(place))
    return place


def _open_partial(folder: Path) -> tuple[BinaryIO, Path]:
    """A new temporary file, locked for as long as it is open."""
    while True:
        # a short name, so that every name a file system allows can be written
        partial = folder / f"{PARTIAL}{secrets.token_hex(8)}"
        file = open(partial, "xb")  # tempfile's files would be readable by their owner only
        if _lock(file, wait=True) is None or os.fstat(file.fileno()).st_nlink:
            return file, partial
        file.close()  # another process took it for a file left behind, between open and lock


def remove_partial(folder: Path) -> None:
    """Remove the temporary files that killed processes have left in a folder; those being written stay."""
    names = []
    with contextlib.suppress(OSError):  # a folder may be written into without the right to list it
        names = [name for name in os.listdir(folder) if name.startswith(PARTIAL)]
    for name in names:
        with contextlib.suppress(OSError), open(folder / name, "rb") as file:
            if _lock(file, wait=False):  # a process that is killed loses its locks
                os.unlink(folder / name)


def _lock(file: BinaryIO, wait: bool) -> bool | None:
    """Whether the file could be locked for this open file alone; None where the file system has no locks."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def read_regular(path: str | os.PathLike) -> bytes:
    """The contents of a regular file, copied into memory.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it is a device, a FIFO or a folder, or cannot be read.
    """
    # O_NONBLOCK: opening a FIFO would wait for its writer
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, f"must be a regular file, got {_kind(mode)}", os.fspath(path))
        with open(handle, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)


def _kind(mode: int) -> str:
    kinds = (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket")
    return next((name for test, name in kinds if test(mode)), "a device")


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
