"""Where images come from: links, folders of other programs, file formats, CSV lists, datasets on disk."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import timm
from refusals import refuses

pytest.importorskip("PIL")
timm()
from PIL import Image, features
from test_finetune_data import folder, picture

from efft_kernels import preparation
from efft_kernels.finetune.data import open_data
from efft_kernels.finetune.folders import check_out
from efft_kernels.finetune.images import BadImages, DataError
from efft_kernels.finetune.prepared import open_images
from efft_kernels.finetune.settings import Settings


def names(part):
    return [part.images.where(i) for i in range(len(part))]


def test_links_are_followed_and_circles_are_not(tmp_path):
    root = folder(tmp_path / "photos")
    folder(tmp_path / "elsewhere", classes=("bird", "more"), n=3)
    (root / "bird").symlink_to(tmp_path / "elsewhere/bird")  # a class
    (root / "cat/more").symlink_to(tmp_path / "elsewhere/more")  # a folder in a class
    (root / "dog/circle").symlink_to(root / "dog")
    (root / "dog/out").symlink_to(root)
    (root / "dog/linked.png").symlink_to(tmp_path / "elsewhere/more/0.png")
    found = open_data(root, 16, test_fraction=0.0)
    assert found.classes == ("bird", "cat", "dog") and np.bincount(found.train.labels).tolist() == [3, 8, 6]
    found.train.check(keep=True)


def test_thumbnails_and_metadata_of_other_programs(tmp_path, caplog):
    root = folder(tmp_path)
    outside = "@eaDir:__MACOSX:$RECYCLE.BIN:.git:iPod Photo Cache"
    inside = "@eaDir/0.png:thumbs:.thumbnails:@tmp:a.lrdata"
    for place in (*outside.split(":"), *(f"cat/{name}" for name in inside.split(":"))):
        picture(root / place / "SYNOPHOTO_THUMB_M.jpg")
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._0.png", ".git/1.png"):
        (root / "cat" / name).parent.mkdir(exist_ok=True)
        (root / "cat" / name).write_bytes(b"x")
    found = open_data(root, 16, test_fraction=0.0)
    assert found.classes == ("cat", "dog") and len(found.train) == 10
    assert caplog.text.count("ignored") == 1 and "a folder of another program" in caplog.text
    picture(root / "thumbs" / "0.png")  # up or down: a class may have this name
    assert open_data(root, 16, test_fraction=0.0).classes == ("cat", "dog", "thumbs")


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda root: picture(root / "0.png"), "ignored, in no folder of a class: {}/0.png"),
        (lambda root: (folder(root / "train"), picture(root / "0.png")), "ignored, no folder of a part: {}/cat and 2 "),
        (
            lambda root: [(root / n).touch() for n in ("dog/a.txt", "cat/0.heic")],
            "not an image: {}/cat/0.heic and 1 more",
        ),
        (lambda root: (root / "cat/gone").symlink_to(root / "nowhere"), "ignored, not an image: {}/cat/gone"),
        (lambda root: (root / "wolf").symlink_to(root / "dog"), "wolf/0.png is of class wolf, but {}/dog/0.png has it"),
        (lambda root: (root / "cat/5.png").symlink_to(root / "cat/0.png"), "more than once, and count as often: {}"),
        (lambda root: folder(root, classes=("Caf\u00e9", "cafe\u0301 ")), "look alike: 'Caf\u00e9' and 1 more"),
    ],
)
def test_what_may_be_a_mistake_in_folders_is_said(change, says, tmp_path, caplog):
    open_data(folder(tmp_path), 16, test_fraction=0.0)
    assert not caplog.text
    change(tmp_path)
    open_data(tmp_path, 16, test_fraction=0.0)
    assert says.format(tmp_path) in caplog.text


@pytest.mark.parametrize("suffix", ["jfif", "JPE", "avif", "mpo"])
def test_other_names_of_formats(suffix, tmp_path):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    kind = {"avif": "AVIF", "mpo": "MPO"}.get(suffix, "JPEG")
    for i in range(2):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.new("RGB", (9, 9), (200, 30, 30)).save(tmp_path / "a" / f"{i}.{suffix}", format=kind)
    train = open_data(tmp_path, 8, test_fraction=0.0).train
    assert len(train) == 2 and abs(int(train[0][0][0, 4, 4]) - 200) < 10


def test_transparency_is_on_white_and_said_once(tmp_path, caplog):
    caplog.set_level("INFO")
    preparation._say_white.cache_clear()
    (tmp_path / "a").mkdir()
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    half.paste((255, 0, 0, 255), (0, 0, 4, 8))
    half.save(tmp_path / "a/0.png")
    half.quantize(4).save(tmp_path / "a/1.png")
    Image.new("LA", (8, 8), (10, 0)).save(tmp_path / "a/2.png")
    Image.new("RGBA", (8, 8), (10, 20, 30, 255)).save(tmp_path / "a/3.png")
    grey = Image.new("L", (8, 8), 7)
    grey.save(tmp_path / "a/4.png", transparency=7)
    train = open_data(tmp_path, 8, test_fraction=0.0).train
    pixel = lambda i, x: train.images.load(i).getpixel((x, 4))
    for i in (0, 1):
        assert pixel(i, 1) == (255, 0, 0) and pixel(i, 6) == (255, 255, 255)
    assert pixel(2, 1) == pixel(4, 1) == (255, 255, 255) and pixel(3, 1) == (10, 20, 30)
    assert caplog.text.count("white") == 1


def test_all_bad_images_are_named_at_once(tmp_path):
    root = folder(tmp_path)
    (root / "cat/1.png").write_bytes(b"no image")
    (root / "dog/3.png").write_bytes((root / "dog/3.png").read_bytes()[:60])
    (root / "dog/9.png").symlink_to(root / "nowhere.png")
    os.mkfifo(root / "dog/8.png")
    train = open_data(root, 16, test_fraction=0.0).train
    for keep in (True, False):
        with pytest.raises(BadImages) as error:
            train.check(keep)
        said = str(error.value)
        assert said.startswith("4 images cannot be used:\n") and len(error.value.sentences) == 4
        for words in (
            "cat/1.png cannot be read",
            "dog/3.png cannot be read",
            "dog/8.png cannot be read as an image: it is no regular file",
            "dog/9.png is a link to a file that does",
        ):
            assert words in said
        assert train.kept is None


def test_out_and_the_images(tmp_path):
    root = folder(tmp_path / "photos")
    (tmp_path / "far").mkdir()
    (root / "cat/far").symlink_to(tmp_path / "far")
    before = sorted(tmp_path.rglob("*"))
    for out in (root, root / "runs/1", root / "cat", tmp_path / "far/run", tmp_path / "runs/../photos/x"):
        refuses(DataError, "out must be outside of the images", check_out, str(root), out)
    for out in (tmp_path / "run", tmp_path, tmp_path / "photos2"):
        check_out(str(root), out)
    assert sorted(tmp_path.rglob("*")) == before


def csv_file(root, text):
    for i in range(6):
        picture(root / "images" / f"{i}.png", i)
    (root / "link.png").symlink_to(root / "images/0.png")
    (root / "list.csv").write_text(text)
    return root / "list.csv"


def test_csv_with_a_class_per_image(tmp_path):
    words = "dog,\u2028wet", "cat\n"
    lines = "".join(f'images/{i}.png,x,"{words[i % 2]}",y\n' for i in range(6))
    found = open_data(csv_file(tmp_path, "image,file_name,label,tags\n" + lines), 16)
    assert found.classes == ("cat", "dog,\u2028wet") and not found.multilabel
    assert (len(found.train), len(found.test)) == (4, 2)
    assert "list.csv, line 2)" in names(open_data(tmp_path / "list.csv", 16, test_fraction=0.0).train)[0]


def test_csv_with_splits_and_semicolons(tmp_path):
    splits = "train train train val test test".split()
    lines = "".join(f"{tmp_path}/images/{i}.png;{i % 2};{split}\n" for i, split in enumerate(splits))
    found = open_data(path := csv_file(tmp_path, "\ufeffFile;Class;Split\n" + lines), 16)
    assert [len(part) for part in found.parts().values()] == [3, 1, 2] and found.classes == ("0", "1")
    text = path.read_text()
    for old, new in ("0;test", "0;val"), ("2.png;0", "2.png;1"), (";1;", ";9;"):  # the same images in the same order
        path.write_text(text.replace(old, new))
        assert open_data(path, 16).fingerprint() != found.fingerprint()


def test_csv_with_several_labels(tmp_path, caplog):
    caplog.set_level("INFO")
    words = ["sea", "sea|sky", "", "sky | sea", "tree", "tree;sky"]
    flags = ["1,0,0", "1,1,0", "0,0,0", "1,1,0", "0,0,1", "0,1,1"]
    named = csv_file(tmp_path, "image,labels\n" + "".join(f"images/{i}.png,{w}\n" for i, w in enumerate(words)))
    marked = named.with_name("flags.csv")
    marked.write_text("id,image,sea,sky,tree\n" + "".join(f"1,images/{i}.png,{w}\n" for i, w in enumerate(flags)))
    a, b = (open_data(path, 16, test_fraction=0.0) for path in (named, marked))
    assert "flags.csv: the classes are the columns of 0 and 1: sea, sky, tree" in caplog.messages[0]
    assert a.classes == b.classes == ("sea", "sky", "tree") and a.multilabel and b.multilabel
    assert a.train.labels == b.train.labels == [(0,), (0, 1), (), (0, 1), (2,), (1, 2)]
    pixels, target = a.train[5]
    assert pixels.dtype == torch.uint8 and target.tolist() == [0, 1, 1]
    c = open_data(named, 16, test_fraction=0.0, augment="flip", seed=0)
    assert c.train.unchanged("bicubic")[5][1].tolist() == [0, 1, 1]
    held = open_data(named, 16, test_fraction=0.3)
    assert len(held.train) + len(held.test) == 6 and len(held.test) >= 2


@pytest.mark.parametrize(
    "text, words",
    [
        ("image,label\n", ["header and a line"]),
        ("image,a,b\nimages/0.png,1,0\nimages/1.png,0,\n", ["a column of 0 and 1 for each class"]),
        ("image,a,b\nimages/0.png,1,0\nimages/1.png,0,01\n", ["a column of 0 and 1 for each class"]),
        ("a,b\n0.png,cat\n", ["must have a header with one of image", "got a, b"]),
        ("image,label\nimages/0.png\n", ["line 2", "2 columns", "got 1"]),
        ("image,label\nimages/0.png,\n", ["line 2", "must have a label"]),
        ("image,label,split\nimages/0.png,a,train\nimages/1.png,a,later\n", ["line 3", "'later'"]),
        ("image,label,split\nimages/0.png,a,train\nimages/1.png,b,test\n", ["line 3", "'b'", "no class"]),
        ("image,label\nnone.png,a\nimages/0.png,a\nimages/no.png,b\n", ["2 images", "line 2) does", "line 4) does"]),
        ("image,label\nimages/0.png,a\nimages/0.png,b\n",
         ["line 3) cannot be of class b", "as a train image of class a"]),
        ('image,label\nimages/0.png,"a\n', ["is not CSV"]),
        ("image,label,label\nimages/0.png,a,b\n", ["one column of each name, got 'label' more than once"]),
        ("image,label\nlink.png,a\nimages/../images/0.png,b\n", ["line 3) cannot be of class b"]),
        ("file,path,label\nimages/0.png,x,a\n", ["at most one column called image, path", "got file and path"]),
        ("image,label,labels\nimages/0.png,a,a|b\n", ["at most one column called label", "got label and labels"]),
        ("image,label,Label\nimages/0.png,a,b\n", ["got label and Label"]),
        ("image,label\nimages,a\n", ["images (", "line 2) is a folder"]),
        ("image,a|b,c\nimages/0.png,1,0\nimages/1.png,1,0\n", ["without '|'", "got 'a|b'"]),
        ("image,label,split\nimages/0.png,a,train\nimages/0.png,a,test\n",
         ["line 3) cannot be a test image", "line 2, has it as a train image"]),
    ],
)  # fmt: skip
def test_wrong_csv(text, words, tmp_path):
    with pytest.raises(DataError) as error:
        open_data(csv_file(tmp_path, text), 16)
    assert all(word in str(error.value) for word in words), error.value


def test_all_entries_of_a_file_are_held_out_together(tmp_path):
    root = folder(tmp_path / "photos", n=10)
    for i in range(10):
        (root / f"cat/z{i}.png").symlink_to(root / f"cat/{i}.png")
    lines = [f"images/{i}.png,{i % 2}\n" for i in range(6)]
    for spec in (root, csv_file(tmp_path, "image,label\n" + "".join(2 * lines))):
        parts = open_data(spec, 16, hold_out=True).parts().values()
        files = [{os.path.realpath(part.images.file_name(i)) for i in range(len(part))} for part in parts]
        assert len(set.union(*files)) == sum(map(len, files)) and all(files)
        assert [np.bincount(part.labels).tolist() for part in parts][1:] == [[4, 2] if spec == root else [2, 2]] * 2


@pytest.fixture
def library():
    return pytest.importorskip("datasets")


def rows(library, n, **columns):
    images = [Image.new("RGB", (9, 9), (10 * i, 0, 0)) for i in range(n)]
    kinds = {"photo": library.Image(), **{name: kind for name, (kind, _) in columns.items()}}
    values = {name: found for name, (_, found) in columns.items()}
    return library.Dataset.from_dict({"photo": images, **values}, features=library.Features(kinds))


def test_datasets_on_disk(library, tmp_path):
    label = library.ClassLabel(names=["cat", "dog"])
    parts = {
        "train": rows(library, 6, label=(label, [0, 1] * 3)),
        "validation": rows(library, 2, label=(label, [1, 0])),
    }
    library.DatasetDict(parts).save_to_disk(tmp_path / "both")
    found = open_data(tmp_path / "both", 16, test_fraction=0.0)
    assert found.classes == ("cat", "dog") and found.train.labels == [0, 1] * 3 and found.val.labels == [1, 0]
    assert found.train[3][0][0, 8, 8] == 30 and "row 3 of train" in names(found.train)[3]
    assert found.fingerprint() == open_data(tmp_path / "both", 16, test_fraction=0.0).fingerprint()
    parts["train"].save_to_disk(tmp_path / "one")
    assert len(open_data(tmp_path / "one", 16).test) == 2
    loader = torch.utils.data.DataLoader(found.train, num_workers=1)
    assert len(list(loader)) == 6


def test_datasets_with_texts_and_several_labels(library, tmp_path):
    text = library.Value("string")
    rows(library, 4, label=(text, ["b", "a", "b", "a"])).save_to_disk(tmp_path / "text")
    found = open_data(tmp_path / "text", 16, test_fraction=0.0)
    assert found.classes == ("a", "b") and found.train.labels == [1, 0, 1, 0]
    several = library.List(library.ClassLabel(names=["sea", "sky"]))
    rows(library, 4, labels=(several, [[0], [0, 1], [], [1]])).save_to_disk(tmp_path / "several")
    found = open_data(tmp_path / "several", 16, test_fraction=0.0)
    assert found.multilabel and found.train.labels == [(0,), (0, 1), (), (1,)]
    for kind, classes in (
        (library.Value("float32"), ("0", "1", "2")),
        (library.ClassLabel(names=["a", "b", "c"]), "abc"),
    ):
        column = (library.List(kind), [[0, 1, 0], [1, 0, 1], [0, 0, 0]])
        rows(library, 3, labels=column).save_to_disk(tmp_path / classes[0])
        found = open_data(tmp_path / classes[0], 16, test_fraction=0.0)
        assert found.classes == tuple(classes) and found.train.labels == [(1,), (0, 2), ()]
    numbers = library.List(library.Value("int64"))
    for name, cells, labels in (
        ("twice", [[2, 2], [3], [2, 3]], [(0,), (1,), (0, 1)]),
        ("one hot", [[0, 1], [1, 0]], [(1,), (0,)]),
        ("single", [[0], [1]], [(0,), (1,)]),
    ):
        rows(library, len(cells), labels=(numbers, cells)).save_to_disk(tmp_path / name)
        assert open_data(tmp_path / name, 16, test_fraction=0.0).train.labels == labels
    texts = library.List(text)
    for name, column in {"label": (text, ["a", None]), "labels": (texts, [["a"], None])}.items():
        rows(library, 2, **{name: column}).save_to_disk(tmp_path / name)
        refuses(DataError, f"a class in each row of '{name}', got None", open_data, tmp_path / name, 16)
    rows(library, 2, label=(text, ["a", "b"])).save_to_disk(tmp_path / "empty")  # too few for a fifth of each class
    with pytest.raises(DataError, match="must have images in each part, but has none for test"):
        open_images(Settings(str(tmp_path / "empty"), "out", checkpoint="random", batch_size=2), 1)
    library.Dataset.from_dict({"x": [1, 2]}).save_to_disk(tmp_path / "other")
    refuses(DataError, "column of images and a column label or labels, but has x", open_data, tmp_path / "other", 16)


def test_a_run_is_refused_before_anything_is_written(tmp_path):
    pytest.importorskip("accelerate")
    from test_finetune_run import tiny

    from efft_kernels.finetune.loop import train

    root = folder(tmp_path / "photos", n=8)
    settings, before = tiny(root, root / "runs/1"), sorted(tmp_path.rglob("*"))
    refuses(DataError, "out must be outside of the images", train, settings, progress=False)
    assert sorted(tmp_path.rglob("*")) == before
    for name in ("cat/1.png", "dog/2.png"):
        os.truncate(root / name, 50)
    with pytest.raises(BadImages, match=r"^2 images cannot be used:\n  .*cat/1.png .*\n  .*dog/2.png "):
        train(replace(settings, out=str(tmp_path / "run")), progress=False)
