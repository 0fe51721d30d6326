"""Compiling csrc/cuda at first use, with compilers that write down what they were called with."""

import logging
from pathlib import Path

import pytest
import torch
from refusals import refuses

from efft_kernels.kernels import build, cuda


@pytest.fixture
def toolkit(tmp_path, monkeypatch) -> Path:
    """a folder as nvcc's, a c++, and an H100"""
    home = tmp_path / "toolkit"
    for folder in (home / "bin", home / "include", tmp_path / "path"):
        folder.mkdir(parents=True)
    (home / "include" / "cuda_runtime.h").write_text("")
    for script in (home / "bin" / "nvcc", tmp_path / "path" / "c++"):
        script.write_text(
            f'#!/bin/sh\necho "$0 $@" >> {tmp_path}/calls\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"\n'
        )
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"), prepend=":")
    monkeypatch.setenv("EFFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    monkeypatch.setattr(cuda, "_PACKAGE", tmp_path)  # nothing was built when it was installed
    cuda._load.cache_clear(), cuda.load.cache_clear()
    yield home
    monkeypatch.undo()
    cuda._load.cache_clear(), cuda.load.cache_clear()


def test_csrc_cuda_is_compiled_at_first_use_for_the_gpu_at_hand(toolkit, tmp_path, monkeypatch, caplog):
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    assert cuda.unavailable() is None and not (tmp_path / "calls").exists()  # asking compiles nothing
    with caplog.at_level(logging.WARNING, "efft_kernels"):
        assert cuda.load() is torch.ops.efft_cuda
    (line,) = [record.getMessage() for record in caplog.records]
    assert "compiling the CUDA kernels for Some GPU (sm_90a; about" in line and str(tmp_path / "cache") in line
    calls = (tmp_path / "calls").read_text().splitlines()
    nvcc = [call for call in calls if call.startswith(str(toolkit))]
    assert len(nvcc) == len([*(build.csrc() / "cuda").glob("*.cu")])
    assert all("-gencode=arch=compute_90a,code=sm_90a" in call and "sm_80" not in call for call in nvcc)
    assert "-lcudart_static" in calls[-1] and loaded == [str(build.compiled("cuda", "90a"))]
    # once: the next process finds it
    cuda._load.cache_clear(), cuda.load.cache_clear()
    cuda.load()
    assert len((tmp_path / "calls").read_text().splitlines()) == len(calls)


def test_a_compiler_that_fails_is_an_error(toolkit, tmp_path):
    (toolkit / "bin" / "nvcc").write_text("#!/bin/sh\necho 'no room' >&2; exit 1\n")
    refuses(RuntimeError, "nvcc failed: no room", cuda.load)
    assert not list((tmp_path / "cache").iterdir())


def test_without_nvcc_it_says_what_brings_one(toolkit, monkeypatch):
    monkeypatch.setattr(build, "cuda_home", lambda: None)
    assert "pip install 'efft_kernels[cuda]'" in cuda.unavailable()
    refuses(RuntimeError, "there is no nvcc", cuda.load)


def test_another_gpu_gets_nothing_compiled(toolkit, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    assert "compute capability 8.0 and 9.0, not 8.9" in cuda.unavailable()


def test_the_first_folder_with_nvcc_and_headers(toolkit, tmp_path, monkeypatch):
    assert build.cuda_home() == toolkit
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_PATH", str(toolkit))
    assert build.cuda_home() == toolkit
    monkeypatch.delenv("CUDA_PATH")
    wheels = tmp_path / "site" / "nvidia" / "cu13"
    wheels.parent.mkdir(parents=True)
    toolkit.rename(wheels)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    assert build.cuda_home() in (wheels, Path("/usr/local/cuda"))
