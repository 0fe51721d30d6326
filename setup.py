"""Builds the compiled libraries of csrc/ against the torch that is installed. Everything else is in pyproject.toml.

pip's build isolation hides the environment's packages from sys.path but not from sysconfig, so the torch that will run
the library is found there. python -m build makes an environment for itself; torch is then looked for in the activated
one. Without torch, off Linux, and without a working C++ compiler the package is installed without its kernels and a
line says why; efft_kernels/kernels/build.py compiles them at first use, if that is possible by then.

csrc/cuda becomes a library of its own, where torch is a CUDA build and nvcc is found; no GPU is needed. The environment
variable EFFT_CUDA says otherwise: 0 leaves it out, 1 builds it whatever torch is installed (it is the same library).
"""

import hashlib
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("build", ROOT / "efft_kernels" / "kernels" / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)


def find_torch():
    activated = [os.environ.get(name) for name in ("VIRTUAL_ENV", "CONDA_PREFIX")]
    places = [sysconfig.get_path("purelib", vars={"base": home}) for home in activated if home]
    for place in (None, sysconfig.get_path("purelib"), *places):
        sys.path += [place] if place else []
        try:
            import torch
        except ImportError:
            continue
        return torch
    return None


class BuildPy(build_py):
    """Puts csrc/ inside the installed package, for the compile at first use. An editable install reads it in place."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "csrc", Path(self.build_lib, "efft_kernels", "csrc"), dirs_exist_ok=True)


def wants_cuda(torch) -> str | None:
    """The toolkit to build csrc/cuda with, or None"""
    wanted = os.environ.get("EFFT_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"EFFT_CUDA must be 0, 1 or unset, got {wanted!r}")
    home = build.cuda_home() if wanted == "1" or (wanted == "" and torch.version.cuda) else None
    if wanted == "1" and home is None:
        sys.exit("EFFT_CUDA=1, but no folder with bin/nvcc and include/cuda_runtime.h was found; set CUDA_HOME to it")
    return home


def sources(part: str) -> str:
    """A C++ file with the digest of csrc/PART, by which the library is known to be of these sources"""
    file, text = Path("build", f"sources_{part}.cpp"), build.mark(ROOT / "csrc" / part)
    file.parent.mkdir(exist_ok=True)
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    return str(file)


ARCHITECTURES = ("80", "90a")
MACROS = [("TORCH_TARGET_VERSION", "0x020b000000000000")]
CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-Wno-psabi"]


def extensions(torch) -> dict:
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    home = wants_cuda(torch)
    # torch's own guess is none beside a CPU build, and wrong where nvcc on PATH is a wrapper script
    cpp_extension.CUDA_HOME = home

    cpu = CppExtension(
        "efft_kernels._cpu",
        [*map(str, sorted(Path("csrc/cpu").glob("*.cpp"))), sources("cpu")],
        define_macros=MACROS,
        extra_compile_args={"cxx": CXX_FLAGS},
        depends=[*map(str, Path("csrc/cpu").glob("*.h")), *map(str, Path("csrc/cpu").glob("*.inl"))],
        py_limited_api=True,
    )
    libraries = [cpu]
    if home:
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
        headers = sorted(Path("csrc/cuda").glob("*.h"))
        # beside a CPU torch ninja is not told what a .cu includes: a changed header must change the command
        digest = hashlib.sha256(b"".join(header.read_bytes() for header in headers)).hexdigest()[:16]
        nvcc_flags = ["-std=c++17", "-O3", f"-DEFFT_HEADERS=0x{digest}", *codes]
        libraries.append(
            # not a CUDAExtension, which would link against torch's CUDA libraries, and so against one version of CUDA
            CppExtension(
                "efft_kernels._cuda",
                ["csrc/cuda/bindings.cpp", *map(str, sorted(Path("csrc/cuda").glob("*.cu"))), sources("cuda")],
                define_macros=MACROS,
                extra_compile_args={"cxx": CXX_FLAGS, "nvcc": nvcc_flags},
                depends=[*map(str, headers)],
                library_dirs=[f"{home}/lib64", f"{home}/lib"],
                # libtorch is needed for the libtorch_cuda behind it, where there is one
                extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-lcudart_static", "-lrt", "-lpthread", "-ldl"],
                py_limited_api=True,
            )
        )
    return {
        "ext_modules": libraries,
        "cmdclass": {"build_py": BuildPy, "build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


os.chdir(ROOT)
reason = build.problem()
torch = None if reason else find_torch()
if torch is None:
    reason = reason or "torch is not installed yet; they will be at first use"
    if os.environ.get("EFFT_CUDA") == "1":
        sys.exit(f"EFFT_CUDA=1, but the kernels cannot be compiled: {reason}")
    print(f"efft_kernels: the kernels of csrc/ are not compiled: {reason}", file=sys.stderr)
setup(**(extensions(torch) if torch else {"cmdclass": {"build_py": BuildPy}}))
