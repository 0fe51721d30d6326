"""What setup.py installs where nothing can be compiled, and csrc/cpu on another architecture."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from efft_kernels.kernels import build

ROOT = Path(__file__).parents[1]
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"

# setup.py as on another platform: what it imports itself must not know
SETUP = "import runpy, setuptools, sys; sys.platform = sys.argv.pop(1); runpy.run_path('setup.py', run_name='__main__')"
# modules of POSIX systems are missing, as on Windows
USE = """
import sys
sys.modules.update(dict.fromkeys(("fcntl", "resource", "pwd", "grp", "termios")))
import torch, efft_kernels as ek
print(ek.__file__, *ek.backends(), sep="\\n")
layer = ek.EFFTLinear(32, 16, rank=4)
layer(torch.randn(8, 32)).sum().backward()
print(layer.u.grad is not None)
sys.platform = sys.argv[1]
print(ek.kernels.build.problem())
"""


def python(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "EFFT_CUDA", "PYTHONPATH")} | environment
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=kept, capture_output=True, text=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """a copy of what setup.py reads, without a compiled library"""
    folder = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    made = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "efft_kernels", folder / "efft_kernels", ignore=made)
    return folder


def test_why_nothing_can_be_compiled(tmp_path, monkeypatch):
    assert build.problem() is None
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho no libstdc++ >&2\nexit 1\n")
    monkeypatch.setenv("CXX", f"{compiler} -m64")
    assert build.problem() == f"there is no C++ compiler: '{compiler}' (the variable CXX names another) is not found"
    compiler.chmod(0o755)
    assert build.problem() == f"the C++ compiler does not work: {compiler} failed: no libstdc++"
    for platform in ("darwin", "win32"):
        monkeypatch.setattr(sys, "platform", platform)
        assert build.problem() == f"the C++ kernels are for Linux, not for {platform}"


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_installs_without_kernels_and_says_so(platform, source, tmp_path):
    missing = {name: str(tmp_path / "missing") for name in ("CC", "CXX")}
    none, says = {}, "the C++ kernels are for Linux, not for win32"
    if platform == "linux":
        none, says = missing, f"there is no C++ compiler: '{tmp_path / 'missing'}'"
    built = python("-c", SETUP, platform, "-q", "bdist_wheel", "-d", str(tmp_path), folder=source, **none)
    assert built.returncode == 0, built.stderr
    assert f"the kernels of csrc/ are not compiled: {says}" in built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "efft_kernels/csrc/cpu/neon.cpp" in archive.namelist()
        archive.extractall(tmp_path / "installed")
    # the package works with plain torch, and names the reason when it is asked
    installed = str(tmp_path / "installed")
    paths = {"PYTHONPATH": installed, "EFFT_CACHE": str(tmp_path / "cache")}
    used = python("-c", USE, platform, folder=tmp_path, **paths, **missing)
    assert used.returncode == 0, used.stderr
    file, *_, gradient, reason = used.stdout.splitlines()
    assert file.startswith(installed) and gradient == "True" and says in reason
    if none:
        assert f"cannot be compiled now: {says}" in used.stdout

    refused = python("-c", SETUP, platform, "-q", "bdist_wheel", folder=source, EFFT_CUDA="1", **none)
    assert refused.returncode and f"EFFT_CUDA=1, but the kernels cannot be compiled: {says}" in refused.stderr


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which(CROSS) and shutil.which(EMULATOR)), reason=f"needs {CROSS} and {EMULATOR}")
def test_kernels_of_aarch64(tmp_path):
    """NEON, with and without bfloat16's dot product, on odd shapes in an emulator; without warnings."""
    sources = [s for s in (ROOT / "csrc" / "cpu").glob("*.cpp") if not s.name.startswith("bindings")]
    flags = "-std=c++17 -O1 -Wall -Wextra -Werror -Wno-psabi -static -DEFFT_AVAILABLE_ONLY".split()
    main = ROOT / "tests" / "sanitize" / "main.cpp"
    subprocess.run([CROSS, *flags, *sources, main, "-o", tmp_path / "main", "-lpthread"], check=True)
    processors = {"max": ["neon_bf16: passed", "neon: passed", "portable"], "cortex-a72": ["neon", "portable"]}
    for processor, isas in processors.items():
        # emulated, each takes seconds; the portable ones are those that run on this machine
        run = [isa.removesuffix(": passed") for isa in isas if ":" in isa] or ["none"]
        done = subprocess.run([EMULATOR, "-cpu", processor, tmp_path / "main", *run], capture_output=True, text=True)
        assert done.stdout.splitlines() == isas
