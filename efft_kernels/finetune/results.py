"""The end of a run: its final measurement and the files that it leaves."""

import contextlib
import datetime
import importlib.metadata
import json
import logging
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import storage
from . import checkpoints, methods, outputs, page, plots, predictions
from .bars import bar
from .checkpoints import Progress
from .data import Data
from .evaluation import evaluate
from .finished import read_record
from .models import preparation_of, public_name
from .prepared import Prepared, check_same, describe_device, make_adapted, make_identity
from .settings import Settings
from .trackers import Trackers

log = logging.getLogger("efft_kernels.finetune")

# of metrics, as people read them
NAMES = {
    **{"top1": "top-1", "mean_class": "mean over classes", "loss": "loss"},
    **{"mean_ap": "mean average precision", "f1": "F1", "exact": "all labels right"},
}


@dataclass(frozen=True)
class Result:
    """The result of a run. Its files are in ``out``: adapter.safetensors, metrics.json, predictions.csv, curves.png,
    report.html, logs/.
    """

    metrics: dict  # of the final weights: part of the data -> the metrics of evaluation.evaluate
    history: list[dict]  # one entry per epoch
    parameters: int  # trained, without the head
    head_parameters: int
    images_per_second: float  # while training, over all processes
    epoch: int  # of the final weights
    adapter: Path
    out: Path


def read_finished(settings: Settings, data: Data, out: Path, main: bool) -> Result | None:
    """The result of the run in a folder if it is finished.

    Raises:
        ValueError: the folder holds another run, or files of another version.
    """
    path = out / "metrics.json"
    if not path.is_file():
        return None
    found = read_record(out, identified=True)
    identity, result = found["identity"], found["result"]
    weights, checkpoint = identity["weights"], found["settings"]["checkpoint"]
    check_same(out, identity, make_identity(settings, data, weights) | {"contents": data.contents()})
    if settings.checkpoint != checkpoint:  # only then, because it takes reading them
        weights = methods.fingerprint(make_adapted(settings, len(data.classes)))
        check_same(out, identity, make_identity(settings, data, weights))
    if main:
        checkpoints.clear(out)  # those of a run that was killed after it wrote its results
        log.info(f"{out} holds this run, finished; resume=false would repeat it")
    result = {name: v for name, v in result.items() if name in Result.__dataclass_fields__}
    result |= {"adapter": out / result["adapter"]}
    return Result(**result, history=found["history"], out=out)


def finish(run: Prepared, progress: Progress, logs: Trackers) -> Result:
    """Measure the final weights and write the results.

    Raises:
        checkpoints.StorageError: a file cannot be written; the checkpoint of the last step stays.
    """
    s, data = run.settings, run.data
    epoch = progress.history[-1]["epoch"]
    metrics, rows, parts = {}, [], data.parts()
    with contextlib.ExitStack() as stack:
        if s.select == "val":
            checkpoints.set_weights(progress.model, progress.best["weights"])
            epoch = progress.best["epoch"]
        else:
            stack.enter_context(progress.averaged())
        for name in [name for name in ("val", "test") if name in parts] or ["train"]:
            part, found = parts[name].unchanged(s.interpolation), []
            with bar(run.show, len(part), f"measuring on {name}", "img") as shown:
                metrics[name] = evaluate(run, progress.model, part, shown, found)
            rows += predictions.rows_of(name, part, found, data.classes)
        speed = progress.seen / progress.seconds if progress.seconds else 0.0
        sizes = {"parameters": run.parameters, "head_parameters": run.head_parameters}
        result = {"metrics": metrics, **sizes, "images_per_second": speed, "epoch": epoch, "adapter": outputs.FILES[0]}
        record = {"result": result, "classes": list(data.classes), "multilabel": data.multilabel}
        record |= {"history": progress.history, "settings": asdict(s), "identity": run.identity}
        record |= {"run": _circumstances(run, progress), "versions": _versions()}
        record = json.loads(json.dumps(record))  # as "report" will read it
        weights = checkpoints.get_weights(progress.model)
        on_main(run, lambda: _write(run, progress, record, rows, weights))
    logs.close()
    return Result(**{**result, "adapter": run.out / result["adapter"]}, history=progress.history, out=run.out)


def _write(run: Prepared, progress: Progress, record: dict, rows: list, weights: dict[str, Tensor]) -> None:
    """Write the files of a finished run; metrics.json last, because its presence means that the run is finished."""
    s = run.settings
    with checkpoints.storing(run.out, "the results"):
        model = run.accelerator.unwrap_model(progress.model)
        if s.fsdp:  # its weights are shards; a new model takes the complete ones
            model = make_adapted(s, len(record["classes"]))
            model.load_state_dict(weights, strict=False)
        for p in run.unused:
            p.requires_grad_(True)
        adapter, curves, table, report, metrics = (run.out / name for name in outputs.FILES)
        said = preparation_of(model, s), record["classes"], record["multilabel"]
        methods.save(s.method, s.options, model, adapter, public_name(s.model), *said)
        storage.write(curves, lambda file: plots.curves(file, record))
        storage.write_bytes(table, predictions.to_csv(rows))
        storage.write_bytes(report, page.build(record, rows, page.loader(run.data)).encode())
        storage.write_bytes(metrics, json.dumps(record, indent=1).encode())
        checkpoints.clear(run.out)


def _circumstances(run: Prepared, progress: Progress) -> dict:
    """How the run was done, for its report."""
    plan = next(iter(run.model.efft.values())).plan if hasattr(run.model, "efft") else None
    return {
        "command": shlex.join(["efft-finetune", *sys.argv[1:]]) if "finetune" in sys.argv[0] else "from Python",
        "device": describe_device(run.accelerator),
        "processes": run.accelerator.num_processes,
        "seconds": round(progress.seconds, 3),
        "peak_memory": _peak_memory(run.accelerator.device),
        "parameters_of_model": sum(p.numel() for p in run.model.parameters()),
        "method": methods.METHODS[run.settings.method].meaning,
        "options": {**methods.METHODS[run.settings.method].options, **run.settings.options},
        "plan": None if plan is None else str(plan),
        "images": {name: len(part) for name, part in run.data.parts().items()},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _peak_memory(device: torch.device) -> int | None:
    """Bytes of the device that this process took at most; on a CPU its whole memory. None where that is not known."""
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:  # not a POSIX system
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def on_main(run: Prepared, write) -> None:
    """Call write() on the main process; a StorageError there is raised on every process."""
    failure = None
    if run.main:
        try:
            write()
        except checkpoints.StorageError as error:
            failure = error
    if run.accelerator.num_processes > 1:
        said = [None if failure is None else (failure.errno, failure.strerror)]
        torch.distributed.broadcast_object_list(said, 0)
        failure = said[0] and checkpoints.StorageError(*said[0])
    if failure:
        raise failure


def _versions() -> dict[str, str]:
    found = {}
    for name in ("efft_kernels", "torch", "timm", "transformers", "accelerate"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {"python": sys.version.split()[0], **found}
