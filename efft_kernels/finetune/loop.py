"""Training: checks first, then steps that can be interrupted at any moment, then the files that a run leaves.

Nothing random is carried from step to step: the order of an epoch depends on (seed, epoch), augmentation on (seed,
epoch, image), dropout on (seed, step, part, process). So a state is weights, optimizer and counters, and a run
that resumes from it takes the same steps, on a CPU bit for bit.
"""

import contextlib
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
from datetime import timedelta
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import storage
from . import checkpoints, methods
from .data import Data, DataError, Pictures, open_data, seed_all
from .models import logits, make_model, need, normalisation, timm
from .report import curves
from .settings import Settings

log = logging.getLogger("efft_kernels.finetune")
_REST = 64 * 2**20  # bytes of logs, curves and metrics, with room to spare


class Interrupted(Exception):
    """A signal asked the run to stop; its state has been written."""


@dataclass(frozen=True)
class Result:
    """What a run found. The files are in ``out``: adapter.safetensors, metrics.json, curves.png, logs/."""

    metrics: dict  # of the final weights: part of the data -> {"top1": %, "mean_class": %, "loss": nats}
    history: list[dict]  # one entry an epoch
    parameters: int  # trained, without the head
    head_parameters: int
    images_per_second: float  # while training, over all processes
    epoch: int  # whose weights these are
    adapter: Path
    out: Path


def train(settings: Settings, *, progress: bool = True) -> Result:
    """Fine-tune a model, or go on with the run that ``settings.out`` holds.

    Args:
        settings: the run. A finished one is not repeated: its result is read.
        progress: show a bar.

    Raises:
        ValueError, FileNotFoundError: settings, data or weights that cannot be used, before the first step.
        checkpoints.StorageError: a full or failing disk. What was written before is whole.
        Interrupted: after SIGTERM or SIGINT, with a state to resume from.
    """
    settings.check()
    methods.check(settings.method, settings.options)
    accelerator = _accelerator(settings)
    out = Path(settings.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, but {out} is a file")
    main = accelerator.is_main_process
    with contextlib.ExitStack() as stack:
        stack.callback(_release)
        with checkpoints.storing(out if out.is_dir() else Path.cwd(), f"the folder {out}"):
            out.mkdir(parents=True, exist_ok=True)
            if main:
                stack.enter_context(checkpoints.alone(out))
                checkpoints.tidy(out)
                if not settings.resume:
                    checkpoints.clear(out)
                    (out / "metrics.json").unlink(missing_ok=True)
                    shutil.rmtree(out / "logs", ignore_errors=True)  # curves of two runs would mix
        accelerator.wait_for_everyone()
        return _Run(settings, accelerator, out, progress and main).go()


def _accelerator(settings: Settings):
    """Devices, processes, precision"""
    accelerate = need("accelerate")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be 'cpu' or 'auto' on a machine without a GPU that torch can use, got 'cuda'")
    cpu = settings.device == "cpu" or not torch.cuda.is_available()
    precision = settings.mixed_precision
    if precision == "auto":
        precision = "no" if cpu or settings.dtype == "float64" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if precision != "no" and settings.dtype == "float64":
        raise ValueError(f"mixed_precision must be 'no' with dtype='float64', got {precision!r}")
    if precision == "fp16" and cpu:
        raise ValueError("mixed_precision must be 'no' or 'bf16' on a CPU, got 'fp16'")
    plugin = None
    if settings.fsdp:
        plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
    return accelerate.Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        gradient_accumulation_plugin=accelerate.utils.GradientAccumulationPlugin(
            num_steps=settings.accumulate, sync_with_dataloader=False
        ),
        fsdp_plugin=plugin,
        kwargs_handlers=[accelerate.InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )


def _release() -> None:
    """so that the next run of this Python process may choose another precision"""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()
    GradientState._reset_state()


class Batches:
    """What one process reads: for each step and part of it, pairs (epoch, image). The same order for any number of
    processes and parts, of which each takes its slice of every batch.
    """

    def __init__(self, settings: Settings, images: int, rank: int, world: int, first: int):
        self.seed, self.images, self.size = settings.seed, images, settings.batch_size
        self.parts, self.rank, self.world, self.first = settings.accumulate, rank, world, first
        self.steps = images // settings.batch_size  # of an epoch; the rest is left out
        self.total = self.steps * settings.epochs

    def __len__(self) -> int:
        return (self.total - self.first) * self.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.size // (self.parts * self.world)
        order = (-1, [])
        for step in range(self.first, self.total):
            epoch, place = divmod(step, self.steps)
            if order[0] != epoch:
                generator = torch.Generator().manual_seed(_seed(f"order {self.seed} {epoch}"))
                order = epoch, torch.randperm(self.images, generator=generator).tolist()
            batch = order[1][place * self.size : (place + 1) * self.size]
            for part in range(self.parts):
                start = (part * self.world + self.rank) * share
                yield [(epoch, i) for i in batch[start : start + share]]


def _seed(key: str) -> int:
    return int.from_bytes(sha256(key.encode()).digest()[:8], "little") % 2**63


class _Run:
    """One call of train()."""

    def __init__(self, settings: Settings, accelerator, out: Path, progress: bool):
        self.settings, self.accelerator, self.out, self.progress = settings, accelerator, out, progress
        self.rank, self.world, self.device = accelerator.process_index, accelerator.num_processes, accelerator.device
        self.main = accelerator.is_main_process
        self.asked_to_stop = 0  # the signal

    # -- before the first step ----------------------------------------------------------------------------------------

    def go(self) -> Result:
        s = self.settings
        share = s.accumulate * self.world
        if s.batch_size % share:
            raise ValueError(
                f"batch_size must be a multiple of accumulate={s.accumulate} times {self.world} processes, "
                f"got {s.batch_size}"
            )
        choice = {"hold_out": s.select == "val", "classes": s.classes, "augment": s.augment, "seed": s.seed}
        fractions = {"test_fraction": s.test_fraction, "val_fraction": s.val_fraction}
        data = open_data(s.data, s.image_size, interpolation=s.interpolation, **choice, **fractions)
        if len(data.classes) < 2:
            raise DataError(f"{s.data} must have at least 2 classes, but has {len(data.classes)}")
        if len(data.train) < s.batch_size:
            raise DataError(f"batch_size must be at most the {len(data.train)} training images, got {s.batch_size}")
        if finished := self._finished(data):
            return finished
        seed_all(f"model {s.seed}")
        model = make_model(s.model, len(data.classes), s.image_size, s.checkpoint, s.drop_path)
        methods.apply(s.method, model.to(getattr(torch, s.dtype)), s.options)
        self.weights = methods.fingerprint(model)
        self.data_print = data.fingerprint()
        saved = checkpoints.load(self.out, log.warning) if s.resume else None
        if saved:
            self._check_same(saved["identity"])
        self._look_at(data, model, skip=bool(saved))
        model.to(self.device)
        self.mean, self.std = (
            torch.tensor(values, device=self.device, dtype=getattr(torch, s.dtype)).view(3, 1, 1) * 255
            for values in normalisation(model, s.normalize)
        )
        self._try(model, len(data.classes))
        self.parameters = methods.count(model)
        self.head_parameters = sum(p.numel() for p in methods.trainable_parameters(model)) - self.parameters
        self._check_disk(model)
        if self.main:
            log.info(
                f"{s.method} on {s.model}: {self.parameters:,} trained parameters and {self.head_parameters:,} of the "
                f"head; {', '.join(f'{len(part)} {name}' for name, part in data.parts().items())} images of "
                f"{len(data.classes)} classes"
            )
        return self._train(data, model, saved)

    def _identity(self) -> dict:
        return {**self.settings.identity(), "data": self.data_print, "weights": self.weights}

    def _check_same(self, found: dict) -> None:
        now = json.loads(json.dumps(self._identity()))
        if differing := [name for name in now if found.get(name) != now[name]]:
            what = {"data": "the images", "weights": "the frozen weights"}
            said = [what.get(n) or f"{n} ({found.get(n)!r} there, {now[n]!r} now)" for n in differing]
            raise ValueError(
                f"out must be a new folder, or resume false to start over: the run in {self.out} differs in "
                f"{', '.join(said)}"
            )

    def _finished(self, data: Data) -> Result | None:
        path = self.out / "metrics.json"
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text())
            identity, result = found["identity"], found["result"]
            self.weights = identity["weights"]  # reading the weights again would cost more than it proves
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not what a run of this version leaves: {error}") from error
        self.data_print = data.fingerprint()
        self._check_same(identity)
        if self.main:
            checkpoints.clear(self.out)  # if it was interrupted at the very last
            log.info(f"{self.out} holds this run, finished; resume=false would repeat it")
        return Result(**{**result, "adapter": self.out / result["adapter"]}, history=found["history"], out=self.out)

    def _look_at(self, data: Data, model: nn.Module, skip: bool) -> None:
        """Read every image once: to keep it, or to know that it can be read."""
        parts = data.parts()
        keep = sum(part.bytes for part in parts.values()) <= self.settings.memory * 2**30
        if skip and not keep:
            return  # read when the run began, and since then of one size
        with self._bar(sum(map(len, parts.values())), "reading images", "img") as bar:
            for part in parts.values():
                part.check(keep, bar.update)

    def _try(self, model: nn.Module, classes: int) -> None:
        """One forward and backward on noise, in evaluation mode; what gets no gradient is not trained"""
        s = self.settings
        noise = torch.rand(2, 3, s.image_size, s.image_size, device=self.device, dtype=getattr(torch, s.dtype))
        model.eval()
        try:
            with self.accelerator.autocast():
                y = logits(model, noise)
        except (RuntimeError, ValueError, AssertionError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(f"image_size={s.image_size} does not fit {s.model}: {error}") from error
        if y.shape != (2, classes):
            raise ValueError(f"{s.model} must give [2, {classes}] for two images, got {list(y.shape)}")
        y.float().sum().backward()
        # left out of the steps, where DDP would wait for their gradients
        self.unused = [p for p in methods.trainable_parameters(model) if p.grad is None]
        for p in model.parameters():
            p.grad = None
        for p in self.unused:
            p.requires_grad_(False)
        if not methods.trainable_parameters(model):
            raise ValueError(f"method {s.method!r} trains nothing that the output of {s.model} depends on")

    def _check_disk(self, model: nn.Module) -> None:
        trained = sum(p.numel() * p.element_size() for p in methods.trainable_parameters(model))
        # two states stay while a third is written; each has the weights and two moments, and perhaps the best weights
        needed = trained * (3 * (3 + (self.settings.select == "val")) + 1) + _REST
        free = shutil.disk_usage(self.out).free
        held = sum(path.stat().st_size for path in checkpoints.states(self.out))
        if self.main and free + held < needed:
            raise checkpoints.StorageError(
                f"{self.out} has {free / 2**20:.0f} MiB free, but states, adapter and logs of this run take up to "
                f"{needed / 2**20:.0f} MiB"
            )

    # -- the steps ----------------------------------------------------------------------------------------------------

    def _train(self, data: Data, model: nn.Module, saved: dict | None) -> Result:
        s, accelerator = self.settings, self.accelerator
        timm()
        from timm.scheduler import CosineLRScheduler

        optimizer = torch.optim.AdamW(methods.trainable_parameters(model), lr=s.lr, weight_decay=s.weight_decay)
        steps = len(data.train) // s.batch_size
        schedule = CosineLRScheduler(
            optimizer, t_initial=steps * s.epochs, lr_min=min(s.min_lr, s.lr), t_in_epochs=False,
            warmup_t=round(s.warmup * steps), warmup_lr_init=min(s.warmup_lr, s.lr),
        )  # fmt: skip
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.step, self.history, self.best = 0, [], {}
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, right, images of this epoch
        self.seconds, self.seen = 0.0, 0
        if saved:
            self._restore(saved)
            if self.main:
                log.info(f"going on after step {self.step} of {steps * s.epochs}")
        batches = Batches(s, len(data.train), self.rank, self.world, self.step)
        loader = torch.utils.data.DataLoader(
            data.train,
            batch_sampler=batches,
            num_workers=0 if data.train.kept is not None else s.workers,
            pin_memory=self.device.type == "cuda",
        )
        writer = self._writer(steps)
        bar = self._bar(steps * s.epochs * s.batch_size, "training", "img", self.step * s.batch_size)
        with self._signals(), bar:
            parts = iter(loader)
            began, shown = time.perf_counter(), 0.0
            methods.train_mode(self.model)
            while self.step < batches.total:
                schedule.step_update(self.step)
                self._one_step(parts)
                self.step += 1
                bar.update(s.batch_size)
                now = time.perf_counter()
                if self.progress and now - shown > 0.5:
                    shown = now
                    loss, right, n = self.sums.tolist()
                    bar.set_postfix_str(
                        f"epoch {self.step / steps:.1f}, loss {loss / n:.4f}, top-1 {100 * right / n:.1f} %"
                    )
                self.seconds, self.seen = self.seconds + now - began, self.seen + s.batch_size
                if self.step % steps == 0:
                    self._end_of_epoch(data, writer)
                stop = self._stopping()
                # saved also at the very end: what follows can be interrupted, too
                if stop or self.step % s.save_every == 0 or self.step == batches.total:
                    self._save()
                if stop and self.step < batches.total:
                    raise Interrupted(
                        f"stopped after step {self.step} of {batches.total}; the same command goes on from there"
                    )
                began = time.perf_counter()
            bar.close()  # what follows is no time of training
            return self._finish(data, writer)

    def _one_step(self, parts: Iterator) -> None:
        s, accelerator = self.settings, self.accelerator
        for part in range(s.accumulate):
            images, labels = _sentence_of(parts)
            images, labels = self._ready(images), labels.to(self.device, non_blocking=True)
            seed_all(f"step {s.seed} {self.step} {part} {self.rank}")
            with accelerator.accumulate(self.model):
                with accelerator.autocast():
                    y = logits(self.model, images)
                    y = y if y.dtype == torch.float64 else y.float()
                    loss = F.cross_entropy(y, labels, label_smoothing=s.label_smoothing)
                accelerator.backward(loss)
                if s.clip_grad is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(methods.trainable_parameters(self.model), s.clip_grad)
                self.optimizer.step()
                self.optimizer.zero_grad()
            n = len(labels)
            self.sums += torch.stack(
                [
                    loss.detach().double() * n,
                    (y.detach().argmax(1) == labels).sum().double(),
                    n + 0 * loss.detach().double(),
                ]
            )

    def _ready(self, images: Tensor) -> Tensor:  # uint8 [B, 3, S, S] -> normalised, on the device
        return (images.to(self.device, non_blocking=True).to(self.mean.dtype) - self.mean) / self.std

    def _end_of_epoch(self, data: Data, writer) -> None:
        s = self.settings
        loss, right, n = self.accelerator.reduce(self.sums, "sum").tolist()
        self.sums.zero_()
        self._check_finite(loss)
        entry = {"epoch": self.step * s.batch_size // (len(data.train) // s.batch_size * s.batch_size)}
        entry |= {
            "lr": self._plain_optimizer().param_groups[0]["lr"],
            "train": {"loss": loss / n, "top1": 100 * right / n},
        }
        if data.val is not None:
            entry["val"] = self._evaluate(data.val, len(data.classes))
            if s.select == "val" and entry["val"]["top1"] > self.best.get("top1", -1):
                self.best = {"top1": entry["val"]["top1"], "epoch": entry["epoch"], "weights": self._weights()}
        self.history.append(entry)
        if self.main:
            held = f", val {entry['val']['top1']:.2f} %" if "val" in entry else ""
            log.info(f"epoch {entry['epoch']}: loss {loss / n:.4f}, top-1 {100 * right / n:.2f} %{held}")
            with checkpoints.storing(self.out, "the logs"):
                for part in ("train", "val"):
                    for name, value in entry.get(part, {}).items():
                        writer.add_scalar(f"{part}/{name}", value, entry["epoch"])
                writer.add_scalar("lr", entry["lr"], entry["epoch"])
                writer.flush()

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss of step {self.step} is {loss}; a smaller lr or scale, or clip_grad, keeps it finite"
            )

    @torch.no_grad()
    def _evaluate(self, part: Pictures, classes: int, bar=None) -> dict[str, float]:
        """top-1 and mean-class accuracy in %, and the mean loss, of all images of a part"""
        # counts: for each class right ones, three kinds of others, and images
        found = need("torchmetrics").classification.MulticlassStatScores(classes, average=None).to(self.device)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, images; torchmetrics would use float32
        self.model.eval()
        size = max(1, self.settings.batch_size // (self.settings.accumulate * self.world))
        mine = list(range(self.rank, len(part), self.world))
        mine += [-1] * (-(-len(part) // self.world) - len(mine))  # processes forward together: a stand-in, not counted
        workers = 0 if part.kept is not None else self.settings.workers
        sampler = [[max(i, 0) for i in mine[at : at + size]] for at in range(0, len(mine), size)]
        loader = torch.utils.data.DataLoader(part, batch_sampler=sampler, num_workers=workers)
        at, batches = 0, iter(loader)
        for _ in range(len(sampler)):
            images, labels = _sentence_of(batches)
            real = torch.tensor([i >= 0 for i in mine[at : at + len(labels)]], device=self.device)
            at += len(labels)
            with self.accelerator.autocast():
                y = logits(self.model, self._ready(images))
            y, labels = y[real], labels.to(self.device)[real]
            if len(y):
                found.update(y, labels)
                sums += torch.stack([F.cross_entropy(y.double(), labels, reduction="sum"), real.sum().double()])
            if bar is not None:
                bar.update(min(at * self.world, len(part)) - bar.n)
        methods.train_mode(self.model)
        loss, n = self.accelerator.reduce(sums, "sum").tolist()
        counts = found.compute().double()
        right, images = counts[:, 0], counts[:, -1]
        there = images > 0  # a class without images has no accuracy
        return {
            "top1": round(100 * (right.sum() / images.sum()).item(), 4),
            "mean_class": round(100 * (right[there] / images[there]).mean().item(), 4),
            "loss": loss / n,
        }

    # -- states -------------------------------------------------------------------------------------------------------

    def _weights(self) -> dict[str, Tensor]:
        """What is trained, and buffers, under the names of the unwrapped model; on every process"""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return {key: t.clone() for key, t in get_model_state_dict(self.model, options=options).items()}

    def _set_weights(self, weights: dict[str, Tensor]) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(self.model, weights, options=options)

    def _save(self) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        sums = self.accelerator.reduce(self.sums.clone(), "sum").cpu()
        self._check_finite(sums[0].item())  # a state without use would replace one of use
        made = {
            "identity": json.loads(json.dumps(self._identity())),
            "step": self.step,
            "weights": self._weights(),
            "optimizer": get_optimizer_state_dict(self.model, self._plain_optimizer(), options=options),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
            "sums": sums,
            "history": self.history,
            "best": self.best,
            "seconds": self.seconds,
            "seen": self.seen,
        }
        self._alone(lambda: checkpoints.save(self.out, self.step, made))

    def _restore(self, saved: dict) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        self._set_weights(saved["weights"])
        set_optimizer_state_dict(
            self.model, self._plain_optimizer(), saved["optimizer"], options=StateDictOptions(full_state_dict=True)
        )
        if self.accelerator.scaler and saved["scaler"]:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.step, self.history, self.best = saved["step"], saved["history"], saved["best"]
        self.seconds, self.seen = saved["seconds"], saved["seen"]
        if self.main:
            self.sums.copy_(saved["sums"])

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _alone(self, write) -> None:
        """The main process writes; if it cannot, all processes know."""
        failure = None
        if self.main:
            try:
                write()
            except checkpoints.StorageError as error:
                failure = error
        if self.world > 1:
            said = [None if failure is None else (failure.errno, failure.strerror)]
            torch.distributed.broadcast_object_list(said, 0)
            failure = said[0] and checkpoints.StorageError(*said[0])
        if failure:
            raise failure

    @contextlib.contextmanager
    def _signals(self):
        """SIGTERM and SIGINT ask to stop after the step; a second one is obeyed at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def ask(number, frame):
            self.asked_to_stop = number
            signal.signal(number, before[number])

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stopping(self) -> bool:
        asked = bool(self.asked_to_stop)
        if self.world > 1:
            asked = torch.tensor(int(asked), device=self.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        return bool(asked)

    # -- after the last ----------------------------------------------------------------------------------------------

    def _finish(self, data: Data, writer) -> Result:
        s = self.settings
        epoch = s.epochs
        if s.select == "val":
            self._set_weights(self.best["weights"])
            epoch = self.best["epoch"]
        metrics = {}
        parts = data.parts()
        for name in [name for name in ("val", "test") if name in parts] or ["train"]:
            with self._bar(len(parts[name]), f"measuring on {name}", "img") as bar:
                metrics[name] = self._evaluate(parts[name], len(data.classes), bar)
        result = {
            "metrics": metrics,
            "parameters": self.parameters,
            "head_parameters": self.head_parameters,
            "images_per_second": self.seen / self.seconds if self.seconds else 0.0,
            "epoch": epoch,
            "adapter": "adapter.safetensors",
        }
        record = {
            "result": result,
            "classes": list(data.classes),
            "history": self.history,
            "settings": asdict(s),
            "identity": self._identity(),
            "versions": _versions(),
        }
        weights = self._weights()
        self._alone(lambda: self._leave(record, weights, writer))
        return Result(**{**result, "adapter": self.out / result["adapter"]}, history=self.history, out=self.out)

    def _leave(self, record: dict, weights: dict[str, Tensor], writer) -> None:
        """The files of a finished run; metrics.json last, because it says that the run is finished"""
        s = self.settings
        with checkpoints.storing(self.out, "the results"):
            model = self.accelerator.unwrap_model(self.model)
            if s.fsdp:  # its weights are shards: a model of its own takes the whole ones
                seed_all(f"model {s.seed}")
                model = make_model(s.model, len(record["classes"]), s.image_size, s.checkpoint)
                methods.apply(s.method, model.to(getattr(torch, s.dtype)), s.options)
                model.load_state_dict(weights, strict=False)
            for p in self.unused:
                p.requires_grad_(True)
            methods.save(s.method, s.options, model, self.out / record["result"]["adapter"], s.model)
            storage.write(self.out / "curves.png", lambda file: curves(file, record))
            writer.close()
            text = json.dumps(record, indent=1)
            storage.write_bytes(self.out / "metrics.json", text.encode())
            checkpoints.clear(self.out)

    def _writer(self, steps: int):
        if not self.main:
            return None
        need("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        with checkpoints.storing(self.out, "the logs"):
            # epochs that were logged but not saved before an interruption are drawn once
            return SummaryWriter(self.out / "logs", purge_step=self.step // steps + 1 if self.step else None)

    def _bar(self, total: int, what: str, unit: str, done: int = 0):
        tqdm = need("tqdm").tqdm
        quiet = not self.progress
        slow = 0.1 if sys.stderr.isatty() else 10.0
        return tqdm(
            total=total, initial=done, desc=what, unit=unit, disable=quiet, mininterval=slow, dynamic_ncols=True
        )


def _sentence_of(batches: Iterator):
    """The next batch; a DataError that a worker raised without the traceback that it wraps it in"""
    try:
        return next(batches)
    except DataError as error:
        raise DataError(str(error).strip().splitlines()[-1].rpartition("DataError: ")[2]) from None


def _versions() -> dict[str, str]:
    import importlib.metadata

    found = {}
    for name in ("efft_kernels", "torch", "timm", "transformers", "accelerate"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {"python": sys.version.split()[0], **found}
