"""Files are written completely or not at all, and caches share one folder."""

import errno
import os
import stat
import subprocess
import sys

import pytest
from refusals import refuses

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


def test_a_file_and_then_its_folder_are_on_the_disk_when_a_write_returns(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(stat.S_ISDIR(os.fstat(fd).st_mode)) or fsync(fd))
    storage.write_bytes(tmp_path / "a.bin", b"new")
    assert synced == [False, True]


def test_a_link_stays_a_link(tmp_path):
    storage.write_bytes(tmp_path / "a.bin", b"old")
    (tmp_path / "link").symlink_to(tmp_path / "a.bin")
    storage.write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "a.bin").read_bytes() == b"new"
    with open(tmp_path / "a.bin", "ab") as file:  # as a shell opens what stands after >>
        (tmp_path / "open").symlink_to(f"/dev/fd/{file.fileno()}")
        refuses(OSError, "is a device or an open file", storage.write_bytes, tmp_path / "open", b"other")


def test_permissions_are_those_of_any_new_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask belongs to all threads"))
    storage.write_bytes(tmp_path / "a.bin", b"")
    (tmp_path / "b.bin").touch()
    assert (tmp_path / "a.bin").stat().st_mode == (tmp_path / "b.bin").stat().st_mode


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFT_CACHE", str(tmp_path))
    assert storage.cache_folder() == tmp_path
    monkeypatch.setenv("EFFT_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "user"))
    assert storage.cache_folder() == tmp_path / "user" / "efft_kernels"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert storage.cache_folder() == tmp_path / ".cache" / "efft_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("EFFT_CACHE")
    assert storage.cache_folder() == tmp_path / ".cache" / "efft_kernels"


@pytest.mark.slow
def test_files_of_killed_writes_are_removed_and_those_under_way_stay(tmp_path):
    program = (
        "import os, sys; from efft_kernels import storage\n"
        "storage.write(sys.argv[1], lambda file: (file.write(b'half'), file.flush(), os.kill(os.getpid(), 9)))"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", program, tmp_path / "a.bin"])
    assert [name.startswith(storage.PARTIAL) for name in os.listdir(tmp_path)] == [True]  # the second removed the first

    def fill(file):
        storage.write_bytes(tmp_path / "b.bin", b"inner")  # would remove this file if it did not see that it is in use
        file.write(b"outer")

    storage.write(tmp_path / "a.bin", fill)
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "b.bin"] and (tmp_path / "a.bin").read_bytes() == b"outer"


def test_the_longest_name_can_be_written(tmp_path):
    storage.write_bytes(tmp_path / ("n" * 255), b"data")
    assert os.listdir(tmp_path) == ["n" * 255]
