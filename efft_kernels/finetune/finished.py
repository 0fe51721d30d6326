"""Use a finished run: restore its model, prepare images for it, merge it into a plain checkpoint."""

import json
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor, nn

from ..hub import PREFIX, local_folder
from ..merge import merge
from ..storage import write_bytes
from . import checkpoints, methods
from .data import seed_all
from .models import make_model, preparation_of
from .settings import Settings

_NUMBER, _METRICS, _IDENTITY = int | float, {"*": int | float}, {"data": str, "contents?": str, "weights": str}
# what is read of a record; "?" ends the names of what an earlier version did not write, "*" stands for any name
_RECORD = {
    "classes": [str],
    "result": {
        "metrics": {"*": _METRICS}, "parameters": int, "head_parameters": int, "images_per_second": _NUMBER,
        "epoch": int, "adapter": str,
    },
    "settings": {"data": str, "out": str, "model": str, "method": str, "checkpoint": str | None},
    "history": [{"epoch": int, "lr": _NUMBER, "train?": _METRICS, "val?": _METRICS}],
    "versions": {"*": str},
    "multilabel?": bool,
    "identity?": _IDENTITY,
    "run?": {
        "seconds?": _NUMBER, "peak_memory?": int | None, "parameters_of_model?": int, "images?": {"*": int},
        "options?": dict, "command?": str, "device?": str, "method?": str, "date?": str,
    },
}  # fmt: skip


def restore(out: str | Path, checkpoint: str | None = None) -> tuple[nn.Module, dict]:
    """The trained model of a finished run, in evaluation mode, and the contents of its metrics.json.

    Args:
        out: the folder of the run, or "hf-hub:OWNER/NAME" for one that was exported to the hub.
        checkpoint: the pre-trained weights, if they have moved since; of a model in a folder that folder.

    Raises:
        FileNotFoundError: there is no finished run, or its pre-trained weights are gone.
        ValueError: files of another version, or pre-trained weights that are not those of the run.
    """
    out = local_folder(out, ("metrics.json", "*.safetensors"))
    record = read_record(out, identified=True)
    settings, result, classes = Settings(**record["settings"]), record["result"], record["classes"]
    name, weights = settings.model, checkpoint or settings.checkpoint
    kind = name.partition(":")[0]
    if checkpoint and kind in ("hf", "local-dir") and Path(checkpoint).is_dir():
        name, weights = f"{kind}:{checkpoint}", settings.checkpoint
    if weights == "random":
        seed_all(f"model {settings.seed}")
    try:
        model = make_model(name, len(classes), settings.image_size, weights)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; if it has moved, set checkpoint to its new place") from error
    adapter = Path(out) / result["adapter"]
    expected = preparation_of(model, settings), tuple(classes)
    for stated, wanted, what in zip(methods.read_needs(adapter), expected, ("preparation of images", "classes")):
        if stated not in (None, wanted):
            raise ValueError(f"{adapter} must be the file of this run, but it states another {what}: {stated}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the digest of all weights, below, is stricter than the samples
        methods.load(model.to(getattr(torch, settings.dtype)), adapter)
    if methods.fingerprint(model) != record["identity"]["weights"]:
        raise ValueError(
            f"checkpoint must be the weights that the run in {out} started from, got others in "
            f"{checkpoint or weights!r}"
        )
    return model.eval(), record


def beside(run: str | Path, name: str) -> Path:
    """The path of a file in the folder of a run.

    Raises:
        ValueError: a run on the hub, which has no folder here.
    """
    if str(run).startswith(PREFIX):
        raise ValueError(f"out must name a file, because {run} has no folder here")
    return Path(run) / name


def read_record(out: str | Path, *, identified: bool = False, later: bool = False) -> dict:
    """The contents of metrics.json of a finished run, in a folder or on the hub.

    Args:
        out: as for :func:`restore`.
        identified: whether it must have the digests of the images and weights, by which a run is known again.
        later: whether it may have settings of a later version.

    Raises:
        FileNotFoundError: there is no finished run. ValueError: a file of another version.
    """
    path = Path(local_folder(out, ("metrics.json", "*.safetensors"))) / "metrics.json"
    if path.parent.is_file():
        raise FileNotFoundError(f"RUN must be the folder that a run left, but {out} is a file")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: there is no finished run in {out}")
    try:
        record = json.loads(path.read_text())
        if problem := _misfit(record, _RECORD | {"identity": _IDENTITY} if identified else _RECORD):
            raise ValueError(problem)
        if not {"test", "val", "train"} & set(record["result"]["metrics"]):
            raise ValueError("result.metrics has none of test, val and train")
        there, known = set(record["settings"]), {field.name for field in fields(Settings)}
        if lost := (known & set(record.get("identity", ()))) - there:  # it would count as its default
            raise ValueError(f"it lacks settings.{min(lost)}")
        if (unknown := there - known) and not later:
            raise ValueError(f"this version has no setting {min(unknown)!r}")
        Settings(**{name: record["settings"][name] for name in there & known})
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not what a run of this version leaves: {error}") from error
    return record


def _misfit(value, shape, at: str = "") -> str | None:
    """What a part of a record lacks, or has of another type than the shape, in words; None if it fits."""
    if not isinstance(value, type(shape) if isinstance(shape, dict | list) else shape):
        return f"{at[:-1] or 'it'} must not be {str(value)[:40]!r}"
    if isinstance(shape, list):
        shape, value = {"*": shape[0]}, dict(enumerate(value))
    for name, inner in shape.items() if isinstance(shape, dict) else ():
        key = name.rstrip("?")
        if key not in value and name not in ("*", f"{key}?"):
            return f"it lacks {at}{key}"
        for each in value if name == "*" else value.keys() & {key}:
            if problem := _misfit(value[each], inner, f"{at}{each}."):
                return problem
    return None


def preparation(model: nn.Module, record: dict) -> Callable[..., Tensor]:
    """The preprocessing of the images of a run, for programs that serve its model: another size, crop or mean than in
    training would cost accuracy.

    Args:
        model, record: of :func:`restore`.

    Returns:
        A function from a PIL image in RGB to a tensor [3, S, S] in the dtype of the weights, on the CPU.
    """
    settings = Settings(**record["settings"])
    return preparation_of(model, settings).transform(getattr(torch, settings.dtype))


def merged(out: str | Path, path: str | Path, checkpoint: str | None = None) -> Path:
    """Write the merged weights of a finished run as a safetensors file that timm or transformers can load.

    Raises:
        ValueError: the method adds modules that cannot be folded into the weights.
        checkpoints.StorageError: the file cannot be written.
        FileNotFoundError, ValueError: as :func:`restore`.
    """
    from safetensors.torch import save

    model, record = restore(out, checkpoint)
    method = record["settings"]["method"]
    if hasattr(model, "efft"):
        merge(model, keep_weights=False)
    elif method not in ("full", "linear", "bitfit"):
        raise ValueError(
            f"method {method!r} adds modules that cannot be folded into the weights; predict serves it as it is"
        )
    tensors = {key: t.detach().clone().contiguous() for key, t in model.state_dict().items()}
    path = Path(path)
    with checkpoints.storing(path.parent, str(path)):
        write_bytes(path, save(tensors, {"format": "pt"}))
    return path
