"""Files are written completely or not at all, and caches share one folder."""

import errno
import os

import pytest

from efft_kernels import storage


def test_an_error_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "a.bin"
    storage.write_bytes(path, b"old")

    def fill(file):
        file.write(b"new")
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        storage.write(path, fill)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_the_reason_of_a_failed_write_is_raised(tmp_path, monkeypatch):
    def fill(file):
        file.file = open("/dev/full", "wb", buffering=0)
        try:
            file.write(b"data")
        except OSError:
            raise RuntimeError("unexpected pos 0 vs 4") from None  # all that torch.save says

    with pytest.raises(OSError) as error:
        storage.write(tmp_path / "a.bin", fill)
    assert error.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_a_link_stays_a_link(tmp_path):
    storage.write_bytes(tmp_path / "a.bin", b"old")
    (tmp_path / "link").symlink_to(tmp_path / "a.bin")
    storage.write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "a.bin").read_bytes() == b"new"


def test_permissions_are_those_of_any_new_file(tmp_path):
    storage.write_bytes(tmp_path / "a.bin", b"")
    (tmp_path / "b.bin").touch()
    assert (tmp_path / "a.bin").stat().st_mode == (tmp_path / "b.bin").stat().st_mode


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFT_CACHE", str(tmp_path))
    assert storage.cache_folder() == tmp_path
    monkeypatch.setenv("EFFT_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "user"))
    assert storage.cache_folder() == tmp_path / "user" / "efft_kernels"
