"""Training: steps that can be interrupted at any moment, and the files that a run leaves.

No random state is carried from step to step: the order of an epoch depends on (seed, epoch), augmentation on (seed,
epoch, image), dropout on (seed, step, part, process). A run that resumes from a checkpoint therefore takes the same
steps as one that was never interrupted, on a CPU bit for bit.
"""

import contextlib
import importlib.metadata
import json
import logging
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import storage
from ..extras import need, timm
from . import checkpoints, methods
from .checkpoints import Progress
from .data import SOURCES, Data, Pictures, seed_all
from .folders import check_out
from .head_init import probe_head
from .images import DataError
from .models import logits, make_model, preparation_of
from .prepared import Prepared, check_same, make_accelerator, make_identity, open_images, prepare
from .report import bar, curves, log_writer
from .settings import Settings

log = logging.getLogger("efft_kernels.finetune")


class Interrupted(Exception):
    """A signal asked the run to stop; its checkpoint has been written."""


class Diverged(ValueError):
    """The loss is not finite."""


@dataclass(frozen=True)
class Result:
    """The result of a run. Its files are in ``out``: adapter.safetensors, metrics.json, curves.png, logs/."""

    metrics: dict  # of the final weights: part of the data -> {"top1": %, "mean_class": %, "loss": nats}
    history: list[dict]  # one entry per epoch
    parameters: int  # trained, without the head
    head_parameters: int
    images_per_second: float  # while training, over all processes
    epoch: int  # of the final weights
    adapter: Path
    out: Path


def train(settings: Settings, *, progress: bool = True) -> Result:
    """Fine-tune a model, or continue the run that ``settings.out`` holds.

    Args:
        settings: the run. A finished one is not repeated: its result is read.
        progress: show progress bars.

    Raises:
        ValueError, FileNotFoundError: settings, data or weights that cannot be used, before the first step.
        Diverged: a ValueError during training: the loss is not finite.
        checkpoints.StorageError: the disk is full or fails; files that were written before are complete.
        Interrupted: after SIGTERM or SIGINT, with a checkpoint to resume from.
    """
    settings.check()
    methods.check(settings.method, settings.options)
    accelerator = make_accelerator(settings)
    out, main = Path(settings.out), accelerator.is_main_process
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, but {out} is a file")
    if settings.data not in SOURCES:
        check_out(settings.data, out)
    with contextlib.ExitStack() as stack:
        stack.callback(_reset_accelerate)
        with checkpoints.storing(out if out.is_dir() else Path.cwd(), f"the folder {out}"):
            out.mkdir(parents=True, exist_ok=True)
            if main:
                stack.enter_context(checkpoints.alone(out))
                checkpoints.tidy(out)
                if not settings.resume:
                    checkpoints.clear(out)
                    (out / "metrics.json").unlink(missing_ok=True)
                    shutil.rmtree(out / "logs", ignore_errors=True)  # the curves of two runs would mix
        accelerator.wait_for_everyone()
        data = open_images(settings, accelerator.num_processes)
        if result := _finished(settings, data, out, main):
            return result
        run, saved = prepare(settings, accelerator, out, data, progress and main)
        if saved is None and settings.head_init == "probe":
            probe_head(run)
        made, schedule = begin(run, saved)
        del saved  # as large as the optimizer
        writer = log_writer(out, made.step // run.steps + 1 if made.step else None) if main else None
        with _stop_signals() as stop:
            fit(run, made, schedule, writer, stop)
            return finish(run, made, writer)


def _reset_accelerate() -> None:
    """Let the next run of this Python process choose another precision."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()
    GradientState._reset_state()


def _finished(settings: Settings, data: Data, out: Path, main: bool) -> Result | None:
    """The result of the run in a folder if it is finished.

    Raises:
        ValueError: the folder holds another run, or files of another version.
    """
    path = out / "metrics.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        identity, result = found["identity"], found["result"]
        weights = identity["weights"]  # not computed again, which would take reading them
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what a run of this version leaves: {error}") from error
    check_same(out, identity, make_identity(settings, data, weights))
    if main:
        checkpoints.clear(out)  # those of a run that was killed after it wrote its results
        log.info(f"{out} holds this run, finished; resume=false would repeat it")
    return Result(**{**result, "adapter": out / result["adapter"]}, history=found["history"], out=out)


class Batches:
    """The batches of one process: for each step and each part of it, a list of (epoch, image).

    The order of the images is the same for any number of processes and parts, each of which takes its slice of every
    batch.
    """

    def __init__(self, settings: Settings, images: int, rank: int, world: int, first: int):
        self.seed, self.images, self.size = settings.seed, images, settings.batch_size
        self.parts, self.rank, self.world, self.first = settings.accumulate, rank, world, first
        self.steps = images // settings.batch_size  # of an epoch; the remaining images are left out
        self.total = self.steps * settings.epochs

    def __len__(self) -> int:
        return (self.total - self.first) * self.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.size // (self.parts * self.world)
        order = (-1, [])
        for step in range(self.first, self.total):
            epoch, place = divmod(step, self.steps)
            if order[0] != epoch:
                key = sha256(f"order {self.seed} {epoch}".encode()).digest()[:8]
                generator = torch.Generator().manual_seed(int.from_bytes(key, "little") % 2**63)
                order = epoch, torch.randperm(self.images, generator=generator).tolist()
            batch = order[1][place * self.size : (place + 1) * self.size]
            for part in range(self.parts):
                start = (part * self.world + self.rank) * share
                yield [(epoch, i) for i in batch[start : start + share]]


def begin(run: Prepared, saved: dict | None) -> tuple[Progress, object]:
    """The state of a run before its next step, from a checkpoint if there is one, and its learning rate schedule."""
    s, accelerator = run.settings, run.accelerator
    timm()
    from timm.scheduler import CosineLRScheduler

    optimizer = torch.optim.AdamW(methods.parameter_groups(run.model, s.lr_ratio), lr=s.lr, weight_decay=s.weight_decay)
    schedule = CosineLRScheduler(
        optimizer, t_initial=run.steps * s.epochs, lr_min=min(s.min_lr, s.lr), t_in_epochs=False,
        warmup_t=round(s.warmup * run.steps), warmup_lr_init=min(s.warmup_lr, s.lr),
    )  # fmt: skip
    model, optimizer = accelerator.prepare(run.model, optimizer)
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    progress = Progress(model, optimizer, accelerator.scaler, sums)
    if saved:
        progress.restore(saved, run.main)
        if run.main:
            log.info(f"continuing after step {progress.step} of {run.steps * s.epochs}")
    return progress, schedule


def fit(run: Prepared, progress: Progress, schedule, writer, stop: "_Stop") -> None:
    """Take all steps that are left.

    Args:
        schedule: the learning rate, of :func:`begin`.
        writer: of the logs, on the main process.
        stop: whether a signal has asked to stop.

    Raises:
        Interrupted: a signal asked to stop; the checkpoint of the last step is written.
        Diverged: the loss is not finite. No checkpoint of such a state is written.
        checkpoints.StorageError: a checkpoint or the logs cannot be written.
    """
    s, accelerator, images = run.settings, run.accelerator, run.data.train
    batches = Batches(s, len(images), accelerator.process_index, accelerator.num_processes, progress.step)
    loader = torch.utils.data.DataLoader(
        images,
        batch_sampler=batches,
        num_workers=0 if images.kept is not None else s.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    with bar(run.show, batches.total * s.batch_size, "training", "img", progress.step * s.batch_size) as shown:
        parts = iter(loader)
        began, printed = time.perf_counter(), 0.0
        methods.train_mode(progress.model)
        while progress.step < batches.total:
            schedule.step_update(progress.step)
            one_step(run, progress, parts)
            progress.step += 1
            shown.update(s.batch_size)
            now = time.perf_counter()
            if run.show and now - printed > 0.5:
                printed = now
                loss, right, n = progress.sums.tolist()
                shown.set_postfix_str(
                    f"epoch {progress.step / run.steps:.1f}, loss {loss / n:.4f}, top-1 {100 * right / n:.1f} %"
                )
            progress.seconds += now - began
            progress.seen += s.batch_size
            if progress.step % run.steps == 0:
                end_epoch(run, progress, writer)
            stopping = _any_process(run, stop.asked)
            # also after the last step, because the run can be interrupted while it measures and writes its results
            if stopping or progress.step % s.save_every == 0 or progress.step == batches.total:
                save(run, progress)
            if stopping and progress.step < batches.total:
                raise Interrupted(
                    f"stopped after step {progress.step} of {batches.total}; the same command continues from there"
                )
            began = time.perf_counter()


def one_step(run: Prepared, progress: Progress, parts: Iterator) -> None:
    """One step of the optimizer, on as many parts of a batch as are accumulated."""
    s, accelerator = run.settings, run.accelerator
    for part in range(s.accumulate):
        images, labels = _next(parts)
        images, labels = run.normalise(images), labels.to(accelerator.device, non_blocking=True)
        seed_all(f"step {s.seed} {progress.step} {part} {accelerator.process_index}")
        with accelerator.accumulate(progress.model):
            with accelerator.autocast():
                y = logits(progress.model, images)
                y = y if y.dtype == torch.float64 else y.float()
                loss = F.cross_entropy(y, labels, label_smoothing=s.label_smoothing)
            accelerator.backward(loss)
            if s.clip_grad is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(methods.trainable_parameters(progress.model), s.clip_grad)
            progress.optimizer.step()
            progress.optimizer.zero_grad()
        n, loss = len(labels), loss.detach().double()
        progress.sums += torch.stack([loss * n, (y.detach().argmax(1) == labels).sum().double(), n + 0 * loss])


def end_epoch(run: Prepared, progress: Progress, writer) -> None:
    """Measure on the validation images, remember the best weights, and log the epoch."""
    s, data = run.settings, run.data
    loss, right, n = run.accelerator.reduce(progress.sums, "sum").tolist()
    progress.sums.zero_()
    _check_finite(progress.step, loss)
    entry = {
        "epoch": progress.step // run.steps,
        "lr": progress.optimizer.param_groups[0]["lr"],
        "train": {"loss": loss / n, "top1": 100 * right / n},
    }
    if data.val is not None:
        entry["val"] = evaluate(run, progress.model, data.val)
        if s.select == "val" and entry["val"]["top1"] > progress.best.get("top1", -1):
            weights = checkpoints.get_weights(progress.model)
            progress.best = {"top1": entry["val"]["top1"], "epoch": entry["epoch"], "weights": weights}
    progress.history.append(entry)
    if run.main:
        val = f", val {entry['val']['top1']:.2f} %" if "val" in entry else ""
        log.info(f"epoch {entry['epoch']}: loss {loss / n:.4f}, top-1 {100 * right / n:.2f} %{val}")
        if warning := at_chance(s, entry["epoch"], loss / n, len(data.classes)):
            log.warning(warning)
        with checkpoints.storing(run.out, "the logs"):
            for part in ("train", "val"):
                for name, value in entry.get(part, {}).items():
                    writer.add_scalar(f"{part}/{name}", value, entry["epoch"])
            writer.add_scalar("lr", entry["lr"], entry["epoch"])
            writer.flush()


def at_chance(settings: Settings, epoch: int, loss: float, classes: int) -> str | None:
    """A warning if the loss of the first epoch that lies wholly after the warm-up is above that of guessing.

    Stochastic depth on a frozen backbone, or steps that are too large, can drown what tells the classes apart.

    Args:
        epoch: that has ended, counted from 1.
        loss: its mean in nats; guessing gives ln(classes).
    """
    s = settings
    if epoch != math.ceil(s.warmup) + 1 or loss <= math.log(classes):
        return None
    scale = s.options.get("scale", methods.METHODS[s.method].options.get("scale"))
    smaller = f"a smaller lr ({s.lr:g} now)" + (f" or scale ({scale:g} now)" if scale is not None else "")
    return (
        f"epoch {epoch}, the first after the warm-up, has a loss of {loss:.3f}, above the {math.log(classes):.3f} of "
        f"guessing among {classes} classes: the run may never learn; try drop_path 0 ({s.drop_path:g} now), {smaller}"
    )


@torch.no_grad()
def evaluate(run: Prepared, model, part: Pictures, shown=None) -> dict[str, float]:
    """Top-1 and mean-class accuracy in %, and the mean loss in nats, over all images of a part of the data."""
    s, accelerator = run.settings, run.accelerator
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    classes = len(run.data.classes)
    stats = need("torchmetrics").classification.MulticlassStatScores(classes, average=None).to(device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, images; torchmetrics would use float32
    model.eval()
    size = max(1, s.batch_size // (s.accumulate * world))
    mine = list(range(rank, len(part), world))
    # every process takes the same number of forwards; -1 stands for an image that is not counted
    mine += [-1] * (-(-len(part) // world) - len(mine))
    sampler = [[max(i, 0) for i in mine[at : at + size]] for at in range(0, len(mine), size)]
    workers = 0 if part.kept is not None else s.workers
    batches = iter(torch.utils.data.DataLoader(part, batch_sampler=sampler, num_workers=workers))
    at = 0
    for _ in range(len(sampler)):
        images, labels = _next(batches)
        real = torch.tensor([i >= 0 for i in mine[at : at + len(labels)]], device=device)
        at += len(labels)
        with accelerator.autocast():
            y = logits(model, run.normalise(images))
        y, labels = y[real], labels.to(device)[real]
        if len(y):
            stats.update(y, labels)
            sums += torch.stack([F.cross_entropy(y.double(), labels, reduction="sum"), real.sum().double()])
        if shown is not None:
            shown.update(min(at * world, len(part)) - shown.n)
    methods.train_mode(model)
    loss, n = accelerator.reduce(sums, "sum").tolist()
    counts = stats.compute().double()  # [classes, 5]: true and false positives and negatives, images
    right, images = counts[:, 0], counts[:, -1]
    present = images > 0  # a class without images has no accuracy
    return {
        "top1": round(100 * (right.sum() / images.sum()).item(), 4),
        "mean_class": round(100 * (right[present] / images[present]).mean().item(), 4),
        "loss": loss / n,
    }


def save(run: Prepared, progress: Progress) -> None:
    """Write a checkpoint. A state whose loss is not finite raises instead: it would replace one of use."""
    sums = run.accelerator.reduce(progress.sums.clone(), "sum")
    _check_finite(progress.step, sums[0].item())
    state = progress.state(run.identity, sums)
    _on_main(run, lambda: checkpoints.save(run.out, progress.step, state))


def finish(run: Prepared, progress: Progress, writer) -> Result:
    """Measure the final weights and write the results.

    Raises:
        checkpoints.StorageError: a file cannot be written; the checkpoint of the last step stays.
    """
    s, data = run.settings, run.data
    epoch = s.epochs
    if s.select == "val":
        checkpoints.set_weights(progress.model, progress.best["weights"])
        epoch = progress.best["epoch"]
    metrics, parts = {}, data.parts()
    for name in [name for name in ("val", "test") if name in parts] or ["train"]:
        with bar(run.show, len(parts[name]), f"measuring on {name}", "img") as shown:
            metrics[name] = evaluate(run, progress.model, parts[name], shown)
    result = {
        "metrics": metrics,
        "parameters": run.parameters,
        "head_parameters": run.head_parameters,
        "images_per_second": progress.seen / progress.seconds if progress.seconds else 0.0,
        "epoch": epoch,
        "adapter": "adapter.safetensors",
    }
    record = {
        "result": result,
        "classes": list(data.classes),
        "history": progress.history,
        "settings": asdict(s),
        "identity": run.identity,
        "versions": _versions(),
    }
    weights = checkpoints.get_weights(progress.model)
    _on_main(run, lambda: _write_results(run, progress, record, weights, writer))
    return Result(**{**result, "adapter": run.out / result["adapter"]}, history=progress.history, out=run.out)


def _write_results(run: Prepared, progress: Progress, record: dict, weights: dict[str, Tensor], writer) -> None:
    """Write the files of a finished run; metrics.json last, because its presence means that the run is finished."""
    s = run.settings
    with checkpoints.storing(run.out, "the results"):
        model = run.accelerator.unwrap_model(progress.model)
        if s.fsdp:  # its weights are shards; a new model takes the complete ones
            seed_all(f"model {s.seed}")
            model = make_model(s.model, len(record["classes"]), s.image_size, s.checkpoint)
            methods.apply(s.method, model.to(getattr(torch, s.dtype)), s.options)
            model.load_state_dict(weights, strict=False)
        for p in run.unused:
            p.requires_grad_(True)
        path = run.out / record["result"]["adapter"]
        methods.save(s.method, s.options, model, path, s.model, preparation_of(model, s), record["classes"])
        storage.write(run.out / "curves.png", lambda file: curves(file, record))
        writer.close()
        storage.write_bytes(run.out / "metrics.json", json.dumps(record, indent=1).encode())
        checkpoints.clear(run.out)


def _check_finite(step: int, loss: float) -> None:
    if not math.isfinite(loss):
        raise Diverged(f"the loss of step {step} is {loss}; a smaller lr or scale, or clip_grad, keeps it finite")


def _on_main(run: Prepared, write) -> None:
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


def _any_process(run: Prepared, asked: bool) -> bool:
    """Whether the value is true on any process."""
    if run.accelerator.num_processes > 1:
        asked = torch.tensor(int(asked), device=run.accelerator.device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
    return bool(asked)


class _Stop:
    asked = False


@contextlib.contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Let SIGTERM and SIGINT ask to stop after the current step; a second signal has its former effect."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number, frame):
        stop.asked = True
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _next(batches: Iterator):
    """The next batch. A DataError of a worker process is raised without the traceback that it comes wrapped in."""
    try:
        return next(batches)
    except DataError as error:
        raise DataError(str(error).strip().splitlines()[-1].rpartition("DataError: ")[2]) from None


def _versions() -> dict[str, str]:
    found = {}
    for name in ("efft_kernels", "torch", "timm", "transformers", "accelerate"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {"python": sys.version.split()[0], **found}
