"""Records of what was proven and measured on a device, and the choice that follows from them for one call.

There are two files of one form: the user's, ``tuned.json`` in the cache folder, and the one in this folder, which ships
with the package.

    {"format": 3, "devices": {"NVIDIA H200": {
        "proof": {"cuda": {"sources": ..., "driver": ..., "torch": ..., "triton": ..., "date": ...,
                           "plans": {"hopper 192 single_pass": {"bfloat16": 40, "float16 short": 6}},
                           "dropped": {"mma 64 extended_k": "..."}}},
        "measured": {"lowrank_linear bfloat16 K768 N2304 R16": {"12608": {
            "torch": 114.9, "torch_host": 65.1, "cuda": {"us": 81.0, "host": 29.3, "plan": {...}},
            "triton": {"us": 96.4, "host": 125.0, "plan": {...}}}}}}}}

A proof counts where its sources, driver, torch and triton are those at hand; in the shipped file the driver may differ.
It has the number of cases in each dtype, those of a short battery apart. That of a CPU also has "isa", the instruction
set that a process uses: what was measured with another does not count.
Times are microseconds of one call, on the device, and on the host where that is not the device. ``prove.py`` and
``timing.py`` make these records.
"""

import contextlib
import functools
import importlib
import json
import math
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from ... import storage
from .. import decisions

FORMAT = 3
SHIPPED = Path(__file__).with_name("tuned.json")
GAIN = 0.97  # a kernel is chosen if it takes at most this part of plain torch's time
LINEAR, BACKWARD, MIXED = "lowrank_linear", "lowrank_linear_backward", "mixed_linear"
ALL = [True, False, False, True, True]  # needs of a backward with a frozen weight: (x, weight, bias, down, up)

COMMAND = "python -m efft_kernels.tune"
SOURCES: dict[str, Callable[[], str]] = {}  # of each backend, the digest of what it is made from; set by its module

_caches: list = []
_overrides: dict[str, dict | None] = {}
_unwritten: dict = {"format": FORMAT, "devices": {}}  # what could not be written counts in this process
_lock = threading.Lock()


class Choice(NamedTuple):
    """What is on record for one op at one size."""

    backend: str | None  # the fastest one that gains enough, None where plain torch is the better choice
    torch_us: float  # plain torch, in the better of its two orders
    us: dict[str, float]  # of the best plan of each backend
    plans: dict[str, dict]  # that plan


def cached(function: Callable) -> Callable:
    """The function with a cache that is emptied when a record changes."""
    found = functools.lru_cache(maxsize=4096)(function)
    _caches.append(found)
    return found


def _cached_by_threads(function: Callable) -> Callable:
    """The same for what depends on the number of threads, which is part of a CPU's name on record"""
    found = cached(lambda threads, *given: function(*given))
    return functools.wraps(function)(lambda *given: found(torch.get_num_threads(), *given))


def invalidate() -> None:
    """Read the files again at the next use."""
    for found in _caches:
        found.cache_clear()
    decisions.clear()


@contextlib.contextmanager
def override(backend: str, plan: dict) -> Iterator[None]:
    """Calls of this backend use this plan, wherever it can run. For the battery and the timing; not thread-safe."""
    before = _overrides.get(backend)
    _overrides[backend] = plan
    try:
        yield
    finally:
        _overrides[backend] = before


def overridden(backend: str) -> dict | None:
    return _overrides.get(backend)


@functools.cache
def gpu(index: int | None) -> tuple[str, str]:
    """(name, architecture class) of a CUDA device; of Triton's interpreter for None"""
    if index is None:
        return "interpreter", "interpreter"
    major, minor = torch.cuda.get_device_capability(index)
    # 8.6, 8.9 and 12.x have 99 KiB of shared memory for a block, the others 163 KiB or more
    arch = "sm_86" if major in (8, 12) and (major, minor) != (8, 0) else f"sm_{min(major, 10) * 10}"
    return torch.cuda.get_device_name(index), arch


@functools.cache
def processor() -> str:
    """The CPU's model name; for Arm, which has none in /proc/cpuinfo, the numbers of its maker and of its cores."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    if name := re.search(r"^model name\s*:\s*(.+)$", text, re.M):
        return name.group(1).strip()
    numbers = dict.fromkeys(re.findall(r"^CPU (?:implementer|part)\s*:\s*(\S+)$", text, re.M))
    return " ".join(["Arm", *numbers]) if numbers else "this processor"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return gpu(torch.cuda.current_device() if device.index is None else device.index)[0]
    return f"{processor()}, {torch.get_num_threads()} threads"


@functools.cache
def driver() -> str:
    """The version of the GPU's driver, or of the CUDA that it speaks; "none" without one."""
    try:
        found = re.search(r"\b(\d+\.\d+(\.\d+)?)\b", Path("/proc/driver/nvidia/version").read_text())
        if found:
            return found.group(1)
    except OSError:
        pass
    return str(torch._C._cuda_getDriverVersion()) if torch.cuda.is_available() else "none"


def conditions(backend: str, device: torch.device) -> dict[str, str]:
    """What a proof depends on beside the model of the device."""
    return {
        "sources": SOURCES[backend](),
        "driver": driver() if device.type == "cuda" else "none",
        "torch": torch.__version__,
        "triton": _version("triton"),
    }


@functools.cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def user_file() -> Path:
    return storage.cache_folder() / "tuned.json"


@cached
def _files() -> tuple[dict, dict]:
    """(devices of the user's file, devices of the shipped one)"""
    try:
        shipped = json.loads(SHIPPED.read_text())["devices"]
    except FileNotFoundError:
        shipped = {}
    user = _read_user()
    for name, found in _unwritten["devices"].items():
        user[name] = _merged(user.get(name, {}), found)
    return user, shipped


def _read_user(saving: bool = False) -> dict:
    """The devices of the user's file. One that is about to be replaced (saving) is kept if it is of another form, and
    OSError is raised if it cannot be read now.
    """
    path, what = user_file(), "ignored, tune again or delete it"
    try:
        found = json.loads(path.read_text())
        if found["format"] == FORMAT:
            return _checked(found["devices"])
        reason = f"is of format {found['format']}, not {FORMAT}"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if saving and isinstance(error, OSError):
            raise
        reason = f"cannot be read: {error!r}"
    if saving:
        kept = path.with_name(f"tuned.{time.time_ns()}.json")
        path.rename(kept)
        what = f"kept as {kept.name}"
    warnings.warn(f"{path} {reason}; it is {what}", stacklevel=2)
    return {}


def _checked(devices: dict[str, dict]) -> dict[str, dict]:
    """ValueError, KeyError or TypeError for what this file's form does not have"""
    if _height(devices) > 12:
        raise ValueError("it is nested too deep")
    for device in devices.values():
        for record in device["proof"].values():
            if missing := {"sources", "driver", "torch", "triton", "plans", "dropped"} - record.keys():
                raise ValueError(f"a proof must have {sorted(missing)}")
            # raises TypeError if one of these is no table, or the name is none
            _ = {record.get("isa"): None, **record["dropped"]}, [{**cases} for _, cases in {**record["plans"]}.items()]
        for entry, rows in device["measured"].items():
            _, _, *_ = entry.split()  # at least op and dtype
            for M, row in rows.items():
                found = [value for value in row.values() if isinstance(value, dict)]
                times = [row["torch"], row.get("torch_host", 1), *(value["us"] for value in found)]
                times += [value.get("host", 1) for value in found]
                plans = [value["plan"] for value in found]
                if int(M) < 1 or not all(isinstance(t, int | float) and 0 < t < math.inf for t in times):
                    raise ValueError(f"{entry} M {M}: times must be positive numbers, got {times}")
                if min(_size(entry, int(M))[1]) < 1:
                    raise ValueError(f"{entry} M {M}: a mixed batch has at least one row for each sample")
                if not all(isinstance(plan, dict) for plan in plans):
                    raise ValueError(f"{entry} M {M}: plans must be objects, got {plans}")
                if "cpu" in row and row["cpu"]["plan"].keys() != {"isa"}:
                    raise ValueError(f"{entry} M {M}: a plan of a CPU must have isa alone, got {row['cpu']['plan']}")
    return devices


@_cached_by_threads
def proof(backend: str, device: torch.device) -> dict[str, dict]:
    """{"plans": {name: {dtype: cases}}, "dropped": {name: reason}, ...} on record for this device as it is now; the
    user's first.
    """
    if backend not in SOURCES and backend in ("cuda", "triton", "cpu"):
        with contextlib.suppress(ImportError):  # what is not installed is not proven
            importlib.import_module(f"{__package__.rpartition('.')[0]}.{backend}")
    if backend in SOURCES:
        now, name = conditions(backend, device), device_name(device)
        anywhere = {key: value for key, value in now.items() if key != "driver"}
        for devices, compared in zip(_files(), (now, anywhere)):
            found = devices.get(name, {}).get("proof", {}).get(backend)
            if found and all(found[key] == value for key, value in compared.items()):
                return found
    return {"plans": {}, "dropped": {}}


def proves(proof: dict[str, dict], plan: dict, dtype: str, short: bool = True) -> bool:
    """Whether a plan is proven in a dtype; with or without those that only a short battery ran for"""
    cases = proof["plans"].get(plan_name(plan), {})
    return dtype in cases or (short and f"{dtype} short" in cases)


def unproven(backend: str, device: torch.device) -> str | None:
    """Why no record proves this backend on this device, or None."""
    if proof(backend, device)["plans"]:
        return None
    name, now = device_name(device), conditions(backend, device)
    for devices in _files():
        found = devices.get(name, {}).get("proof", {}).get(backend)
        if isinstance(found, dict):
            if not (different := [key for key, value in now.items() if found.get(key) != value]):
                return f"none of its plans was proven on this {name}: {found.get('dropped')}"
            key = different[0]
            what = "from other sources" if key == "sources" else f"with {key} {found.get(key)}, now it is {now[key]}"
            return f"it was proven on this {name} {what}; prove it again: {COMMAND}"
    return f"not proven on this {name}: {COMMAND}"


def plan_name(plan: dict) -> str:
    """{"single_pass": True, "hopper": False, "tile": 64} -> "single_pass tile64" """
    parts = (
        key if value is True else value if isinstance(value, str) else f"{key}{value}"
        for key, value in plan.items()
        if value is not False
    )
    return " ".join(parts)


def rank_class(R: int) -> int:
    """Ranks that cost the same: the next power of two, from 16 on."""
    return max(16, 1 << max(0, R - 1).bit_length())


def key(
    op: str, dtype: torch.dtype, K: int, N: int, R: int, needs: list[bool] | None = None, A: int = 0, B: int = 0
) -> str:
    """The name of an entry; a backward is measured for each set of low-rank gradients, (x, down, up), apart, and a
    mixed batch for each number of adapters and of samples, A and B.
    """
    mixed = f" A{A} B{B}" if A else ""
    wanted = "" if needs is None else " needs " + _wanted(needs)
    return f"{op} {str(dtype)[6:]} K{K} N{N} R{rank_class(R)}{mixed}{wanted}"


def _wanted(needs: list[bool]) -> str:
    return ",".join(name for name, need in zip(("x", "down", "up"), (needs[0], needs[-2], needs[-1])) if need)


@_cached_by_threads
def choice(device: torch.device, entry: str, M: int) -> Choice | None:
    """What is on record for M rows: measured there, or chosen alike at all nearest smaller and larger sizes.

    The size of a mixed batch is three numbers: adapters, samples, rows of each. A smaller one has no more of any.
    """
    equal, here = _size(entry, M)
    for rows in (sizes.get(equal, {}) for sizes in _rows(device_name(device), device)):
        if here in rows:
            return _choice(rows[here], device, entry)
        above, below = [at for at in rows if _within(here, at)], [at for at in rows if _within(at, here)]
        if above and below:
            nearest = [at for at in above if not any(_within(other, at) for other in above if other != at)]
            nearest += [at for at in below if not any(_within(at, other) for other in below if other != at)]
            if len({_choice(rows[at], device, entry).backend for at in nearest}) == 1:
                return _choice(rows[min(nearest, key=lambda at: abs(math.log(at[-1] / here[-1])))], device, entry)
    return None


@cached
def _rows(name: str, device: torch.device) -> list[dict[str, dict[tuple, dict]]]:
    """{what must be equal: {size: row}} of the user's file, then of the shipped one: rows with a proven plan"""
    found: list[dict[str, dict[tuple, dict]]] = [{}, {}]
    for sizes, devices in zip(found, _files()):
        for entry, rows in devices.get(name, {}).get("measured", {}).items():
            for M, row in rows.items():
                if _proven(row, device, entry):
                    equal, size = _size(entry, int(M))
                    sizes.setdefault(equal, {})[size] = row
    return found


def _size(entry: str, M: int) -> tuple[str, tuple[int, ...]]:
    """(the part of an entry that must be equal, the sizes that may lie between measured ones)"""
    if mixed := re.search(r" A(\d+) B(\d+)", entry):
        A, B = map(int, mixed.groups())
        return entry.replace(mixed[0], ""), (A, B, M // B if B else 0)
    return entry, (M,)


def _within(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    return all(a <= b for a, b in zip(small, large))


def _proven(row: dict, device: torch.device, entry: str) -> dict[str, dict]:
    """{backend: {us, plan}} of the plans in a row that are proven in its dtype on this device as it is now"""
    found = {backend: value for backend, value in row.items() if isinstance(value, dict)}
    if "cpu" in found and found["cpu"]["plan"]["isa"] != recorded_isa():
        del found["cpu"]
    return {b: v for b, v in found.items() if proves(proof(b, device), v["plan"], entry.split()[1])}


def _choice(row: dict, device: torch.device, entry: str) -> Choice:
    found = _proven(row, device, entry)
    us = {backend: value["us"] for backend, value in found.items()}
    able = [b for b, value in found.items() if us[b] <= GAIN * row["torch"] and _keeps_up(value, row)]
    backend = min(able, key=us.get, default=None)
    return Choice(backend, row["torch"], us, {backend: value["plan"] for backend, value in found.items()})


def _keeps_up(value: dict, row: dict) -> bool:
    """Whether a single call takes no longer than one of plain torch, on the host or on the device.

    Without a CUDA graph the host may be what a model waits for, and one call of a Triton kernel costs it more than the
    two or three calls of plain torch.
    """
    return max(value["us"], value.get("host", 0)) <= max(row["torch"], row.get("torch_host", float("inf")))


def slower(backend: str, op: str, tensors: tuple, needs: list[bool] | None = None) -> str | None:
    """Why plain torch, or another backend, is the better choice for this call, or None."""
    entries = _entries(op, tensors, needs)
    if not entries:
        return "it has not been measured"
    for entry, M in entries:
        found = choice(tensors[0].device, entry, M)
        if found is None:
            return f"it has not been measured for {entry}, M {M}"
        if backend not in found.us:
            return f"none of its plans is on record for {entry}, M {M}"
        if found.backend != backend:
            faster = f"{found.backend} {found.us[found.backend]:.4g} us" if found.backend else "too small a gain"
            if found.us[backend] <= GAIN * found.torch_us and backend == min(found.us, key=found.us.get):
                faster = "but one call takes the host longer"
            return f"measured here: {found.us[backend]:.4g} us, plain torch {found.torch_us:.4g} us, {faster}"
    return None


def on_record(op: str, tensors: tuple, needs: list[bool] | None = None) -> bool:
    """Whether a call at these sizes was measured, or lies between two that were chosen alike."""
    entries = _entries(op, tensors, needs)
    return bool(entries) and all(choice(tensors[0].device, entry, M) for entry, M in entries)


def recorded_isa() -> str | None:
    """The CPU's instruction set that the tuner chose for this processor and this number of threads, or None."""
    found = proof("cpu", torch.device("cpu"))
    return found["isa"] if found.get("isa") in found["plans"] else None


def _entries(op: str, tensors: tuple, needs: list[bool] | None) -> list[tuple[str, int]]:
    """[(entry, M)] that a call goes by; M is what varies: rows of x, slices of a group, matrices of one merge"""
    dtype = tensors[0].dtype
    if op.removesuffix("_backward") in (LINEAR, MIXED):
        backward = op.endswith("_backward")
        N, K = tensors[2 if backward else 1].shape
        *A, R, _ = tensors[4].shape  # of up
        mixed = (*A, len(tensors[-1])) if A else ()
        return [(key(op, dtype, K, N, R, (needs or ALL) if backward else None, *mixed), len(tensors[0]))]
    if op.startswith("group_update"):
        (S, P, Q), N = tensors[-2].shape, tensors[-1].shape[1]
        return [(f"{op} {str(dtype)[6:]} P{P} Q{Q} N{N}", S)]
    if op == "merge_":
        count = len(tensors) // 3
        sizes = [(*w.shape, down.shape[1]) for w, down in zip(tensors[:count], tensors[count:])]
        return [(key(op, dtype, K, N, R), sizes.count((N, K, R))) for N, K, R in dict.fromkeys(sizes)]
    return []


def save(
    device: str, proof: dict[str, dict] | None = None, measured: dict[str, dict[str, dict]] | None = None
) -> str | None:
    """Add to the user's file; from then on it counts in this process. Returns why it could not be written, or None.

    Processes that write at once wait for each other, so each finds the other's entries. A record that cannot be written
    (a full disk, a read-only folder) counts in this process all the same.
    """
    new = {"proof": proof or {}, "measured": measured or {}}
    reason = None
    try:
        with _lock, _exclusive():
            devices = _read_user(saving=True)
            devices[device] = _merged(devices.get(device, {}), new)
            storage.write_bytes(user_file(), (lines({"format": FORMAT, "devices": devices}) + "\n").encode())
    except OSError as error:
        held = _unwritten["devices"]
        held[device] = _merged(held.get(device, {}), new)
        reason = f"{user_file()} cannot be written: {error}"
    invalidate()
    return reason


def _merged(old: dict, new: dict) -> dict:
    """A proof under other conditions replaces the old one, and takes the old times of its backend away."""
    found = {"proof": dict(old.get("proof", {})), "measured": dict(old.get("measured", {}))}
    for backend, record in new.get("proof", {}).items():
        before = found["proof"].get(backend, {})
        if all(before.get(name) == record[name] for name in ("sources", "driver", "torch", "triton")):
            plans = {k: v for k, v in before["plans"].items() if k not in record["dropped"]}
            plans |= {k: plans.get(k, {}) | cases for k, cases in record["plans"].items()}
            dropped = {k: v for k, v in before["dropped"].items() if k not in record["plans"]} | record["dropped"]
            record = before | record | {"plans": plans, "dropped": dropped}
        else:
            found["measured"] = {
                entry: {M: {name: value for name, value in row.items() if name != backend} for M, row in rows.items()}
                for entry, rows in found["measured"].items()
            }
        found["proof"][backend] = record
    for entry, rows in new.get("measured", {}).items():
        kept = found["measured"].get(entry, {})
        found["measured"][entry] = kept | {M: kept.get(M, {}) | row for M, row in rows.items()}
    return found


@contextlib.contextmanager
def _exclusive() -> Iterator[None]:
    """One writing process at a time; the lock goes with the process that holds it."""
    storage.cache_folder().mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows: the file is still replaced as a whole
        yield
        return
    with open(storage.cache_folder() / "tuned.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def lines(value, indent: str = "") -> str:
    """JSON whose lines are filled with short entries, and have one long entry each; ValueError for numbers that are
    not finite
    """
    text, height = json.dumps(value, allow_nan=False), _height(value)
    if height == 0 or (height <= 4 and len(text) <= 1000):
        return text
    inner = indent + "  "
    if isinstance(value, dict):
        parts = [f"{json.dumps(name)}: {lines(part, inner)}" for name, part in value.items()]
    else:
        parts = [lines(part, inner) for part in value]
    start, end = "{}" if isinstance(value, dict) else "[]"
    filled: list[str] = []
    for part in parts:
        if filled and "\n" not in filled[-1] + part and len(inner) + len(filled[-1]) + len(part) <= 236:
            filled[-1] += f", {part}"
        else:
            filled.append(part)
    return f"{start}\n{inner}" + f",\n{inner}".join(filled) + f"\n{indent}{end}"


def _height(value) -> int:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if parts is None else 1 + max(map(_height, parts), default=0)
