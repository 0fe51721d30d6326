"""Everything a run makes and checks before its first step."""

import json
import logging
import shutil
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn

from ..extras import need
from ..kernels.tuning.table import device_name
from ..ops.dispatch import candidates, default_backend
from . import checkpoints, methods, trackers
from .bars import bar
from .data import Data, open_data, seed_all
from .images import BadImages, DataError
from .models import checkpoint_blocks, logits, make_model, normalisation
from .settings import Settings

log = logging.getLogger("efft_kernels.finetune")
_OTHER_FILES = 64 * 2**20  # bytes, an upper bound for logs, curves and metrics together


@dataclass(frozen=True)
class Prepared:
    """What stays the same from the first step to the last."""

    settings: Settings
    accelerator: object  # accelerate.Accelerator: device, processes, precision
    out: Path
    show: bool  # progress bars, on one process at most
    data: Data
    model: nn.Module  # adapted and on the device; not yet wrapped by DDP or FSDP2
    unused: list[nn.Parameter]  # trained by the method, but without effect on the output; frozen during the run
    mean: Tensor  # [3, 1, 1], of pixels from 0 to 255
    std: Tensor  # [3, 1, 1]
    parameters: int  # trained, without the head
    head_parameters: int
    identity: dict  # what a continuation of this run must have in common with it
    class_weights: Tensor | None = None  # [classes], of the loss

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.accelerator.is_main_process

    @property
    def wide(self) -> torch.dtype:
        """The dtype that sums are kept in: float64 where the device has it."""
        return torch.float32 if self.accelerator.device.type == "mps" else torch.float64

    @property
    def steps(self) -> int:
        """Steps per epoch; the images that do not fill a batch are left out."""
        return len(self.data.train) // self.settings.batch_size

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] on any device -> normalised, in the dtype of the weights, on the device of the run."""
        return (images.to(self.mean.device, non_blocking=True).to(self.mean.dtype) - self.mean) / self.std


def make_accelerator(settings: Settings):
    """The accelerate.Accelerator with the device, the processes and the precision of a run.

    Raises:
        ValueError: a device or a precision that this machine or the dtype does not have.
    """
    accelerate = need("accelerate")
    kind = find_device(settings.device)
    cpu = kind == "cpu"
    if kind == "mps" and settings.dtype == "float64":
        raise ValueError("dtype must be 'float32' on mps, which has no float64")
    precision = settings.mixed_precision
    if precision == "auto":
        precision = "no"
        if kind in ("cuda", "xpu") and settings.dtype != "float64":
            precision = "bf16" if kind == "xpu" or torch.cuda.is_bf16_supported() else "fp16"
    trackers.check(settings.trackers)
    if precision != "no" and settings.dtype == "float64":
        raise ValueError(f"mixed_precision must be 'no' with dtype='float64', got {precision!r}")
    if precision == "fp16" and cpu:
        raise ValueError("mixed_precision must be 'no' or 'bf16' on a CPU, got 'fp16'")
    plugin = None
    if settings.fsdp:
        plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
    made = accelerate.Accelerator(
        cpu=cpu,
        log_with=list(settings.trackers) or None,  # of an empty list it warns
        project_config=accelerate.utils.ProjectConfiguration(logging_dir=settings.out),
        mixed_precision=precision,
        gradient_accumulation_plugin=accelerate.utils.GradientAccumulationPlugin(
            num_steps=settings.accumulate, sync_with_dataloader=False
        ),
        fsdp_plugin=plugin,
        kwargs_handlers=[accelerate.InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    if made.device.type != kind:
        raise ValueError(f"device must be 'auto' or {made.device.type!r} on this machine, got {settings.device!r}")
    if settings.cuda_graph and (kind != "cuda" or made.num_processes > 1):
        raise ValueError(
            f"cuda_graph must be False unless one process trains on a CUDA GPU, got True with {made.num_processes} "
            f"on {kind}"
        )
    return made


def find_device(name: str) -> str:
    """A device that torch can use, by its name, perhaps with a number; "auto" is a GPU if there is one.

    Raises:
        ValueError: this machine has no such device.
    """
    if (name := str(name)).startswith("cpu:"):
        name = "cpu"
    kinds = [kind for kind in ("cuda", "xpu", "mps") if getattr(torch, kind).is_available()]
    known = [*kinds, *(f"{kind}:{i}" for kind in kinds for i in range(getattr(torch, kind).device_count()))]
    if name not in ("auto", "cpu", *known):
        raise ValueError(f"device must be one of {', '.join(('auto', 'cpu', *known))} on this machine, got {name!r}")
    return name if name != "auto" else (*known, "cpu")[0]


def describe_device(accelerator) -> str:
    """One line that says which device and which kernels compute."""
    device = accelerator.device
    chosen = default_backend() or ", ".join(module.__name__.rpartition(".")[2] for module in candidates(device))
    kernels = f"kernels {chosen} where they are faster" if chosen and not default_backend() else f"kernels {chosen}"
    name = device_name(device) if device.type in ("cpu", "cuda") else device.type
    precision = "without autocast" if accelerator.mixed_precision == "no" else f"autocast {accelerator.mixed_precision}"
    processes = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    return f"computing on {device.type} ({name}){processes}, {precision}, {kernels if chosen else 'plain torch'}"


def open_images(settings: Settings, processes: int) -> Data:
    """The data of a run.

    Raises:
        ValueError: a batch that cannot be divided among the processes.
        DataError: data without enough classes or images, or that cannot be used for another reason.
    """
    s = settings
    if s.batch_size % (s.accumulate * processes):
        raise ValueError(
            f"batch_size must be a multiple of accumulate={s.accumulate} times {processes} processes, "
            f"got {s.batch_size}"
        )
    choice = {"hold_out": s.select == "val", "classes": s.classes, "augment": s.augment, "seed": s.seed}
    fractions = {"test_fraction": s.test_fraction, "val_fraction": s.val_fraction}
    data = open_data(s.data, s.image_size, interpolation=s.interpolation, **choice, **fractions)
    if len(data.classes) < 2:
        raise DataError(f"{s.data} must have at least 2 classes, but has {len(data.classes)}")
    if data.multilabel and s.head_init == "probe":
        raise ValueError("head_init must be 'random' with several labels per image, got 'probe'")
    if empty := [name for name, part in data.parts().items() if not len(part)]:
        raise DataError(f"{s.data} must have images in each part, but has none for {', '.join(empty)}")
    if len(data.train) < s.batch_size:
        raise DataError(f"batch_size must be at most the {len(data.train)} training images, got {s.batch_size}")
    return data


def prepare(settings: Settings, accelerator, out: Path, data: Data, show: bool) -> tuple[Prepared, dict | None]:
    """Make the model, check that a run can start, and find the checkpoint that it resumes from.

    Args:
        settings: of the run.
        accelerator: of :func:`make_accelerator`.
        out: the folder of the run, locked by this process.
        data: of :func:`open_images`.
        show: progress bars.

    Returns:
        What the run needs, and the checkpoint, or None for a new run.

    Raises:
        ValueError, FileNotFoundError: a model, weights or images that cannot be used, or a folder of another run.
        checkpoints.StorageError: not enough space for the files of the run.
    """
    s, dtype = settings, getattr(torch, settings.dtype)
    model = make_adapted(s, len(data.classes))
    weights = methods.fingerprint(model)
    if accelerator.is_main_process:
        log.info(describe_device(accelerator))
    if s.gradient_checkpointing:
        checkpoint_blocks(model)
    model.to(accelerator.device)
    mean, std = (
        torch.tensor(values, device=accelerator.device, dtype=dtype).view(3, 1, 1) * 255
        for values in normalisation(model, s.normalize)
    )
    unused = _try_model(model, s, accelerator, len(data.classes))
    identity = make_identity(s, data, weights) | {"contents": data.contents()}

    def check(state: dict) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        steps = len(data.train) // s.batch_size
        if isinstance(state.get("identity"), dict):  # first: a state of another run has other contents, undamaged
            check_same(out, state["identity"], identity)
        checkpoints.check_contents(state, trained, steps, steps * s.epochs)

    saved = checkpoints.load(out, log.warning, check) if s.resume else None
    read_images(data, s.memory, show, resumed=bool(saved))
    parameters = methods.count(model)
    head_parameters = sum(p.numel() for p in methods.trainable_parameters(model)) - parameters
    if accelerator.is_main_process:
        _check_disk(out, model, s)
        log.info(
            f"{s.method} on {s.model}: {parameters:,} trained parameters and {head_parameters:,} of the head; "
            f"{', '.join(f'{len(part)} {name}' for name, part in data.parts().items())} images of "
            f"{len(data.classes)} classes"
        )
    weights = weigh_classes(data).to(accelerator.device) if s.class_weights else None
    counts = (parameters, head_parameters)
    return Prepared(s, accelerator, out, show, data, model, unused, mean, std, *counts, identity, weights), saved


def make_adapted(settings: Settings, classes: int) -> nn.Module:
    """The model of a run before its first step, on the CPU."""
    s = settings
    seed_all(f"model {s.seed}")
    model = make_model(s.model, classes, s.image_size, s.checkpoint, s.drop_path).to(getattr(torch, s.dtype))
    methods.apply(s.method, model, s.options)
    return model


def weigh_classes(data: Data) -> Tensor:
    """Weights [classes] of the loss, by which every class counts the same however many training images show it.

    With one class per image N / (present classes * images of the class), so that the mean over the images is 1; with
    several the number of images without the class over that of images with it. Classes without images have 1.
    """
    labels = data.train.labels
    shown = torch.zeros(len(data.classes), dtype=torch.float64)
    for label in labels:
        shown[list(label) if data.multilabel else label] += 1
    if data.multilabel:
        found = (len(labels) - shown) / shown
    else:
        found = len(labels) / ((shown > 0).sum() * shown)
    return torch.where((shown > 0) & (shown < len(labels)) if data.multilabel else shown > 0, found, 1.0).float()


def make_identity(settings: Settings, data: Data, weights: str) -> dict:
    """What a run and its continuation must share: settings, and digests of the data and the frozen weights."""
    # through JSON, so that it equals one that was read from a file
    return json.loads(json.dumps({**settings.identity(), "data": data.fingerprint(), "weights": weights}))


def check_same(out: Path, there: dict, now: dict) -> None:
    """Raises OtherRun, a ValueError, with the names of what differs between the run in a folder and this one."""
    # a folder of an earlier version lacks the settings that were added since; it was trained with their defaults
    there = {field.name: field.default for field in fields(Settings) if field.name in now} | there
    if differing := [name for name in now if there.get(name) != now[name]]:
        known = {"data": "the images", "contents": "the contents of the images", "weights": "the frozen weights"}
        said = [known.get(n) or f"{n} ({there.get(n)!r} there, {now[n]!r} now)" for n in differing]
        raise checkpoints.OtherRun(
            f"out must be a new folder, or resume false to start over: the run in {out} differs in {', '.join(said)}"
        )


def read_images(data: Data, memory: float, show: bool, resumed: bool) -> None:
    """Read every image once: to keep it in memory, or to find those that cannot be read.

    Args:
        memory: GiB that the images may take.
        resumed: whether an earlier start of this run has read them; then only images to be kept are read.

    Raises:
        BadImages: images that cannot be read, all of them.
    """
    parts = data.parts()
    keep = sum(part.bytes for part in parts.values()) <= memory * 2**30
    if resumed and not keep:
        return
    with bar(show, sum(map(len, parts.values())), "reading images", "img") as shown:
        if bad := [sentence for part in parts.values() for sentence in part.find_bad(keep, shown.update)]:
            raise BadImages(list(dict.fromkeys(bad)))


def _try_model(model: nn.Module, settings: Settings, accelerator, classes: int) -> list[nn.Parameter]:
    """Run one forward and backward on noise, in evaluation mode, and freeze the parameters that get no gradient.

    Returns:
        These parameters. DDP would wait for their gradients in every step.
    """
    s = settings
    noise = torch.rand(2, 3, s.image_size, s.image_size, device=accelerator.device, dtype=getattr(torch, s.dtype))
    model.eval()
    try:
        with accelerator.autocast():
            y = logits(model, noise)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"image_size={s.image_size} does not fit {s.model}: {error}") from error
    if y.shape != (2, classes):
        raise ValueError(f"{s.model} must give [2, {classes}] for two images, got {list(y.shape)}")
    y.float().sum().backward()
    unused = [p for p in methods.trainable_parameters(model) if p.grad is None]
    for p in model.parameters():
        p.grad = None
    for p in unused:
        p.requires_grad_(False)
    if not methods.trainable_parameters(model):
        raise ValueError(f"method {s.method!r} trains nothing that the output of {s.model} depends on")
    return unused


def _check_disk(out: Path, model: nn.Module, settings: Settings) -> None:
    trained = sum(p.numel() * p.element_size() for p in methods.trainable_parameters(model))
    # two checkpoints stay while a third is written; each holds the weights, two moments, and perhaps the best weights
    needed = trained * (3 * (3 + (settings.select == "val")) + 1) + _OTHER_FILES
    free = shutil.disk_usage(out).free
    held = sum(path.stat().st_size for path in checkpoints.states(out))
    if free + held < needed:
        raise checkpoints.StorageError(
            f"{out} has {free / 2**20:.0f} MiB free, but checkpoints, adapter and logs of this run take up to "
            f"{needed / 2**20:.0f} MiB"
        )
