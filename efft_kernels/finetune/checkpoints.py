"""Checkpoints: what they hold, how they are written and found again, and errors that say what is safe on the disk."""

import contextlib
import errno
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn

from ..storage import remove_partial, write

_NAME = "state-{:09d}.pt"
_MARK = b"efft-sha"  # ends a file, followed by the SHA-256 of all that is before
_locked: set[Path] = set()  # folders that runs of this process have locked


class OtherRun(ValueError):
    """A sound checkpoint, but of a run that differs; the message names what differs."""


class StorageError(OSError):
    """A disk that is full or fails; the message says which files are complete."""


@dataclass
class Progress:
    """What changes from step to step: exactly what a checkpoint holds, in addition to the identity of its run.

    Nothing else is carried over: the order of the images and every random number depend on settings and counters alone.
    """

    model: nn.Module  # perhaps wrapped by DDP or FSDP2
    optimizer: torch.optim.Optimizer  # perhaps wrapped by accelerate
    scaler: object | None  # torch.amp.GradScaler with fp16
    sums: Tensor  # [3] float64: loss, correct answers and images of this epoch, of this process
    step: int = 0  # steps taken
    history: list[dict] = field(default_factory=list)  # one entry per epoch
    best: dict = field(default_factory=dict)  # top1, epoch and weights of the best epoch on val
    seconds: float = 0.0  # of training
    seen: int = 0  # images trained on in these seconds
    averages: list[Tensor] = field(default_factory=list)  # moving averages of the trained parameters, in their order

    def update_averages(self, decay: float) -> None:
        """Take the present weights into the moving averages, with less decay in the first steps (as TensorFlow)."""
        step = self.step + 1
        decay = min(decay, step / (step + 9))
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self._trained(), 1 - decay)

    def _trained(self) -> list[Tensor]:
        return [p.detach() for p in self.model.parameters() if p.requires_grad]

    @contextlib.contextmanager
    def averaged(self):
        """Within this context the model has the moving averages as its weights, if there are any."""
        if not self.averages:
            yield
            return
        before = [p.clone() for p in self._trained()]
        torch._foreach_copy_(self._trained(), self.averages)
        try:
            yield
        finally:
            torch._foreach_copy_(self._trained(), before)

    def start_averages(self) -> None:
        """Start the moving averages at the present weights."""
        self.averages = [p.clone() for p in self._trained()]

    def state(self, identity: dict, sums: Tensor) -> dict:
        """The contents of a checkpoint; every process of a run must call it.

        Args:
            identity: of the run.
            sums: those of all processes together.
        """
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        averages = {}
        if self.averages:
            with self.averaged():
                averages = {"averages": get_weights(self.model)}
        return {
            **averages,
            "identity": identity,
            "step": self.step,
            "weights": get_weights(self.model),
            "optimizer": get_optimizer_state_dict(self.model, _unwrapped(self.optimizer), options=options),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "sums": sums.cpu(),
            "history": self.history,
            "best": self.best,
            "seconds": self.seconds,
            "seen": self.seen,
        }

    def restore(self, saved: dict, main: bool) -> None:
        """Continue from the contents of a checkpoint; every process of a run must call it.

        Args:
            main: whether this process takes the sums, which the checkpoint has of all processes together.
        """
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        if "averages" in saved:
            set_weights(self.model, saved["averages"])
            self.start_averages()
        set_weights(self.model, saved["weights"])
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self.model, _unwrapped(self.optimizer), saved["optimizer"], options=options)
        if self.scaler and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.step, self.history, self.best = saved["step"], saved["history"], saved["best"]
        self.seconds, self.seen = saved["seconds"], saved["seen"]
        if main:
            self.sums.copy_(saved["sums"])


def get_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trained weights and the buffers on the CPU, named as in the unwrapped model.

    Every process of a run must call it; the first one gets them, the others nothing, for one copy takes memory enough.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return {key: t.clone() for key, t in get_model_state_dict(model, options=options).items()}


def set_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put weights of :func:`get_weights` on the model; every process of a run must call it, and gets the first's."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    shared = torch.distributed.is_initialized()
    options = StateDictOptions(full_state_dict=True, strict=False, broadcast_from_rank0=shared)
    set_model_state_dict(model, weights, options=options)


def _unwrapped(optimizer) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def states(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first; a file of another name, such as state-best.pt, is the user's."""
    return sorted(folder.glob(f"state-{'[0-9]' * 9}.pt"))


def save(folder: Path, step: int, state: dict, keep: int = 2) -> Path:
    """Write a checkpoint, then remove all but the last ``keep``, and those of later steps, which a run skipped.

    Raises:
        StorageError: it could not be written; the earlier ones are unchanged.
    """
    path = folder / _NAME.format(step)

    def fill(file) -> None:
        hashed = _Hashed(file)
        torch.save(state, hashed)
        file.write(_MARK + hashed.digest.digest())

    try:
        write(path, fill)
    except OSError as error:
        raise StorageError(error.errno, _sentence(folder, f"the state of step {step}", error)) from error
    there = states(folder)
    kept = there[: there.index(path) + 1][-keep:]
    for old in set(there) - set(kept):
        old.unlink(missing_ok=True)
    return path


class _Hashed:
    """A file that computes the SHA-256 of what is written to it."""

    def __init__(self, file):
        self.file, self.digest = file, sha256()

    def write(self, data) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def load(folder: Path, warn: Callable[[str], None], check: Callable[[dict], None] = lambda state: None) -> dict | None:
    """The newest checkpoint that is sound, or None.

    Args:
        folder: of the run.
        warn: gets a sentence for each checkpoint that is skipped.
        check: raises ValueError for contents that this run cannot continue from.

    Raises:
        OtherRun: ``check`` raised it for every checkpoint that can be read.
    """
    others = []
    for path in reversed(states(folder)):
        try:
            state = _read(path)
            check(state)
        except OtherRun as error:
            others.append((path, error))
        except Exception as error:  # unpickling raises errors of any type
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            warn(f"{path} is damaged and skipped: {reason}")
        else:
            for other, error in others:
                warn(f"{other} is skipped: {error}")
            return state
    if others:
        raise others[0][1]
    return None


def _read(path: Path) -> dict:
    """The contents of a checkpoint whose digest is right, and whose name has its step."""
    if not path.is_file():
        raise ValueError("it is no regular file")
    digest, left = sha256(), path.stat().st_size - len(_MARK) - sha256().digest_size
    with open(path, "rb") as file:
        while left > 0 and (part := file.read(min(left, 2**20))):
            digest.update(part)
            left -= len(part)
        if left or file.read() != _MARK + digest.digest():
            raise ValueError("its contents differ from the digest that was written with them, or it has none")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or path.name != _NAME.format(state["step"]):
        raise ValueError("it is not the state of the step in its name")
    return state


def check_contents(state: dict, trained: dict[str, Tensor], steps: int, total: int) -> None:
    """Raise ValueError if a state does not have what :meth:`Progress.restore` needs.

    Args:
        state: of :meth:`Progress.state`.
        trained: the trained parameters of the model, by name.
        steps, total: of an epoch, and of the run.
    """
    names = ("identity", "step", "weights", "optimizer", "scaler", "sums", "history", "best", "seconds", "seen")
    if missing := [name for name in names if name not in state]:
        raise ValueError(f"it has no {missing[0]}")
    if type(state["step"]) is not int or not 0 < state["step"] <= total:
        raise ValueError(f"its step must be from 1 to {total}, got {state['step']!r}")
    if not isinstance(state["history"], list) or len(state["history"]) != state["step"] // steps:
        raise ValueError(f"it must have a history of {state['step'] // steps} epochs")
    for name, p in trained.items():
        found = state["weights"].get(name)
        if not isinstance(found, Tensor) or found.shape != p.shape:
            raise ValueError(f"it must have weights {name} of shape {tuple(p.shape)}")
    moments = state["optimizer"]["state"]
    if not moments or moments.keys() - trained.keys():
        raise ValueError("its optimizer is for other parameters than the trained ones")
    if state["sums"].shape != (3,) or not state["sums"].isfinite().all():
        raise ValueError("its sums must be three finite numbers")


def clear(folder: Path) -> None:
    """Remove all checkpoints."""
    for path in states(folder):
        path.unlink()


def tidy(folder: Path) -> None:
    """Remove the temporary files of writes that were killed."""
    remove_partial(folder)


@contextlib.contextmanager
def storing(folder: Path, what: str):
    """Turn an OSError into a StorageError whose message says what could not be written and what is safe."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError) or error.errno is None:  # a sentence already, not an error of the system
            raise
        raise StorageError(error.errno, _sentence(folder, what, error)) from error


def _sentence(folder: Path, what: str, error: OSError) -> str:
    left = states(folder)
    safe = f"the state of step {int(left[-1].stem[6:])} is complete; " if left else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(folder).free / 2**20
        why, then = f"no space left in {folder} ({free:.1f} MiB free)", "make room and run the same command again"
    else:
        why, then = f"{error.strerror or error} ({folder})", "run the same command again when it can be written"
    return f"{why}: {what} could not be written; {safe}{then}"


@contextlib.contextmanager
def alone(folder: Path):
    """Lock the folder of a run.

    Raises:
        ValueError: another process has locked it.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    # a record lock, not flock: workers that read images and outlive a killed run must not keep it. It is of the
    # process, so that another run in this one has to be told apart by name
    taken = ValueError(f"out must be a separate folder, but another process is training into {folder}")
    place = folder.resolve()
    if place in _locked:
        raise taken
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise taken from error
        _locked.add(place)
        try:
            yield
        finally:
            _locked.discard(place)
