"""Builds the compiled library of csrc/ against the torch that is installed. Everything else is in pyproject.toml.

pip's build isolation hides the environment's packages from sys.path but not from sysconfig, so the torch that will run
the library is found there. Without one nothing is compiled now, and efft_kernels/kernels/native.py compiles at first use.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def cuda_home() -> str | None:
    """The first folder with both nvcc and its headers. An nvcc on PATH may be a wrapper script far away from them."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates += [Path(nvcc).resolve().parents[1]] if nvcc else []
    candidates += ["/usr/local/cuda"]
    for home in filter(None, candidates):
        if Path(home, "bin/nvcc").exists() and Path(home, "include/cuda_runtime.h").exists():
            return str(home)
    return None


def find_torch():
    try:
        import torch
    except ImportError:
        sys.path.append(sysconfig.get_path("purelib"))
        try:
            import torch
        except ImportError:
            return None
    return torch


class BuildPy(build_py):
    """Puts csrc/ inside the installed package, for the compile at first use. An editable install reads it in place."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "csrc", Path(self.build_lib, "efft_kernels", "csrc"), dirs_exist_ok=True)


def extension(torch) -> dict:
    home = cuda_home() if torch.version.cuda else None
    if home:
        os.environ["CUDA_HOME"] = home  # read when cpp_extension is imported
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    kernels = sorted(Path("csrc/cuda").glob("*.cu")) if home else []
    sources = [Path("csrc/bindings.cpp"), *sorted(Path("csrc/cpu").glob("*.cpp")), *kernels]
    nvcc_flags = ["-std=c++17", "-O3"]
    nvcc_flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a", "100a")]
    library = (CUDAExtension if kernels else CppExtension)(
        "efft_kernels._native",
        [str(source) for source in sources],
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000"), *([("EFFT_CUDA", None)] if kernels else [])],
        extra_compile_args={"cxx": ["-std=c++17", "-O3", "-g0", "-Wno-psabi"], "nvcc": nvcc_flags},
        depends=[str(header) for header in Path("csrc").rglob("*.h")],
        py_limited_api=True,
    )
    return {
        "ext_modules": [library],
        "cmdclass": {"build_py": BuildPy, "build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


os.chdir(ROOT)
torch = find_torch()
if torch is None:
    print("efft_kernels: torch is not installed yet, so csrc/ is not compiled now but at first use", file=sys.stderr)
setup(**(extension(torch) if torch else {"cmdclass": {"build_py": BuildPy}}))
