"""Folders of images: which files of a folder are images, and data sets with a folder for each class."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from .images import SUFFIXES, DataError, Files, Source, check_apart, held_out, say

PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
# folders and files that other programs put beside images, in lower case; hidden ones are left out anyway
_FOREIGN_FOLDERS = frozenset(
    ("@eadir", "@recycle", "#recycle", "#snapshot", "__macosx", "$recycle.bin", "system volume information")
    + ("lost+found", "lost.dir", "network trash folder", "temporary items", "__pycache__", "_vti_cnf", "_gsdata_")
    + ("thumbnails", "_thumbnails", "_thumbs", "@tmp", "@synoresource", "@sharebin", "@recently-snapshot", "~snapshot")
    + ("recycler", "recycled", "found.000", "appledouble", "thevolumesettingsfolder", "ipod photo cache", "captureone")
)
_FOREIGN_INSIDE = frozenset(("thumbs", "thumb", "previews", "_previews"))  # a class may have such a name
_FOREIGN_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini", "zbthumbnail.info", "icon\r"))


def find_images(root: Path, classes: Collection[str] = ()) -> tuple[list[Path], list[Path], list[Path]]:
    """The images in a folder and the folders in it, links followed, sorted by path.

    A folder that is reached twice is read once; a link to a folder around root is not followed.

    Args:
        root: the folder.
        classes: names of folders that are classes, though other programs call thumbnails so, but in a class's folder.

    Returns:
        (images, other files, folders of other programs, which are left out). Hidden files and folders and other
        programs' files are in none of them.

    Raises:
        OSError: a folder cannot be read.
    """
    images, others, foreign = [], [], []
    seen = set(map(os.path.realpath, Path(root).absolute().parents))

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
            elif is_foreign(name, inside=name not in classes or here.name in classes):
                folders.remove(name)
                foreign.append(here / name)
        for name in sorted(files):
            if name.startswith(".") or name.lower() in _FOREIGN_FILES:
                continue
            path = here / name
            if path.suffix.lower() in SUFFIXES:
                images.append(path)
            elif path.is_file() or path.is_symlink():
                others.append(path)
    # by path, as if no folder were a link, which is the order of earlier versions
    return sorted(images), sorted(others), foreign


def is_foreign(name: str, inside: bool) -> bool:
    """Whether a folder of this name belongs to another program: thumbnails, metadata, recycle bins."""
    name = name.lower()
    return name in _FOREIGN_FOLDERS or name.endswith(".lrdata") or (inside and name in _FOREIGN_INSIDE)


def read_folder(root: Path, test_fraction: float) -> Source:
    """root/CLASS/*.jpg, or root/{train,val,test}/CLASS/*.jpg

    Raises:
        DataError: the folders are not those of classes.
        OSError: a folder cannot be read.
    """
    below = _folders(root)
    parts = {part: [root / name for name in below if name.lower() in names] for part, names in PARTS.items()}
    # a folder train/ that holds images instead of folders is a class, of vehicles perhaps
    parts["train"] = [path for path in parts["train"] if _folders(path)]
    if not parts["train"]:
        found = [path for paths in parts.values() for path in paths]
        if found and len(found) == len(below) and all(_folders(path) for path in found):
            raise DataError(f"{root} must have a folder train in addition to {found[0].name}, but has none")
        classes, images = _class_folders(root, None)
        check_apart({"train": images}, lambda label: classes[label])
        train, test = held_out(images, test_fraction) if test_fraction else (images, None)
        if test is not None and not len(test):
            raise DataError(
                f"{root} must have two images of a class, so that one can be held out for testing, but has one of each "
                "(test_fraction=0 holds out none)"
            )
        return Source(train, None, test, classes)
    for part, paths in parts.items():
        if len(paths) > 1:
            raise DataError(f"{root} must have one folder of {part} images, got {' and '.join(p.name for p in paths)}")
    taken = [path.name for paths in parts.values() for path in paths]
    say("ignored, no folder of a part", [root / name for name in below if name not in taken] + _strays(root))
    classes, train = _class_folders(*parts["train"], None)
    read = {part: _class_folders(*parts[part], classes)[1] for part in ("val", "test") if parts[part]}
    check_apart({"train": train, **read}, lambda label: classes[label])
    return Source(train, read.get("val"), read.get("test"), classes)


def _strays(root: Path) -> list[Path]:
    """The images beside the folders in a folder."""
    files = (path for path in root.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    return sorted(path for path in files if not path.is_dir())


def _folders(root: Path) -> tuple[str, ...]:
    """The names of the folders in a folder, without hidden ones and those of other programs."""
    found = [path for path in root.iterdir() if not path.name.startswith(".") and not is_foreign(path.name, False)]
    for path in found:
        if path.is_symlink() and not path.exists() and path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{path} is a link to a folder that does not exist")
    return tuple(sorted(path.name for path in found if path.is_dir()))


def _class_folders(root: Path, classes: tuple[str, ...] | None) -> tuple[tuple[str, ...], Files]:
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
    say("ignored, not an image", others)
    say("ignored, a folder of another program", foreign)
    say("ignored, in no folder of a class", _strays(root))
    return classes, Files(root, tuple(paths), tuple(labels))


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
