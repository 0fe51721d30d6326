"""One file with the weights and the images of the offline experiment, for machines without a network.

    python benchmarks/paper/bundle.py FILE [--image-size 112] [--datasets NAME ...]

Weights are rounded to bfloat16. Of each data set it has the 1000 training images and the test images that a run would
draw; images that are larger than a run needs are stored resized, so the file serves runs at this size with as many
test images, whose pixels are the same as without it. The licences of the data are those in sources.py: one of them
excludes commercial use, so the file is not for passing on.
"""

import argparse
import io
import json
import math
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import sources
from efft_kernels.finetune.data import SOURCES, Source, open_data
from efft_kernels.finetune.images import Arrays, Subset
from efft_kernels.storage import write, write_bytes

PARTS = ("train", "val", "test")


def make(path: Path, image_size: int, names: list[str], most: dict[str, int], weights: str = "dinov2s_mri") -> None:
    """Write the file.

    Args:
        image_size: largest side that is stored, in pixels.
        most: test images of a data set; "" for the others.
    """
    found = sources.weights(weights)
    state = torch.load(found.path, map_location="cpu", weights_only=True)
    state = {key: t for key, t in state.get("state_dict", state).items() if t.is_floating_point()}
    raw = b"".join(t.bfloat16().contiguous().view(torch.uint8).numpy().tobytes() for t in state.values())
    planes = np.frombuffer(raw, np.uint8).reshape(-1, 2).T  # exponents and digits apart, which compresses well
    about = {"weights": weights, "model": found.model, "about": found.about, "image_size": image_size, "most": most,
             "shapes": {key: list(t.shape) for key, t in state.items()}, "data": {}}  # fmt: skip

    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as box:
        box.writestr("weights", zlib.compress(planes.tobytes(), 9))
        for name in names:
            source = SOURCES[name]()
            test = drawn(source.test, most.get(name, most[""]))
            entry = {"classes": list(source.classes), "parts": {}}
            for part, images in zip(PARTS, (source.train, source.val, test)):
                pixels = _pixels(images, image_size)
                entry["parts"][part] = {"labels": list(images.labels), "shape": list(pixels.shape)}
                picture = io.BytesIO()
                Image.fromarray(mosaic(pixels)).save(picture, "WEBP", lossless=True, method=4)
                box.writestr(f"{name}.{part}", picture.getvalue())
            about["data"][name] = entry
        box.writestr("about.json", json.dumps(about))
    write_bytes(path, whole.getvalue())


def drawn(images, most: int | None):
    """At most so many of the images, in random order, because a list may be sorted by class."""
    if not most or most >= len(images):
        return images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    return Subset((images,), tuple((0, i) for i in sorted(order[:most])))


def _pixels(images, size: int) -> np.ndarray:
    """[N, H, W] or [N, H, W, 3] uint8, resized if they are larger than the size."""
    first = images.load(0)
    pixels = np.stack([np.asarray(images.load(i)) for i in range(len(images))])
    if max(first.size) > size:
        name = "to be resized"
        SOURCES[name] = lambda: Source(images, None, images, ("0",))
        part = open_data(name, size).train
        part.check(True)
        pixels = part.kept.permute(0, 2, 3, 1).numpy()
        del SOURCES[name]
    return pixels[..., 0] if (pixels == pixels[..., :1]).all() else pixels


def mosaic(pixels: np.ndarray) -> np.ndarray:
    """All images in one: rows of about as many as there are rows."""
    n, h, w, *rest = pixels.shape
    across = math.ceil(math.sqrt(n))
    down = math.ceil(n / across)
    whole = np.zeros((down * across, h, w, *rest), np.uint8)
    whole[:n] = pixels
    return whole.reshape(down, across, h, w, *rest).swapaxes(1, 2).reshape(down * h, across * w, *rest)


def tiles(picture: np.ndarray, shape: list[int]) -> np.ndarray:
    """The images of a mosaic."""
    n, h, w, *rest = shape
    across = math.ceil(math.sqrt(n))
    parts = picture.reshape(-1, h, across, w, *rest).swapaxes(1, 2)
    return parts.reshape(-1, h, w, *rest)[:n]


def use(path: Path, image_size: int = 0, most: dict[str, int] | None = None) -> sources.Weights:
    """Let the sources of images and weights read the file instead of packages; returns its weights.

    Args:
        image_size: side of the images that runs need, in pixels.
        most: {data set: test images that runs draw}

    Raises:
        ValueError: it is no such file, or is for other images.
    """
    path = Path(path)
    if _used.get("path") != path:
        _read(path)
    has, limits = _used["about"]["image_size"], _used["about"]["most"]
    if image_size and has != image_size:
        raise ValueError(f"--bundle has images of {has} pixels, {image_size} are asked for: {path}")
    for name, number in (most or {}).items():
        if name in _used["about"]["data"] and (kept := limits.get(name, limits[""])) != number:
            raise ValueError(f"--bundle has {kept} test images of {name} at most, {number} are asked for: {path}")
    return _used["weights"]


_used: dict = {}


def _read(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as box:
            about = json.loads(box.read("about.json"))
            planes = np.frombuffer(zlib.decompress(box.read("weights")), np.uint8).reshape(2, -1)
        _ = about["image_size"], about["most"][""]
    except (KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        said = f"--bundle must be a file that this version of bundle.py wrote, got {path}: {error}"
        raise ValueError(said) from error
    file = path.with_suffix(".weights.pt")
    if not file.exists():
        flat = torch.from_numpy(np.ascontiguousarray(planes.T)).flatten().view(torch.bfloat16).float()
        sizes = [math.prod(shape) for shape in about["shapes"].values()]
        state = {key: t.view(shape).clone() for (key, shape), t in zip(about["shapes"].items(), flat.split(sizes))}
        write(file, lambda target: torch.save(state, target))
    for name, entry in about["data"].items():
        SOURCES[name] = lambda name=name, entry=entry: _source(path, name, entry)
    found = sources.Weights(about["model"], file, about["about"] + ", rounded to bfloat16")
    sources.WEIGHTS[about["weights"]] = lambda: found
    _used.update(path=path, weights=found, about=about)


def _source(path: Path, name: str, entry: dict) -> Source:
    parts = []
    with zipfile.ZipFile(path) as box:
        for part, stored in entry["parts"].items():
            picture = Image.open(io.BytesIO(box.read(f"{name}.{part}")))
            grey = len(stored["shape"]) == 3
            pixels = tiles(np.asarray(picture.convert("L" if grey else "RGB")), stored["shape"])
            parts.append(Arrays(f"{name} ({part})", pixels, stored["labels"]))
    return Source(*parts, tuple(entry["classes"]), protocol=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--datasets", nargs="+", metavar="NAME", help="default: those of vtab1k.py --offline --gpu")
    parser.add_argument("--test-images", type=int, default=2000, help="of a data set, at most")
    args = parser.parse_args(arguments)
    for option in ("image_size", "test_images"):
        if (value := getattr(args, option)) < 1:
            parser.error(f"--{option.replace('_', '-')} must be at least 1, got {value}")
    if unknown := [name for name in args.datasets or () if name not in SOURCES]:
        parser.error(f"--datasets must be of {', '.join(SOURCES)}, got {unknown[0]!r}")
    from vtab1k import FACTS

    plan = FACTS["offline"]["gpu"]
    names = list(dict.fromkeys(args.datasets or [name for of in plan["groups"].values() for name in of]))
    args.file.parent.mkdir(parents=True, exist_ok=True)
    make(args.file, args.image_size, names, {"": args.test_images} | plan["most"])
    print(f"{args.file}: {args.file.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
