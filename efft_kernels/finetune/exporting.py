"""Export a finished run: merged weights, an ONNX model that takes pixels, a LoRA for PEFT, a repository on the hub."""

import json
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from ..export import export_lora
from ..extras import need
from ..files import publish
from ..hub import ADAPTER, PREFIX, repository
from ..merge import merge
from ..storage import write
from . import checkpoints
from .finished import beside, merged, read_record, restore
from .models import logits, normalisation, public_name
from .outputs import check_file, check_unread, make_folder, read_by
from .results import NAMES
from .settings import Settings

FORMATS = {"lora": "-lora", "onnx": ".onnx", "weights": ".safetensors", "hub": None}  # -> end of the default name
_IN_ONE_FILE = 2**31 - 2**24  # bytes of weights; the graph beside them takes less than 16 MiB


def export(out: str | Path, to: str, path: str | Path | None = None, checkpoint: str | None = None) -> Path | str:
    """Export a finished run.

    Args:
        out: the folder of the run.
        to: "lora", a folder for PEFT; "onnx"; "weights", merged ones for timm or transformers; or "hub", the adapter
            with a model card and the record of the run, in which the paths of data, weights and run are cut to their
            last name.
        path: the file, the folder of a LoRA, or OWNER/NAME of a repository; None for a name in the folder of the run.
        checkpoint: the pre-trained weights, if they have moved since.

    Returns:
        The path, or for "hub" the name that load_adapter, predict and the service take.

    Raises:
        ValueError: another format, a path that is no place for it or a file that is read, a method that it cannot
            express, or an ONNX model that gives other results than torch; nothing is written then.
        ImportError: a package that the format needs is missing.
        checkpoints.StorageError: the file cannot be written.
        FileNotFoundError, ValueError: as :func:`finished.restore`.
    """
    if to not in FORMATS:
        raise ValueError(f"to must be one of {', '.join(FORMATS)}, got {to!r}")
    if to == "hub":
        return _to_hub(out, path)
    path = Path(path) if path is not None else beside(out, f"exported{FORMATS[to]}")
    read = list(read_by(out, checkpoint))
    if to == "lora":
        check_unread([path / name for name in ("adapter_model.safetensors", "adapter_config.json")], read)
    else:
        check_file(path, FORMATS[to], read)
        check_unread([path.with_name(f"{path.name}.data")], read)
    if to == "weights":
        return merged(out, path, checkpoint)
    if to == "onnx":
        return _onnx(out, path, checkpoint)
    model, record = restore(out, checkpoint)
    if not hasattr(model, "efft"):
        raise ValueError(f"method {record['settings']['method']!r} is no low-rank update, which a LoRA could express")
    make_folder(path)
    with checkpoints.storing(path, str(path)):
        export_lora(model, path, base_model=record["settings"]["model"])
    return path


def _to_hub(out: str | Path, name: str | Path | None) -> str:
    """Upload the adapter of a run, with its record, so that the repository is the folder of a run, too."""
    if name is None:
        raise ValueError("out must name the repository to upload to, OWNER/NAME")
    repo = repository(str(name))
    record = read_record(out)
    adapter = Path(out) / record["result"]["adapter"]
    metrics = {
        f"{part}, {NAMES[key]}" + " (%)" * (key != "loss"): value
        for part, found in record["result"]["metrics"].items()
        for key, value in found.items()
    }
    for key in ("data", "out", "checkpoint"):  # a folder of this machine is nobody's business
        record["settings"][key] = record["settings"][key] and (Path(record["settings"][key]).resolve().name or key)
    record["settings"]["model"] = public_name(record["settings"]["model"])
    record["result"]["adapter"] = ADAPTER
    record.pop("run", None)
    publish(adapter, repo, metrics, {"metrics.json": json.dumps(record, indent=1).encode()})
    return PREFIX + repo


class _FromPixels(nn.Module):
    """A model with the normalisation of its images before it."""

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor):
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, pixels: Tensor) -> Tensor:
        return logits(self.model, (pixels - self.mean) / self.std)


def _onnx(out: str | Path, path: Path, checkpoint: str | None) -> Path:
    """Write the merged model as ONNX: pixels [batch, 3, S, S] from 0 to 255, RGB, float32 -> logits [batch, classes].

    Size, interpolation and the names of the classes are among the metadata of the file. Weights of more than 2 GiB,
    which the format cannot hold, are in a second file beside it, PATH.data.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        need(package, "onnx")
    import onnx

    model, record = restore(out, checkpoint)
    settings = Settings(**record["settings"])
    if hasattr(model, "efft"):
        merge(model, keep_weights=False)
    model = model.float().cpu()
    mean, std = (torch.tensor(t).view(3, 1, 1) * 255 for t in normalisation(model, settings.normalize))
    whole = _FromPixels(model, mean, std).eval()
    size = settings.image_size
    example = torch.randint(0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(0)).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own future
        program = torch.onnx.export(
            whole,
            (example,),
            input_names=["pixels"],
            output_names=["logits"],
            dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1)}},
            dynamo=True,
            verbose=False,
        )
    proto = program.model_proto
    described = {
        "classes": json.dumps(record["classes"]),
        "multilabel": json.dumps(record.get("multilabel", False)),
        "image_size": str(size),
        "interpolation": settings.interpolation,
        "pixels": "RGB, 0 to 255, resized to a square without a crop; the mean and deviation are part of the model",
    }
    for key, value in described.items():
        proto.metadata_props.add(key=key, value=value)
    apart = sum(t.nbytes for t in whole.state_dict().values()) > _IN_ONE_FILE
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, path.name)
        onnx.save_model(proto, written, save_as_external_data=apart, location=f"{path.name}.data")
        onnx.checker.check_model(written)
        _check(whole, written, size)
        with checkpoints.storing(path.parent, str(path)):
            for part in sorted(Path(folder).iterdir(), reverse=True):  # the weights first
                with open(part, "rb") as source:
                    write(path.parent / part.name, lambda file, source=source: shutil.copyfileobj(source, file))
            if not apart:  # of a larger model that was there before
                path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    return path


@torch.no_grad()
def _check(model: nn.Module, file: Path, size: int) -> None:
    """Compare an ONNX model with the one in torch on batches of 1 and 3 images.

    Raises:
        ValueError: they differ by more than rounding.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        generator = torch.Generator().manual_seed(batch)
        pixels = torch.randint(0, 256, (batch, 3, size, size), generator=generator).float()
        want = model(pixels)
        got = torch.from_numpy(session.run(["logits"], {"pixels": pixels.numpy()})[0])
        far = (got - want).abs().max().item()
        if not far <= 1e-3 * max(1.0, want.abs().max().item()):  # also for nan
            raise ValueError(f"the ONNX model gives other logits than torch: they differ by {far:.2g}")
