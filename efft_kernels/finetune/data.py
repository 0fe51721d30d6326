"""Data sets: read from a folder, from VTAB-1K's lists or from a registered source, checked, and turned into tensors."""

import contextlib
import logging
import os
import random
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from ..extras import need, timm
from .images import DataError, Files, Images, held_out, joined

log = logging.getLogger("efft_kernels.finetune")

# of the data sets of VTAB-1K, by the name of the folder
VTAB_CLASSES = {
    **{"cifar": 100, "caltech101": 102, "dtd": 47, "oxford_flowers102": 102, "oxford_iiit_pet": 37, "svhn": 10},
    **{"sun397": 397, "patch_camelyon": 2, "eurosat": 10, "resisc45": 45, "diabetic_retinopathy": 5},
    **{"clevr_count": 8, "clevr_dist": 6, "dmlab": 6, "kitti": 4, "dsprites_loc": 16, "dsprites_ori": 16},
    **{"smallnorb_azi": 18, "smallnorb_ele": 9},
}
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_LISTS = ("train800", "val200", "train800val200", "test")


@dataclass(frozen=True)
class Source:
    """The images of a data set, before any of them is transformed."""

    train: Images
    val: Images | None
    test: Images | None
    classes: tuple[str, ...]  # their names
    protocol: bool = False  # train on val as well unless it is needed to choose by, as VTAB-1K does


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
    """What a run trains on and is measured on. The items of each part are (uint8 [3, S, S], label)."""

    train: "Pictures"
    val: "Pictures | None"
    test: "Pictures | None"
    classes: tuple[str, ...]

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
        spec: a folder, or a name that was registered with :func:`source` (``./digits`` is a folder of such a name).
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
        if not root.is_dir():
            known = f" or one of {', '.join(sorted(SOURCES))}" if SOURCES else ""
            raise DataError(f"data must be a folder{known}, got {name!r}")
        try:
            if any((root / f"{part}.txt").exists() for part in _LISTS):
                found = _lists(root, hold_out, classes)
            else:
                found = _folder(root, test_fraction)
        except OSError as error:
            raise DataError(f"{error.filename or root} cannot be read: {error.strerror or error}") from error
    if classes is not None and classes < len(found.classes):
        raise DataError(f"classes must be at least the {len(found.classes)} of {name}, got {classes}")
    if found.protocol and not hold_out and found.val is not None:
        found = replace(found, train=joined(found.train, found.val), val=None)
    if hold_out and found.val is None:
        rest, val = held_out(found.train, val_fraction)
        if not len(val):
            raise DataError(
                f"val_fraction must leave images to choose by, got {val_fraction} of {len(found.train)} in {name}"
            )
        found = replace(found, train=rest, val=val)
    names = found.classes + tuple(f"class {i}" for i in range(len(found.classes), classes or 0))
    plain = transform(image_size, "none", interpolation)
    parts = (
        None if images is None else Pictures(images, prepare, image_size, drawn)
        for images, prepare, drawn in (
            (found.train, transform(image_size, augment, interpolation), seed if augment != "none" else None),
            (found.val, plain, None),
            (found.test, plain, None),
        )
    )
    return Data(*parts, names)


def _folder(root: Path, test_fraction: float) -> Source:
    """root/CLASS/*.jpg, or root/{train,val,test}/CLASS/*.jpg"""
    below = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    parts = {part: next((below[n] for n in names if n in below), None) for part, names in _PARTS.items()}
    # a folder train/ that holds images instead of folders is a class, of vehicles perhaps
    if parts["train"] is None or not _folders(parts["train"]):
        classes, images = _class_folders(root, None)
        train, test = held_out(images, test_fraction) if test_fraction else (images, None)
        if test is not None and not len(test):
            raise DataError(
                f"{root} must have two images of a class, so that one can be held out for testing, but has one of each "
                "(test_fraction=0 holds out none)"
            )
        return Source(train, None, test, classes)
    classes, train = _class_folders(parts["train"], None)
    val, test = (parts[part] and _class_folders(parts[part], classes)[1] for part in ("val", "test"))
    return Source(train, val, test, classes)


def _folders(root: Path) -> tuple[str, ...]:
    """The names of the folders in a folder, hidden ones excluded."""
    return tuple(sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")))


def _class_folders(root: Path, classes: tuple[str, ...] | None) -> tuple[tuple[str, ...], Images]:
    found = _folders(root)
    if not found:
        raise DataError(f"{root} must have a folder of images for each class, but has no folders")
    classes = classes or found
    if unknown := set(found) - set(classes):
        raise DataError(f"{root / min(unknown)} is not a class of the training images: {', '.join(classes)}")
    paths, labels, others = [], [], []
    for name in found:
        files = [path for path in sorted((root / name).rglob("*")) if path.is_file() and not _hidden(path, root)]
        images = [path for path in files if path.suffix.lower() in _SUFFIXES]
        if not images:
            raise DataError(f"{root / name} must hold images ({', '.join(sorted(_SUFFIXES))}), but has none")
        others += [path for path in files if path.suffix.lower() not in _SUFFIXES]
        paths += [str(path.relative_to(root)) for path in images]
        labels += [classes.index(name)] * len(images)
    if others:
        log.warning(f"ignored, not an image: {others[0]}" + f" and {len(others) - 1} more" * (len(others) > 1))
    return classes, Files(root, tuple(paths), tuple(labels))


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _lists(root: Path, hold_out: bool, classes: int | None) -> Source:
    """VTAB-1K as NOAH keeps it: lists of "relative/path.jpg label" """
    classes = classes or VTAB_CLASSES.get(root.resolve().name)
    needed = {"train": "train800", "val": "val200"} if hold_out else {"train": "train800val200"}
    read = {}
    for part, name in {**needed, "test": "test"}.items():
        if not (root / f"{name}.txt").is_file():
            others = ", ".join(_existing(root))
            raise DataError(f"{root / name}.txt does not exist, but is needed in addition to {others}")
        read[part] = _list(root, root / f"{name}.txt", classes)
    _check_apart(read)
    if classes is None:
        _check_dense(read)
    count = classes or 1 + max(max(images.labels) for images in read.values())
    return Source(read["train"], read.get("val"), read["test"], tuple(f"class {i}" for i in range(count)))


def _check_apart(read: dict[str, Files]) -> None:
    """Check that no image is listed in two parts, or twice with different labels."""
    seen = {}
    for part, images in read.items():
        for i, label in enumerate(images.labels):
            other, j = seen.setdefault(os.path.normpath(images.paths[i]), (part, i))
            if other != part or read[other].labels[j] != label:
                list_, line = read[other].lines[j]
                what = f"a {part} image" if other != part else f"of class {label}"
                raise DataError(
                    f"{images.where(i)} cannot be {what}: {list_}, line {line}, has it as a {other} image of class "
                    f"{read[other].labels[j]}"
                )


def _check_dense(read: dict[str, Files]) -> None:
    """Check that no label exceeds the number of training images, which is a typing error rather than a class."""
    most = len(read["train"])
    for images in read.values():
        if (label := max(images.labels)) >= most:
            list_, line = images.lines[images.labels.index(label)]
            raise DataError(
                f"{list_}, line {line}, has the label {label}, more than {most} training images can teach; if it is "
                "right, set classes"
            )


def _existing(root: Path) -> list[str]:
    return [f"{name}.txt" for name in _LISTS if (root / f"{name}.txt").exists()]


def _list(root: Path, path: Path, classes: int | None) -> Files:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    paths, labels, places = [], [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"(\S.*?)\s+(\d+)", line.strip())
        if not match:
            raise DataError(f"{path}, line {number}, must be 'relative/path label', got {line.strip()[:80]!r}")
        name, label = match[1], int(match[2])
        if classes is not None and label >= classes:
            raise DataError(f"{path}, line {number}, must have a label from 0 to {classes - 1}, got {label}")
        if not (root / name).is_file():
            raise DataError(f"{root / name} ({path}, line {number}) does not exist")
        paths.append(name)
        labels.append(label)
        places.append((path, number))
    if not paths:
        raise DataError(f"{path} must list images, but is empty")
    return Files(root, tuple(paths), tuple(labels), tuple(places))


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
        return create_transform(
            size, crop_pct=1.0, crop_mode="squash", interpolation=interpolation, use_prefetcher=True
        )
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

    Augmentation depends on (seed, epoch, i) alone: not on workers, on the order, or on earlier random numbers.
    """

    def __init__(self, images: Images, transform, size: int, seed: int | None):
        self.images, self.transform, self.size, self.seed = images, transform, size, seed
        self.labels = [int(label) for label in images.labels]
        self.kept: Tensor | None = None  # [N, 3, S, S] uint8

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def bytes(self) -> int:
        """The size of all tensors together."""
        return len(self) * 3 * self.size**2

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        epoch, i = key if isinstance(key, tuple) else (0, key)
        return self._pixels(epoch, i) if self.kept is None else self.kept[i], self.labels[i]

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
            DataError: an image cannot be read; the first one, if there are several.
        """
        self.kept = (
            torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8) if keep and self.seed is None else None
        )
        kept = self.kept

        def read(i: int) -> None:
            if kept is None:
                self.images.load(i)
            else:
                kept[i] = torch.as_tensor(self.transform(self.images.load(i)))

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            try:
                for _ in pool.map(read, range(len(self))):
                    tick(1)
            except BaseException:
                self.kept = None
                pool.shutdown(cancel_futures=True)
                raise


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
