"""Where the metrics of a run are logged: TensorBoard by default, and the other trackers that accelerate knows."""

from pathlib import Path

from ..extras import need
from . import checkpoints
from .settings import Settings


def check(names: tuple[str, ...]) -> None:
    """Check that trackers are known and installed; accelerate would leave them out silently.

    Raises:
        ValueError: accelerate knows no such tracker. ImportError: its package is missing.
    """
    tracking = need("accelerate.tracking")
    known = [str(name) for name in tracking.LOGGER_TYPE_TO_CLASS]
    there = [str(name) for name in tracking.get_available_trackers()]
    for name in names:
        if name not in known:
            raise ValueError(f"trackers must be among {', '.join(known)}, got {name!r}")
        if name not in there:
            raise ImportError(f"the tracker {name} is not installed: pip install {name.replace('_', '-')}")


class Trackers:
    """The trackers of a run; made on every process, they log on the main one."""

    def __init__(self, accelerator, settings: Settings, first: int):
        """
        Args:
            first: the first epoch to be logged. An interrupted start may have logged it already; those entries of
                TensorBoard are hidden.

        Raises:
            checkpoints.StorageError: the logs cannot be written.
        """
        self.accelerator, self.out = accelerator, Path(settings.out)
        if settings.trackers:
            options = {"tensorboard": {"purge_step": first}} if "tensorboard" in settings.trackers else {}
            with checkpoints.storing(self.out, "the logs"):
                accelerator.init_trackers("logs", init_kwargs=options)
            for tracker in accelerator.trackers:
                if tracker.name != "tensorboard":  # it would write a file of settings at every start
                    tracker.store_init_configuration({k: v for k, v in vars(settings).items() if v is not None})

    def log(self, values: dict[str, float], epoch: int) -> None:
        """Log the values of an epoch.

        Raises:
            checkpoints.StorageError: they cannot be written.
        """
        with checkpoints.storing(self.out, "the logs"):
            self.accelerator.log(values, step=epoch)

    def close(self) -> None:
        """Finish all trackers. accelerate's own end_training() would also end the process group."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
