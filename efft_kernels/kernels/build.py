"""Compiles csrc/, and the digest of sources by which a library and a proof are known to belong to them.

setup.py runs this file by its path, also where torch and the rest of the package cannot be imported: at its top it
imports the standard library only.
"""

import ast
import functools
import hashlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
MARK = b"EFFT-SOURCES:"
_COMMENT = re.compile(r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/', re.S)


def csrc() -> Path | None:
    """The C++ sources: inside an installed package, beside the package in a checkout."""
    return next((d for d in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if (d / "cpu").is_dir()), None)


def files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix in (".cpp", ".cu", ".h", ".inl"))


def digest(folder: Path) -> str:
    """Of the C++ files in a folder, without their comments and the width of their white space."""
    found = hashlib.sha256()
    for file in files(folder):
        text = _COMMENT.sub(lambda match: match.group(1) or " ", file.read_text())
        found.update(f"{file.name}\n{' '.join(text.split())}\n".encode())
    return found.hexdigest()[:32]


def python_digest(paths: list[Path]) -> str:
    """Of what Python files define, whatever file that is in: without comments, docstrings and imports."""
    definitions = []
    for path in paths:
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.Import | ast.ImportFrom) and not _is_text(node):
                definitions.append(repr(_meaning(node)))
    return hashlib.sha256("\n".join(sorted(definitions)).encode()).hexdigest()[:32]


def _meaning(node):
    """a syntax tree as lists and strings, the same in every version of Python"""
    if isinstance(node, list):
        return [_meaning(part) for part in node if not _is_text(part)]
    if isinstance(node, ast.AST):
        fields = [(name, value) for name, value in ast.iter_fields(node) if name not in ("kind", "type_comment")]
        return [type(node).__name__, *([name, _meaning(v)] for name, v in fields if v is not None and v != [])]
    return repr(node)


def _is_text(node) -> bool:
    """a docstring, or another string that stands for itself"""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def mark(folder: Path) -> str:
    """A C++ file that puts the digest of a folder into a library."""
    text = MARK.decode() + digest(folder)
    return f'extern "C" __attribute__((used, visibility("default"))) const char efft_sources[] = "{text}";\n'


@functools.cache
def carried(library: Path) -> str | None:
    """The digest that a library was compiled with, or None."""
    found = re.search(re.escape(MARK) + rb"([0-9a-f]{32})", library.read_bytes())
    return found.group(1).decode() if found else None


def belongs(library: Path, part: str) -> bool:
    """Whether a library was compiled from csrc/cpu or csrc/cuda as they are here; true where these are not there."""
    folder = csrc()
    return folder is None or not (folder / part).is_dir() or carried(library) == digest(folder / part)


def cuda_home() -> Path | None:
    """The first folder with both nvcc and its headers: of the environment, or of the wheels of the extra "cuda".

    An nvcc on PATH may be a wrapper script far away from its headers.
    """
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates += [Path(nvcc).resolve().parents[1]] if nvcc else []
    candidates += ["/usr/local/cuda", Path(sysconfig.get_path("purelib"), "nvidia", "cu13")]
    for home in map(Path, filter(None, candidates)):
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return home
    return None


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def problem() -> str | None:
    """Why csrc/ cannot be compiled here, or None: the platform, no compiler, or one that fails on a small library."""
    if not sys.platform.startswith("linux"):
        return f"the C++ kernels are for Linux, not for {sys.platform}"
    cxx = compiler()
    if shutil.which(cxx[0]) is None:
        return f"there is no C++ compiler: {cxx[0]!r} (the variable CXX names another) is not found"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <vector>\nint probe() { return int(std::vector<int>(3).size()); }\n")
        try:
            _run([*cxx, "-std=c++17", "-fPIC", "-shared", source, "-o", Path(folder, "probe.so")])
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            return f"the C++ compiler does not work: {error}"
    return None


def compiled(part: str, arch: str | None = None) -> Path:
    """Where csrc/PART, compiled for this torch and architecture, lies in the user's cache; it may not exist yet."""
    import torch

    from ..storage import cache_folder

    key = hashlib.sha256(f"{digest(csrc() / part)} {torch.__version__} {arch}".encode()).hexdigest()[:16]
    return cache_folder() / f"{part}-{key}.so"


def own_cache(folder: Path) -> None:
    """Make folder the cache of this process and its children, with the libraries that are compiled already."""
    from ..storage import cache_folder

    folder.mkdir(parents=True, exist_ok=True)
    for library in cache_folder().glob("*.so"):
        if not (folder / library.name).exists():
            (folder / library.name).symlink_to(library.resolve())
    os.environ["EFFT_CACHE"] = str(folder)


def compile_library(part: str, about: str, home: Path | None = None, arch: str | None = None) -> Path:
    """Compile csrc/cpu, or with the toolkit at home csrc/cuda, into the user's cache, and log one line about it.

    There is no lock: of two processes that compile at once the last one's file stays, and none ever waits for one that
    was killed.

    Raises:
        RuntimeError: there are no sources or no compiler, or it fails.
    """
    import torch

    sources = csrc()
    if sources is None:
        raise RuntimeError(f"no compiled library in {PACKAGE} and no csrc/ to compile one from")
    library, cxx = compiled(part, arch), compiler()
    if library.exists():
        return library
    if reason := problem():
        raise RuntimeError(f"they are not compiled, and cannot be compiled now: {reason}")
    logging.getLogger("efft_kernels").warning("compiling %s, once, to %s", about, library)
    include, lib = (Path(torch.__file__).parent / name for name in ("include", "lib"))
    common = ["-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        marked = Path(folder, "sources.cpp")
        marked.write_text(mark(sources / part))
        objects, jobs = [], []
        for source in [*files(sources / part), marked]:
            if source.suffix in (".cpp", ".cu"):
                objects.append(Path(folder, source.name + ".o"))
                command = [*cxx, *common, "-fPIC", "-Wno-psabi", f"-I{include}"]
                if source.suffix == ".cu":
                    command = [home / "bin" / "nvcc", *common, "-Xcompiler", "-fPIC", f"-I{include}"]
                    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
                jobs.append([*command, "-c", source, "-o", objects[-1]])
        list(pool.map(_run, jobs))
        links = [f"-L{lib}", "-ltorch_cpu"]
        if home:
            # libtorch is needed for the libtorch_cuda behind it, where there is one
            links += ["-Wl,--no-as-needed", "-ltorch", f"-L{home}/lib64", f"-L{home}/lib", "-lcudart_static"]
            links += ["-lrt", "-lpthread", "-ldl"]
        _run([*cxx, "-shared", *objects, "-o", Path(folder, "library.so"), *links])
        os.replace(Path(folder, "library.so"), library)
    return library


def _run(command: list) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {(done.stderr or done.stdout).strip()[-2000:]}")
