"""Label any number of images with a finished run: files and folders in, a CSV file out."""

import csv
import io
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..storage import write
from . import checkpoints
from .bars import bar
from .finished import preparation, restore
from .folders import find_images
from .images import DataError, Files, say
from .models import logits
from .prepared import find_device


@dataclass(frozen=True)
class Labelled:
    """An image and what was found; ``classes`` with their probabilities, the most probable first."""

    file: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    several: bool = False  # whether all of the classes are labels of the image
    problem: str | None = None  # why the image could not be read


def find_files(places: Sequence[str], classes: Collection[str] = ()) -> list[str]:
    """The image files in folders (and in folders in them), and files as they are named; ``classes`` as for find_images.

    Raises:
        DataError: a place that does not exist, or a folder without images.
    """
    found = []
    for place in places:
        path = Path(place)
        if path.is_dir():
            try:
                images, others, foreign = find_images(path, classes)
            except OSError as error:
                raise DataError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error
            if not images:
                raise DataError(f"{place} has no images")
            say("ignored, not an image", others)
            say("ignored, a folder of another program", foreign)
            found += map(str, images)
        elif not path.exists() and not path.is_symlink():
            raise DataError(f"{place} does not exist")
        else:
            found.append(place)
    return list(dict.fromkeys(found))


class _Prepared(torch.utils.data.Dataset):
    """The images as tensors; a sentence in place of one that cannot be read."""

    def __init__(self, files: Sequence[str], prepare):
        self.images, self.prepare = Files(Path("."), tuple(files), (0,) * len(files)), prepare

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int):
        try:
            return i, self.prepare(self.images.load(i))
        except DataError as error:
            return i, str(error)


@torch.inference_mode()
def label(
    out: str | Path,
    files: Sequence[str],
    checkpoint: str | None = None,
    *,
    device: str = "auto",
    batch_size: int = 32,
    workers: int = 0,
    top: int = 5,
    show: bool = False,
) -> Iterator[Labelled]:
    """Label images with a finished run, one after the other in their order.

    Args:
        out: the folder of the run.
        files: of the images.
        checkpoint: the pre-trained weights, if they have moved since the run.
        device: "auto" for a GPU if there is one, "cpu", "cuda", "mps" or "xpu", also with a number as "cuda:1".
        batch_size: images per forward.
        workers: processes that read images.
        top: classes at most of each image; with several labels per image all with a probability of at least 0.5.
        show: a progress bar.

    Raises:
        ValueError: a device that torch cannot use.
        FileNotFoundError, ValueError: as :func:`finished.restore`.
    """
    device = find_device(device)
    model, record = restore(out, checkpoint)
    prepare = preparation(model, record)
    model.to(device)
    several, classes = record.get("multilabel", False), record["classes"]
    loader = torch.utils.data.DataLoader(
        _Prepared(files, prepare), batch_size=batch_size, num_workers=workers, collate_fn=list
    )
    with bar(show, len(files), "labelling", "img") as shown:
        for batch in loader:
            pixels = [x for _, x in batch if not isinstance(x, str)]
            p = iter(())
            if pixels:
                y = logits(model, torch.stack(pixels).to(device)).float()
                p = iter((y.sigmoid() if several else y.softmax(1)).cpu())
            for i, x in batch:
                if isinstance(x, str):
                    yield Labelled(files[i], (), (), several, x)
                    continue
                values, best = next(p).topk(len(classes) if several else min(top, len(classes)))
                pairs = [(classes[c], float(v)) for c, v in zip(best, values) if not several or v >= 0.5]
                yield Labelled(files[i], tuple(c for c, _ in pairs), tuple(v for _, v in pairs), several)
            shown.update(len(batch))


def label_to_csv(out: str | Path, files: Sequence[str], path: Path, **options) -> list[str]:
    """Write the labels of images to a CSV file, atomically: image, label, probability, and the next best classes.

    Args:
        path: of the CSV file.
        options: of :func:`label`.

    Returns:
        A sentence for each image that cannot be read; these are not in the file.

    Raises:
        checkpoints.StorageError: the file cannot be written.
        FileNotFoundError, ValueError: as :func:`finished.restore`.
    """
    bad = []

    def fill(file) -> None:
        def line(*cells) -> None:
            text = io.StringIO(newline="")
            csv.writer(text, lineterminator="\n").writerow(cells)
            file.write(text.getvalue().encode(errors="surrogateescape"))

        line("image", "label", "probability", "others")
        for found in label(out, files, **options):
            if found.problem:
                bad.append(found.problem)
                continue
            pairs = [f"{name}={p:.4f}" for name, p in zip(found.classes, found.probabilities)]
            if found.several:
                line(found.file, "|".join(found.classes), "|".join(f"{p:.4f}" for p in found.probabilities), "")
            else:
                line(found.file, found.classes[0], f"{found.probabilities[0]:.4f}", "|".join(pairs[1:]))

    with checkpoints.storing(path.parent, str(path)):
        write(path, fill)
    return bad
