"""Data for fine-tuning: folders, lists and registered sources, and the errors for malformed ones."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from models import timm
from refusals import refuses

pytest.importorskip("PIL")
timm()
from PIL import Image

from efft_kernels.finetune import data as data_module
from efft_kernels.finetune import folders
from efft_kernels.finetune.data import Source, open_data, source
from efft_kernels.finetune.images import Arrays, DataError


def picture(path, value=0, size=(20, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def folder(root, parts=("",), classes=("cat", "dog"), n=5):
    for part in parts:
        for c, name in enumerate(classes):
            for i in range(n):
                picture(root / part / name / f"{i}.png", 10 * c + i)
    return root


def lists(root, name="cifar", n=4):
    """VTAB-1K in NOAH's layout, with a file name that contains a space."""
    root = root / name
    for part, count in (("train800", n), ("val200", 2), ("test", 3)):
        lines = []
        for i in range(count):
            picture(root / "images" / part / f"im {i}.png", i)
            lines.append(f"images/{part}/im {i}.png {i}")
        (root / f"{part}.txt").write_text("\n".join(lines) + "\n")
    both = (root / "train800.txt").read_text() + (root / "val200.txt").read_text()
    (root / "train800val200.txt").write_text(both)
    return root


def test_folder_of_classes(tmp_path):
    (tmp_path / "test.txt").write_text("notes")  # no list of VTAB-1K
    found = open_data(folder(tmp_path), 16)
    assert found.classes == ("cat", "dog") and found.val is None and (len(found.train), len(found.test)) == (8, 2)
    pixels, label = found.test[1]
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8 and label == 1
    again = open_data(tmp_path, 16, hold_out=True)
    assert [again.test.images.key(i) for i in range(2)] == [found.test.images.key(i) for i in range(2)]
    keys = [{part.images.key(i) for i in range(len(part))} for part in again.parts().values()]
    assert [len(part) for part in keys] == [6, 2, 2] and len(set.union(*keys)) == 10
    with pytest.raises(DataError, match="val_fraction must leave images to choose by, got 0.0 of 8"):
        open_data(tmp_path, 16, hold_out=True, val_fraction=0.0)
    assert again.fingerprint() != found.fingerprint() == open_data(tmp_path, 8).fingerprint()


def test_vtab_lists(tmp_path):
    root = lists(tmp_path)
    whole, held = open_data(root, 16), open_data(root, 16, hold_out=True)
    assert (len(whole.train), whole.val, len(whole.test)) == (6, None, 3)
    assert (len(held.train), len(held.val), len(held.test)) == (4, 2, 3) and len(whole.classes) == 100
    assert whole.train.labels == [0, 1, 2, 3, 0, 1]


def test_source(monkeypatch):
    monkeypatch.setattr(data_module, "SOURCES", dict(data_module.SOURCES))
    images = np.arange(5 * 8 * 8, dtype=np.uint8).reshape(5, 8, 8)
    part = lambda at: Arrays("toy", images[at], [0, 1, 0, 1, 1][at])
    source("toy")(lambda: Source(part(slice(3)), part(slice(3, 4)), part(slice(4, 5)), ("a", "b"), protocol=True))
    assert len(open_data("toy", 16).train) == 4 and len(open_data("toy", 16, hold_out=True).val) == 1


def test_whole_picture_resized(tmp_path):
    """Nothing is cropped: the four corners of a wide image are present."""
    path = tmp_path / "a" / "0.png"
    path.parent.mkdir()
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:5, :15], pixels[-5:, -15:] = 255, 128
    Image.fromarray(pixels).save(path)
    (x, _) = open_data(tmp_path, 32, test_fraction=0.0, interpolation="bilinear").train[0]
    assert x[:, 1, 1].tolist() == [255] * 3 and x[:, -2, -2].tolist() == [128] * 3


def test_16_bits_of_grey_keep_their_range(tmp_path):
    (tmp_path / "a").mkdir()
    values = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "a/0.png")
    Image.fromarray(values).save(tmp_path / "a/1.tif")
    (tmp_path / "a/2.pgm").write_bytes(b"P5\n8 8\n65535\n" + values.astype(">u2").tobytes())
    train = open_data(tmp_path, 8, test_fraction=0.0).train
    for i in range(3):
        found = train.images.load(i)
        assert found.mode == "RGB" and np.abs(np.asarray(found)[..., 1] - values / 257).max() <= 1
    train.check(keep=True)
    assert train.kept.shape == (3, 3, 8, 8)


def test_32_bits_of_grey_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.random.rand(8, 8).astype(np.float32)).save(tmp_path / "a/0.tif")
    with pytest.raises(DataError, match="a/0.tif cannot be read as an image: .* 32 bits .*mode F"):
        open_data(tmp_path, 8, test_fraction=0.0).train.check(keep=True)


def test_a_class_may_be_called_train(tmp_path):
    found = open_data(folder(tmp_path, classes=("bus", "train")), 16)
    assert found.classes == ("bus", "train") and len(found.train) == 8


def test_names_that_are_no_utf8(tmp_path):
    root = folder(tmp_path)
    target = os.fsencode(root / "cat") + b"/\xff.png"
    try:
        os.rename(root / "cat/0.png", target)
    except OSError:
        pytest.skip("this file system wants UTF-8")
    found = open_data(root, 16, test_fraction=0.0)
    found.train.check(keep=True)
    assert len(found.fingerprint()) == 64 and len(found.train) == 10


def test_list_as_windows_writes_it(tmp_path):
    root = lists(tmp_path)
    path = root / "test.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(open_data(root, 16).test) == 3


def broken_line(root, line, part="train800val200"):
    path = root / f"{part}.txt"
    path.write_text(path.read_text() + line + "\n")


def line(text, part="train800val200"):
    return lambda root: broken_line(root, f"images/{text}", part)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (line("train800/im 0.png"), ["train800val200.txt, line 7", "path label"]),
        (line("train800/im 0.png x"), ["line 7", "'images/train800/im 0.png x'"]),
        (line("train800/im 0.png 100"), ["line 7", "0 to 99", "100"]),
        (line("train800/im 0.png -1"), ["line 7", "-1"]),
        (line("none.png 1", "test"), ["images/none.png", "test.txt, line 4", "exist"]),
        (
            line("val200/../val200/im 1.png 1", "test"),
            ["im 1.png (", "test.txt, line 4) cannot be a test image", "train800val200.txt, line 6, has it", "class 1"],
        ),
        (
            line("val200/im 1.png 3"),
            ["train800val200.txt, line 7) cannot be of class 3", "line 6, has it as a train image of class 1"],
        ),
        (lambda root: (root / "test.txt").write_text("\n \n"), ["test.txt", "empty"]),
        (lambda root: (root / "test.txt").unlink(), ["test.txt", "does not exist", "train800.txt"]),
        (lambda root: (root / "test.txt").write_bytes(b"\xff\xfe\x00"), ["test.txt", "cannot be read"]),
    ],
)
def test_wrong_lists(spoil, words, tmp_path):
    root = lists(tmp_path)
    spoil(root)
    with pytest.raises(DataError) as error:
        open_data(root, 16)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


def test_label_beyond_all_images(tmp_path):
    root = lists(tmp_path, "mine")
    picture(root / "images/test/im 9.png")
    broken_line(root, "images/test/im 9.png 6", "test")
    refuses(DataError, "test.txt, line 4, has the label 6, more than 6 .* set classes", open_data, root, 16)
    assert len(open_data(lists(tmp_path, "other"), 16).classes) == 4


@pytest.mark.filterwarnings("ignore::UserWarning")  # decoders warn about damaged files
@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "bmp", "tif", "webp", "ppm"])
def test_damage_is_a_sentence_or_still_an_image(kind, tmp_path):
    draw = random.Random(0)
    path = picture(tmp_path / "a" / f"0.{kind}")
    whole, images = path.read_bytes(), open_data(tmp_path, 8, test_fraction=0.0).train.images
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 6)):
            data[draw.randrange(min(len(data), draw.choice((40, len(data)))))] = draw.randrange(256)
        path.write_bytes(data[: draw.randint(1, len(data))] if draw.random() < 0.5 else data)
        try:
            assert images.load(0).mode == "RGB"
        except DataError as error:
            assert f"0.{kind} cannot be read as an image" in str(error) and "\n" not in str(error)


def test_folder_that_may_not_be_read(tmp_path, monkeypatch):
    def forbidden(*args):
        raise PermissionError(13, "Permission denied", "photos/cat")

    monkeypatch.setattr(folders, "_class_folders", forbidden)
    refuses(DataError, "photos/cat cannot be read: Permission denied", open_data, folder(tmp_path), 16)


@pytest.mark.parametrize("content", [b"", b"no image", None], ids=["empty", "text", "cut"])
@pytest.mark.parametrize("keep", [True, False])
def test_unreadable_image_of_a_list(content, keep, tmp_path):
    root = lists(tmp_path)
    path = root / "images/train800/im 2.png"
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    with pytest.raises(DataError) as error:
        open_data(root, 16).train.check(keep)
    assert "im 2.png" in str(error.value) and "train800val200.txt, line 3)" in str(error.value), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda root: None, ["folder of images for each class", "no folders"]),
        (lambda root: (folder(root), (root / "bird").mkdir()), ["bird", "has none"]),
        (lambda root: folder(root, n=1), ["two images of a class", "test_fraction=0"]),
        (lambda root: (folder(root, ("train",)), folder(root, ("test",), ("cow",))), ["test/cow", "cat, dog"]),
        (lambda root: folder(root, ("val", "test")), ["folder train in addition to val"]),
        (lambda root: folder(root, ("train", "val", "Valid")), ["one folder of val images, got Valid and val"]),
        (lambda root: (folder(root), (root / "bird").symlink_to("gone")), ["bird is a link to a folder that does not"]),
    ],
)
def test_wrong_folders(make, words, tmp_path):
    make(tmp_path)
    with pytest.raises(DataError) as error:
        open_data(tmp_path, 16)
    assert all(word in str(error.value) for word in words), error.value


def test_wrong_names(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "SOURCES", {})
    refuses(DataError, "data must be a folder or a .csv file, got 'nowhere'", open_data, "nowhere")
    source("digits")(lambda: None)
    refuses(DataError, "data must be a folder or a .csv file or one of digits, got 'nowhere'", open_data, "nowhere")
    refuses(DataError, "classes must be at least the 2", open_data, folder(tmp_path), classes=1)


@pytest.mark.parametrize("augment", ["flip", "crop", "rand"])
def test_augmentation_depends_on_seed_epoch_and_image_alone(augment, tmp_path):
    folder(tmp_path)
    a, b, c = (open_data(tmp_path, 16, augment=augment, seed=seed) for seed in (1, 1, 2))
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    first = [a.train[2, i][0] for i in range(8)]
    after = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    assert after == (torch.rand(1), random.random(), np.random.rand())
    loader = torch.utils.data.DataLoader(b.train, batch_sampler=[[(2, i)] for i in reversed(range(8))], num_workers=2)
    again = [x[0] for x, _ in loader][::-1]
    assert all(torch.equal(x, y) for x, y in zip(first, again))
    assert any(not torch.equal(x, a.train[3, i][0]) for i, x in enumerate(first))
    assert any(not torch.equal(x, c.train[2, i][0]) for i, x in enumerate(first))
    assert torch.equal(a.test[0][0], c.test[0][0])
    a.train.check(keep=True)
    assert a.train.kept is None


def test_flip_is_all_of_the_picture(tmp_path):
    folder(tmp_path)
    plain, flipped = open_data(tmp_path, 16), open_data(tmp_path, 16, augment="flip")
    kinds = set()
    for epoch in range(8):
        x, want = flipped.train[epoch, 0][0], plain.train[0][0]
        kinds.add(torch.equal(x, want))
        assert torch.equal(x, want) or torch.equal(x, want.flip(-1))
    assert kinds == {True, False}


def test_kept_equals_read(tmp_path):
    found = open_data(folder(tmp_path), 16)
    want = [found.train[i] for i in range(8)]
    found.train.check(keep=True)
    assert all(torch.equal(a, c) and b == d for (a, b), (c, d) in zip(want, (found.train[0, i] for i in range(8))))


@pytest.mark.slow
def test_a_process_that_raises_ends_with_its_workers():
    """Its traceback keeps the loader alive, so that the workers are ended by SIGTERM."""
    code = (
        "import torch; from efft_kernels.finetune.data import keeping_readers, reading\n"
        "with keeping_readers():\n"
        "    loader = iter(torch.utils.data.DataLoader([1] * 9, **reading(1)))\n"
        "    next(loader); loader._workers[0].terminate(); next(loader); raise ValueError('stopped')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "ValueError: stopped" in done.stderr


def test_importing_it_loads_nothing_heavy():
    heavy = ("timm", "accelerate", "transformers", "sklearn")
    code = f"import sys, efft_kernels.finetune.data; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
