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
from faults import PLANTED

from efft_kernels.kernels.build import digest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc" / "cuda"
TORCH = Path(torch.__file__).parent


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

    def plant(self, name: str | None) -> None:
        """Chooses a fault of a library with all of them; without a name the library is sound."""
        self.library.efft_sim_plant(list(PLANTED).index(name) + 1 if name else 0)

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


def compile_all(jobs: list[tuple[Path, Path, list[str]]]) -> None:
    """Compiles jobs of (source, object, flags); kernels with -O1, as to compile them takes longer than to run them."""

    def run(job):
        source, target, flags = job
        command = [*compiler(), "-x", "c++", "-O1", "-std=c++17", "-fPIC", "-DEFFT_SIM", f"-I{HERE}", *flags]
        command += ["-fno-strict-aliasing"]  # as in CUDA: the kernels read and write pairs of numbers as one
        # the fibers jump between stacks, at which compilers that fortify by default would end the process
        command += ["-U_FORTIFY_SOURCE"]
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
    jobs = [(source, folder / f"{source.stem}.o", []) for source in sorted(CSRC.glob("*.cu"))]
    jobs += [(HERE / "sim.cpp", folder / "sim.o", [f"-I{CSRC}", "-O3"]), bindings(folder, "efft_cuda_sim")]
    compile_all(jobs)
    return link([target for _, target, _ in jobs], folder / "efft_cuda_sim.so")


def planted_in(text: str, planted: list[tuple[int, str, str]]) -> str:
    """A file of csrc/cuda with faults of (number, text that occurs once, faulty text) beside what they replace.

    planted(number) of sim.h chooses between them at run time: between statements, which end with a semicolon, or else
    between the values of an expression.
    """
    parts = []
    for number, sound, faulty in planted:
        assert text.count(sound) == 1, f"the text has {text.count(sound)} times {sound!r}"
        start, lines, others = text.index(sound), sound.splitlines(True), faulty.splitlines(True)
        while others and lines[0] == others[0]:
            start += len(lines.pop(0))
            others.pop(0)
        while others and lines[-1] == others[-1]:
            lines.pop(), others.pop()
        sound, faulty = ("".join(of).rstrip("\n") for of in (lines, others))
        if sound[-1] == faulty[-1:] == ",":
            sound, faulty = sound[:-1], faulty[:-1]
        end = start + len(sound)
        if sound.endswith(";"):
            before, after = f"{{ if (planted({number})) {{ {faulty} }} else {{ ", "} } "
        else:
            before, after = f"(planted({number}) ? ({faulty}) : (", "))"
        # one that lies within another lies within what that one leaves sound
        parts += [(start, 1, -end, number, before), (end, 0, -start, -number, after)]
    for at, *_, inserted in sorted(parts, reverse=True):
        text = text[:at] + inserted + text[at:]
    return text


def build_faulty(folder: Path, objects: Path, constant: tuple[str, str, str] | None = None) -> Simulated:
    """Builds csrc/cuda with all of faults.PLANTED, of which Simulated.plant() chooses one, or with the one `constant`.

    The library has each kernel that has faults as its one_*.cu has it, in bfloat16, and the rest from the objects of a
    sound build.
    """
    csrc, library = folder / "csrc", f"efft_faulty_{folder.name}"
    shutil.copytree(CSRC, csrc)
    kernels = ["linear", "hopper", "hopper_pass"]
    if constant:
        file, sound, faulty = constant
        text = (csrc / file).read_text()
        assert text.count(sound) == 1, f"{file} has {text.count(sound)} times {sound!r}"
        (csrc / file).write_text(text.replace(sound, faulty))
        kernels = [file.removesuffix(".h")]
    else:
        found: dict[str, list] = {}
        for number, (file, *texts) in enumerate(PLANTED.values(), 1):
            found.setdefault(file, []).extend((number, *pair) for pair in zip(texts[::2], texts[1::2]))
        for file, planted in found.items():
            (csrc / file).write_text(planted_in((csrc / file).read_text(), planted))
    jobs = [(HERE / f"one_{kernel}.cu", folder / f"one_{kernel}.o", [f"-I{csrc}"]) for kernel in kernels]
    jobs.append(bindings(folder, library))
    compile_all(jobs)
    stems = {"sim", *(source.stem for source in CSRC.glob("*.cu"))} - {f"{kernel}_bf16" for kernel in kernels}
    rest = [objects / f"{stem}.o" for stem in sorted(stems)]
    return Simulated(link([*(target for _, target, _ in jobs), *rest], folder / f"{library}.so"), library)
