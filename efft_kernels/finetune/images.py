"""Labelled images: files, arrays, parts and unions of these."""

import logging
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partialmethod
from hashlib import sha256
from pathlib import Path

import torch

from ..preparation import to_rgb
from ..storage import read_regular

log = logging.getLogger("efft_kernels.finetune")

SUFFIXES = frozenset(".jpg .jpeg .jpe .jfif .png .bmp .gif .webp .avif .tif .tiff .ppm .pgm .mpo".split())
Label = int | tuple[int, ...]  # a class, or with several labels per image the classes that it shows, ascending


class DataError(ValueError):
    """Data that cannot be trained on; the message names the file and the line."""


class BadImages(DataError):
    """Images that cannot be used; ``sentences`` has one for each."""

    def __init__(self, sentences: Sequence[str]):
        self.sentences = list(sentences)
        several = f"{len(self.sentences)} images cannot be used:\n  " if len(self.sentences) > 1 else ""
        super().__init__(several + "\n  ".join(self.sentences))

    def __reduce__(self):  # a DataLoader's worker sends it to the main process
        return BadImages, (self.sentences,)


class Images:
    """A sequence of labelled images. Subclasses define how one is loaded and what it is called."""

    labels: Sequence[Label]

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, i: int):
        """The i-th image, a PIL.Image in RGB."""
        raise NotImplementedError

    def where(self, i: int) -> str:
        """What to call the i-th image in an error: its file, and the line that lists it."""
        raise NotImplementedError

    def file_name(self, i: int) -> str:
        """What the i-th image is called in tables: its file."""
        return self.where(i)

    def key(self, i: int) -> str:
        """A string that is equal for equal images only, as far as that can be told without reading them."""
        return self.where(i)

    def places(self) -> list[Hashable]:
        """Of each image what is equal for the same file, by whatever path or link."""
        return [(id(self), i) for i in range(len(self))]

    def digest(self, i: int) -> bytes:
        """A digest of the contents of the i-th image."""
        return sha256(self.load(i).tobytes()).digest()


@dataclass(frozen=True)
class Files(Images):
    """Image files."""

    root: Path
    paths: tuple[str, ...]  # relative to root, or absolute
    labels: tuple[Label, ...]
    lines: tuple[tuple[Path, int], ...] | None = None  # of each image: the list that names it, and its line there

    def load(self, i: int):
        path = self.root / self.paths[i]
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for its writer
                raise OSError("it is no regular file")
            return decode(path)
        except FileNotFoundError as error:
            what = "is a link to a file that does not exist" if path.is_symlink() else "does not exist"
            raise DataError(f"{self.where(i)} {what}") from error
        except MemoryError:
            raise
        except Exception as error:  # decoders raise any exception for a damaged file
            raise DataError(f"{self.where(i)} cannot be read as an image: {' '.join(str(error).split())}") from error

    def where(self, i: int) -> str:
        line = f" ({self.lines[i][0]}, line {self.lines[i][1]})" if self.lines else ""
        return f"{self.root / self.paths[i]}{line}"

    def file_name(self, i: int) -> str:
        return str(self.root / self.paths[i])

    def key(self, i: int) -> str:
        try:
            size = (self.root / self.paths[i]).stat().st_size
        except OSError:
            size = "missing"  # found and named when the images are read
        return f"{self.paths[i]} {size}"

    def places(self) -> list[Hashable]:
        real, found = {}, []
        for path in self.paths:
            folder, name = os.path.split(os.path.normpath(os.path.join(self.root, path)))
            if folder not in real:
                real[folder] = os.path.realpath(folder)
            file = os.path.join(real[folder], name)
            found.append(os.path.realpath(file) if os.path.islink(file) else file)
        return found

    def digest(self, i: int) -> bytes:
        try:
            return sha256(read_regular(self.root / self.paths[i])).digest()
        except OSError:
            return b"missing"  # found and named when the images are read


def decode(file):
    """Read an image file: RGB, rotated as EXIF says, transparency on white.

    Args:
        file: a path or a binary file.
    """
    from PIL import Image

    with Image.open(file) as image:
        return to_rgb(image)


@dataclass(frozen=True)
class Arrays(Images):
    """Images that are computed or in memory: ``pixels[i]`` is a uint8 numpy array, [H, W] or [H, W, 3]."""

    name: str
    pixels: Sequence
    labels: Sequence[int]

    def load(self, i: int):
        from PIL import Image

        return Image.fromarray(self.pixels[i]).convert("RGB")

    def where(self, i: int) -> str:
        return f"image {i} of {self.name}"


@dataclass(frozen=True)
class Subset(Images):
    """Some of the images of one or more sequences."""

    of: tuple[Images, ...]
    index: tuple[tuple[int, int], ...]  # (which sequence, number in it)

    @property
    def labels(self) -> list[Label]:
        return [plain(self.of[part].labels[i]) for part, i in self.index]

    def __len__(self) -> int:
        return len(self.index)

    def places(self) -> list[Hashable]:
        found = [images.places() for images in self.of]
        return [found[part][i] for part, i in self.index]

    def _ask(self, method: str, i: int):
        part, j = self.index[i]
        return getattr(self.of[part], method)(j)

    load = partialmethod(_ask, "load")
    where = partialmethod(_ask, "where")
    file_name = partialmethod(_ask, "file_name")
    key = partialmethod(_ask, "key")
    digest = partialmethod(_ask, "digest")


def joined(*parts: Images) -> Images:
    """The images of all parts, one part after the other."""
    return Subset(parts, tuple((part, i) for part, images in enumerate(parts) for i in range(len(images))))


def plain(label) -> Label:
    """A label as an int or a tuple of ints, whatever kind of number an array holds."""
    return tuple(int(c) for c in label) if isinstance(label, tuple | list) else int(label)


def held_out(images: Images, fraction: float) -> tuple[Images, Images]:
    """Split into (the rest, a fraction of each class), at least one image of each class that has two. The split is
    always the same. An image with several labels counts for the rarest of them, a file that is there twice as one.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    members, same, labels = {}, {}, [plain(label) for label in images.labels]
    frequency = Counter(c for label in labels if isinstance(label, tuple) for c in label)
    places = images.places()
    for i in order:
        same.setdefault(places[i], []).append(i)
    for entries in same.values():
        label = labels[entries[0]]
        key = min(label, key=lambda c: (frequency[c], c), default=-1) if isinstance(label, tuple) else label
        members.setdefault(key, []).append(entries)
    held = set()
    for found in members.values():
        held.update(*found[: min(max(1, round(fraction * len(found))), len(found) - 1)])
    parts = [i for i in range(len(images)) if i not in held], sorted(held)
    return tuple(Subset((images,), tuple((0, i) for i in part)) for part in parts)


def check_apart(read: Mapping[str, Files], named: Callable[[Label], str] = str) -> None:
    """Find files that are in two of these parts, or twice with different labels, by whatever path or link.

    Raises:
        DataError: there is one in lists; ``named`` gives its classes. In folders, where links may mean it, it is said.
    """
    seen, repeated, mixed = {}, [], []
    for part, images in read.items():
        for i, (label, place) in enumerate(zip(images.labels, images.places())):
            other, j = seen.setdefault(place, (part, i))
            if other != part or read[other].labels[j] != label:
                what = f"a {part} image" if other != part else f"of class {named(label)}"
                of = f"has it as a {other} image of class {named(read[other].labels[j])}"
                if lines := read[other].lines:
                    raise DataError(f"{images.where(i)} cannot be {what}: {lines[j][0]}, line {lines[j][1]}, {of}")
                mixed.append(f"{images.where(i)} is {what}, but {read[other].where(j)} {of}")
            elif i != j:
                repeated.append(images.where(i))
    say("one file in two places", mixed)
    say("images that are there more than once, and count as often", repeated)


def check_classes(classes: Sequence[str]) -> None:
    """Warn about names of which a typing error may have made two."""
    alike = {}
    for name in classes:
        alike.setdefault(unicodedata.normalize("NFKC", name).casefold().strip(), []).append(name)
    for names in alike.values():
        say("classes of their own, though they look alike", [repr(name) for name in names][len(names) == 1 :])


def say(what: str, found: Sequence) -> None:
    """Warn about these, if there are any: the first by name."""
    if found:
        log.warning(f"{what}: {found[0]}" + f" and {len(found) - 1} more" * (len(found) > 1))


@dataclass(frozen=True)
class Source:
    """The images of a data set, before any of them is transformed."""

    train: Images
    val: Images | None
    test: Images | None
    classes: tuple[str, ...]  # their names
    protocol: bool = False  # train on val as well unless it is needed to choose by, as VTAB-1K does
    multilabel: bool = False  # labels are tuples of classes
