"""Series of fine-tuning runs: their settings, their results, and the work of doing those that are missing.

A run is plain data and its result a line of runs.csv. There is no other state, so after an interruption the next call
does what is missing, and machines that share a folder share results.
"""

import concurrent.futures
import csv
import datetime
import fcntl
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # record.py is there
from record import FORMAT, commit, installed, machine, versions, write_csv, write_json


@dataclass(frozen=True)
class Run:
    """One training and its measurement.

    Settings are those of efft_kernels.finetune that differ from its defaults, and three more: ``test_images``, the
    number of test images to use, ``probe``, options of linear_probe.py, which then replaces the training loop, and
    ``images``, the digest of the lists of a data set that is not built in.
    """

    data: str
    method: str  # its name in the tables
    seed: int
    part: str  # "test": train on all 1000 images, measure on test images; "val": train on 800, measure on the other 200
    settings: dict

    @property
    def name(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        words = re.sub(r"[^A-Za-z0-9_.-]+", "_", f"{self.data}.{self.method}.{self.part}.{self.seed}")
        return f"{words}.{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Places:
    """What a run needs of this machine; it does not identify the run."""

    data: str | None = None  # folder of the data sets; None for built-in sources
    checkpoint: str | None = None
    device: str = "auto"
    bundle: str | None = None  # file of bundle.py, for the built-in sources
    deadline: float | None = None  # a time.time() at which every run must have ended
    keep: str | None = None  # folder for the files of runs that are done one at a time, in folders with their names

    def adapter(self, run: Run) -> Path:
        """The file that a run leaves with ``keep``."""
        return Path(self.keep, run.name, "adapter.safetensors")


class Store:
    """The results of runs: a line each in FOLDER/runs.csv; runs.json has the environments that they were made in.

    Processes and machines may share the folder. A result is added under a lock, by replacing the file, and readers
    read the lines before the environments, which only grow, so they need no lock; a killed process leaves no part of a
    line.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "runs.csv"
        self._read: tuple[object, dict[str, dict]] = None, {}  # (version of the file, {name of a run: its record})

    def get(self, run: Run) -> dict | None:
        return self._records().get(run.name)

    def put(self, run: Run, record: dict) -> dict:
        """Add the result of a run, or replace it."""
        with self.path.with_name(".runs.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            records = self._records() | {run.name: record}
            about = self.path.with_suffix(".json")
            head = {"benchmark": "runs", "format": FORMAT, **(json.loads(about.read_text()) if about.exists() else {})}
            environments = head.setdefault("environments", [])
            rows = [_row(record, environments) for record in records.values()]
            # first the environments that lines refer to, which keep their numbers
            write_json(about, head)
            write_csv(self.path, rows)
        return record

    def all(self) -> list[dict]:
        return list(self._records().values())

    def _records(self) -> dict[str, dict]:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return {}
        version = found.st_ino, found.st_mtime_ns, found.st_size
        if self._read[0] != version:
            self._read = version, {Run(**record["run"]).name: record for record in self._load()}
        return self._read[1]

    def _load(self) -> list[dict]:
        try:
            text = self.path.read_text()
            head = json.loads(self.path.with_suffix(".json").read_text())
            if head["format"] != FORMAT:
                raise ValueError(f"expected format {FORMAT}, got {head['format']!r}")
            if not text.endswith("\n"):
                raise ValueError("the last line is cut off")
            lines = csv.DictReader(io.StringIO(text), strict=True)
            return [_record(line, head["environments"]) for line in lines]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, OSError, csv.Error) as error:
            raise ValueError(
                f"{self.path}: expected the results of runs: {error!r}; delete the damaged lines to have them repeated"
            ) from error


RUN, ENVIRONMENT, SETTING = ("data", "method", "part", "seed"), ("machine", "versions", "commit"), "settings."


def _row(record: dict, environments: list[dict]) -> dict[str, str]:
    """The line of a record. Its environment is appended to those that are known, if it is a new one."""
    environment = {key: record.get(key) for key in ENVIRONMENT}
    if environment not in environments:
        environments.append(environment)
    run, found = record["run"], {key: value for key, value in record.items() if key not in ("run", *ENVIRONMENT)}
    cells = {key: run[key] for key in RUN} | found | {"environment": environments.index(environment)}
    row = {key: "" if value is None else _cell(value) for key, value in cells.items()}
    return row | {SETTING + key: _cell(value) for key, value in run["settings"].items()}


def _record(line: dict[str, str], environments: list[dict]) -> dict:
    """The record of a line; an empty cell is a key that the record does not have, or a top1 of None."""
    cells = {key: _value(text) for key, text in line.items() if text != ""}
    settings = {key.removeprefix(SETTING): value for key, value in cells.items() if key.startswith(SETTING)}
    run = {key: cells.pop(key) for key in RUN} | {"settings": settings}
    environment = environments[cells.pop("environment")]
    found = {key: value for key, value in cells.items() if not key.startswith(SETTING)}
    return {"run": run, "top1": None, **found, **environment}


def _cell(value) -> str:
    """A value as JSON; a string without quotation marks, unless it would be read as something else, as an empty cell
    or an end of a line would.
    """
    plain = isinstance(value, str) and value.isprintable() and value and _value(value) == value
    return value if plain else json.dumps(value)


def _value(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text


def measure(run: Run, places: Places, after_epoch: Callable[[int, float], None] | None = None) -> dict:
    """Train and measure. A run that diverges has the accuracy None. SIGTERM raises KeyboardInterrupt as SIGINT does.

    Args:
        after_epoch: called after each epoch with its number and the accuracy then of a run on validation images, in %;
            what it raises ends the run without a record. Measuring more often changes no result.
    """
    from efft_kernels.finetune.loop import Diverged, Interrupted, train
    from efft_kernels.finetune.settings import Settings

    settings, data, probe = _prepared(run, places, watched=after_epoch is not None)
    report = after_epoch and (lambda entry: after_epoch(entry["epoch"], entry["val"]["top1"]))
    began, spent = time.perf_counter(), time.process_time()
    if probe:
        found = _probed(run, data, settings, places, probe)
    else:
        with tempfile.TemporaryDirectory(prefix="efft_run_") as out:
            out = places.adapter(run).parent if places.keep else out
            # an interrupted run is repeated from its start, so it needs no checkpoints
            made = Settings(**settings, data=data, out=out, seed=run.seed, device=places.device, save_every=10**9)
            try:
                result = train(made, progress=False, after_epoch=report)
                found = {**result.metrics["test"], "parameters": result.parameters}
                found |= {"head_parameters": result.head_parameters}
                found |= {"train_top1": [round(entry["train"]["top1"], 2) for entry in result.history]}
            except Interrupted as error:  # stops all runs, not only this one
                raise KeyboardInterrupt(str(error)) from error
            except Diverged as error:
                found = {"top1": None, "diverged": str(error)}
    return recorded(run, found, time.perf_counter() - began, time.process_time() - spent)


def measure_together(runs: list[Run], places: Places) -> list[dict]:
    """As measure() for runs that together.shared() says can be trained in one pass; each has its share of the time."""
    import together
    from efft_kernels.finetune.settings import Settings

    began, spent, settings = time.perf_counter(), time.process_time(), []
    for run in runs:
        own, data, probe = _prepared(run, places)
        if probe:
            found = [_probed(run, data, own, places, probe)]
            continue
        settings.append(Settings(**own, data=data, out="none", seed=run.seed, device=places.device))
    if settings:
        found = together.measure(settings, places.deadline)
    share = [(time.perf_counter() - began) / len(runs), (time.process_time() - spent) / len(runs)]
    return [recorded(run, one, *share) for run, one in zip(runs, found, strict=True)]


def _prepared(run: Run, places: Places, watched: bool = False) -> tuple[dict, str, dict | None]:
    """(settings with this machine's checkpoint, the name of the images, options of a probe)"""
    settings = {key: value for key, value in run.settings.items() if key != "images"}
    data = opened(run, places, settings.pop("test_images", None), watched)
    if places.checkpoint and settings.get("checkpoint") != "random":
        settings["checkpoint"] = places.checkpoint
    return settings, data, settings.pop("probe", None)


def _probed(run: Run, data: str, settings: dict, places: Places, probe: dict) -> dict:
    import linear_probe

    return linear_probe.measure(data, settings, run.seed, places.device, **probe)


def recorded(run: Run, found: dict, seconds: float, cpu_seconds: float) -> dict:
    """The record of a run: what was found, where and when."""
    for name in ("top1", "mean_class"):
        if found.get(name) is not None:
            found[name] = round(found[name], 4)  # the metrics are float32
    if found.get("loss") is not None:
        found["loss"] = float(f"{found['loss']:.6g}")
    return {
        "run": asdict(run),
        **found,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine(),
        "versions": versions() | installed("timm", "accelerate", "numpy", "pillow"),
        "commit": commit(),
    }


def weights_named(checkpoint: str) -> str:
    """What identifies these weights in the settings of a run: the name of a file and a digest of it.

    Raises:
        ValueError: it is no file, and neither "random" nor "download".
    """
    if checkpoint in ("random", "download"):
        return checkpoint
    if not Path(checkpoint).is_file():
        raise ValueError(f"--checkpoint must be a file, 'download' or 'random', got {checkpoint}")
    return f"{Path(checkpoint).name} {_digest(Path(checkpoint))}"


def images_named(data: str, places: Places) -> dict[str, str]:
    """What identifies the images of a run in its settings: a digest of the lists in their folder, if they have one."""
    if places.data is None:
        return {}
    lists = sorted(file for part in ("train", "val", "test") for file in Path(places.data, data).glob(f"{part}*.txt"))
    found = " ".join(f"{file.name} {_digest(file)}" for file in lists)
    return {"images": hashlib.sha256(found.encode()).hexdigest()[:12]}


@functools.cache
def _digest(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as content:
        while part := content.read(1 << 24):
            found.update(part)
    return found.hexdigest()[:12]


def opened(run: Run, places: Places, test_images: int | None, watched: bool = False) -> str:
    """Register the images of a run as a source, with those to measure on as its test part; returns its name.

    watched: those of a run on validation images are measured after each epoch as well. They choose no weights.
    """
    import bundle  # imports sources, which registers its data

    from efft_kernels.finetune.data import SOURCES, Source, open_data
    from efft_kernels.finetune.images import joined

    if places.bundle:
        bundle.use(Path(places.bundle))
    if places.data is None and run.data not in SOURCES:
        raise ValueError(f"--datasets must be of {', '.join(sorted(SOURCES))}, got {run.data!r}")
    if places.data is None:
        found = SOURCES[run.data]()
    else:
        parts = open_data(Path(places.data) / run.data, hold_out=True)
        found = Source(*(part and part.images for part in (parts.train, parts.val, parts.test)), parts.classes)
    if run.part == "val":
        train, test = found.train, found.val
    else:
        train, test = joined(found.train, found.val), found.test
        test = bundle.drawn(test, test_images)
    watched = watched and run.part == "val"
    name = f"{run.data}, for {run.part}" + ", watched" * watched
    SOURCES[name] = lambda: Source(train, test if watched else None, test, found.classes)
    return name


def complete(
    runs: Iterable[Run], store: Store, places: Places, workers: int = 1, label: str = "runs", together: int = 0
) -> tuple[list[dict], dict[str, str]]:
    """Do the runs whose results or files are missing. Returns (records in order, {name of a failed run: why}).

    Args:
        together: at most so many runs in one pass; 0 for the training loop of efft_kernels.finetune, a run at a time.
    """
    import tqdm

    runs = list({run.name: run for run in runs}.values())
    missing = [run for run in runs if _missing(run, store, places)]
    failures = {}
    with tqdm.tqdm(total=len(runs), initial=len(runs) - len(missing), desc=label, unit="run") as bar:

        def take(group: list[Run], result: Callable[[], list[dict]]) -> None:
            try:
                for run, record in zip(group, result(), strict=True):
                    store.put(run, record)
            except (ValueError, OSError, RuntimeError) as error:
                failures.update((run.name, f"{type(error).__name__}: {error}") for run in group)
                if isinstance(error, concurrent.futures.BrokenExecutor):  # a worker was killed
                    _pool.cache_clear()
            bar.set_postfix_str(f"{group[0].data} {group[0].method}")
            bar.update(len(group))

        groups = passes(missing, together) if together else [[run] for run in missing]
        if workers <= 1:
            for group in groups:
                take(group, lambda: measured(group, store, places, bool(together)))
        elif missing:
            pool = _pool(workers)
            futures = {pool.submit(measured, group, store, places, bool(together)): group for group in groups}
            try:
                for future in concurrent.futures.as_completed(futures):
                    take(futures[future], future.result)
            except BaseException:
                _pool.cache_clear()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [record for run in runs if (record := store.get(run)) is not None], failures


def _missing(run: Run, store: Store, places: Places) -> bool:
    record = store.get(run)
    return record is None or bool(places.keep and record["top1"] is not None and not places.adapter(run).is_file())


def measured(group: list[Run], store: Store, places: Places, together: bool) -> list[dict]:
    """The records of runs of one pass, or of one run, but for those that another process has done by now.

    Raises:
        TimeoutError: there is not enough time left.
    """
    left = [run for run in group if _missing(run, store, places)]
    if left and places.deadline and time.time() >= places.deadline:
        raise TimeoutError("no time was left")
    made = measure_together(left, places) if left and together else [measure(run, places) for run in left]
    by_name = {run.name: record for run, record in zip(left, made, strict=True)}
    return [by_name.get(run.name) or store.get(run) for run in group]


def passes(runs: list[Run], most: int) -> list[list[Run]]:
    """The runs in groups of at most so many that can be trained together, in the order of their first runs."""
    from together import shared

    groups: dict[object, list[list[Run]]] = {}
    for run in runs:
        common = shared(run.settings["method"], run.settings) if "probe" not in run.settings else ()
        found = groups.setdefault((run.part, common) if common else run.name, [[]])
        if len(found[-1]) == most:
            found.append([])
        found[-1].append(run)
    return [group for found in groups.values() for group in found]


@functools.lru_cache(1)  # the workers keep the images that they have read
def _pool(workers: int) -> concurrent.futures.ProcessPoolExecutor:
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    return concurrent.futures.ProcessPoolExecutor(workers, context, _start, (threads, os.getpid()))


def _start(threads: int, parent: int) -> None:
    torch.set_num_threads(threads)

    def leave_with_the_parent() -> None:  # a killed parent cannot stop its workers
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=leave_with_the_parent, daemon=True).start()


def choose(runs: list[Run], store: Store) -> Run:
    """The run with the smallest loss on validation images, whose top-1 has steps of half a point; the first of several.

    Raises:
        ValueError: all diverged or failed.
    """
    return choose_together({runs[0].data: runs}, store)[runs[0].data]


def choose_together(runs: dict[str, list[Run]], store: Store) -> dict[str, Run]:
    """For each data set the run with the setting whose mean loss on validation images over all data sets is smallest.

    Args:
        runs: data set -> a run for each setting, in the same order for all of them.

    Raises:
        ValueError: every setting diverged or failed on some data set.
    """
    points = list(zip(*runs.values(), strict=True))

    def loss(point: tuple[Run, ...]) -> float:
        found = [store.get(run) or {} for run in point]
        losses = [math.inf if record.get("top1") is None else record.get("loss", math.inf) for record in found]
        return math.inf if any(map(math.isnan, losses)) else sum(losses) / len(losses)

    best = min(points, key=loss)
    if not math.isfinite(loss(best)):
        raise ValueError(f"all {len(points)} settings of {best[0].method} diverged or failed on {' or '.join(runs)}")
    return dict(zip(runs, best))


def tested(run: Run, seed: int, **settings) -> Run:
    """The run on test images with the settings of a run on validation images."""
    return replace(run, part="test", seed=seed, settings=run.settings | settings)


def command(name: str, work: Callable[[], dict[str, str]]) -> int:
    """Do the work of a command, which returns why runs failed: the exit status. Errors are a line on stderr."""
    try:
        failures = work()
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: stopped; the same command continues with the missing runs", file=sys.stderr)
        return 75
    for run, why in failures.items():
        print(f"failed: {run}: {why}", file=sys.stderr)
    return int(bool(failures))
