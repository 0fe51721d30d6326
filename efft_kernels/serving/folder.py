"""AdapterFolder: the adapter files of a folder, loaded into a bank on use, evicted to stay within a memory budget."""

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from ..hub import local_folder
from .uploads import ADAPTER_NAME


class DoesNotFit(Exception):
    """The budget has no room next to the adapters that are in use now. It may have later."""


class TooLarge(ValueError):
    """An adapter that takes more memory than the budget."""


class AdapterFolder:
    """Adapters by file name. They load on first use; the least recently used are evicted to stay within the budget.

    An adapter that is held is not evicted. A file that was replaced is loaded again, and holders of the old one keep
    it; a file that was deleted is not found any more. Thread-safe.

    Args:
        bank: holds the loaded adapters: an AdapterBank, or an object with its ``read``, ``add`` and ``remove``.
        path: the folder; adapter ``name`` is the file ``path/name.safetensors``. "hf-hub:OWNER/NAME" stands for the
            files of a repository as they are when this object is made.
        budget: bytes that the loaded adapters may take together.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, bank, path: str | os.PathLike, budget: int):
        self.bank, self.budget = bank, budget
        self.path = Path(local_folder(path, ("*.safetensors", "*.labels.txt")))
        if not self.path.is_dir():
            raise FileNotFoundError(f"there is no folder {self.path} for adapters")
        self.loads = self.evictions = 0
        self._sizes: OrderedDict[str, int] = OrderedDict()  # key in the bank -> bytes, most recently used last
        self._too_large: dict[str, tuple[str, int]] = {}  # name -> key and bytes of its file, if they exceed the budget
        self._holders: dict[str, int] = {}  # key -> number of contexts that hold it
        self._lock = threading.Lock()

    @property
    def loaded(self) -> int:
        """Number of adapters in the bank."""
        return len(self._sizes)

    @property
    def in_use(self) -> int:
        """Number of adapters that are held."""
        return len(self._holders)

    @property
    def bytes(self) -> int:
        """Memory of the adapters in the bank."""
        return sum(tuple(self._sizes.values()))

    def names(self) -> list[str]:
        """Names of the adapters in the folder that can be asked for, sorted."""
        return [name for name in self.files() if ADAPTER_NAME.fullmatch(name) and self.file(name).is_file()]

    def files(self) -> list[str]:
        """Names of all there is in the folder with that suffix, without it, sorted; they may hold any characters."""
        return sorted(file.stem for file in self.path.glob("*.safetensors"))

    def file(self, name: str) -> Path:
        """Path of an adapter's file."""
        return self.path / f"{name}.safetensors"

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[str]:
        """Keep an adapter in the bank within this context, which gives the adapter's key there.

        Raises:
            FileNotFoundError: there is no such adapter.
            DoesNotFit: there is no room for it next to the adapters that are held.
            TooLarge: a ValueError: it takes more memory than the budget.
            ValueError: its file is not an adapter for the bank's model.
        """
        try:
            s = os.stat(self.file(name))
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"there is no adapter {name!r}") from None
        # a replaced file is another adapter, also where the time of its change was set
        key = f"{name}@{s.st_mtime_ns}.{s.st_ctime_ns}.{s.st_ino}.{s.st_size}"
        with self._lock:  # kept while a file is read, so that two requests do not both load it
            if key in self._sizes:
                self._sizes.move_to_end(key)
            else:
                self._load(name, key)
            self._holders[key] = self._holders.get(key, 0) + 1
        try:
            yield key
        finally:
            with self._lock:
                self._holders[key] -= 1
                if not self._holders[key]:
                    del self._holders[key]

    def _load(self, name: str, key: str) -> None:
        there, size = self._too_large.get(name, ("", 0))
        if there != key:
            adapter = self.bank.read(self.file(name), strict=True)
            size = adapter.bytes()
        if size > self.budget:
            self._too_large[name] = key, size  # it is not read again
            raise TooLarge(f"adapter {name!r} of {size} bytes is larger than the budget of {self.budget}")
        for old in [old for old in self._sizes if old.rpartition("@")[0] == name and old not in self._holders]:
            self._evict(old)
        self._make_room(name, size)
        self.bank.add(key, adapter)
        self._sizes[key] = size
        self.loads += 1

    def _make_room(self, name: str, size: int) -> None:
        """Evict until ``size`` more bytes fit, or raise DoesNotFit before anything is evicted."""
        if sum(self._sizes[key] for key in self._holders) + size > self.budget:
            in_use = len(self._holders)
            raise DoesNotFit(f"adapter {name!r} does not fit the {self.budget} bytes next to {in_use} in use")
        for key in [key for key in self._sizes if key not in self._holders]:
            if self.bytes + size <= self.budget:
                return
            self._evict(key)

    def _evict(self, key: str) -> None:
        self.bank.remove(key)
        del self._sizes[key]
        self.evictions += 1
