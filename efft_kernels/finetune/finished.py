"""What to do with a finished run: its model again, a plain merged checkpoint, labels for images."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ..merge import merge
from ..storage import write_bytes
from . import checkpoints, methods
from .data import Files, seed_all, transform
from .models import logits, make_model, normalisation
from .settings import Settings


def restore(out: str | Path, checkpoint: str | None = None) -> tuple[nn.Module, dict]:
    """The trained model of a finished run, in evaluation mode, and the record in its metrics.json.

    Args:
        out: the folder of the run.
        checkpoint: where the pre-trained weights are now; None for where they were.

    Raises:
        FileNotFoundError: no finished run there, or its weights are gone.
        ValueError: files that do not fit, pre-trained weights that are not those of the run.
    """
    path = Path(out) / "metrics.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: there is no finished run in {out}")
    try:
        record = json.loads(path.read_text())
        settings, result, classes = Settings(**record["settings"]), record["result"], record["classes"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what a run of this version leaves: {error}") from error
    weights = checkpoint or settings.checkpoint
    if weights == "random":
        seed_all(f"model {settings.seed}")
    try:
        model = make_model(settings.model, len(classes), settings.image_size, weights)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; if it has moved, checkpoint says where to") from error
    methods.load(model.to(getattr(torch, settings.dtype)), Path(out) / result["adapter"])
    if methods.fingerprint(model) != record["identity"]["weights"]:
        raise ValueError(
            f"checkpoint must be the weights that the run in {out} started from, got others in {weights!r}"
        )
    return model.eval(), record


def preparation(model: nn.Module, record: dict) -> Callable[..., Tensor]:
    """What the run did to an image, for whoever serves its model or adapter elsewhere: as other sizes, crops or means
    than those of the training would cost accuracy.

    Args:
        model, record: of :func:`restore`.

    Returns:
        A function from a PIL image in RGB to a tensor [3, S, S] in the dtype of the weights, on the CPU.
    """
    settings = Settings(**record["settings"])
    resize = transform(settings.image_size, "none", settings.interpolation)
    mean, std = (torch.tensor(t).view(3, 1, 1) * 255 for t in normalisation(model, settings.normalize))
    return lambda image: ((torch.as_tensor(resize(image)) - mean) / std).to(getattr(torch, settings.dtype))


def merged(out: str | Path, path: str | Path, checkpoint: str | None = None) -> Path:
    """Write the weights of a finished run as those of the plain model, safetensors, for timm or transformers to load.

    Raises:
        ValueError: a method whose modules cannot be folded into the weights; else as :func:`restore`.
        checkpoints.StorageError: the file cannot be written.
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


@torch.no_grad()
def predict(out: str | Path, files: list[str], checkpoint: str | None = None) -> Iterator[tuple[str, str, float]]:
    """(file, class, probability) for each image file, by a finished run.

    Raises:
        data.DataError: a file that is not a readable image; else as :func:`restore`.
    """
    model, record = restore(out, checkpoint)
    prepare = preparation(model, record)
    images = Files(Path("."), tuple(files), (0,) * len(files))
    for i, file in enumerate(files):
        p = logits(model, prepare(images.load(i))[None]).softmax(1)[0]
        best = int(p.argmax())
        yield file, record["classes"][best], float(p[best])
