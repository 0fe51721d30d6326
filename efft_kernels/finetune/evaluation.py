"""The loss of a run, and what is measured on a part of its images, over all processes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..extras import need
from . import methods
from .data import Pictures, reading
from .images import DataError
from .models import logits
from .prepared import Prepared


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image."""

    image: int  # its number in the part
    classes: tuple[int, ...]  # one class, or with several labels per image those with a probability of at least 0.5
    probabilities: tuple[float, ...]  # of these classes
    error: float  # largest distance of a class's probability from 0 or 1, whichever is true


def loss_of(run: Prepared, y: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of logits [B, C]: cross-entropy, or with several labels per image the binary one of each class.

    Class weights are of the training images together, not of a batch: parts of an accumulated batch add up to it.
    """
    weights, smoothing = run.class_weights, run.settings.label_smoothing
    if run.data.multilabel:
        if smoothing:
            labels = labels * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(y, labels.to(y.dtype), pos_weight=weights)
    if weights is None:
        return F.cross_entropy(y, labels, label_smoothing=smoothing)
    total = F.cross_entropy(y, labels, weight=weights.to(y.dtype), label_smoothing=smoothing, reduction="sum")
    return total / len(labels)


def right_answers(y: Tensor, labels: Tensor) -> Tensor:
    """How many rows of logits give the right class, or with several labels per image all of the right ones."""
    if labels.dim() == 2:
        return ((y > 0) == (labels > 0.5)).all(1).sum()
    return (y.argmax(1) == labels).sum()


@torch.no_grad()
def evaluate(
    run: Prepared, model, part: Pictures, shown=None, predictions: list[Prediction] | None = None
) -> dict[str, float]:
    """Measure a model on all images of a part of the data; every process of a run must call it.

    Args:
        model: perhaps wrapped.
        shown: a progress bar of the images.
        predictions: a list that gets what is predicted of each image, in their order.

    Returns:
        The metrics, in % and nats: top1, mean_class and loss, or with several labels per image mean_ap (average
        precision) and f1 (at probability 0.5), means over the classes that some image has, exact (images whose labels
        are all right) and loss.
    """
    s, accelerator = run.settings, run.accelerator
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    classes = len(run.data.classes)
    stats = _multilabel_statistics(classes, device) if run.data.multilabel else {}
    counts = torch.zeros(2, classes, dtype=torch.int64, device=device)  # right answers, and images, of each class
    sums = torch.zeros(3, dtype=run.wide, device=device)  # loss, right answers, images
    found = []
    model.eval()
    size = max(1, s.batch_size // (s.accumulate * world))
    mine = list(range(rank, len(part), world))
    # every process takes the same number of forwards; -1 stands for an image that is not counted
    mine += [-1] * (-(-len(part) // world) - len(mine))
    sampler = [[max(i, 0) for i in mine[at : at + size]] for at in range(0, len(mine), size)]
    workers = 0 if part.kept is not None else s.workers
    batches = iter(torch.utils.data.DataLoader(part, batch_sampler=sampler, **reading(workers)))
    at = 0
    for _ in range(len(sampler)):
        images, labels = next_batch(batches)
        numbers = [i for i in mine[at : at + len(labels)] if i >= 0]  # padding comes last
        at += len(labels)
        with accelerator.autocast():
            y = logits(model, run.normalise(images))
        y, labels = y[: len(numbers)].to(run.wide), labels.to(device)[: len(numbers)]
        if numbers:
            if run.data.multilabel:
                for metric in stats.values():
                    metric.update(y.sigmoid().float(), labels.long())
                counts[1] += labels.sum(0).long()
            else:
                right = labels[y.argmax(1) == labels]
                counts += torch.stack([torch.bincount(each, minlength=classes) for each in (right, labels)])
            loss = (
                F.binary_cross_entropy_with_logits(y, labels.to(y.dtype), reduction="none").mean(1).sum()
                if run.data.multilabel
                else F.cross_entropy(y, labels, reduction="sum")
            )
            sums += torch.stack([loss, right_answers(y, labels).to(y.dtype), loss * 0 + len(numbers)])
            if predictions is not None:
                found += _predictions(numbers, y, labels)
        if shown is not None:
            shown.update(min(at * world, len(part)) - shown.n)
    methods.train_mode(model)
    loss, right, n = accelerator.reduce(sums, "sum").tolist()
    if predictions is not None:
        found = need("accelerate").utils.gather_object(found) if world > 1 else found
        predictions += sorted(found, key=lambda prediction: prediction.image)
    exact, (right, images) = right, accelerator.reduce(counts, "sum").double()
    present = images > 0  # a class without images has no accuracy
    if run.data.multilabel:
        found = {name: metric.compute()[present] for name, metric in stats.items()}
        percent = {name: round(100 * each.mean().item(), 4) if len(each) else 0.0 for name, each in found.items()}
        return {**percent, "exact": round(100 * exact / n, 4), "loss": loss / n}
    return {
        "top1": round(100 * (right.sum() / images.sum()).item(), 4),
        "mean_class": round(100 * (right[present] / images[present]).mean().item(), 4),
        "loss": loss / n,
    }


def _multilabel_statistics(classes: int, device: torch.device) -> dict:
    metrics = need("torchmetrics").classification  # imported only here: it imports scipy and transformers for seconds
    kinds = {"mean_ap": metrics.MultilabelAveragePrecision, "f1": metrics.MultilabelF1Score}
    return {name: kind(classes, average="none").to(device) for name, kind in kinds.items()}


def _predictions(numbers: list[int], y: Tensor, labels: Tensor) -> list[Prediction]:
    """The predictions of a batch of logits."""
    if labels.dim() == 2:
        p = y.sigmoid()
        errors = (p - labels).abs().amax(1).tolist()
        rows = [[(c, value) for c, value in enumerate(row) if value >= 0.5] for row in p.tolist()]
    else:
        p = y.softmax(1)
        best, which = p.max(1)
        errors = (1 - p.gather(1, labels[:, None])[:, 0]).tolist()
        rows = [[pair] for pair in zip(which.tolist(), best.tolist())]
    return [
        Prediction(i, tuple(c for c, _ in row), tuple(value for _, value in row), error)
        for i, row, error in zip(numbers, rows, errors)
    ]


def next_batch(batches: Iterator):
    """The next batch. A DataError of a worker process is raised without the traceback that it comes wrapped in."""
    try:
        return next(batches)
    except DataError as error:
        raise DataError(str(error).strip().splitlines()[-1].rpartition("DataError: ")[2]) from None
