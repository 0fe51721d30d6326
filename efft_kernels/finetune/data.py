"""Data sets: read from a folder, a list or a registered source, checked, and turned into tensors."""

import contextlib
import functools
import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from ..extras import need, timm
from .arrow import is_dataset, read_dataset
from .folders import read_folder
from .images import BadImages, DataError, Images, Source, check_classes, held_out, joined, plain
from .lists import is_lists, read_csv, read_lists

# name -> a function that makes the Source
SOURCES: dict[str, Callable[[], Source]] = {}


def source(name: str):
    """Decorator that registers a function without arguments, which returns a Source, under a name for ``data``."""

    def register(function: Callable[[], Source]) -> Callable[[], Source]:
        SOURCES[name] = function
        return function

    return register


@dataclass(frozen=True)
class Data:
    """What a run trains on and is measured on. The items of each part are (uint8 [3, S, S], label), and with several
    labels per image (uint8 [3, S, S], float32 [classes] of 0 and 1).
    """

    train: "Pictures"
    val: "Pictures | None"
    test: "Pictures | None"
    classes: tuple[str, ...]
    multilabel: bool = False

    def parts(self) -> dict[str, "Pictures"]:
        named = {"train": self.train, "val": self.val, "test": self.test}
        return {name: part for name, part in named.items() if part is not None}

    def fingerprint(self) -> str:
        """A digest of the names, sizes and labels of all images."""
        digest = sha256(repr(self.classes).encode())
        for name, part in self.parts().items():
            digest.update(name.encode())
            for i, label in enumerate(part.images.labels):
                # a file name may contain bytes that are not UTF-8
                digest.update(f"{part.images.key(i)}\0{label}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def contents(self) -> str:
        """A digest of the contents of all images; reads every file, but decodes none."""
        digest = sha256()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for part in self.parts().values():
                for found in pool.map(part.images.digest, range(len(part))):
                    digest.update(found)
        return digest.hexdigest()


def open_data(
    spec: str | os.PathLike,
    image_size: int = 224,
    *,
    hold_out: bool = False,
    classes: int | None = None,
    augment: str = "none",
    interpolation: str = "bicubic",
    seed: int = 0,
    test_fraction: float = 0.2,
    val_fraction: float = 0.2,
) -> Data:
    """Find images and labels. Lists and folders are read, images are not.

    Args:
        spec: a folder, a CSV file, or a name that was registered with :func:`source` (``./digits`` is a folder of such
            a name).
        hold_out: whether a validation part is needed to choose by.
        image_size, classes, augment, interpolation, seed, test_fraction, val_fraction: as in Settings.

    Raises:
        DataError: there is no data, or a line, label or folder in it is wrong; the message names it.
    """
    name = os.fspath(spec)
    if name in SOURCES:
        found = SOURCES[name]()
    else:
        root = Path(name)
        if not root.is_dir() and not (root.is_file() and root.suffix.lower() in (".csv", ".tsv")):
            known = f" or one of {', '.join(sorted(SOURCES))}" if SOURCES else ""
            raise DataError(f"data must be a folder or a .csv file{known}, got {name!r}")
        try:
            if root.is_file():
                found = read_csv(root, test_fraction)
            elif is_lists(root):
                found = read_lists(root, hold_out, classes)
            elif is_dataset(root):
                found = read_dataset(root, test_fraction)
            else:
                found = read_folder(root, test_fraction)
        except OSError as error:
            raise DataError(f"{error.filename or root} cannot be read: {error.strerror or error}") from error
    check_classes(found.classes)
    if found.multilabel and (torn := [each for each in found.classes if "|" in each]):
        raise DataError(f"classes of {name} must have names without '|', which stands between labels, got {torn[0]!r}")
    if classes is not None and classes < len(found.classes):
        raise DataError(f"classes must be at least the {len(found.classes)} of {name}, got {classes}")
    if found.protocol and not hold_out and found.val is not None:
        found = replace(found, train=joined(found.train, found.val), val=None)
    if hold_out and found.val is None:
        rest, val = held_out(found.train, val_fraction)
        if not (val_fraction and len(val)):
            raise DataError(
                f"val_fraction must leave images to choose by, got {val_fraction} of {len(found.train)} in {name}"
            )
        found = replace(found, train=rest, val=val)
    names = found.classes + tuple(f"class {i}" for i in range(len(found.classes), classes or 0))
    plain = transform(image_size, "none", interpolation)
    parts = (
        None if images is None else Pictures(images, prepare, image_size, drawn, len(names) * found.multilabel)
        for images, prepare, drawn in (
            (found.train, transform(image_size, augment, interpolation), seed if augment != "none" else None),
            (found.val, plain, None),
            (found.test, plain, None),
        )
    )
    return Data(*parts, names, found.multilabel)


@functools.cache
def _run_goes_on():  # memory that is shared with processes that read images
    return multiprocessing.RawValue("b", False)


@contextlib.contextmanager
def keeping_readers() -> Iterator[None]:
    """Within this context processes of :func:`reading` ignore SIGTERM."""
    goes_on = _run_goes_on()
    goes_on.value = True
    try:
        yield
    finally:
        goes_on.value = False


def reading(workers: int) -> dict:
    """Options of a DataLoader. A signal to stop may go to all processes of a run, which then still takes a step and
    saves its state: those that read images leave it to the run until that ends.
    """
    return {"num_workers": workers, "worker_init_fn": functools.partial(_leave_signals, _run_goes_on())}


def _leave_signals(goes_on, worker: int) -> None:
    def end(number, frame):
        if not goes_on.value:
            os._exit(128 + number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)


def transform(size: int, augment: str, interpolation: str):
    """A function from a PIL image to uint8 [3, S, S]: resized to a square without a crop, or augmented by timm.

    Args:
        size: S, in pixels.
        augment: "none", "flip", "crop" or "rand".
        interpolation: of the resize: "bicubic", "bilinear" or "nearest".
    """
    timm()
    from timm.data import create_transform

    if augment == "none":
        return create_transform(size, crop_pct=1, crop_mode="squash", interpolation=interpolation, use_prefetcher=True)
    crop = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)} if augment == "flip" else {}
    policy = {"auto_augment": "rand-m9-mstd0.5-inc1"} if augment == "rand" else {}
    # the image is made square first, so that the crop of "flip" covers all of it
    train = create_transform(
        size, True, hflip=0.5, color_jitter=0.0, interpolation=interpolation, use_prefetcher=True, **crop, **policy
    )
    if augment != "flip":
        return train
    from torchvision.transforms import Compose, Resize
    from torchvision.transforms.functional import InterpolationMode

    return Compose([Resize((size, size), InterpolationMode(interpolation)), train])


class Pictures(torch.utils.data.Dataset):
    """Images as tensors: items (uint8 [3, S, S], label), indexed by i or by (epoch, i).

    With ``classes`` > 0 an image has several labels, and its item is a float32 tensor [classes] of 0 and 1.

    Augmentation depends on (seed, epoch, i) alone: not on workers, on the order, or on earlier random numbers.
    """

    def __init__(self, images: Images, transform, size: int, seed: int | None, classes: int = 0):
        self.images, self.transform, self.size, self.seed = images, transform, size, seed
        self.labels = [plain(label) for label in images.labels]
        self.classes = classes
        self.kept: Tensor | None = None  # [N, 3, S, S] uint8

    def unchanged(self, interpolation: str) -> "Pictures":
        """These images without augmentation, to be measured."""
        if self.seed is None:
            return self
        return Pictures(self.images, transform(self.size, "none", interpolation), self.size, None, self.classes)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def bytes(self) -> int:
        """The size of all tensors together."""
        return len(self) * 3 * self.size**2

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int | Tensor]:
        epoch, i = key if isinstance(key, tuple) else (0, key)
        return self._pixels(epoch, i) if self.kept is None else self.kept[i], self._target(i)

    def _target(self, i: int) -> int | Tensor:
        if not self.classes:
            return self.labels[i]
        target = torch.zeros(self.classes)
        target[list(self.labels[i])] = 1.0
        return target

    def _pixels(self, epoch: int, i: int) -> Tensor:
        image = self.images.load(i)
        if self.seed is None:
            return torch.as_tensor(self.transform(image))
        with _seeded(f"augment {self.seed} {epoch} {i}"):
            return torch.as_tensor(self.transform(image))

    def check(self, keep: bool, tick: Callable[[int], None] = lambda n: None) -> None:
        """Read every image once, and keep the tensors in memory if they are not augmented.

        Args:
            keep: whether to keep them.
            tick: called with the number of images read since the last call.

        Raises:
            BadImages: images that cannot be read, all of them.
        """
        if bad := self.find_bad(keep, tick):
            raise BadImages(bad)

    def find_bad(self, keep: bool, tick: Callable[[int], None] = lambda n: None) -> list[str]:
        """As :func:`check`, but returns a sentence for each image that cannot be read."""
        self.kept = (
            torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8) if keep and self.seed is None else None
        )
        kept = self.kept

        def read(i: int) -> str | None:
            try:
                image = self.images.load(i)
            except DataError as error:
                return str(error)
            if kept is not None:
                kept[i] = torch.as_tensor(self.transform(image))
            return None

        bad = []
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            try:
                for sentence in pool.map(read, range(len(self))):
                    bad += [sentence] if sentence else []
                    tick(1)
            except BaseException:
                self.kept = None
                pool.shutdown(cancel_futures=True)
                raise
        if bad:
            self.kept = None
        return bad


@contextlib.contextmanager
def _seeded(key: str):
    """Seed the generators of Python, numpy and torch from a text, and restore their states afterwards."""
    numpy = need("numpy")
    states = random.getstate(), numpy.random.get_state(), torch.random.get_rng_state()
    seed_all(key)
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


def seed_all(key: str) -> None:
    """Seed Python, numpy and torch (all devices) from a text."""
    seed = int.from_bytes(sha256(key.encode()).digest()[:8], "little")
    random.seed(seed)
    need("numpy").random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)
