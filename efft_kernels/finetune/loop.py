"""Training: steps that can be interrupted at any moment, and the files that a run leaves.

No random state is carried from step to step: the order of an epoch depends on (seed, epoch), augmentation on (seed,
epoch, image), dropout on (seed, step, part, process). A run that resumes from a checkpoint therefore takes the same
steps as one that was never interrupted, on a CPU bit for bit.
"""

import contextlib
import functools
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import torch

from ..extras import timm
from . import checkpoints, methods
from .bars import bar
from .captured import CapturedStep
from .checkpoints import Progress
from .data import SOURCES, keeping_readers, reading, seed_all
from .evaluation import evaluate, loss_of, next_batch, right_answers
from .folders import check_out
from .head_init import probe_head
from .models import logits
from .outputs import FILES, check_folder, make_folder
from .prepared import Prepared, make_accelerator, open_images, prepare
from .results import NAMES, Result, finish, on_main, read_finished
from .settings import Settings
from .trackers import Trackers

log = logging.getLogger("efft_kernels.finetune")


class Interrupted(Exception):
    """A signal asked the run to stop; its checkpoint has been written."""


class PeerLost(RuntimeError):
    """Another process of the run was killed, failed or cannot be reached."""


class Diverged(ValueError):
    """The loss is not finite."""


def train(settings: Settings, *, progress: bool = True, after_epoch: Callable[[dict], None] | None = None) -> Result:
    """Fine-tune a model, or continue the run that ``settings.out`` holds.

    Args:
        settings: the run. A finished one is not repeated: its result is read.
        progress: show progress bars.
        after_epoch: called after each epoch that is trained, with its entry of ``Result.history``. What it raises ends
            the run, as a sweep that prunes does; the run can then be continued from its last checkpoint.

    Raises:
        ValueError, FileNotFoundError: settings, data or weights that cannot be used, before the first step.
        Diverged: a ValueError during training: the loss is not finite.
        checkpoints.StorageError: the disk is full or fails; files that were written before are complete.
        Interrupted: after SIGTERM or SIGINT, with a checkpoint to resume from.
        PeerLost: another process of the run ended; checkpoints that were written before are complete.
    """
    settings.check()
    methods.check(settings.method, settings.options)
    out = Path(settings.out)
    old = settings.resume and (checkpoints.states(out) or (out / "metrics.json").exists())
    rates = ("min_lr", "warmup_lr") if settings.warmup else ("min_lr",)
    for name in () if old else rates:  # the defaults fit any lr
        if settings.lr < (rate := getattr(settings, name)) != Settings.__dataclass_fields__[name].default:
            raise ValueError(f"{name} must be at most lr={settings.lr:g}, got {rate:g}")
    check_folder(out, settings.resume, data=settings.data, checkpoint=settings.checkpoint)
    if settings.data not in SOURCES:
        check_out(settings.data, out)
    accelerator = make_accelerator(settings)
    main = accelerator.is_main_process
    with contextlib.ExitStack() as stack:
        stack.callback(_reset_accelerate)
        stack.enter_context(_naming_lost_peers(accelerator.num_processes, out))
        make_folder(out)
        with checkpoints.storing(out, f"the folder {out}"):
            if main:
                stack.enter_context(checkpoints.alone(out))
                checkpoints.tidy(out)
        accelerator.wait_for_everyone()
        data = open_images(settings, accelerator.num_processes)
        if settings.resume and (result := read_finished(settings, data, out, main)):
            return result
        run, saved = prepare(settings, accelerator, out, data, progress and main)
        if not settings.resume:  # only now, when the new run can start
            on_main(run, lambda: _remove_run(out))
        if saved is None and settings.head_init == "probe":
            probe_head(run)
        if main and settings.resume and saved is None and [*out.glob("logs/events.out.tfevents.*")]:
            log.info(f"{out} has logs of an earlier run, but no state to continue from: starting at step 0")
        made, schedule = begin(run, saved)
        del saved  # as large as the optimizer
        logs = Trackers(accelerator, settings, made.step // run.steps + 1)
        with keeping_readers(), _stop_signals() as stop:
            fit(run, made, schedule, logs, stop, after_epoch)
            return finish(run, made, logs)


def _remove_run(out: Path) -> None:
    """Remove the results and the checkpoints of the run in a folder, and its curves, which would mix with new ones."""
    if not (checkpoints.states(out) or any((out / name).exists() for name in FILES)):
        return  # the logs may be another program's
    # if it is killed, the rest is of no finished run, and a removal can be repeated
    with checkpoints.storing(out, "the former run"):
        for path in (out / "metrics.json", *(out / "logs").glob("events.out.tfevents.*"), *map(out.joinpath, FILES)):
            path.unlink(missing_ok=True)
        checkpoints.clear(out)


@contextlib.contextmanager
def _naming_lost_peers(processes: int, out: Path) -> Iterator[None]:
    """Turn the error of a collective whose peer is gone into PeerLost, whose message says what is safe."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors, which name the file of its sources
        if processes == 1 or not (isinstance(error, torch.distributed.DistError) or "gloo/" in str(error)):
            raise
        left = checkpoints.states(out)
        safe = f"the state of step {int(left[-1].stem[6:])} is complete and" if left else "no state was written yet:"
        reason = str(error).strip().splitlines()[0].rpartition("] ")[2][:200]
        raise PeerLost(
            f"another process of this run has ended or cannot be reached ({reason}); {safe} the same command "
            f"{'continues from it' if left else 'begins the run again'}"
        ) from error


def _reset_accelerate() -> None:
    """Let the next run of this Python process choose another precision."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()
    GradientState._reset_state()


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

    if s.compile:
        run.model.compile()
    optimizer = torch.optim.AdamW(methods.parameter_groups(run.model, s.lr_ratio), lr=s.lr, weight_decay=s.weight_decay)
    schedule = CosineLRScheduler(
        optimizer, t_initial=run.steps * s.epochs, lr_min=min(s.min_lr, s.lr), t_in_epochs=False,
        warmup_t=round(s.warmup * run.steps), warmup_lr_init=min(s.warmup_lr, s.lr),
    )  # fmt: skip
    model, optimizer = accelerator.prepare(run.model, optimizer)
    sums = torch.zeros(3, dtype=run.wide, device=accelerator.device)
    progress = Progress(model, optimizer, accelerator.scaler, sums)
    if s.ema is not None:
        progress.start_averages()
    if saved:
        progress.restore(saved, run.main)
        if run.main:
            log.info(f"continuing after step {progress.step} of {run.steps * s.epochs}")
    return progress, schedule


def fit(
    run: Prepared,
    progress: Progress,
    schedule,
    logs: Trackers,
    stop: "_Stop",
    after_epoch: Callable[[dict], None] | None = None,
) -> None:
    """Take all steps that are left.

    Args:
        schedule: the learning rate, of :func:`begin`.
        logs: of the epochs.
        stop: whether a signal has asked to stop.
        after_epoch: as for :func:`train`.

    Raises:
        Interrupted: a signal asked to stop; the checkpoint of the last step is written.
        Diverged: the loss is not finite. No checkpoint of such a state is written.
        checkpoints.StorageError: a checkpoint or the logs cannot be written.
    """
    s, accelerator, images = run.settings, run.accelerator, run.data.train
    batches = Batches(s, len(images), accelerator.process_index, accelerator.num_processes, progress.step)
    how = {"pin_memory": accelerator.device.type == "cuda", **reading(0 if images.kept is not None else s.workers)}
    loader = torch.utils.data.DataLoader(images, batch_sampler=batches, **how)
    gradients = functools.partial(_gradients, run, progress)
    if s.cuda_graph:
        gradients = CapturedStep(gradients, methods.trainable_parameters(progress.model), progress.model.buffers())
    with bar(run.show, batches.total * s.batch_size, "training", "img", progress.step * s.batch_size) as shown:
        parts = iter(loader)
        began, printed = time.perf_counter(), 0.0
        methods.train_mode(progress.model)
        ended = progress.step == batches.total or out_of_patience(run, progress)
        while not ended:
            schedule.step_update(progress.step)
            one_step(run, progress, parts, gradients)
            progress.step += 1
            shown.update(s.batch_size)
            now = time.perf_counter()
            if run.show and now - printed > 0.5:
                printed = now
                loss, right, n = progress.sums.tolist()
                shown.set_postfix_str(
                    f"epoch {progress.step / run.steps:.1f}, loss {loss / n:.4f}, right {100 * right / n:.1f} %"
                )
            progress.seconds += now - began
            progress.seen += s.batch_size
            if progress.step % run.steps == 0:
                end_epoch(run, progress, logs)
                if after_epoch is not None:
                    after_epoch(progress.history[-1])
                ended = progress.step == batches.total or out_of_patience(run, progress)
            stopping = _any_process(run, stop.asked)
            after_each = (s.save_every,) if s.save_every else (100, run.steps)
            # also after the last step, because the run can be interrupted while it measures and writes its results
            if stopping or ended or any(progress.step % steps == 0 for steps in after_each):
                save(run, progress)
            if stopping and not ended:
                raise Interrupted(
                    f"stopped after step {progress.step} of {batches.total}; the same command "
                    f"{'' if s.resume else 'with resume true '}continues from there"
                )
            began = time.perf_counter()
    if progress.step < batches.total and run.main:
        log.info(f"stopped after epoch {progress.history[-1]['epoch']}: none was better in {s.patience} epochs")


def out_of_patience(run: Prepared, progress: Progress) -> bool:
    """Whether an epoch has just ended, and none of the last ``patience`` ones was the best on the validation images."""
    s = run.settings
    if s.patience is None or not progress.best or progress.step % run.steps:
        return False
    return progress.step // run.steps - progress.best["epoch"] >= s.patience


def one_step(run: Prepared, progress: Progress, parts: Iterator, gradients: Callable) -> None:
    """One step of the optimizer, on as many parts of a batch as are accumulated.

    gradients: (images, labels) -> (logits, loss), with the backward done.
    """
    s, accelerator = run.settings, run.accelerator
    for part in range(s.accumulate):
        images, labels = next_batch(parts)
        images, labels = run.normalise(images), labels.to(accelerator.device, non_blocking=True)
        seed_all(f"step {s.seed} {progress.step} {part} {accelerator.process_index}")
        with accelerator.accumulate(progress.model):
            y, loss = gradients(images, labels)
            if s.clip_grad is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(methods.trainable_parameters(progress.model), s.clip_grad)
            progress.optimizer.step()
            progress.optimizer.zero_grad()
        n, loss = len(labels), loss.to(run.wide)
        progress.sums += torch.stack([loss * n, right_answers(y, labels).to(run.wide), n + 0 * loss])
    if s.ema is not None:
        progress.update_averages(s.ema)


def _gradients(run: Prepared, progress: Progress, images: torch.Tensor, labels: torch.Tensor) -> tuple:
    """The logits [B, C] and the loss of a batch, after its backward."""
    with run.accelerator.autocast():
        y = logits(progress.model, images)
        y = y if y.dtype == torch.float64 else y.float()
        loss = loss_of(run, y, labels)
    run.accelerator.backward(loss)
    return y.detach(), loss.detach()


def end_epoch(run: Prepared, progress: Progress, logs: Trackers) -> None:
    """Measure on the validation images, remember the best weights, and log the epoch."""
    s, data = run.settings, run.data
    right_name, best_name = ("exact", "mean_ap") if data.multilabel else ("top1", "top1")
    loss, right, n = run.accelerator.reduce(progress.sums, "sum").tolist()
    progress.sums.zero_()
    _check_finite(progress.step, loss)
    entry = {
        "epoch": progress.step // run.steps,
        "lr": progress.optimizer.param_groups[0]["lr"],
        "train": {"loss": loss / n, right_name: 100 * right / n},
    }
    if data.val is not None:
        with progress.averaged():
            entry["val"] = evaluate(run, progress.model, data.val)
            if s.select == "val" and entry["val"][best_name] > progress.best.get(best_name, -1):
                weights = checkpoints.get_weights(progress.model)
                progress.best = {best_name: entry["val"][best_name], "epoch": entry["epoch"], "weights": weights}
    progress.history.append(entry)
    still = unmoved(run, progress, entry["epoch"])
    if run.main:
        val = f", val {entry['val'][best_name]:.2f} %" if "val" in entry else ""
        log.info(f"epoch {entry['epoch']}: loss {loss / n:.4f}, {NAMES[right_name]} {100 * right / n:.2f} %{val}")
        warning = None if data.multilabel else at_chance(s, entry["epoch"], loss / n, len(data.classes))
        for said in filter(None, (warning, still)):
            log.warning(said)
    values = {f"{part}/{name}": v for part in ("train", "val") for name, v in entry.get(part, {}).items()}
    logs.log({**values, "lr": entry["lr"]}, entry["epoch"])


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


def unmoved(run: Prepared, progress: Progress, epoch: int) -> str | None:
    """A warning if no factor that starts at zero has moved by the end of the epoch of :func:`at_chance`, or the last:
    squared gradients, by which AdamW divides, overflow at a scale of 1e30. Every process must call it.
    """
    model, s = run.accelerator.unwrap_model(progress.model), run.settings
    late = [p for p in methods.starting_at_zero(model) if p.requires_grad] if hasattr(model, "efft") else []
    if not late or epoch != min(math.ceil(s.warmup) + 1, s.epochs):
        return None
    if _any_process(run, any(getattr(p, "to_local", lambda p=p: p)().any() for p in late)):  # sharded by FSDP2
        return None
    return (
        f"epoch {epoch} has ended, and no factor that starts at zero has moved: the adapter changes nothing; try "
        f"another lr ({s.lr:g} now) or scale{f' ({s.scale:g} now)' if s.scale is not None else ''}"
    )


def save(run: Prepared, progress: Progress) -> None:
    """Write a checkpoint. A state whose loss is not finite raises instead: it would replace one of use."""
    sums = run.accelerator.reduce(progress.sums.clone(), "sum")
    _check_finite(progress.step, sums[0].item())
    state = progress.state(run.identity, sums)
    on_main(run, lambda: checkpoints.save(run.out, progress.step, state))


def _check_finite(step: int, loss: float) -> None:
    if not math.isfinite(loss):
        raise Diverged(f"the loss of step {step} is {loss}; a smaller lr or scale, or clip_grad, keeps it finite")


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
