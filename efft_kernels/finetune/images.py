"""Labelled images: files, arrays, parts and unions of these."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


class DataError(ValueError):
    """Data that cannot be trained on; the message names the file and the line."""


class Images:
    """A sequence of labelled images. Subclasses define how one is loaded and what it is called."""

    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, i: int):
        """The i-th image, a PIL.Image in RGB."""
        raise NotImplementedError

    def where(self, i: int) -> str:
        """What to call the i-th image in an error: its file, and the line that lists it."""
        raise NotImplementedError

    def key(self, i: int) -> str:
        """A string that is equal for equal images only, as far as that can be told without reading them."""
        return self.where(i)


@dataclass(frozen=True)
class Files(Images):
    """Image files."""

    root: Path
    paths: tuple[str, ...]  # relative to root
    labels: tuple[int, ...]
    lines: tuple[tuple[Path, int], ...] | None = None  # of each image: the list that names it, and its line there

    def load(self, i: int):
        from PIL import Image

        try:
            with Image.open(self.root / self.paths[i]) as image:
                return _to_rgb(image)
        except FileNotFoundError as error:
            raise DataError(f"{self.where(i)} does not exist") from error
        except MemoryError:
            raise
        except Exception as error:  # decoders raise any exception for a damaged file
            raise DataError(f"{self.where(i)} cannot be read as an image: {' '.join(str(error).split())}") from error

    def where(self, i: int) -> str:
        line = f" ({self.lines[i][0]}, line {self.lines[i][1]})" if self.lines else ""
        return f"{self.root / self.paths[i]}{line}"

    def key(self, i: int) -> str:
        try:
            size = (self.root / self.paths[i]).stat().st_size
        except OSError as error:
            raise DataError(f"{self.where(i)} does not exist") from error
        return f"{self.paths[i]} {size}"


def _to_rgb(image):
    """Convert to RGB, rotated as EXIF says. 16-bit grey is scaled to 8 bits; convert() alone would clip it at 255."""
    from PIL import ImageOps

    image.load()
    png = image.format == "PNG"
    with contextlib.suppress(Exception):  # malformed EXIF does not make the pixels unusable
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and png):
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels have 32 bits of unknown range (mode {image.mode}); save it with 8 or 16 bits")
    return image.convert("RGB")


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
    def labels(self) -> list[int]:
        return [int(self.of[part].labels[i]) for part, i in self.index]

    def __len__(self) -> int:
        return len(self.index)

    def load(self, i: int):
        part, j = self.index[i]
        return self.of[part].load(j)

    def where(self, i: int) -> str:
        part, j = self.index[i]
        return self.of[part].where(j)

    def key(self, i: int) -> str:
        part, j = self.index[i]
        return self.of[part].key(j)


def joined(*parts: Images) -> Images:
    """The images of all parts, one part after the other."""
    return Subset(parts, tuple((part, i) for part, images in enumerate(parts) for i in range(len(images))))


def held_out(images: Images, fraction: float) -> tuple[Images, Images]:
    """Split into (the rest, a fraction of each class), at least one image of each class that has two. The split is
    always the same.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    members, labels = {}, images.labels
    for i in order:
        members.setdefault(int(labels[i]), []).append(i)
    held = set()
    for found in members.values():
        held.update(found[: min(max(1, round(fraction * len(found))), len(found) - 1)])
    parts = [i for i in range(len(images)) if i not in held], sorted(held)
    return tuple(Subset((images,), tuple((0, i) for i in part)) for part in parts)
