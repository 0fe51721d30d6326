"""What a run shows to people: progress bars, TensorBoard logs, and curves."""

import sys
from pathlib import Path

from ..extras import need
from . import checkpoints


def bar(show: bool, total: int, what: str, unit: str, done: int = 0):
    """A tqdm progress bar, updated rarely where the output is not a terminal."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return need("tqdm").tqdm(
        total=total, initial=done, desc=what, unit=unit, disable=not show, mininterval=interval, dynamic_ncols=True
    )


def log_writer(out: Path, first: int | None):
    """A TensorBoard writer for out/logs.

    Args:
        first: the first epoch to be logged, if a run continues. An interrupted start may have logged it already; those
            entries are hidden.

    Raises:
        checkpoints.StorageError: the logs cannot be written.
    """
    need("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with checkpoints.storing(out, "the logs"):
        return SummaryWriter(out / "logs", purge_step=first)


def curves(file, record: dict) -> None:
    """Draw loss, accuracy and learning rate by epoch, as PNG.

    Args:
        file: a binary file to write to.
        record: the contents of metrics.json.
    """
    need("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    history, settings, result = record["history"], record["settings"], record["result"]
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, rate = figure.subplots(1, 3)
    for axis, key, label in ((loss, "loss", "loss, nats"), (accuracy, "top1", "top-1 accuracy, %")):
        for part in ("train", "val"):
            points = [(entry["epoch"], entry[part][key]) for entry in history if part in entry]
            if points:
                axis.plot(*zip(*points), label=part)
        if key == "top1" and "test" in result["metrics"]:
            top1 = result["metrics"]["test"]["top1"]
            axis.plot([result["epoch"]], [top1], "k*", label=f"test, at the end: {top1:.2f}")
        axis.set(xlabel="epoch", ylabel=label)
        axis.legend()
    rate.plot([entry["epoch"] for entry in history], [entry["lr"] for entry in history])
    rate.set(xlabel="epoch", ylabel="learning rate")
    figure.suptitle(
        f"{settings['method']} on {settings['model']}, {result['parameters']:,} trained parameters and the head"
    )
    figure.savefig(file, format="png", dpi=120)
