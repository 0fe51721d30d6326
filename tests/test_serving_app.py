"""The service: uploads, the adapter folder, settings, the command, the classifier, and a deployment on loopback."""

import asyncio
import contextlib
import ctypes
import io
import os
import platform
import re
import shutil
import signal
import socket
import struct
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock
from urllib.parse import urlencode

import numpy
import pytest
import torch
from models import shake, timm
from refusals import refuses

import efft_kernels as ek
from efft_kernels.serving.folder import AdapterFolder, DoesNotFit
from efft_kernels.serving.uploads import Refused, Upload, check_adapter_name, decode, read_upload

starlette = pytest.importorskip("starlette.requests", reason="starlette, of the extra serve, is not installed")
pytest.importorskip("pydantic", reason="pydantic, of the extra serve, is not installed")
pytest.importorskip("python_multipart", reason="python-multipart, of the extra serve, is not installed")
Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
ImageFile = pytest.importorskip("PIL.ImageFile")
psutil = pytest.importorskip("psutil")

from efft_kernels.serving import classifier as classifier_module
from efft_kernels.serving import cli, cluster, keys, places, server, start
from efft_kernels.serving.classifier import Classifier, base_model
from efft_kernels.serving.settings import ServerSettings, Settings

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import load_test

PIXELS = 1_000_000


def saved(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def refused(status, call, *args, says="", **options):
    """The message with which a call is refused."""
    with pytest.raises(Refused, match=says) as found:
        call(*args, **options)
    assert found.value.status == status
    return str(found.value)


@pytest.fixture
def picture():
    return Image.fromarray(numpy.arange(40 * 30 * 3, dtype="uint8").reshape(30, 40, 3))


def test_every_mode_16_bits_of_colour_and_mpo_become_rgb_on_white(picture):
    for mode in ("RGB", "RGBA", "L", "1", "P", "LA", "CMYK"):
        got = decode(saved(picture.convert(mode), "JPEG" if mode == "CMYK" else "PNG"), max_pixels=PIXELS)
        assert got.mode == "RGB" and got.size == (40, 30)
        assert "RGB" not in mode or got.tobytes() == picture.tobytes()
    deep = numpy.asarray(picture).astype(">u2") * 257
    file = load_test.png(40, 30, zlib.compress(b"".join(b"\0" + row.tobytes() for row in deep)), bits=16)
    assert decode(file, max_pixels=PIXELS).tobytes() == picture.tobytes()
    first = decode(saved(picture, "MPO", save_all=True, append_images=[picture.rotate(90)]), max_pixels=PIXELS)
    assert first.size == (40, 30) and first.mode == "RGB"
    picture.putalpha(0)  # transparent parts are white
    assert decode(saved(picture), max_pixels=PIXELS).getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(picture, kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    plain, got = (decode(saved(picture, kind, **more), max_pixels=PIXELS) for more in ({}, {"exif": exif}))
    assert got.size == (30, 40) and got.tobytes() == plain.transpose(Image.Transpose.ROTATE_270).tobytes()
    for exif in (b"Exif\0\0MM\0*\0\0\0\x08" + b"\xff" * 200, b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0"):
        assert decode(saved(picture, kind, exif=exif), max_pixels=PIXELS).size == (40, 30), "a corrupt one is ignored"


def test_pixels_are_checked_before_decoding(picture, monkeypatch):
    loads, load = [], ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: loads.append(1) or load(self))
    refused(413, decode, saved(picture), max_pixels=1199, says="at most 1199 pixels, got 40 x 30")
    assert not loads
    decode(saved(picture), max_pixels=1200)
    assert loads


@pytest.mark.parametrize("blocks", ["", "xmp", "mpf", "xmp mpf"])
def test_of_a_motion_photo_the_picture_is_read(picture, blocks):
    """A JPEG followed by a video, in which markers occur by chance, with the blocks that may tell of the video."""
    plain, video = saved(picture, "JPEG"), b"\0\0\0\x10ftypmp42\0\0\0\0\0\0\4\4mdat" + b"\xff\xd8\xff\xda\xff\xd9" * 170
    block = lambda marker, body: b"\xff" + marker + (len(body) + 2).to_bytes(2, "big") + body
    about = f"<x:xmpmeta><Description GCamera:MotionPhoto='1' GCamera:MicroVideoOffset='{len(video)}'/></x:xmpmeta>"
    xmp = block(b"\xe1", b"http://ns.adobe.com/xap/1.0/\0" + about.encode()) if "xmp" in blocks else b""
    size = len(plain) + len(xmp) + 90 * ("mpf" in blocks)
    tags = (3, 0xB000, 7, 4, b"0100", 0xB001, 4, 1, 2, 0xB002, 7, 32, 50, 0)
    pictures = (0x20030000, size, 0, 0, 0, 0, len(video), size - len(xmp) - 10, 0, 0)
    mpf = block(b"\xe2", b"MPF\0II*\0\x08\0\0\0" + struct.pack("<HHHL4sHHLLHHLLLLLLHHLLLHH", *tags, *pictures))
    data = plain[:2] + xmp + mpf * ("mpf" in blocks) + plain[2:] + video
    assert len(data) == size + len(video)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.format == ("MPO" if "mpf" in blocks else "JPEG")
    assert decode(data, max_pixels=PIXELS).tobytes() == decode(plain, max_pixels=PIXELS).tobytes()


def test_what_follows_the_picture_is_not_counted_as_scans(picture):
    """Phones append a video to a photo, in which the bytes of a scan's marker occur by chance."""
    data = saved(picture, "JPEG", progressive=True)
    assert decode(data + b"\0\2" + b"\xff\xda\0\2" * 100, max_pixels=PIXELS).size == picture.size
    exif = data[:2] + b"\xff\xe1\x00\xca" + b"\xff\xda" * 100 + data[2:]
    assert decode(exif, max_pixels=PIXELS).size == picture.size
    start = data.index(b"\xff\xda")
    many = data[:start] + data[start:-2] * 20 + data[-2:]
    refuses(Refused, "must have at most 64 scans", decode, many, max_pixels=PIXELS)


def test_extreme_aspect_ratios_and_truncated_files_are_refused(picture):
    for size in ((1, 60_000), (60_000, 1), (3, 301)):
        says = f"at most 100 times as long as it is wide, got {size[0]} x"
        refused(422, decode, saved(Image.new("L", size)), max_pixels=25_000_000, says=says)
    assert decode(saved(Image.new("L", (3, 300))), max_pixels=PIXELS).size == (3, 300)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    for data in (saved(picture, kind) for kind in ("JPEG", "PNG", "WEBP")):
        for end in range(0, len(data) - 20, 97):
            refuses(Refused, "image", decode, data[:end], max_pixels=PIXELS)


def test_malformed_requests_are_refused_with_4xx(tmp_path):
    """Every malformed request of the load test, through parsing, the folder and decoding."""
    folder = AdapterFolder(FakeBank(), tmp_path, 1000)
    for what, request in load_test.malformed().items():
        if "method" in request:
            continue
        headers = {"content-type": "application/octet-stream"} | request.get("headers", {})
        with pytest.raises((Refused, FileNotFoundError)) as error:
            upload = read(request["body"], headers, request.get("query"), max_bytes=20 * 2**20)
            if upload.adapter:
                touch(folder, upload.adapter)
            decode(upload.image, max_pixels=25_000_000)
        assert getattr(error.value, "status", 404) in (400, 404, 413, 415, 422), what


def request(body, headers=None, query=None, chunk=1_000_000, left=None):
    """A request that arrives in chunks; ``left`` becomes those that were not asked for."""
    headers, left = {"content-length": str(len(body))} | (headers or {}), [] if left is None else left
    left[:] = [body[i : i + chunk] for i in range(0, len(body), chunk)] or [b""]

    async def receive():
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    scope = {
        "type": "http", "method": "POST", "path": "/", "query_string": urlencode(query or {}).encode(),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items() if value is not None],
    }  # fmt: skip
    return starlette.Request(scope, receive)


def read(*args, max_bytes=1000, **options):
    """The upload of such a request."""
    return asyncio.run(read_upload(request(*args, **options), max_bytes=max_bytes))


def form(**fields):
    parts = []
    for name, value in fields.items():
        file = '; filename="a"' if isinstance(value, bytes) else ""
        data = value if isinstance(value, bytes) else value.encode()
        parts.append(f'--x\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + data + b"\r\n")
    return b"".join(parts) + b"--x--\r\n", {"content-type": "multipart/form-data; boundary=x"}


def test_raw_bodies_and_forms_give_the_same_upload():
    raw = read(b"abc", {"content-type": "image/png"}, {"adapter": "cats", "top": "3"})
    assert (raw.image, raw.adapter, raw.top) == (b"abc", "cats", 3)
    assert read(*form(image=b"abc", adapter="cats", top="3")) == raw
    assert read(b"abc").adapter is None and read(b"abc").top == 5
    for top in ("0", "100001", "000000001", "9" * 5000, "-1"):
        refused(400, read, b"a", query={"top": top})
    for given in ((b"a", {}, {"adaptor": "cats"}), form(image=b"a", adaptor="cats")):
        refused(400, read, *given, says="parameters must be adapter or top, got 'adaptor'")
    body, kind = form(image=b"a", adapter="cats")
    twice = body.replace(b"--x\r\n", b'--x\r\nContent-Disposition: form-data; name="adapter"\r\n\r\ndogs\r\n--x\r\n', 1)
    for given in ((b"a", {}, [("adapter", "cats")] * 2), (body, kind, {"adapter": "dogs"}), (twice, kind)):
        refused(400, read, *given, says="parameters must be given once, got 'adapter' more than once")


def test_bodies_that_are_too_large():
    refused(413, read, b"a" * 1001)
    left = []
    refused(413, read, b"a" * 5000, {"content-length": None}, chunk=100, left=left, says="at most 1000 bytes")
    assert len(left) == 39, "reading stops at the limit"
    refused(413, read, b"a" * 5000, {"content-length": "10"})  # a wrong length
    refused(413, read, b"a", {"content-length": "9" * 5000})
    refused(400, read, b"a", {"content-length": "-1"})
    assert len(read(b"a" * 1000).image) == 1000 and len(read(*form(image=b"a" * 1000)).image) == 1000
    refused(413, read, *form(image=b"a" * 1001))


@pytest.mark.parametrize(
    "name", ["../a", "a/b", "/etc/passwd", "..", ".hidden", "a\\b", "a\0", "a" * 101, "ä", "a b", "%2e%2e", "-a", "a\n"]
)
def test_names_that_could_be_paths_are_refused(name):
    refused(400, check_adapter_name, name)
    assert check_adapter_name("a.b-C_1") == "a.b-C_1" and check_adapter_name("") is None


class FakeBank:
    def __init__(self):
        self.held, self.factor, self.most = {}, 1, 0

    def read(self, path, strict):
        assert strict
        data = Path(path).read_bytes()
        if data.startswith(b"bad"):
            raise ValueError("no adapter")
        return SimpleNamespace(bytes=lambda: len(data) * self.factor)

    def add(self, name, adapter):
        assert name not in self.held
        self.held[name] = adapter.bytes()
        self.most = max(self.most, sum(self.held.values()))

    def remove(self, name):
        del self.held[name]

    @property
    def names(self):
        return [name.partition("@")[0] for name in self.held]


@pytest.fixture
def folder(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode() * 100)
    return AdapterFolder(FakeBank(), tmp_path, 250)


def touch(folder, *names):
    for name in names:
        with folder.hold(name):
            pass


def test_the_least_recently_used_is_evicted(folder):
    folder.budget = 200  # two exactly
    touch(folder, *"abab")
    assert folder.bank.names == ["a", "b"] and folder.loads == 2
    touch(folder, "a", "c")
    assert folder.bank.names == ["a", "c"] and folder.evictions == 1 and folder.bytes == folder.bank.most == 200
    folder.budget = 100  # one exactly
    touch(folder, "b")
    assert folder.bank.names == ["b"]


def test_held_adapters_are_not_evicted(folder):
    with folder.hold("a"), folder.hold("b"):
        refuses(DoesNotFit, "'c' does not fit the 250 bytes next to 2 in use", touch, folder, "c")
        assert folder.bank.names == ["a", "b"]
        touch(folder, "a")
    touch(folder, "c")
    assert folder.bank.names == ["a", "c"]  # a was used last
    with folder.hold("c"), pytest.raises(DoesNotFit):
        folder._make_room("d", 200)
    assert folder.bank.names == ["a", "c"]  # nothing is evicted for an adapter that would not fit even then
    with folder.hold("a") as oldest:
        touch(folder, "c", "d")
        assert folder.bank.names == ["a", "d"] and oldest in folder.bank.held


def test_replaced_deleted_and_invalid_files(folder):
    touch(folder, "a")
    (folder.path / "new").write_bytes(b"A" * 120)
    with folder.hold("a") as old:
        os.replace(folder.path / "new", folder.path / "a.safetensors")
        with folder.hold("a") as new:
            assert new != old and folder.bank.held[new] == 120 and old in folder.bank.held
    touch(folder, "b")
    assert sorted(folder.bank.held.values()) == [100, 120]
    changed, loads = os.stat(folder.file("b")).st_mtime_ns, folder.loads
    folder.file("b").write_bytes(b"B" * 100)
    os.utime(folder.file("b"), ns=(changed, changed))
    touch(folder, "b")
    assert folder.loads == loads + 1
    (folder.path / "a.safetensors").unlink()
    refuses(FileNotFoundError, "no adapter 'a'", touch, folder, "a")
    (folder.path / "c.safetensors").write_bytes(b"bad")
    refuses(ValueError, "no adapter", touch, folder, "c")
    (folder.path / "d.safetensors").write_bytes(b"d" * 251)
    refuses(ValueError, "larger than the budget of 250", touch, folder, "d")
    (folder.path / "d.safetensors").write_bytes(b"d" * 50)
    touch(folder, "d")
    folder.file("folder").mkdir()
    folder.file("link").symlink_to("nowhere")
    assert folder.names() == ["b", "c", "d"]
    touch(folder, "b")
    refuses(FileNotFoundError, "no folder", AdapterFolder, FakeBank(), folder.path / "none", 1)


def test_adapters_larger_in_memory_than_on_disk(folder):
    folder.bank.factor = 2
    touch(folder, "a", "b")
    assert folder.bank.names == ["b"]
    folder.bank.factor = 3
    for _ in range(2):
        refuses(ValueError, "'c' of 300 bytes is larger than the budget of 250", touch, folder, "c")
        folder.bank.read = None  # it is not read again
    assert folder.bank.names == ["b"] and folder.evictions == 1, "nothing is evicted for it"


def test_folder_in_many_threads(folder):
    def work(names):
        for name in names:
            with contextlib.suppress(DoesNotFit), folder.hold(name) as key:
                assert key in folder.bank.held

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, [names * 50 for names in ("abcd", "dcba", "acbd", "bbca")]))
    assert not folder.in_use and folder.bank.most <= 250


def test_images_are_prepared_as_the_file_of_an_adapter_says(served, own, monkeypatch):
    files, classifier = served[1], Classifier(own)
    size, state = classifier.preparation.size, ek.read_adapter(classifier.folder.file("adapter-0"))
    model = ek.load_adapter(base_model(own), state.path, strict=True)
    mine = ek.Preparation(size, (0.1, 0.2, 0.3), (0.9, 0.8, 0.7), "nearest", 1.0, "squash")
    made = {"stated": mine, "wide": replace(mine, size=(size[0] + 32, size[1] + 32))}
    labels = ["x", "y", "z"]
    for name, preparation in {**made, "several": mine}.items():
        multilabel = name == "several" or None
        file = classifier.folder.file(name)
        ek.save_adapter(model, file, preparation=preparation, classes=labels, multilabel=multilabel)
    image = classifier.prepare(Upload(files[0], "stated", 5))
    picture = decode(files[0], max_pixels=10**8)
    assert torch.equal(image.image, mine.transform()(picture))
    plain = classifier.prepare(Upload(files[0], None, 5))
    assert torch.equal(plain.image, classifier.preparation.transform()(picture))
    assert classifier.answer(image, classifier.classify([image])[0])["label"] in labels
    wide = classifier.prepare(Upload(files[0], "wide", 5))  # this model takes images of several sizes
    assert wide.image.shape[1] == size[0] + 32
    both = classifier.classify([image, wide, plain])
    for alone, found in zip((image, wide, plain), both):
        torch.testing.assert_close(classifier.classify([alone])[0], found)
    several = classifier.classify([classifier.prepare(Upload(files[0], "several", 5))])[0]
    torch.testing.assert_close(several.logit().softmax(0), both[0])
    fixed = lambda _, args: None if args[0].shape[2:] == size else 1 / 0  # a model that does not say so
    classifier.model.patch_embed.register_forward_pre_hook(fixed)
    good, bad = classifier.classify([image, wide])
    assert bad.status == 422 and torch.equal(good, classifier.classify([image])[0])
    monkeypatch.setattr(classifier_module, "input_size", lambda model: size)
    refused(422, classifier.prepare, Upload(files[0], "wide", 5), says="'wide' needs images of another size")
    monkeypatch.setattr(classifier, "model", Mock(side_effect=torch.OutOfMemoryError))
    assert classifier.classify([wide])[0].status == 500, "not for its size"


def test_labels_files(served, own):
    classifier = Classifier(own)
    path, upload = Path(own.adapters, "adapter-0.labels.txt"), Upload(served[1][0], "adapter-0", 5)
    path.write_bytes("ant\nbee\ncat\n".encode("utf-8-sig"))
    prepared = classifier.prepare(upload)
    path.write_text("dog\neel\nfox\n")  # for the requests after this one
    scores = classifier.answer(prepared, torch.tensor([0.2, 0.5, 0.3]))["scores"]
    assert [s["label"] for s in scores] == ["bee", "cat", "ant"]
    shutil.copy(classifier.folder.file("adapter-1"), classifier.folder.file("adapter-0"))
    assert [found.status for found in classifier.classify([prepared])] == [503]
    shutil.copy(Path(served[0].adapters, "adapter-0.safetensors"), own.adapters)
    for data in ("chat\nchien\n\u00e9meu\n".encode("latin-1"), b"ant\nbee\n"):
        path.write_bytes(data)
        refused(422, classifier.prepare, upload, says="its labels")
    path.unlink()
    path.symlink_to(path)
    refuses(Refused, "its labels cannot be read", classifier.prepare, upload)


def test_settings_and_options():
    made = Settings(model="m", adapters="x", replicas="3", batch_wait_ms="2.5")
    assert (made.replicas, made.batch_wait_ms, made.adapters) == (3, 2.5, os.path.abspath("x"))
    assert (made.weights, made.labels, Settings(model="m", adapters=2024).adapters) == ("", "", os.path.abspath("2024"))
    for args, says in [
        ({"model": "m"}, "adapters\n  Field required"),
        ({"model": "m", "adapters": "x", "repliccas": 2}, "repliccas\n  Extra inputs are not permitted"),
        ({"model": "m", "adapters": "x", "stop_s": -1}, "stop_s\n.* greater than or equal to 0 .*input_value=-1"),
    ]:
        refuses(ValueError, says, Settings, **args)
    args = ["--model", "m", "--adapters=x", "--max_batch=4", "--max-queued", "1", "--dtype=float16", "--port", "80"]
    application, server = cli.settings(args)
    assert application == Settings(model="m", adapters="x", max_batch=4, max_queued=1, dtype="float16")
    assert server == ServerSettings(port=80)


def test_options_that_cannot_be_used(capsys):
    for option, says in [
        (None, "the following arguments are required: --model, --adapters"),
        ("--repliccas=2", "unrecognized arguments: --repliccas=2"),
        ("--replicas=0", "--replicas must be greater than or equal to 1, got '0'"),
        ("--replicas=two", "--replicas must be a valid integer, .* got 'two'"),
        ("--port=99999", "--port must be less than or equal to 65535, got '99999'"),
        ("--max-pixels=178956971", "--max-pixels must be less than or equal to 178956"),
        ("--dtype=int8", "argument --dtype: invalid choice: 'int8'"),
        ("--max-queued=0", "--max-queued must be greater than or equal to 1, got '0'"),
        ("--device=cuda:1", "argument --device: invalid choice: 'cuda:1'"),
    ]:
        refuses(SystemExit, "2", cli.main, ["--model=m", "--adapters=x", option] if option else [])
        assert re.search(says, capsys.readouterr().err), option


def test_help_names_every_setting(capsys):
    pytest.importorskip("ray.serve", reason="Ray Serve, of the extra serve, is not installed")
    refuses(SystemExit, "0", cli.main, ["--help"])
    shown = capsys.readouterr().out
    assert "python -m efft_kernels.serving --model" in shown
    for model in (Settings, ServerSettings):
        assert all(field.description for field in model.model_fields.values())
        assert all(f"--{name.replace('_', '-')} " in shown for name in model.model_fields)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(settings, pictures, expected answers) of a tiny model with three adapters."""
    timm()
    settings = load_test.make_adapters(tmp_path_factory.mktemp("served"), [3, 4, 5])
    Path(settings.adapters, "adapter-0.labels.txt").write_text("ant\nbee\ncat\n")
    files = load_test.pictures(4)
    return settings, files, load_test.expected(settings, files)


@pytest.fixture
def own(served, tmp_path):
    """The settings of ``served`` with a copy of its adapters, which the test may change."""
    adapters = shutil.copytree(served[0].adapters, tmp_path / "adapters")
    return served[0].model_copy(update={"adapters": str(adapters)})


def test_a_mixed_batch_equals_each_adapter_alone(served, own):
    files, names = served[1], [None, "adapter-0", "adapter-2", "lora", "adapter-1", None, "adapter-0"]
    other = shake(ek.inject(base_model(own), ek.LoRAConfig(rank=4), head=3))
    ek.save_adapter(other, Path(own.adapters, "lora.safetensors"))
    want = load_test.expected(own, files)
    classifier = Classifier(own.model_copy(update={"adapter_bytes": 100_000}))
    images = [classifier.prepare(Upload(files[i % len(files)], name, 100)) for i, name in enumerate(names)]
    for i, (name, image, found) in enumerate(zip(names, images, classifier.classify(images))):
        answer = classifier.answer(image, found)
        assert load_test.is_right(answer, name, want[i % len(files), name])
        labels = ["ant", "bee", "cat"] if name == "adapter-0" else "0123456789"
        assert answer["label"] == labels[answer["index"]]
    assert not classifier.folder.in_use and classifier.folder.loads == 4
    low = Classifier(own.model_copy(update={"dtype": "bfloat16"}))
    (scores,) = low.classify([low.prepare(Upload(files[0], None, 5))])
    assert scores.dtype == torch.float32 and scores.sum().item() == pytest.approx(1, abs=1e-6)


def test_adapters_are_held_while_the_model_runs(served, monkeypatch):
    settings, files, _ = served
    classifier, held = Classifier(settings), []
    classifier.model.register_forward_hook(lambda *_: held.append(classifier.folder.in_use))
    images = [classifier.prepare(Upload(files[0], name, 5)) for name in ("adapter-0", None, "adapter-1")]
    classifier.classify(images)
    assert held == [2] and not classifier.folder.in_use
    monkeypatch.setattr(classifier, "model", lambda x: 1 / 0)
    assert classifier.classify(images[:1])[0].status == 500 and not classifier.folder.in_use
    monkeypatch.setattr(classifier_module, "decode", lambda *_, **__: held.append(classifier.folder.in_use) or decoded)
    decoded = decode(files[0], max_pixels=10**8)
    classifier.prepare(Upload(files[0], "adapter-0", 5))
    assert held == [2, 1] and not classifier.folder.in_use


def test_adapters_that_cannot_be_served_are_refused(served, own, caplog):
    _, files, want = served
    classifier = Classifier(own)
    image = classifier.prepare(Upload(files[0], None, 5))
    late = classifier.prepare(Upload(files[0], "adapter-0", 5))
    os.utime(classifier.folder.file("adapter-0"), (1, 1))
    assert classifier.classify([late])[0].status == 503  # its file was replaced meanwhile
    Path(own.adapters, "broken.safetensors").write_bytes(b"not an adapter")
    torch.manual_seed(7)
    foreign = ek.inject(timm().create_model(own.model), ek.EFFTConfig(rank=4))  # of other weights
    ek.save_adapter(foreign, classifier.folder.file("foreign"))
    classifier.folder.file("folder").mkdir()
    os.mkfifo(classifier.folder.file("fifo"))
    unread, says = "broken folder fifo".split(), {"foreign": "its file does not fit the model"}
    for name, status in (*((name, 422) for name in unread), ("foreign", 422), ("nobody", 404)):
        said = refused(status, classifier.prepare, Upload(files[0], name, 5), says=f"adapter '{name}'")
        assert own.adapters not in said  # clients must not see paths
        assert status == 404 or said.endswith(says.get(name, "its file cannot be read"))
    classifier.folder.budget = 1
    refused(422, classifier.check, "adapter-1", says="its file takes more memory than adapters may")
    classifier.folder.budget = own.adapter_bytes
    assert "sampled tensors differ" in caplog.text and "strict" not in caplog.text
    refused(422, classifier.prepare, Upload(files[0][:50], "adapter-0", 5), says="truncated")
    assert not classifier.folder.in_use
    # in a batch they do not affect the others
    lost = [replace(image, upload=Upload(files[0], name, 5), key=f"{name}@1") for name in ("nobody", "broken")]
    good = [classifier.prepare(Upload(files[0], name, 100)) for name in ("adapter-0", None, "adapter-2")]
    found = classifier.classify(lost + good)
    assert [error.status for error in found[:2]] == [404, 422]
    for one, scores in zip(good, found[2:]):
        name = one.upload.adapter
        assert load_test.is_right(classifier.answer(one, scores), name, want[0, name])
    assert [type(result) for result in classifier.classify(lost)] == [Refused] * 2
    with classifier.folder.hold("adapter-0") as key, torch.no_grad():
        classifier.bank.parameters(key)[0].fill_(float("nan"))
    bad, *others = classifier.classify(good)
    refused(422, classifier.answer, good[0], bad, says="'adapter-0' gives scores for this image that are not finite")
    assert [classifier.answer(*each)["adapter"] for each in zip(good[1:], others)] == [None, "adapter-2"]


def test_adapters_of_a_batch_that_exceed_the_budget_are_refused(served):
    settings, files, want = served
    largest = max(path.stat().st_size for path in Path(settings.adapters).glob("*.safetensors"))
    classifier = Classifier(settings.model_copy(update={"adapter_bytes": largest}))
    images = [classifier.prepare(Upload(files[0], f"adapter-{i}", 100)) for i in (0, 1, 0)]
    first, refused, last = classifier.classify(images)
    assert refused.status == 503 and "does not fit" in str(refused)
    for scores in (first, last):
        assert load_test.is_right(classifier.answer(images[0], scores), "adapter-0", want[0, "adapter-0"])


@pytest.mark.parametrize("busy, ends", [([], 0.7), ([(0.25, 0.45)], 0.9), ([(0, 99)], 2.0)], ids=str)
def test_a_stop_waits_until_no_request_is_under_way(busy, ends, monkeypatch):
    """Also for a request that arrives after an idle poll, no longer than the limit, and long enough to be noticed."""
    monkeypatch.setattr(server, "IDLE_S", 0.5)
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr(server, "time", clock)

    handle, is_busy = Mock(), lambda: any(begin <= now[0] < end for begin, end in busy)
    handle.broadcast.return_value.results = lambda timeout_s: [0, int(is_busy())]
    server.wait_until_idle(handle, 0.7, 2.0)
    assert now[0] == pytest.approx(ends, abs=0.11)
    assert {call.args for call in handle.broadcast.call_args_list} == {("stop",)}


@pytest.mark.parametrize(
    "given, says",
    [
        ({"adapters": "none"}, "--adapters must be a folder, and there is none"),
        ({"weights": "none"}, "--weights must be a file, and there is none"),
        ({"model": "no_vit"}, "no_vit cannot be served: Unknown model"),
        ({"model": "hf:folder"}, "hf:folder cannot be served: the service takes models of timm, and AdapterBank"),
        ({"model": "local-dir:folder"}, "finds no 'architecture' in its config.json; the service takes models of timm"),
        ({"num_classes": 11}, "cannot be served: .* size mismatch for head.weight"),
        ({"backend": "magic"}, "cannot be served: .*magic"),
        ({"labels": "latin-1"}, "labels in .*x.labels.txt must be UTF-8"),
        ({"adapters": "latin-1"}, "labels in .*x.labels.txt must be UTF-8"),
        ({"labels": "short"}, "must have a line for each of the 10 classes"),
        ({"key_file": "short"}, "--key-file: .* line 1: a key must have at least 16"),
        ({"device": "cuda", "replicas": 99}, "--device cuda takes a GPU for each of 99 replicas"),
    ],
    ids=str,
)
def test_what_prevents_a_start_is_a_sentence(served, tmp_path, given, says):
    [(option, value), *_] = given.items()
    if value in ("latin-1", "short"):
        path = tmp_path / "x.labels.txt"
        path.write_bytes("\u00e9meu\nchat\n".encode("utf-8" if value == "short" else value))
        given = {option: str(tmp_path if option == "adapters" else path)}
    elif value == "local-dir:folder":
        (tmp_path / "config.json").write_text('{"model_type": "vit"}')  # as transformers has it
        given = {"model": f"local-dir:{tmp_path}"}
    settings = served[0].model_copy(update=given)
    with pytest.raises(start.StartError, match=says):
        start.check_files(settings, ServerSettings())
        start.check_model(settings)


def test_a_start_takes_a_gpu_for_each_replica_and_warns_of_adapters_that_cannot_be_served(own, caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    start.check_files(own.model_copy(update={"device": "cuda", "replicas": 2}), ServerSettings())
    found, bad = AdapterFolder(FakeBank(), own.adapters, 1), ["broken", "caf\udce9", "not a name"]
    for name in bad:
        found.file(name).write_bytes(b"x")
    start.check_model(own)
    assert [record.args[0] for record in caplog.records] == bad
    assert found.names() == ["adapter-0", "adapter-1", "adapter-2", "broken"], "others cannot be asked for"


def test_a_backbone_without_classes(served, tmp_path):
    """Weights without a classifier: adapters answer with their own, and nothing answers with random ones."""
    from safetensors.torch import load_file, save_file

    settings, files, want = served
    weights, path = load_file(settings.weights), str(tmp_path / "backbone.safetensors")
    save_file({key: t for key, t in weights.items() if not key.startswith("head.")}, path)
    for classes in (7, 0):  # 0: as the model's default in timm, here 1000
        classifier = Classifier(settings.model_copy(update={"weights": path, "num_classes": classes}))
        image = classifier.prepare(Upload(files[0], "adapter-1", 100))
        answer = classifier.answer(image, classifier.classify([image])[0])
        assert load_test.is_right(answer, "adapter-1", want[0, "adapter-1"])
        says = "adapter must be given: test_vit has no classes"
        refused(400, classifier.prepare, Upload(files[0], None, 5), says=says)
        assert classifier.classes == 0
    lacking = {key: t for key, t in weights.items() if key != "norm.bias"}
    for state, says in ((lacking, "lack norm.bias"), (weights | {"more": torch.zeros(1)}, "have more")):
        save_file(state, path)
        given, says = settings.model_copy(update={"weights": path}), f"the weights in .* {says}, unlike test_vit"
        refuses(ValueError, says, base_model, given)


def test_ports_addresses_and_tokens(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        says = f"cannot listen on 127.0.0.1:{port}: another process listens there"
        refuses(start.StartError, says, start.free_port, "127.0.0.1", port)
        assert start.free_port("127.0.0.1", 0) not in (0, port)
    refuses(start.StartError, "--host no.such.host is not an address", start.free_port, "no.such.host", port)
    assert start.is_loopback("127.0.0.2") and start.is_loopback("::1") and not start.is_loopback("0.0.0.0")
    refuses(start.StartError, "can be reached at --address 127", cluster._check_reachable, f"127.0.0.1:{port}")
    refuses(start.StartError, "must be auto or HOST:PORT", cluster._check_reachable, "ray://a:1")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    says = "RAY_AUTH_MODE is 'disabled', so Ray would not ask for a token"
    refuses(start.StartError, says, cluster.demand_token, ServerSettings())
    cluster.demand_token(ServerSettings(insecure=True))
    monkeypatch.delenv("RAY_AUTH_MODE")
    cluster.demand_token(ServerSettings())
    assert os.environ.pop("RAY_AUTH_MODE") == "token"


@pytest.mark.parametrize("says, insecure", [(None, 0), (None, 1), ("UNIMPLEMENTED", 0), ("UNAUTHENTICATED", 0)])
def test_a_cluster_that_asks_for_no_token_is_refused(monkeypatch, says, insecure):
    """A gRPC server stands for the control store of the cluster; the deployment below asks that of a real one."""
    ray, grpc = pytest.importorskip("ray"), pytest.importorskip("grpc")
    reply = lambda _, context: context.abort(grpc.StatusCode[says], "") if says else b""
    store = grpc.server(ThreadPoolExecutor(1))
    calls = {"CheckAlive": grpc.unary_unary_rpc_method_handler(reply)}
    store.add_registered_method_handlers("ray.rpc.NodeInfoGcsService", calls)
    address = f"127.0.0.1:{store.add_insecure_port('127.0.0.1:0')}"
    store.start()
    for name in ("init", "shutdown", "get_runtime_context"):
        monkeypatch.setattr(ray, name, lambda **_: SimpleNamespace(gcs_address=address))
    context = cluster.ray_for(Settings(model="m", adapters="."), ServerSettings(address=address, insecure=insecure))
    refused = pytest.raises(start.StartError, match=f"the Ray cluster at {address} asks for no token: .*--insecure")
    with contextlib.nullcontext() if insecure or says == "UNAUTHENTICATED" else refused, context:
        pass
    store.stop(None)


def test_slow_uploads_keep_nobody_out(monkeypatch):
    """Bytes are limited, not uploads: the oldest is dropped when there are too many, and each of them after a while."""

    async def run():
        uploads = places.Uploads(1000, 99.0)

        def upload(*sizes, last=0.0):
            async def read(room):
                for size in sizes:
                    await room(size)
                await asyncio.sleep(last)
                return sum(sizes)

            return asyncio.create_task(uploads.receive(read))

        monkeypatch.setattr(places, "GRACE_S", 99.0)  # until then others wait for the oldest
        assert await asyncio.gather(upload(600, last=0.02), upload(600), upload(2000)) == [600, 600, 2000]
        monkeypatch.setattr(places, "GRACE_S", 0.0)
        slow = [upload(last=99), *[upload(1, last=99) for _ in range(500)]]
        assert await upload(250, 250) == 500
        assert not any(task.done() for task in slow) and (len(uploads), uploads.bytes) == (501, 500)
        assert await upload(600, last=0.02) == 600
        assert [task.done() for task in slow] == [False, *[True] * 100, *[False] * 400], "the oldest that sent any"
        for task in slow[101:]:
            task.cancel()
        uploads.seconds = 0.01
        found = await asyncio.gather(*slow[1:], upload(1, last=99), return_exceptions=True)
        assert {getattr(error, "status", None) for error in found[:100] + found[-1:]} == {408}
        assert {type(error) for error in found[100:-1]} == {asyncio.CancelledError}
        assert len(uploads) == 1 and not uploads.bytes

    asyncio.run(run())


def test_keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# clients\n0123456789abcdef\n\nfedcba9876543210\n0123456789abcdef\n")  # one of them twice
    known = keys.read_keys(path)
    for headers, right in [
        ({"authorization": "Bearer fedcba9876543210"}, True), ({"x-api-key": "0123456789abcdef"}, True), ({}, False),
        ({"authorization": "Bearer 0123456789abcde"}, False), ({"authorization": "Basic 0123456789abcdef"}, False),
        ({"x-api-key": "# clients"}, False), ({"authorization": "Bearer "}, False),
    ]:  # fmt: skip
        assert keys.has_key(headers, known) is right
    bad = "0123456789 abcdef", "0123456789abcde", "0123456789abcdef\u00e9", "0123456789\tabcdef"
    for text, says in [("# none\n", "must have a key"), *((key, "line 1: a key must have at least 16") for key in bad)]:
        path.write_text(text)
        refuses(ValueError, says, keys.read_keys, path)


def alone(settings, monkeypatch):
    """A replica without Ray."""
    app = pytest.importorskip("efft_kernels.serving.app", reason="Ray Serve, of the extra serve, is not installed")
    context = SimpleNamespace(_deployment_config=SimpleNamespace(max_ongoing_requests=100))
    monkeypatch.setattr(app.serve, "get_replica_context", lambda: context)
    return app.EFFTClassifier(settings)


@pytest.mark.parametrize("prefix", ["", "/birds"])
def test_http(prefix, served, monkeypatch):
    """Routes, pages and refusals, at / and at the path of a named service."""
    api = pytest.importorskip("efft_kernels.serving.api", reason="FastAPI, of the extra serve, is not installed")
    from starlette.testclient import TestClient

    settings, (file, *_), want = served
    service = alone(settings.model_copy(update={"max_bytes": len(file)}), monkeypatch)
    with TestClient(api.build(lambda: service), root_path=prefix, follow_redirects=False) as client:
        path = prefix or "/"
        assert [client.get(url).json() for url in (path, prefix + "/")] == [service.describe()] * 2
        found = client.post(path, params={"adapter": "adapter-1", "top": 9}, content=file)
        assert load_test.is_right(found.json(), "adapter-1", want[0, "adapter-1"])
        body, headers = form(image=file, adapter="adapter-2", top="9")
        found = client.post(path, content=body, headers=headers)
        assert load_test.is_right(found.json(), "adapter-2", want[0, "adapter-2"])
        refused, says = client.post(path, content=file + b"a"), f"at most {len(file)} bytes, got {len(file) + 1}"
        assert (refused.status_code, refused.json()) == (413, {"error": f"the body must have {says}"})
        refused = client.get(path, params={"adapter": "adapter-1"})
        assert (refused.status_code, refused.json()["error"]) == (400, "parameters must be left out, got 'adapter'")
        assert client.put(path).headers["allow"] == "GET, POST" and client.get(prefix + "/none").status_code == 404
        for url, accept in ((path, "text/html,*/*;q=0.8"), (prefix + "/docs", "*/*")):
            page = client.get(url, headers={"accept": accept})
            assert page.headers["content-type"].startswith("text/html") and "default-src 'none'" in str(page.headers)
            assert not re.search(r"""(src|href)=["']?(https?:)?//""", page.text), "it loads from elsewhere"
        schema = client.get(prefix + "/openapi.json").json()
        assert schema["paths"].keys() == {"/", "/health"} and "multipart/form-data" in str(schema["paths"]["/"]["post"])
        service.keys = (b"a digest",)
        for answer in (client.get(path), client.post(path, content=b"abc")):
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert client.get(path, headers={"accept": "text/html"}).status_code == 200  # the page asks for the key
        assert client.get(prefix + "/health").status_code == 200
        service.stopping = True
        stopping = client.get(prefix + "/health")
        assert stopping.status_code == 503 and stopping.headers["retry-after"] == "1"


def test_a_replica_decodes_no_more_than_it_works_on(served, monkeypatch):
    settings, files, want = served
    replica = alone(settings.model_copy(update={"max_ongoing": 2, "max_batch": 3, "max_queued": 38}), monkeypatch)
    held, decoded, names = [], [], [f"adapter-{i % 3}" for i in range(60)]
    prepare, compute, full = replica.classifier.prepare, replica.classifier.classify, threading.Event()

    def counted(upload):
        held.append(1)
        decoded.append(len(held))
        if len(held) == 6:  # two batches of three: one at work, one that waits
            full.set()
        return prepare(upload)

    def late(images):
        assert full.wait(30)  # however fast images are decoded
        del held[: len(images)]
        return compute(images)

    replica.classifier.prepare, replica.classifier.classify = counted, late

    async def crowd():
        asked = [replica.classify(request(files[0], query={"adapter": name, "top": "9"})) for name in names]
        return await asyncio.gather(*asked, return_exceptions=True)

    for name, answer in zip(names, found := asyncio.run(crowd())):
        assert isinstance(answer, Refused) or load_test.is_right(answer, name, want[0, name])
    assert sum(isinstance(answer, Refused) for answer in found) == 20 and max(decoded) == 6
    assert replica.forward_since is None, "an idle replica is no stuck one"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_replica_returns_freed_memory(served, monkeypatch):
    replica, pieces = alone(served[0], monkeypatch), [bytearray(100_000) for _ in range(1000)]
    del pieces[::2]  # 48 MiB, in pieces between those that stay
    before = psutil.Process().memory_info().rss >> 20
    replica.check_health()
    replica.decoding.shutdown()
    assert psutil.Process().memory_info().rss >> 20 < before - 24 and len(pieces) == 500


def without_token(process):
    """{method of Ray: statuses of calls without a token}, at all ports of a process and its children but loopback's"""
    import grpc

    pids = {one.pid for one in (process, *psutil.Process(process.pid).children(recursive=True))}
    sockets = [one for one in psutil.net_connections("tcp") if one.pid in pids and one.status == "LISTEN"]
    methods = "NodeInfoGcsService/CheckAlive", "NodeManagerService/RequestWorkerLease", "CoreWorkerService/PushTask"
    found = {method: set() for method in methods}
    for port in {one.laddr.port for one in sockets if not start.is_loopback(one.laddr.ip)}:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            for method, statuses in found.items():
                with pytest.raises(grpc.RpcError) as error:
                    channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=10)
                statuses.add(error.value.code().name)
    return found


def test_a_signal_while_ray_ends_changes_nothing():
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    if (child := os.fork()) == 0:
        with cluster._signals_ignored():
            libc.signal(signal.SIGTERM, 0)  # SIG_DFL, as Ray's C++ does
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.slow
def test_a_deployment_on_loopback(served, tmp_path, monkeypatch):
    """Answers, a killed replica, slow clients, some that leave, overload, ports, a stop; on a machine of any speed."""
    pytest.importorskip("ray.serve", reason="Ray Serve, of the extra serve, is not installed")
    aiohttp = pytest.importorskip("aiohttp")
    settings, files, want = served
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # no Ray: the service starts one of its own
    monkeypatch.setattr(load_test, "PATIENCE", 120.0)
    # half of the queue is enough for the last requests: the killed replica may not be back by then
    limits = {"replicas": 2, "max_ongoing": 8, "max_queued": 80, "upload_s": 300.0, "stop_s": 60.0}
    settings, port = settings.model_copy(update=limits), start.free_port("127.0.0.1", 0)
    service = load_test.Server(settings, port, tmp_path / "log", "--timeout-s=600", "--drain-s=1")

    async def ask():
        # a connection for each request, because the server may close a kept one just when it is used again
        connector = aiohttp.TCPConnector(force_close=True, limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            await service.ready()
            turned_away = without_token(service.process)
            load = load_test.Load(service, session, files, want)
            await load.run(2.0, 15.0, len(load_test.malformed()), 1, load_test.random.Random(0))

            async def post(i=0, complete=None, **query):
                """Send picture i, of which a part is held back until ``complete`` is set."""

                async def parts():
                    yield files[i][:9]
                    if complete:
                        await complete.wait()
                    yield files[i][9:]

                headers = {"content-type": "image/png"}
                async with session.post(service.url, params=query, headers=headers, data=parts()) as answer:
                    found = await answer.json() if answer.status == 200 else None
                    return answer.status, answer.headers.get("retry-after"), found

            async def slowly(complete):  # again while Ray's queue is full: so many arrive at once
                while (found := await post(0, complete))[0] == 503 and not complete.is_set():
                    await asyncio.sleep(0.1)
                return found

            async def get(path=""):
                async with session.get(service.url + path) as answer:
                    return answer.status, await answer.json() if (answer.status, path) == (200, "") else None

            async def until(requests):
                """Wait until so many requests are under way in the replicas, of which each GET asks any."""
                end, counts = time.monotonic() + 120, [-1]
                while min(counts) + max(counts) not in (requests, 2 * requests):  # twice: there is one replica
                    assert time.monotonic() < end, counts
                    described = [found for _, found in [await get() for _ in range(8)] if found]
                    counts = [found["in_use"]["requests"] for found in described] or [-1]
                return described

            complete = asyncio.Event()
            slow = [asyncio.create_task(slowly(complete)) for _ in range(400)]
            await until(400)
            quick = await asyncio.gather(*[post() for _ in range(20)])
            leaving = slow[300:] + [asyncio.create_task(post(adapter=f"adapter-{i % 3}")) for i in range(30)]
            await asyncio.sleep(0.02)
            for task in leaving:
                task.cancel()
            await until(300)  # the requests of those who left end, too
            complete.set()
            crowd = await asyncio.gather(*slow[:300])
            described = await until(0)

            complete = asyncio.Event()
            last = [asyncio.create_task(post(i % 4, complete, adapter="adapter-1", top="100")) for i in range(40)]
            await until(40)
            service.process.send_signal(signal.SIGTERM)
            while (await get("health"))[0] == 200:
                await asyncio.sleep(0.05)
            stopping = [(await get("-/healthz"))[0], *[(await post())[:2] for _ in range(8)]]
            complete.set()
            last = await asyncio.gather(*last)
            with contextlib.suppress(aiohttp.ClientError):  # until nothing listens any more
                while True:
                    stopping.append((await get("health"))[0])
                    await asyncio.sleep(0.02)
            return load, turned_away, quick, crowd, described, stopping, last

    try:
        load, turned_away, quick, crowd, described, stopping, last = asyncio.run(ask())
    finally:
        stopped = service.stop()
    problems = load.problems[:5], service.log.read_text()[-2000:]
    assert load.counts["killed"] == 1 and load.counts["malformed"] >= 30 and load.counts["sent"] == 46
    assert not any(load.counts[what] for what in ("lost", "wrong", "accepted")), problems
    for statuses in turned_away.values():
        assert "UNAUTHENTICATED" in statuses <= {"UNAUTHENTICATED", "UNIMPLEMENTED", "UNAVAILABLE"}, turned_away
    assert [status for status, *_ in quick] == [200] * 20, quick
    assert {found[:2] for found in crowd} == {(200, None), (503, "1")}, problems
    assert described[0]["adapters"] == [f"adapter-{i}" for i in range(3)]
    assert not any(found["in_use"]["adapters"] for found in described)
    # never 404; a replica that has just started is told a moment later
    assert {503, (503, "1")} <= {*stopping} <= {503, (503, "1"), 200, (200, None)} and stopping[0] == 503, stopping
    for i, (status, _, answer) in enumerate(last):
        assert status == 200 and load_test.is_right(answer, "adapter-1", want[i % 4, "adapter-1"]), (answer, problems)
    assert stopped == 0, problems


@pytest.fixture
def ray_serve(monkeypatch):
    """Ray Serve without a Ray: the calls to it, and the state of the application, which a test sets."""
    pytest.importorskip("ray.serve")
    from ray import serve

    found = SimpleNamespace(status=SimpleNamespace(value="RUNNING"))
    fake = SimpleNamespace(state=found.status, begin=lambda: None, look=lambda: None)
    monkeypatch.setattr(serve, "start", lambda http_options: fake.begin())
    monkeypatch.setattr(serve, "run_many", Mock())
    monkeypatch.setattr(serve, "get_app_handle", Mock())
    monkeypatch.setattr(serve, "status", lambda: fake.look() or SimpleNamespace(applications={"efft": found}))
    monkeypatch.setattr(server, "_answers", lambda *_: True)
    return fake


def test_an_http_server_that_starts_slowly_is_waited_for(ray_serve, monkeypatch):
    import ray

    stop, died = threading.Event(), ray.exceptions.ActorDiedError()
    monkeypatch.setattr(stop, "wait", lambda seconds: None)

    def deploy(options):
        ray_serve.begin = Mock(side_effect=[died, died, None])
        server._deploy(None, Settings(model="test_vit", adapters="."), options, {"port": 1}, stop)

    deploy(ServerSettings())
    assert ray_serve.begin.call_count == 3
    refuses(start.StartError, "cannot deploy", deploy, ServerSettings().model_copy(update={"start_s": 0.0}))
    stop.set()
    refuses(server.Stopped, None, deploy, ServerSettings())


@pytest.mark.parametrize(
    "when, answers, says, done",
    [
        ("checking", False, "stopped before", []),
        ("starting", False, "stopped before", ["ended"]),
        ("starting", True, "stopped before", ["drained", "ended"]),
        ("running", True, "stopping", ["drained", "ended"]),
    ],
)
def test_a_signal_at_any_moment(ray_serve, monkeypatch, capsys, when, answers, says, done):
    """Answers under way are waited for as soon as the first replicas give any, though others may still start."""
    from efft_kernels.serving import app

    found, fakes = [], {
        server: {"check_files": lambda *_: None, "check_model": lambda _: come("checking"),
                 "_answers": lambda *_: come("running") or answers, "_drain": lambda *_: found.append("drained")},
        cluster: {"ray_for": lambda *_: contextlib.nullcontext(), "claim_name": lambda _: None,
                  "end_proxies": lambda: found.append("ended")},
        app: {"app": lambda settings: None},
    }  # fmt: skip

    def come(now):
        if now == when:
            os.kill(os.getpid(), signal.SIGTERM)

    for module, stubs in fakes.items():
        for name, stub in stubs.items():
            monkeypatch.setattr(module, name, stub)
    monkeypatch.setattr(os, "environ", dict(os.environ, RAY_AUTH_MODE="token"))
    ray_serve.state.value, ray_serve.look = "DEPLOYING" if when == "starting" else "RUNNING", lambda: come("starting")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(Settings(model="m", adapters="."), ServerSettings(host="0.0.0.0", port=0))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    out, err = capsys.readouterr()
    assert found == done and out.splitlines()[-1].startswith(says)
    assert ("listens on 0.0.0.0 without an API key" in err) == (when != "checking")
    assert "warning: without --weights the model is random" in err
