"""What was measured on GPUs, as data: for each backend a shipped table and the user's own, by GPU model and by sizes.

A table is a JSON file

    {"format": 1, ..., "gpus": {"NVIDIA H200": {"tuned": {entry: {"use": ..., "ms": ..., "torch_ms": ...}},
                                                "proven": {"tests": ..., "benchmark": ...}}}}

``key`` makes the entries, tune.py measures them. ``proven`` names the recorded runs that show the kernels right and
faster on that model, and counts only where it is shipped.
"""

import functools
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch


@functools.lru_cache(maxsize=None)
def gpu(index: int | None) -> tuple[str, str]:
    """(name, architecture class) of a CUDA device; of the interpreter for None"""
    if index is None:
        return "interpreter", "interpreter"
    major, minor = torch.cuda.get_device_capability(index)
    # 8.6, 8.9 and 12.x have 99 KiB of shared memory for a program, the others 163 KiB or more
    arch = "sm_86" if major in (8, 12) and (major, minor) != (8, 0) else f"sm_{min(major, 10) * 10}"
    return torch.cuda.get_device_name(index), arch


def key(kernel: str, kind: str, M: int, N: int, K: int, R: int, exact: bool = False) -> str:
    """how a tuned entry is found: R by its power of two, from 16 on, and so is M, which varies with the batch

    kind: "half", "tf32" or "fp32". exact: only for this M; what is faster than plain torch at one is not at every
    other, as tiles fill a GPU in rounds.
    """
    return f"{kernel} {kind} M{M if exact else _power_of_two(M)} N{N} K{K} R{max(16, _power_of_two(R))}"


def _power_of_two(n: int) -> int:
    """the next one"""
    return 1 << max(0, n - 1).bit_length()


class Table:
    """One backend's: the shipped file beside this one, and the user's of the same name."""

    def __init__(self, name: str):
        self.shipped = Path(__file__).with_name(name)
        self._cached = []
        self.read = self.remembered(self._read)

    def user(self) -> Path:
        """where tune.py keeps what it measured: $EFFT_CACHE, or efft_kernels in the user's cache folder"""
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(os.environ.get("EFFT_CACHE") or Path(cache) / "efft_kernels") / self.shipped.name

    def _read(self) -> tuple[dict, dict]:
        """(the shipped table, the user's GPUs), read once"""
        shipped = json.loads(self.shipped.read_text())
        try:
            user = json.loads(self.user().read_text())
            if user["format"] == shipped["format"]:
                return shipped, dict(user["gpus"])
            reason = f"is of format {user['format']}, not {shipped['format']}"
        except FileNotFoundError:
            return shipped, {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"cannot be read: {error!r}"
        warnings.warn(f"{self.user()} {reason}; it is ignored, tune again or delete it", stacklevel=2)
        return shipped, {}

    def tuned(self, gpu: str, entry: str) -> dict | None:
        """what was measured for this entry on a GPU of this name: the user's own, else the shipped"""
        shipped, user = self.read()
        for gpus in (user, shipped["gpus"]):
            if found := gpus.get(gpu, {}).get("tuned", {}).get(entry):
                return found
        return None

    def source(self, gpu: str, entry: str) -> Path:
        """the file that has what ``tuned`` gives"""
        return self.user() if entry in self.read()[1].get(gpu, {}).get("tuned", {}) else self.shipped

    def unproven(self, gpu: str, kernels: str) -> str | None:
        """what is not on record for these kernels on a GPU of this name, or None"""
        record = self.read()[0]["gpus"].get(gpu, {}).get("proven", {})
        for what, sentence in (("tests", "run of the tests"), ("benchmark", "benchmark that shows it faster")):
            if not record.get(what):
                return f"no {sentence} of the {kernels} kernels on an {gpu} is on record"
        return None

    def remembered(self, function: Callable) -> Callable:
        """the function with a cache, which is emptied when the table changes"""
        cached = functools.lru_cache(maxsize=4096)(function)
        self._cached.append(cached)
        return cached

    def forget(self) -> None:
        """read the files anew at the next use"""
        for cached in self._cached:
            cached.cache_clear()

    def use(self, gpu: str, entry: str, value: dict | None) -> None:
        """let an entry count in this process, unwritten, until forget(); None: go back to what is without it"""
        table = self.read()[1].setdefault(gpu, {}).setdefault("tuned", {})
        table.pop(entry, None)
        if value:
            table[entry] = value
        for cached in self._cached:
            if cached is not self.read:
                cached.cache_clear()

    def keep(self, gpu: str, entries: dict[str, dict]) -> None:
        """write these entries to the user's table, beside what it holds, and forget what was only in use"""
        self.forget()
        shipped, gpus = self.read()
        gpus.setdefault(gpu, {}).setdefault("tuned", {}).update(entries)
        self.user().parent.mkdir(parents=True, exist_ok=True)
        _write(self.user(), {"format": shipped["format"], "gpus": gpus})
        self.forget()

    def ship(self, gpu: str, entries: dict[str, dict], proven: dict[str, str]) -> None:
        """write these entries to the shipped table, beside what it holds, and what proves the kernels on this GPU"""
        table = json.loads(self.shipped.read_text())
        found = table["gpus"].setdefault(gpu, {})
        found["proven"] = found.get("proven", {}) | proven
        found.setdefault("tuned", {}).update(entries)
        _write(self.shipped, table)
        self.forget()


def _write(path: Path, table: dict) -> None:
    """a reader sees the old file or the new one"""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        try:
            file.write(lines(table) + "\n")
            file.close()
            os.chmod(file.name, path.stat().st_mode if path.exists() else 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def lines(value, indent: str = "") -> str:
    """JSON with an entry, or a row of defaults, on one line"""
    text, height = json.dumps(value), _height(value)
    if height == 0 or height <= 3 and len(text) <= 180:
        return text
    inner = indent + "  "
    if isinstance(value, dict):
        parts = [f"{json.dumps(name)}: {lines(part, inner)}" for name, part in value.items()]
    else:
        parts = [lines(part, inner) for part in value]
    start, end = "{}" if isinstance(value, dict) else "[]"
    return f"{start}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{end}"


def _height(value) -> int:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if parts is None else 1 + max(map(_height, parts), default=0)
