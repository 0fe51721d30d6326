"""Folders of images: which files of a folder are images, and data sets with a folder for each class."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from .images import SUFFIXES, DataError, Files, Images, Source, held_out

log = logging.getLogger("efft_kernels.finetune")

PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
# folders and files that other programs put beside images, in lower case; hidden ones are left out anyway
_FOREIGN_FOLDERS = frozenset(
    ("@eadir", "@recycle", "#recycle", "#snapshot", "__macosx", "$recycle.bin", "system volume information")
    + ("lost+found", "lost.dir", "network trash folder", "temporary items", "__pycache__", "_vti_cnf", "_gsdata_")
    + ("thumbnails", "_thumbnails", "_thumbs")
)
_FOREIGN_INSIDE = frozenset(("thumbs", "thumb", "previews", "_previews"))  # a class may have such a name
_FOREIGN_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini", "zbthumbnail.info", "icon\r"))


def find_images(root: Path, inside: bool = True) -> tuple[list[Path], list[Path], list[Path]]:
    """The images in a folder and the folders in it, links followed, sorted by path.

    A folder that is reached twice, by a link to it or to a folder around it, is read once.

    Args:
        root: the folder.
        inside: whether folders with names such as "thumbs" directly in root are thumbnails rather than a class.

    Returns:
        (images, other files, folders of other programs, which are left out). Hidden files and folders and other
        programs' files are in none of them.

    Raises:
        OSError: a folder cannot be read.
    """
    images, others, foreign, seen = [], [], [], set()

    def failed(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(root, onerror=failed, followlinks=True):
        here = Path(place)
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for name in list(folders):
            if name.startswith("."):
                folders.remove(name)
            elif is_foreign(name, inside or here != root):
                folders.remove(name)
                foreign.append(here / name)
        for name in sorted(files):
            if name.startswith(".") or name.lower() in _FOREIGN_FILES:
                continue
            path = here / name
            if path.suffix.lower() in SUFFIXES:
                images.append(path)
            elif path.is_file():
                others.append(path)
    # by path, as if no folder were a link, which is the order of earlier versions
    return sorted(images), sorted(others), foreign


def is_foreign(name: str, inside: bool) -> bool:
    """Whether a folder of this name belongs to another program: thumbnails, metadata, recycle bins."""
    return name.lower() in _FOREIGN_FOLDERS or (inside and name.lower() in _FOREIGN_INSIDE)


def read_folder(root: Path, test_fraction: float) -> Source:
    """root/CLASS/*.jpg, or root/{train,val,test}/CLASS/*.jpg

    Raises:
        DataError: the folders are not those of classes.
        OSError: a folder cannot be read.
    """
    below = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    parts = {part: next((below[n] for n in names if n in below), None) for part, names in PARTS.items()}
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
    """The names of the folders in a folder, without hidden ones and those of other programs."""
    names = (path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return tuple(sorted(name for name in names if not is_foreign(name, inside=False)))


def _class_folders(root: Path, classes: tuple[str, ...] | None) -> tuple[tuple[str, ...], Images]:
    found = _folders(root)
    if not found:
        raise DataError(f"{root} must have a folder of images for each class, but has no folders")
    classes = classes or found
    if unknown := set(found) - set(classes):
        raise DataError(f"{root / min(unknown)} is not a class of the training images: {', '.join(classes)}")
    paths, labels, others = [], [], []
    foreign = [path for path in sorted(root.iterdir()) if path.is_dir() and is_foreign(path.name, inside=False)]
    for name in found:
        images, no_images, not_ours = find_images(root / name)
        if not images:
            raise DataError(f"{root / name} must hold images ({', '.join(sorted(SUFFIXES))}), but has none")
        others += no_images
        foreign += not_ours
        paths += [str(path.relative_to(root)) for path in images]
        labels += [classes.index(name)] * len(images)
    if others:
        log.warning(f"ignored, not an image: {others[0]}" + _and_more(others))
    if foreign:
        log.warning(f"ignored, a folder of another program: {foreign[0]}" + _and_more(foreign))
    return classes, Files(root, tuple(paths), tuple(labels))


def _and_more(paths: list[Path]) -> str:
    return f" and {len(paths) - 1} more" * (len(paths) > 1)


def check_out(data: str, out: Path) -> None:
    """Check that a run does not write into the folders of images that it reads, where its files would be a class.

    Args:
        data: as in Settings; only a folder with a folder for each class is looked at.
        out: the folder of the run, which need not exist.

    Raises:
        DataError: out is the data folder, or inside of it or of a folder that it links to.
    """
    root, target = Path(data), out.resolve()
    if not root.is_dir():
        return
    for folder in (root, *_linked(root)):
        if target == (real := folder.resolve()) or real in target.parents:
            same = "is the data folder" if target == root.resolve() else f"is inside of the data folder {root}"
            raise DataError(f"out must be outside of the images, but {out} {same}; choose a folder next to it")


def _linked(root: Path, depth: int = 3) -> Iterator[Path]:
    """The folders in a folder that are links, of parts, of classes and in classes."""
    try:
        below = [path for path in root.iterdir() if path.is_dir()]
    except OSError:
        return  # named when the images are looked for
    for path in below:
        if path.is_symlink():
            yield path
        elif depth > 1:
            yield from _linked(path, depth - 1)
