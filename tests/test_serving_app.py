"""The service: uploads, the adapter folder, settings, the command, the classifier, and a deployment on loopback."""

import asyncio
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import timm

from efft_kernels.serving.folder import AdapterFolder, DoesNotFit
from efft_kernels.serving.uploads import Refused, Upload, check_adapter_name, decode, read_upload

starlette = pytest.importorskip("starlette.requests", reason="starlette, of the extra serve, is not installed")
pytest.importorskip("pydantic", reason="pydantic, of the extra serve, is not installed")
pytest.importorskip("python_multipart", reason="python-multipart, of the extra serve, is not installed")
Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")

from efft_kernels.serving import classifier as classifier_module
from efft_kernels.serving import cli, cluster, keys, places, server, start
from efft_kernels.serving.classifier import Classifier, base_model
from efft_kernels.serving.settings import ServerSettings, Settings

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PIXELS = 1_000_000


def saved(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.fixture
def picture():
    import numpy

    return Image.fromarray(numpy.arange(40 * 30 * 3, dtype="uint8").reshape(30, 40, 3))


def test_transparent_parts_are_white(picture):
    picture.putalpha(0)
    assert decode(saved(picture), max_pixels=PIXELS).getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA"])
def test_every_mode_becomes_rgb(picture, mode):
    got = decode(saved(picture.convert(mode)), max_pixels=PIXELS)
    assert got.mode == "RGB" and got.size == (40, 30)
    if mode in ("RGB", "RGBA"):
        assert got.tobytes() == picture.tobytes()


def test_cmyk_and_16_bit_grey(picture):
    assert decode(saved(picture.convert("CMYK"), "JPEG"), max_pixels=PIXELS).mode == "RGB"
    import numpy

    grey = Image.fromarray((numpy.arange(1200, dtype="uint16") * 54).reshape(30, 40))
    got = numpy.asarray(decode(saved(grey), max_pixels=PIXELS))[..., 0].astype(float)
    assert abs(got - numpy.asarray(grey) / 257).max() <= 1


def test_exif_orientation_is_applied(picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    got = decode(saved(picture, "PNG", exif=exif), max_pixels=PIXELS)
    assert got.size == (30, 40)
    assert got.tobytes() == picture.transpose(Image.Transpose.ROTATE_270).tobytes()


def test_pixels_are_checked_before_decoding(picture, monkeypatch):
    from PIL import ImageFile

    loads = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: loads.append(1) or load(self))
    with pytest.raises(Refused, match="at most 1199 pixels, got 40 x 30") as refused:
        decode(saved(picture), max_pixels=1199)
    assert refused.value.status == 413 and not loads
    decode(saved(picture), max_pixels=1200)
    assert loads


def test_16_bit_rgb_and_mpo(picture):
    import numpy

    deep = numpy.asarray(picture).astype(">u2") * 257
    chunk = lambda kind, body: len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    header = (40).to_bytes(4, "big") + (30).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in deep))
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    assert decode(file, max_pixels=PIXELS).tobytes() == picture.tobytes()
    first = decode(saved(picture, "MPO", save_all=True, append_images=[picture.rotate(90)]), max_pixels=PIXELS)
    assert first.size == (40, 30) and first.mode == "RGB"


def test_what_follows_the_picture_is_not_counted_as_scans(picture):
    """Phones append a video to a photo, in which the bytes of a scan's marker occur by chance."""
    data = saved(picture, "JPEG", progressive=True)
    assert decode(data + b"\xff\xda" * 100, max_pixels=PIXELS).size == picture.size
    exif = data[:2] + b"\xff\xe1\x00\xca" + b"\xff\xda" * 100 + data[2:]
    assert decode(exif, max_pixels=PIXELS).size == picture.size
    start = data.index(b"\xff\xda")
    many = data[:start] + data[start:-2] * 20 + data[-2:]
    with pytest.raises(Refused, match="must have at most 64 scans"):
        decode(many, max_pixels=PIXELS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_corrupt_exif_is_ignored(picture, kind):
    for exif in (b"Exif\0\0MM\0*\0\0\0\x08" + b"\xff" * 200, b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0"):
        assert decode(saved(picture, kind, exif=exif), max_pixels=PIXELS).size == (40, 30)


def test_extreme_aspect_ratios_are_refused():
    from PIL import ImageFile

    for size in ((1, 60_000), (60_000, 1), (3, 301)):
        with pytest.raises(Refused, match=f"at most 100 times as long as it is wide, got {size[0]} x") as refused:
            decode(saved(Image.new("L", size)), max_pixels=25_000_000)
        assert refused.value.status == 422
    assert decode(saved(Image.new("L", (3, 300))), max_pixels=PIXELS).size == (3, 300)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def malformed():
    sys.path.append(str(BENCHMARKS))
    from load_test import malformed

    return malformed()


def test_malformed_requests_are_refused_with_4xx(tmp_path):
    """Every malformed request of the load test, through parsing, the folder and decoding."""
    folder = AdapterFolder(FakeBank(), tmp_path, 1000)
    for what, request in malformed().items():
        if "method" in request:
            continue
        headers = {"content-type": "application/octet-stream"} | request.get("headers", {})
        with pytest.raises((Refused, FileNotFoundError)) as refused:
            upload = asyncio.run(parse(request["body"], headers, request.get("query"), max_bytes=20 * 2**20))[0]
            if upload.adapter:
                touch(folder, upload.adapter)
            decode(upload.image, max_pixels=25_000_000)
        assert getattr(refused.value, "status", 404) in (400, 404, 413, 415, 422), what


def test_truncated_files_are_refused(picture):
    for kind in ("JPEG", "PNG", "WEBP"):
        data = saved(picture, kind)
        for end in range(0, len(data) - 20, 97):
            with pytest.raises(Refused):
                decode(data[:end], max_pixels=PIXELS)


async def parse(body, headers=None, query=None, max_bytes=1000, chunk=None):
    from urllib.parse import urlencode

    headers = {"content-length": str(len(body))} | (headers or {})
    chunks = [body] if chunk is None else [body[i : i + chunk] for i in range(0, len(body), chunk)]
    left = range(len(chunks))[::-1]
    messages = [{"type": "http.request", "body": part, "more_body": more > 0} for part, more in zip(chunks, left)]

    async def receive():
        return messages.pop(0)

    scope = {
        "type": "http", "method": "POST", "path": "/", "query_string": urlencode(query or {}).encode(),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items() if value is not None],
    }  # fmt: skip
    return await read_upload(starlette.Request(scope, receive), max_bytes=max_bytes), messages


def read(*args, **options):
    return asyncio.run(parse(*args, **options))[0]


def status_of(*args, **options):
    with pytest.raises(Refused) as refused:
        read(*args, **options)
    return refused.value.status


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


def test_bodies_that_are_too_large():
    assert status_of(b"a" * 1001) == 413
    upload = parse(b"a" * 5000, {"content-length": None}, chunk=100)
    with pytest.raises(Refused, match="at most 1000 bytes"):
        asyncio.run(upload)
    assert status_of(b"a" * 5000, {"content-length": "10"}) == 413  # a wrong length
    assert status_of(b"a", {"content-length": "9" * 400}) == 413
    assert status_of(b"a", {"content-length": "-1"}) == 400
    assert len(read(b"a" * 1000).image) == 1000
    assert len(read(*form(image=b"a" * 1000)).image) == 1000
    assert status_of(*form(image=b"a" * 1001)) == 413


def test_reading_stops_at_the_limit():
    messages = []

    async def run():
        sent = [{"type": "http.request", "body": b"a" * 100, "more_body": True} for _ in range(100)]

        async def receive():
            messages.append(1)
            return sent.pop()

        scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []}
        await read_upload(starlette.Request(scope, receive), max_bytes=1000)

    with pytest.raises(Refused):
        asyncio.run(run())
    assert len(messages) == 11


@pytest.mark.parametrize(
    "name", ["../a", "a/b", "/etc/passwd", "..", ".hidden", "a\\b", "a\0", "a" * 101, "ä", "a b", "%2e%2e", "-a", "a\n"]
)
def test_names_that_could_be_paths_are_refused(name):
    with pytest.raises(Refused) as refused:
        check_adapter_name(name)
    assert refused.value.status == 400
    assert check_adapter_name("a.b-C_1") == "a.b-C_1" and check_adapter_name("") is None


class FakeBank:
    def __init__(self, factor=1):
        self.held, self.factor, self.most = {}, factor, 0

    def add(self, name, path, strict):
        assert strict
        data = Path(path).read_bytes()
        if data.startswith(b"bad"):
            raise ValueError("no adapter")
        assert name not in self.held
        self.held[name] = len(data) * self.factor
        self.most = max(self.most, sum(self.held.values()))

    def remove(self, name):
        del self.held[name]

    def bytes(self, name):
        return self.held[name]

    @property
    def names(self):
        return [name.partition("@")[0] for name in self.held]


@pytest.fixture
def folder(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode() * 100)
    return AdapterFolder(FakeBank(), tmp_path, 250)


def touch(folder, name):
    with folder.hold(name):
        pass


def test_the_least_recently_used_is_evicted(folder):
    for name in "abab":
        touch(folder, name)
    assert folder.bank.names == ["a", "b"] and folder.loads == 2
    touch(folder, "a")
    touch(folder, "c")
    assert folder.bank.names == ["a", "c"] and folder.evictions == 1
    assert folder.bytes == 200 and folder.bank.most <= 250


def test_held_adapters_are_not_evicted(folder):
    with folder.hold("a"), folder.hold("b"):
        with pytest.raises(DoesNotFit, match="'c' does not fit the 250 bytes next to 2 in use"):
            touch(folder, "c")
        assert folder.bank.names == ["a", "b"]
        with folder.hold("a"):
            pass
    touch(folder, "c")
    assert folder.bank.names == ["a", "c"]  # a was used last
    with folder.hold("c"), pytest.raises(DoesNotFit):
        folder._make_room("d", 200)
    assert folder.bank.names == ["a", "c"]  # nothing is evicted for an adapter that would not fit even then
    with folder.hold("a") as oldest:
        touch(folder, "c")
        touch(folder, "d")
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
    (folder.path / "a.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no adapter 'a'"):
        touch(folder, "a")
    (folder.path / "c.safetensors").write_bytes(b"bad")
    with pytest.raises(ValueError):
        touch(folder, "c")
    (folder.path / "d.safetensors").write_bytes(b"d" * 251)
    with pytest.raises(ValueError, match="larger than the budget of 250"):
        touch(folder, "d")
    assert folder.names() == ["b", "c", "d"]
    touch(folder, "b")


def test_adapters_larger_in_memory_than_on_disk(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.safetensors").write_bytes(b"x" * 100)
    folder = AdapterFolder(FakeBank(factor=2), tmp_path, 250)
    touch(folder, "a")
    touch(folder, "b")
    assert folder.bank.names == ["b"]
    tight = AdapterFolder(FakeBank(factor=3), tmp_path, 250)
    with pytest.raises(DoesNotFit):
        touch(tight, "a")
    assert not tight.bank.held and not tight.loaded


def test_folder_in_many_threads(folder):
    failures = []

    def work(names):
        for name in names:
            try:
                with folder.hold(name) as key:
                    if key not in folder.bank.held:
                        failures.append(name)
            except DoesNotFit:
                pass

    threads = [threading.Thread(target=work, args=(names * 50,)) for names in ("abcd", "dcba", "acbd", "bbca")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and not folder.in_use and folder.bank.most <= 250


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        AdapterFolder(FakeBank(), tmp_path / "none", 1)


def test_images_are_prepared_as_the_file_of_an_adapter_says(served, picture, monkeypatch):
    import efft_kernels as ek

    _, settings, files, _ = served
    classifier = Classifier(settings)
    size = classifier.preparation.size
    state = ek.read_adapter(classifier.folder.file("adapter-0"))
    model = ek.load_adapter(base_model(settings), state.path, strict=True)
    mine = ek.Preparation(size, (0.1, 0.2, 0.3), (0.9, 0.8, 0.7), "nearest", 1.0, "squash")
    made = {"stated": mine, "wide": replace(mine, size=(size[0] + 32, size[1] + 32))}
    labels = ["x", "y", "z"]
    for name, preparation in made.items():
        ek.save_adapter(model, classifier.folder.file(name), preparation=preparation, classes=labels)
    try:
        upload = Upload(files[0], "stated", 5)
        image = classifier.prepare(upload)
        picture = decode(files[0], max_pixels=10**8)
        assert torch.equal(image, mine.transform()(picture))
        plain = classifier.prepare(Upload(files[0], None, 5))
        assert torch.equal(plain, classifier.preparation.transform()(picture)) and not torch.equal(image, plain)
        assert classifier.answer(upload, classifier.classify([image], ["stated"])[0])["label"] in labels
        wide = classifier.prepare(Upload(files[0], "wide", 5))  # this model takes images of several sizes
        assert wide.shape[1] == size[0] + 32
        both = classifier.classify([image, wide, plain], ["stated", "wide", None])
        for alone, name, found in zip((image, wide, plain), ("stated", "wide", None), both):
            torch.testing.assert_close(classifier.classify([alone], [name])[0], found)
        monkeypatch.setattr(classifier_module, "input_size", lambda model: size)
        with pytest.raises(Refused, match="'wide' needs images of another size") as refused:
            classifier.prepare(Upload(files[0], "wide", 5))
        assert refused.value.status == 422
    finally:
        for name in made:
            classifier.folder.file(name).unlink()


def test_an_adapter_of_other_weights_is_not_served(served):
    import efft_kernels as ek

    _, settings, files, _ = served
    classifier = Classifier(settings)
    path = classifier.folder.file("foreign")
    torch.manual_seed(7)
    ek.save_adapter(ek.inject(timm().create_model(settings.model), ek.EFFTConfig(rank=4)), path)
    try:
        with pytest.raises(Refused, match="'foreign' cannot be served") as refused:
            classifier.prepare(Upload(files[0], "foreign", 5))
        assert refused.value.status == 422
    finally:
        path.unlink()


def test_labels_files(served):
    _, settings, files, _ = served
    classifier = Classifier(settings)
    path, upload = Path(settings.adapters, "adapter-0.labels.txt"), Upload(files[0], "adapter-0", 5)
    before, scores = path.read_bytes(), torch.tensor([0.2, 0.5, 0.3])
    try:
        path.write_bytes("ant\nbee\ncat\n".encode("utf-8-sig"))
        classifier.prepare(upload)
        assert [s["label"] for s in classifier.answer(upload, scores)["scores"]] == ["bee", "cat", "ant"]
        for data in ("chat\nchien\n\u00e9meu\n".encode("latin-1"), b"ant\nbee\n"):
            path.write_bytes(data)
            with pytest.raises(Refused, match="its labels") as refused:
                classifier.prepare(upload)
            assert refused.value.status == 422
        path.unlink()
        path.symlink_to(path)
        with pytest.raises(Refused, match="its labels cannot be read"):
            classifier.prepare(upload)
    finally:
        path.unlink()
        path.write_bytes(before)


def test_settings():
    made = Settings(model="m", adapters="x", replicas="3", batch_wait_ms="2.5")
    assert (made.replicas, made.batch_wait_ms, made.adapters) == (3, 2.5, os.path.abspath("x"))
    assert (made.weights, made.labels, Settings(model="m", adapters=2024).adapters) == ("", "", os.path.abspath("2024"))
    for args, says in [
        ({"model": "m"}, "adapters\n  Field required"),
        ({"model": "m", "adapters": "x", "repliccas": 2}, "repliccas\n  Extra inputs are not permitted"),
        ({"model": "m", "adapters": "x", "replicas": "two"}, "replicas\n.* valid integer.*'two'"),
        ({"model": "m", "adapters": "x", "replicas": 0}, "replicas\n.* greater than or equal to 1 .*input_value=0"),
        ({"model": "m", "adapters": "x", "stop_s": -1}, "stop_s\n.* greater than or equal to 0 .*input_value=-1"),
        ({"model": "m", "adapters": "x", "dtype": "int8"}, "dtype\n.*'float32', 'bfloat16' or 'float16'.*'int8'"),
        ({"model": "m", "adapters": "x", "device": "tpu"}, r"device\n.*\(cpu\|cuda\).*'tpu'"),
    ]:
        with pytest.raises(ValueError, match=says):
            Settings(**args)


def test_options_become_settings():
    args = ["--model", "m", "--adapters=x", "--max_batch=4", "--max-queued", "0", "--dtype=float16", "--port", "80"]
    application, server = cli.settings(args)
    assert application == Settings(model="m", adapters="x", max_batch=4, max_queued=0, dtype="float16")
    assert server == ServerSettings(port=80)


@pytest.mark.parametrize(
    "args, says",
    [
        ([], "the following arguments are required: --model, --adapters"),
        (["--model=m", "--adapters=x", "--repliccas=2"], "unrecognized arguments: --repliccas=2"),
        (["--model=m", "--adapters=x", "--replicas=0"], "--replicas must be greater than or equal to 1, got '0'"),
        (["--model=m", "--adapters=x", "--replicas=two"], "--replicas must be a valid integer, .* got 'two'"),
        (["--model=m", "--adapters=x", "--port=99999"], "--port must be less than or equal to 65535, got '99999'"),
        (["--model=m", "--adapters=x", "--dtype=int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--model=m", "--adapters=x", "--device=tpu"], r"--device must match pattern '\^\(cpu\|cuda\).* got 'tpu'"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and value else "",
)
def test_options_that_cannot_be_used(args, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(args)
    assert stopped.value.code == 2
    assert re.search(says, capsys.readouterr().err)


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and "python -m efft_kernels.serving --model" in shown
    for model in (Settings, ServerSettings):
        assert all(field.description for field in model.model_fields.values())
        assert all(f"--{name.replace('_', '-')} " in shown for name in model.model_fields)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(load_test, settings, pictures, expected answers) of a tiny model with three adapters."""
    timm()
    sys.path.append(str(BENCHMARKS))
    import load_test

    folder = tmp_path_factory.mktemp("served")
    settings = load_test.make_adapters(folder, [3, 4, 5])
    Path(settings.adapters, "adapter-0.labels.txt").write_text("ant\nbee\ncat\n")
    files = load_test.pictures(4)
    return load_test, settings, files, load_test.expected(settings, files)


def test_a_mixed_batch_equals_each_adapter_alone(served):
    load_test, settings, files, want = served
    classifier = Classifier(settings.model_copy(update={"adapter_bytes": 100_000}))
    names = [None, "adapter-0", "adapter-2", "adapter-1", None, "adapter-0"]
    uploads = [Upload(files[i % len(files)], name, 100) for i, name in enumerate(names)]
    scores = classifier.classify([classifier.prepare(upload) for upload in uploads], names)
    for i, (name, upload, found) in enumerate(zip(names, uploads, scores)):
        answer = classifier.answer(upload, found)
        assert load_test.is_right(answer, name, want[i % len(files), name])
        labels = ["ant", "bee", "cat"] if name == "adapter-0" else "0123456789"
        assert answer["label"] == labels[answer["index"]]
    assert not classifier.folder.in_use and classifier.folder.loads == 3


def test_adapters_are_held_while_the_model_runs(served, monkeypatch):
    _, settings, files, _ = served
    classifier, held = Classifier(settings), []
    classifier.model.register_forward_hook(lambda *_: held.append(classifier.folder.in_use))
    image = classifier.prepare(Upload(files[0], None, 5))
    classifier.classify([image] * 3, ["adapter-0", None, "adapter-1"])
    assert held == [2] and not classifier.folder.in_use
    monkeypatch.setattr(classifier, "model", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        classifier.classify([image], ["adapter-0"])
    assert not classifier.folder.in_use
    monkeypatch.setattr(classifier_module, "decode", lambda *_, **__: held.append(classifier.folder.in_use) or decoded)
    decoded = decode(files[0], max_pixels=10**8)
    classifier.prepare(Upload(files[0], "adapter-0", 5))
    assert held == [2, 1] and not classifier.folder.in_use


def test_adapters_that_cannot_be_served_are_refused(served):
    load_test, settings, files, want = served
    classifier = Classifier(settings)
    image = classifier.prepare(Upload(files[0], None, 5))
    broken = Path(settings.adapters, "broken.safetensors")
    broken.write_bytes(b"not an adapter")
    try:
        for name, status in (("broken", 422), ("nobody", 404)):
            with pytest.raises(Refused) as refused:
                classifier.prepare(Upload(files[0], name, 5))
            assert refused.value.status == status
            assert settings.adapters not in str(refused.value)  # clients must not see paths
        with pytest.raises(Refused) as refused:
            classifier.prepare(Upload(files[0][:50], "adapter-0", 5))
        assert refused.value.status in (415, 422) and not classifier.folder.in_use
        # in a batch they do not affect the others
        names = ["nobody", "adapter-0", "broken", None]
        *_, right, bad, plain = found = classifier.classify([image] * 4, names)
        assert (found[0].status, bad.status) == (404, 422)
        for name, scores in (("adapter-0", right), (None, plain)):
            answer = classifier.answer(Upload(files[0], name, 100), scores)
            assert load_test.is_right(answer, name, want[0, name])
        assert [type(result) for result in classifier.classify([image] * 2, ["nobody", "broken"])] == [Refused] * 2
    finally:
        broken.unlink()


def test_adapters_of_a_batch_that_exceed_the_budget_are_refused(served):
    load_test, settings, files, want = served
    largest = max(path.stat().st_size for path in Path(settings.adapters).glob("*.safetensors"))
    classifier = Classifier(settings.model_copy(update={"adapter_bytes": largest}))
    names = ["adapter-0", "adapter-1", "adapter-0"]
    images = [classifier.prepare(Upload(files[0], name, 5)) for name in names]
    first, refused, last = classifier.classify(images, names)
    assert refused.status == 503 and "does not fit" in str(refused)
    for scores in (first, last):
        answer = classifier.answer(Upload(files[0], names[0], 100), scores)
        assert load_test.is_right(answer, names[0], want[0, names[0]])


def test_scores_that_are_not_finite_are_refused(served):
    _, settings, files, _ = served
    classifier = Classifier(settings)
    names = ["adapter-0", "adapter-1"]
    uploads = [Upload(files[0], name, 5) for name in names]
    images = [classifier.prepare(upload) for upload in uploads]
    with classifier.folder.hold("adapter-0") as key, torch.no_grad():
        classifier.bank.parameters(key)[0].fill_(float("nan"))
    bad, good = classifier.classify(images, names)
    with pytest.raises(Refused, match="'adapter-0' gives scores for this image that are not finite") as refused:
        classifier.answer(uploads[0], bad)
    assert refused.value.status == 422 and classifier.answer(uploads[1], good)["adapter"] == "adapter-1"


@pytest.mark.parametrize("busy, least, most", [([], 0.7, 2), ([(0.2, 0.4)], 0.75, 2), ([(0, 99)], 2, 4)], ids=str)
def test_a_stop_waits_until_no_request_is_under_way(busy, least, most, monkeypatch):
    """Also for a request that arrives after an idle poll, no longer than the limit, and long enough to be noticed."""
    monkeypatch.setattr(server, "IDLE_S", 0.5)
    start = time.monotonic()

    class Handle:
        def broadcast(self, method):
            assert method == "stop"
            return self

        def results(self, timeout_s):
            return [0, int(any(begin <= time.monotonic() - start < end for begin, end in busy))]

    server.wait_until_idle(Handle(), 0.7, 2.0)
    assert least <= time.monotonic() - start < most


@pytest.mark.parametrize(
    "given, says",
    [
        ({"adapters": "none"}, "--adapters must be a folder, and there is none"),
        ({"weights": "none"}, "--weights must be a file, and there is none"),
        ({"model": "no_vit"}, "no_vit cannot be served: Unknown model"),
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
    settings = served[1].model_copy(update=given)
    with pytest.raises(start.StartError, match=says):
        start.check_files(settings, ServerSettings())
        start.check_model(settings)


def test_a_start_warns_of_adapters_that_cannot_be_served(served, caplog):
    paths = [Path(served[1].adapters, f"{name}.safetensors") for name in ("broken", "not a name")]
    for path in paths:
        path.write_bytes(b"x")
    try:
        start.check_model(served[1])
    finally:
        for path in paths:
            path.unlink()
    assert [record.args[0] for record in caplog.records] == ["broken", "not a name"]


def test_a_backbone_without_classes(served, tmp_path):
    """Weights without a classifier: adapters answer with their own, and nothing answers with random ones."""
    from safetensors.torch import load_file, save_file

    load_test, settings, files, want = served
    weights = load_file(settings.weights)
    path = str(tmp_path / "backbone.safetensors")
    save_file({key: t for key, t in weights.items() if not key.startswith("head.")}, path)
    for classes in (7, 0):  # 0: as the model's default in timm, here 1000
        classifier = Classifier(settings.model_copy(update={"weights": path, "num_classes": classes}))
        upload = Upload(files[0], "adapter-1", 100)
        scores = classifier.classify([classifier.prepare(upload)], ["adapter-1"])[0]
        assert load_test.is_right(classifier.answer(upload, scores), "adapter-1", want[0, "adapter-1"])
        with pytest.raises(Refused, match="adapter must be given: test_vit has no classes") as refused:
            classifier.prepare(Upload(files[0], None, 5))
        assert refused.value.status == 400 and classifier.classes == 0
    lacking = {key: t for key, t in weights.items() if key != "norm.bias"}
    for state, says in ((lacking, "lack norm.bias"), (weights | {"more": torch.zeros(1)}, "have more")):
        save_file(state, path)
        with pytest.raises(ValueError, match=f"the weights in .* {says}, unlike test_vit"):
            base_model(settings.model_copy(update={"weights": path}))


def test_ports_addresses_and_tokens(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(start.StartError, match=f"cannot listen on 127.0.0.1:{port}: another process listens there"):
            start.free_port("127.0.0.1", port)
        assert start.free_port("127.0.0.1", 0) not in (0, port)
    with pytest.raises(start.StartError, match="--host no.such.host is not an address"):
        start.free_port("no.such.host", port)
    assert start.is_loopback("127.0.0.2") and start.is_loopback("::1") and not start.is_loopback("0.0.0.0")
    for address in (f"127.0.0.1:{port}", "ray://a:1"):
        with pytest.raises(
            start.StartError, match="no Ray cluster can be reached at --address|must be auto or HOST:PORT"
        ):
            cluster._check_reachable(address)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(start.StartError, match="RAY_AUTH_MODE is 'disabled', so Ray would not ask for a token"):
        cluster.demand_token(ServerSettings())
    cluster.demand_token(ServerSettings(insecure=True))
    monkeypatch.delenv("RAY_AUTH_MODE")
    cluster.demand_token(ServerSettings())
    assert os.environ.pop("RAY_AUTH_MODE") == "token"


def test_slow_uploads_do_not_take_all_places(monkeypatch):
    """The oldest is dropped for the next one, and each of them after a while; a quick one passes between them."""
    monkeypatch.setattr(places, "GRACE_S", 0.05)

    async def run():
        uploads = places.Uploads(4, 0.5)

        async def quick():
            await asyncio.sleep(0.01)
            return "image"

        slow = [asyncio.create_task(uploads.receive(asyncio.sleep(99))) for _ in range(12)]
        await asyncio.sleep(0.01)
        assert len(uploads) == 4
        assert await asyncio.wait_for(uploads.receive(quick()), 2) == "image"
        found = await asyncio.gather(*slow, return_exceptions=True)
        assert [error.status for error in found] == [408] * 12 and len(uploads) == 0
        left = asyncio.create_task(uploads.receive(asyncio.sleep(99)))
        await asyncio.sleep(0.01)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        assert len(uploads) == 0

    asyncio.run(run())


def test_keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# clients\n0123456789abcdef\n\nfedcba9876543210\n")
    known = keys.read_keys(path)
    for headers, right in [
        ({"authorization": "Bearer fedcba9876543210"}, True), ({"x-api-key": "0123456789abcdef"}, True), ({}, False),
        ({"authorization": "Bearer 0123456789abcde"}, False), ({"authorization": "Basic 0123456789abcdef"}, False),
        ({"x-api-key": "# clients"}, False), ({"authorization": "Bearer "}, False),
    ]:  # fmt: skip
        assert keys.has_key(headers, known) is right
    path.write_text("# none\n")
    with pytest.raises(ValueError, match="must have a key"):
        keys.read_keys(path)


class FakeService:
    stopping, allowed = False, True

    async def classify(self, request):
        self.check_key(request)
        upload = await read_upload(request, max_bytes=100)
        return {"adapter": upload.adapter, "image": len(upload.image)}

    def describe(self):
        return {"model": "m"}

    def check_key(self, request):
        if not self.allowed:
            raise Refused(401, "no key")


@pytest.mark.parametrize("prefix", ["", "/birds"])
def test_http(prefix):
    """Routes, pages and refusals, at / and at the path of a named service."""
    api = pytest.importorskip("efft_kernels.serving.api", reason="FastAPI, of the extra serve, is not installed")
    from starlette.testclient import TestClient

    service = FakeService()
    client = TestClient(api.build(lambda: service), root_path=prefix, follow_redirects=False)
    path = prefix or "/"
    assert client.get(path).json() == client.get(prefix + "/", headers={"accept": "*/*"}).json() == {"model": "m"}
    assert client.post(path, params={"adapter": "a"}, content=b"abc").json() == {"adapter": "a", "image": 3}
    body, headers = form(image=b"abc", adapter="b")
    assert client.post(path, content=body, headers=headers).json() == {"adapter": "b", "image": 3}
    refused = client.post(path, content=b"a" * 101)
    assert (refused.status_code, refused.json()) == (413, {"error": "the body must have at most 100 bytes, got 101"})
    assert client.put(path).headers["allow"] == "GET, POST" and client.get(prefix + "/none").status_code == 404
    for url, accept in ((path, "text/html,*/*;q=0.8"), (prefix + "/docs", "*/*")):
        page = client.get(url, headers={"accept": accept})
        assert page.headers["content-type"].startswith("text/html") and "default-src 'none'" in str(page.headers)
        assert not re.search(r"""(src|href)=["']?(https?:)?//""", page.text), "a page loads something from elsewhere"
    schema = client.get(prefix + "/openapi.json").json()
    assert schema["paths"].keys() == {"/", "/health"} and "multipart/form-data" in str(schema["paths"]["/"]["post"])
    service.allowed = False
    for answer in (client.get(path), client.post(path, content=b"abc")):
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert client.get(path, headers={"accept": "text/html"}).status_code == 200  # the page asks for the key
    assert client.get(prefix + "/health").status_code == 200
    service.stopping = True
    stopping = client.get(prefix + "/health")
    assert stopping.status_code == 503 and stopping.headers["retry-after"] == "1"


@pytest.mark.slow
def test_a_deployment_on_loopback(served, tmp_path):
    """Answers, refusals, a killed replica, clients that leave, overload, and a stop with requests under way."""
    pytest.importorskip("ray.serve", reason="Ray Serve, of the extra serve, is not installed")
    aiohttp = pytest.importorskip("aiohttp")
    load_test, settings, files, want = served
    # half of the queue is enough for the last requests: the killed replica may not be back by then
    settings = settings.model_copy(update={"replicas": 2, "max_ongoing": 8, "max_queued": 80})
    service = load_test.Server(settings, 8971, tmp_path / "log")

    async def ask():
        # a connection for each request, because the server may close a kept one just when it is used again
        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(connector=connector) as session:
            await service.ready(session)
            load = load_test.Load(service, session, files, want)
            await load.run(2.0, 15.0, len(load_test.malformed()), True, load_test.random.Random(0))
            impatient = {"data": files[0], "timeout": aiohttp.ClientTimeout(total=0.02)}

            async def leave(i):
                try:
                    async with session.post(service.url, params={"adapter": f"adapter-{i % 3}"}, **impatient):
                        pass
                except (asyncio.TimeoutError, aiohttp.ClientError):
                    pass

            await asyncio.gather(*[leave(i) for i in range(30)])
            # their requests end too: all replicas become idle and hold no adapter
            end = time.monotonic() + 30
            described = [{"in_use": None}]
            idle = {"adapters": 0, "requests": 0}
            while any(found["in_use"] != idle for found in described) and time.monotonic() < end:
                described = []
                for _ in range(8):
                    async with session.get(service.url) as answer:
                        # the queue may still be full of the requests of those who left
                        described.append(await answer.json() if answer.status == 200 else {"in_use": None})

            async def ask_once():
                async with session.post(service.url, data=files[0], headers={"content-type": "image/png"}) as answer:
                    return answer.status, answer.headers.get("retry-after")

            crowd = await asyncio.gather(*[ask_once() for _ in range(120)])

            async def one(i):
                query, image = {"adapter": "adapter-1", "top": "100"}, files[i % len(files)]
                headers = {"content-type": "image/png"}
                async with session.post(service.url, params=query, headers=headers, data=image) as answer:
                    found = await answer.json()
                    right = answer.status == 200 and load_test.is_right(
                        found, "adapter-1", want[i % len(files), "adapter-1"]
                    )
                    return right or (answer.status, found)

            under_way = [asyncio.create_task(one(i)) for i in range(40)]
            await asyncio.sleep(0.5)
            service.process.send_signal(signal.SIGTERM)
            return load, described, crowd, await asyncio.gather(*under_way, return_exceptions=True)

    try:
        load, described, crowd, last = asyncio.run(ask())
    finally:
        stopped = service.stop()
    problems = load.problems[:5], service.log.read_text()[-2000:]
    assert load.counts["killed"] == 1 and load.counts["malformed"] >= 30
    assert not load.counts["wrong"] and not load.counts["accepted"], problems
    assert described[0]["adapters"] == [f"adapter-{i}" for i in range(3)]
    assert all(found["in_use"] == {"adapters": 0, "requests": 0} for found in described), described
    assert set(crowd) == {(200, None), (503, "1")}, problems
    assert load.counts["sent"] == 46 and not load.counts["lost"], problems
    assert last == [True] * 40 and stopped == 0, (last, problems)


@pytest.mark.slow
def test_the_former_name_deploy():
    """The import path efft_kernels.deploy and its command still work."""
    pytest.importorskip("ray.serve", reason="Ray Serve, of the extra serve, is not installed")
    from efft_kernels import deploy
    from efft_kernels.serving import app

    assert deploy.app is app.app and deploy.Settings is Settings
    command = [sys.executable, "-m", "efft_kernels.deploy", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "python -m efft_kernels.serving" in shown


def test_an_http_server_that_starts_slowly_is_waited_for(monkeypatch):
    pytest.importorskip("ray.serve")
    import ray
    from ray import serve

    settings, calls, stop = Settings(model="test_vit", adapters="."), [], threading.Event()

    def start_serve(http_options):
        calls.append(http_options)
        if len(calls) < 3:
            raise ray.exceptions.ActorDiedError()

    up = SimpleNamespace(applications={"efft": SimpleNamespace(status=SimpleNamespace(value="RUNNING"))})
    for name, stub in {"start": start_serve, "run_many": lambda *_, **__: None, "status": lambda: up}.items():
        monkeypatch.setattr(serve, name, stub)
    monkeypatch.setattr(server, "_answers", lambda *_: True)
    monkeypatch.setattr(stop, "wait", lambda seconds: None)
    server._deploy(None, settings, ServerSettings(), {"port": 1}, stop)
    assert len(calls) == 3
    calls.clear()
    with pytest.raises(start.StartError, match="cannot deploy"):
        server._deploy(None, settings, ServerSettings().model_copy(update={"start_s": 0.0}), {"port": 1}, stop)
    stop.set()
    with pytest.raises(server.Stopped):
        calls.clear()
        server._deploy(None, settings, ServerSettings(), {"port": 1}, stop)
