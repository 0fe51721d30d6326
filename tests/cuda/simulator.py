"""Builds csrc/cuda for the host, with sim.h in place of the GPU: the operators of bindings.cpp for CPU tensors."""

import ctypes
import fcntl
import functools
import itertools
import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from efft_kernels.kernels.build import digest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc" / "cuda"
TORCH = Path(torch.__file__).parent
ANY = "efft_faulty_any"  # stands in compiled bindings for the name of a library with a fault


class Simulated:
    """The simulator's library, and what a test sets and queries."""

    # What a GPU may do at any time is done at the worst time: which warp runs ahead, when a cp.async copies.
    MODES = list(itertools.product((False, True), repeat=2))
    BY_CHANCE = [(seed, eager) for seed in range(2, 5) for eager in (False, True)]

    def __init__(self, library: Path, name: str = "efft_cuda_sim"):
        torch.ops.load_library(str(library))
        self.ops = getattr(torch.ops, name)
        self.library = ctypes.CDLL(str(library))

    def mode(self, order: int, eager_copies: bool) -> None:
        self.library.efft_sim_mode(int(order), eager_copies)

    def launches(self, call, *arguments) -> int:
        before = self.library.efft_sim_launches()
        call(*arguments)
        return self.library.efft_sim_launches() - before

    def shared(self, call, *arguments) -> int:
        """The most bytes of shared memory that a block of any of its launches requests."""
        self.library.efft_sim_shared()
        call(*arguments)
        return self.library.efft_sim_shared()


def compiler() -> list[str] | None:
    command = shlex.split(os.environ.get("CXX") or "c++")
    return command if shutil.which(command[0]) else None


def compile_all(jobs: list[tuple[Path, Path, list[str]]], optimize: str = "-O2") -> None:
    """Compiles jobs of (source, object, flags)."""

    def run(job):
        source, target, flags = job
        command = [*compiler(), "-x", "c++", optimize, "-std=c++17", "-fPIC", "-DEFFT_SIM", f"-I{HERE}", *flags]
        command += ["-fno-strict-aliasing"]  # as in CUDA: the kernels read and write pairs of numbers as one
        command += ["-Wno-unknown-pragmas", "-c", source, "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, jobs))


def bindings(folder: Path, library: str, csrc: Path = CSRC) -> tuple[Path, Path, list[str]]:
    """The job that registers the operators as torch.ops.LIBRARY."""
    flags = [f"-DEFFT_LIBRARY={library}", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{TORCH / 'include'}"]
    return csrc / "bindings.cpp", folder / f"{library}_bindings.o", flags


def link(objects: list[Path], library: Path) -> Path:
    command = [*compiler(), "-shared", *objects, "-o", library, f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return library


def built() -> Path:
    """The whole library, built once for each version of csrc/cuda and of this folder, by whoever needs it first."""
    folders = CSRC.parents[1] / "build" / "simulator"
    folder = folders / f"{digest(CSRC)[:16]}-{digest(HERE)[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folders / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = folder / "efft_cuda_sim.so"
        return library if library.exists() else build(folder)


@functools.cache
def loaded() -> Simulated:
    """The whole library, in this process."""
    return Simulated(built())


def build(folder: Path) -> Path:
    """Builds the whole library, as torch.ops.efft_cuda_sim; its objects stay next to it."""
    sources = [HERE / "sim.cpp", *sorted(CSRC.glob("*.cu"))]
    jobs = [(source, folder / f"{source.stem}.o", []) for source in sources] + [bindings(folder, "efft_cuda_sim")]
    compile_all(jobs)
    return link([target for _, target, _ in jobs], folder / "efft_cuda_sim.so")


def build_faulty(
    folder: Path, number: int, name: str, file: str, sound: str, faulty: str, objects: Path
) -> tuple[Path, str]:
    """Builds csrc/cuda with the one occurrence of `sound` in `file` replaced: the library, and its name in torch.ops.

    The library has the kernel in question as its one_*.cu has it, in bfloat16, and the rest from the objects of a sound
    build. The bindings were compiled once into `folder` as ANY. They include no kernel, so only the name in their
    object changes, to another of the same length.
    """
    csrc = folder / name
    shutil.copytree(CSRC, csrc)
    text = (csrc / file).read_text()
    assert text.count(sound) == 1, f"{file} has {text.count(sound)} times {sound!r}"
    assert file != "kernels.h", "the bindings include kernels.h: compile them too"
    (csrc / file).write_text(text.replace(sound, faulty))
    kernel = file.removesuffix(".h") if file.startswith("hopper") else "linear"
    target = csrc / f"one_{kernel}.o"
    compile_all([(HERE / f"one_{kernel}.cu", target, [f"-I{csrc}"])], "-O1")  # compiling takes longer than running
    library = f"{ANY[:-3]}{number:03}"
    names = csrc / "bindings.o"
    names.write_bytes((folder / f"{ANY}_bindings.o").read_bytes().replace(ANY.encode(), library.encode()))
    stems = {"sim", *(source.stem for source in CSRC.glob("*.cu"))} - {f"{kernel}_bf16"}
    rest = [objects / f"{stem}.o" for stem in sorted(stems)]
    return link([target, names, *rest], folder / f"{library}.so"), library
