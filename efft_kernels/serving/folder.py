"""AdapterFolder: the adapter files of a folder, in a bank while they are used and as long as memory allows."""

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path


class DoesNotFit(Exception):
    """There is no room in the budget beside the adapters that are in use; later there may be."""


class AdapterFolder:
    """Adapters by the names of their files, loaded when they are asked for; the one unused for longest goes first.

    A file that was replaced is loaded anew, and requests that began with the old one keep that; a file that was deleted
    is not found any more. Safe to use from several threads.

    Args:
        bank: what holds them: an AdapterBank, or something with its ``add``, ``remove`` and ``bytes``.
        path: of the folder; adapter ``name`` is ``path/name.safetensors``.
        budget: bytes that the adapters in the bank may take together.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, bank, path: str | os.PathLike, budget: int):
        self.bank, self.path, self.budget = bank, Path(path), budget
        if not self.path.is_dir():
            raise FileNotFoundError(f"there is no folder {self.path} for adapters")
        self.loads = self.evictions = 0
        self._sizes: OrderedDict[str, int] = OrderedDict()  # key in the bank -> bytes, the one used last at the end
        self._held: dict[str, int] = {}  # key -> how many requests use it
        self._lock = threading.Lock()

    @property
    def loaded(self) -> int:
        return len(self._sizes)

    @property
    def in_use(self) -> int:
        return len(self._held)

    @property
    def bytes(self) -> int:
        return sum(tuple(self._sizes.values()))

    def names(self) -> list[str]:
        """Of the adapters in the folder."""
        return sorted(file.stem for file in self.path.glob("*.safetensors"))

    def file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[str]:
        """Within this context the adapter is in the bank, under the name that the context gives.

        Raises:
            FileNotFoundError: there is no such adapter.
            DoesNotFit: it cannot be loaded beside those in use.
            ValueError: its file is none of an adapter for the bank's model, or larger than the budget.
        """
        key = self.take(name)
        try:
            yield key
        finally:
            self.give(key)

    def take(self, name: str) -> str:
        """As entering :meth:`hold`."""
        try:
            state = os.stat(self.file(name))
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"there is no adapter {name!r}") from None
        key = f"{name}@{state.st_mtime_ns}.{state.st_ino}"  # a replaced file is another adapter
        with self._lock:  # while a file is read, too: two requests must not load it both
            if key in self._sizes:
                self._sizes.move_to_end(key)
            else:
                self._load(name, key, state.st_size)
            self._held[key] = self._held.get(key, 0) + 1
        return key

    def give(self, key: str) -> None:
        """As leaving :meth:`hold`."""
        with self._lock:
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]

    def _load(self, name: str, key: str, size: int) -> None:
        if size > self.budget:
            raise ValueError(f"adapter {name!r} of {size} bytes is larger than the budget of {self.budget}")
        for old in [old for old in self._sizes if old.rpartition("@")[0] == name and old not in self._held]:
            self._drop(old)
        self._make_room(name, size)
        self.bank.add(key, self.file(name))
        self._sizes[key] = self.bank.bytes(key)
        self.loads += 1
        try:  # in the dtype of the model it may take more than in the file
            self._make_room(name, 0, key)
        except DoesNotFit:
            self._drop(key)
            raise

    def _make_room(self, name: str, size: int, new: str = "") -> None:
        stays = sum(bytes_ for old, bytes_ in self._sizes.items() if old in self._held or old == new)
        if stays + size > self.budget:
            raise DoesNotFit(f"adapter {name!r} does not fit the {self.budget} bytes beside {len(self._held)} in use")
        for old in [old for old in self._sizes if old not in self._held and old != new]:
            if self.bytes + size <= self.budget:
                return
            self._drop(old)

    def _drop(self, key: str) -> None:
        self.bank.remove(key)
        del self._sizes[key]
        self.evictions += 1
