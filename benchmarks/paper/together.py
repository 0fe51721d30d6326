"""Several fine-tuning runs in one pass: seeds, settings and data sets as adapters of one AdapterBank batch.

A step of K runs is one forward and one backward of K batches through the frozen backbone that they share. Each run has
its own images and their order, factors, head, optimizer and learning rates, so that it takes the steps that it would
take alone, up to rounding; with dropout the masks are others. Methods without a bank are trained one run at a time.

    python benchmarks/paper/together.py --bundle FILE --together 1 8 28    # images per second
"""

import argparse
import contextlib
import copy
import functools
import json
import math
import statistics
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efft_kernels.finetune import methods
from efft_kernels.finetune.data import open_data, seed_all
from efft_kernels.finetune.head_init import RECIPE, fitted
from efft_kernels.finetune.loop import Batches
from efft_kernels.finetune.models import logits, make_model, normalisation
from efft_kernels.finetune.settings import Settings
from efft_kernels.inject import starting_at_zero
from efft_kernels.layouts import classifiers_of, heads_of
from efft_kernels.serving import AdapterBank
from linear_probe import DEVICE, answers

sys.path.append(str(Path(__file__).resolve().parents[1]))
import record

BANKED = ("lora", "fact-tt", "fact-tk", "efft1", "efft2")
OWN = {"lr", "scale", "rank", "weight_decay", "lr_ratio", "head_init"}  # settings that the runs of a pass may differ in
USED = OWN | {
    *("data", "out", "device", "model", "checkpoint", "method", "epochs", "batch_size", "warmup_epochs", "warmup_lr"),
    *("min_lr", "drop_path", "clip_grad", "image_size", "interpolation", "normalize", "seed", "save_every", "trackers"),
}


class Pictures(NamedTuple):
    """The images of a run, uint8 [N, 3, S, S], and their labels."""

    train: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int


def shared(method: str, settings: dict) -> tuple:
    """What runs must have in common to be trained in one pass; () for a run that has to be alone.

    Random weights of a backbone differ from seed to seed.
    """
    if method not in BANKED or settings.get("checkpoint") == "random":
        return ()
    return tuple(sorted((key, json.dumps(value)) for key, value in settings.items() if key not in OWN))


@functools.lru_cache(64)
def read(source: str, size: int, interpolation: str, device: str) -> Pictures:
    """All images of a registered source, resized, on the device."""
    data = open_data(source, size, interpolation=interpolation)
    for part in (data.train, data.test):
        part.check(True)
    found = [t for part in (data.train, data.test) for t in (part.kept, torch.tensor(part.labels))]
    return Pictures(*(t.to(device) for t in found), len(data.classes))


@functools.lru_cache(8)
def _new(seed: int, classes: int, model: str, size: int, checkpoint: str, drop_path: float) -> tuple[nn.Module, Tensor]:
    """The model as a run with this seed makes it, and the state of the random numbers afterwards."""
    seed_all(f"model {seed}")
    return make_model(model, classes, size, checkpoint, drop_path), torch.get_rng_state()


def _backbone(s: Settings, classes: int) -> tuple[nn.Module, Tensor]:
    return _new(s.seed, classes, s.model, s.image_size, s.checkpoint, s.drop_path)


def _adapted(s: Settings, classes: int) -> nn.Module:
    made, state = _backbone(s, classes)
    model = copy.deepcopy(made)
    torch.set_rng_state(state)
    return methods.apply(s.method, model, s.options)


class _Run:
    """One run of a pass: its images, its parameters in the pass, its optimizer and its learning rates."""

    def __init__(self, settings: Settings, pictures: Pictures, model: nn.Module):
        allowed = USED | set(settings.options)
        unused = [f.name for f in fields(Settings) if f.name not in allowed and getattr(settings, f.name) != f.default]
        if unused:
            raise ValueError(f"{unused[0]} must have its default in runs that are trained together")
        self.settings, self.pictures = settings, pictures
        self.parameters = methods.count(model)
        self.head_parameters = sum(p.numel() for p in methods.trainable_parameters(model)) - self.parameters
        self.history: list[float] = []

    def start(self, own: list[nn.Parameter], late: set[int], device: str) -> None:
        """Make the optimizer and the schedule, as efft_kernels.finetune does; late: those that start at zero."""
        from timm.scheduler import CosineLRScheduler

        s, self.own = self.settings, own
        self.batches = Batches(s, len(self.pictures.train), 0, 1, 0)
        groups = [{"params": own}]
        if s.lr_ratio != 1:
            first, second = ([p for i, p in enumerate(own) if (i in late) == zero] for zero in (False, True))
            groups = [{"params": first}, {"params": second, "lr_scale": s.lr_ratio}]
        self.optimizer = torch.optim.AdamW(groups, lr=s.lr, weight_decay=s.weight_decay, fused=device != "cpu" or None)
        self.schedule = CosineLRScheduler(
            self.optimizer, t_initial=self.batches.total, lr_min=min(s.min_lr, s.lr), t_in_epochs=False,
            warmup_t=round(s.warmup * self.batches.steps), warmup_lr_init=min(s.warmup_lr, s.lr),
        )  # fmt: skip
        self.order = torch.tensor([[i for _, i in batch] for batch in self.batches])  # [steps, B]


class Pass:
    """Runs that are trained together: their model, and how it sees the batches of all of them."""

    def __init__(self, settings: list[Settings], pictures: list[Pictures], device: str):
        s = settings[0]
        self.device, self.K, self.B = device, len(settings), s.batch_size
        self.autocast = device != "cpu"  # bfloat16, as efft_kernels.finetune on a GPU
        models = [_adapted(one, found.classes) for one, found in zip(settings, pictures)]
        self.runs = [_Run(*of) for of in zip(settings, pictures, models)]
        late = {id(p) for p in starting_at_zero(models[0])} if s.method in BANKED else set()
        of_model = [p for p in methods.trainable_parameters(models[0]) if id(p) not in _head_ids(models[0])]
        late = {i for i, p in enumerate(of_model) if id(p) in late}
        self.bank = None
        if self.K > 1:
            self.model = copy.deepcopy(_backbone(s, pictures[0].classes)[0]).to(device)
            self.bank = AdapterBank(self.model)
            for i, model in enumerate(models):
                self.bank.add(str(i), model)
                self.runs[i].start(self.bank.parameters(str(i)), late, device)
        else:
            self.model = models[0].to(device)
            heads = _head_ids(self.model)
            own = sorted(methods.trainable_parameters(self.model), key=lambda p: id(p) in heads)  # the head last
            self.runs[0].start(own, late, device)
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) * 255 for v in normalisation(self.model, s.normalize))
        self.normalise = lambda images: (images.to(device).float() - mean) / std
        for i, run in enumerate(self.runs):
            if run.settings.head_init == "probe":
                self._probe(i, run)
        self._gather_images()

    def _gather_images(self) -> None:
        """Put the images of all data sets into one tensor, so that the batches of a step are one index into it."""
        sets = {id(run.pictures): run.pictures for run in self.runs}
        starts, at = {}, 0
        for key, found in sets.items():
            starts[key], at = at, at + len(found.train)
        self.images = torch.cat([found.train for found in sets.values()])
        labels = torch.cat([found.labels for found in sets.values()])
        # [steps, K * B]
        self.order = torch.cat([run.order + starts[id(run.pictures)] for run in self.runs], 1).to(self.device)
        self.labels = labels[self.order]

    def _logits(self, x: Tensor) -> Tensor:
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.autocast):
            return logits(self.model, x).float()

    @torch.no_grad()
    def _probe(self, i: int, run: _Run) -> None:
        """Start the head as a linear probe of the untouched model, as head_init="probe" does."""
        ((_, linear),) = classifiers_of(self.model)
        seen = []
        hook = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].float()))
        self.model.eval()
        for rows in torch.arange(len(run.pictures.train)).split(run.settings.batch_size):
            self._logits(self.normalise(run.pictures.train[rows]))
        hook.remove()
        head = nn.Linear(linear.in_features, run.pictures.classes, linear.bias is not None, device=self.device)
        found = fitted(torch.cat(seen), run.pictures.labels, head, RECIPE, run.settings.seed)
        for p, value in zip(run.own[-len([t for t in found if t is not None]) :], found):
            p.copy_(value)

    def step(self, step: int) -> tuple[Tensor, Tensor]:
        """One step of every run: (losses [K], right answers [K])."""
        for run in self.runs:
            run.schedule.step_update(step)
        seed_all(f"step {self.runs[0].settings.seed} {step} 0 0")
        labels = self.labels[step]
        y = self._logits(self.normalise(self.images[self.order[step]]))
        losses = F.cross_entropy(y, labels, reduction="none").view(self.K, self.B).mean(1)
        losses.sum().backward()
        for run in self.runs:
            if run.settings.clip_grad is not None:
                nn.utils.clip_grad_norm_(run.own, run.settings.clip_grad)
            run.optimizer.step()
            run.optimizer.zero_grad()
        return losses.detach(), (y.detach().argmax(1) == labels).view(self.K, self.B).sum(1)

    def train(self, deadline: float | None = None) -> float:
        """Take all steps; returns the seconds that they took.

        Raises:
            TimeoutError: the last step would end after the deadline, a time.time().
        """
        steps, total = self.runs[0].batches.steps, self.runs[0].batches.total
        methods.train_mode(self.model)
        began, right = time.perf_counter(), 0
        with self._using():
            for step in range(total):
                right = right + self.step(step)[1]
                if (step + 1) % steps == 0:
                    for run, n in zip(self.runs, right.tolist()):
                        run.history.append(round(100 * n / (steps * self.B), 2))
                    right = 0
                if deadline and step in (20, steps):
                    _wait(self.device)
                    left = (time.perf_counter() - began) / (step + 1) * (total - step - 1)
                    if time.time() + left > deadline:
                        raise TimeoutError(f"{left:.0f} s more than there are left for {self.K} runs")
        _wait(self.device)
        return time.perf_counter() - began

    def _using(self, names: list[str] | None = None):
        if self.bank is None:
            return contextlib.nullcontext()
        return self.bank.use(names or [str(i) for i in range(self.K) for _ in range(self.B)])

    @torch.no_grad()
    def test(self, i: int, run: _Run) -> dict:
        """As linear_probe.answers, of the test images."""
        self.model.eval()
        found = []
        for x in run.pictures.test.split(500):
            with self._using([str(i)] * len(x)):
                found.append(self._logits(self.normalise(x))[:, : run.pictures.classes])
        measured = answers(torch.cat(found), run.pictures.test_labels)
        if not math.isfinite(measured["loss"]):
            return {"top1": None, "diverged": f"the loss is {measured['loss']}"}
        return measured


def _head_ids(model: nn.Module) -> set[int]:
    return {id(p) for head in heads_of(model).values() for p in head.parameters()}


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def measure(settings: list[Settings], deadline: float | None = None) -> list[dict]:
    """Train runs in one pass and measure each: what runs.measure() finds of a run, in the order of the runs."""
    device = DEVICE if settings[0].device == "auto" else settings[0].device
    made = Pass(settings, [read(s.data, s.image_size, s.interpolation, device) for s in settings], device)
    seconds = made.train(deadline)
    return [
        {
            **made.test(i, run),
            "parameters": run.parameters,
            "head_parameters": run.head_parameters,
            "train_top1": run.history,
            "together": made.K,
            "step_ms": round(1e3 * seconds / run.batches.total, 2),
        }
        for i, run in enumerate(made.runs)
    ]


def main(arguments: list[str] | None = None) -> int:
    """Print, and with --out record, the images per second of each number of runs, in steps that take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--bundle", type=Path, required=True, help="of bundle.py")
    add("--together", type=int, nargs="+", default=[1, 8, 28], help="numbers of runs, in memory at the same time")
    add("--method", choices=BANKED, default="efft2")
    add("--steps", type=int, default=40)
    add("--image-size", type=int, default=112)
    add("--batch-size", type=int, default=64)
    add("--device", default=DEVICE)
    add("--out", type=Path, help="folder for together.csv and together.json")
    args = parser.parse_args(arguments)
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, for quartiles, got {args.steps}")
    import bundle

    if args.out:
        record.prepare_folder(args.out)
    try:
        found, passes = bundle.use(args.bundle), {}
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for K in args.together:
        settings = [
            Settings("dsprites_loc", "none", found.model, str(found.path), args.method, rank=16, scale=0.1, seed=seed,
                     drop_path=0.0, image_size=args.image_size, batch_size=args.batch_size, device=args.device)
            for seed in range(K)
        ]  # fmt: skip
        pictures = read("dsprites_loc", args.image_size, "bicubic", args.device)
        passes[K] = Pass(settings, [pictures] * K, args.device)
        methods.train_mode(passes[K].model)
    seconds = {K: [] for K in passes}
    for step in range(5 + args.steps):
        for K, made in passes.items():
            with made._using():
                began = time.perf_counter()
                made.step(step)
                _wait(args.device)
            seconds[K].append(time.perf_counter() - began)
    del args.bundle  # a path
    run = record.begun("together", args) | {"complete": True, "results": []}  # all of it is measured
    for K, taken in seconds.items():
        q1, middle, q3 = (1e3 * q for q in statistics.quantiles(taken[5:], n=4))  # the first ones fill caches
        row = {"method": args.method, "adapters": K, "rounds": args.steps, "ms": middle, "q1": q1, "q3": q3}
        row["images_per_s"] = 1e3 * K * args.batch_size / middle
        print(json.dumps(row), flush=True)
        record.add_rows(run, [row], args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
