"""The deployment: what is refused before it costs anything, adapters on demand, and one start of Ray on loopback."""

import asyncio
import io
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from models import timm

from efft_kernels.serving.folder import AdapterFolder, DoesNotFit
from efft_kernels.serving.uploads import Refused, check_adapter_name, decode, read_upload

starlette = pytest.importorskip("starlette.requests", reason="starlette, of the extra serve, is not installed")
pytest.importorskip("python_multipart", reason="python-multipart, of the extra serve, is not installed")
Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PIXELS = 1_000_000


def saved(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


# -- pictures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def picture():
    import numpy

    return Image.fromarray(numpy.arange(40 * 30 * 3, dtype="uint8").reshape(30, 40, 3))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA"])
def test_modes_become_rgb(picture, mode):
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
    exif[0x0112] = 6  # lies on its side
    got = decode(saved(picture, "PNG", exif=exif), max_pixels=PIXELS)
    assert got.size == (30, 40)
    assert got.tobytes() == picture.transpose(Image.Transpose.ROTATE_270).tobytes()


def test_the_size_is_checked_before_anything_is_decoded(picture, monkeypatch):
    from PIL import ImageFile

    loads = []
    honest = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: loads.append(1) or honest(self))
    with pytest.raises(Refused, match="at most 1199 pixels, got 40 x 30") as refused:
        decode(saved(picture), max_pixels=1199)
    assert refused.value.status == 413 and not loads
    decode(saved(picture), max_pixels=1200)
    assert loads


def test_16_bit_colours_and_a_phones_second_picture(picture):
    import numpy

    deep = numpy.asarray(picture).astype(">u2") * 257
    chunk = lambda kind, body: len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    header = (40).to_bytes(4, "big") + (30).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in deep))
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    assert decode(file, max_pixels=PIXELS).tobytes() == picture.tobytes()
    first = decode(saved(picture, "MPO", save_all=True, append_images=[picture.rotate(90)]), max_pixels=PIXELS)
    assert first.size == (40, 30) and first.mode == "RGB"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_metadata_that_is_nonsense_harms_no_picture(picture, kind):
    for exif in (b"Exif\0\0MM\0*\0\0\0\x08" + b"\xff" * 200, b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0"):
        assert decode(saved(picture, kind, exif=exif), max_pixels=PIXELS).size == (40, 30)


def test_a_line_would_grow_with_the_models_size():
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


def test_a_request_that_is_malformed_is_refused_with_4xx(tmp_path):
    """every one of the load test's, through parsing, decoding and the folder; and it takes no time or memory"""
    folder = AdapterFolder(FakeBank(), tmp_path, 1000)
    for what, request in malformed().items():
        if "method" in request:
            continue
        headers = {"content-type": "application/octet-stream"} | request.get("headers", {})
        with pytest.raises((Refused, FileNotFoundError)) as refused:
            upload = asyncio.run(parse(request["body"], headers, request.get("query"), max_bytes=10 * 2**20))[0]
            if upload.adapter:
                folder.take(upload.adapter)
            decode(upload.image, max_pixels=25_000_000)
        assert getattr(refused.value, "status", 404) in (400, 404, 413, 415, 422), what


def test_every_prefix_of_a_file_is_refused_or_whole(picture):
    for kind in ("JPEG", "PNG", "WEBP"):
        data = saved(picture, kind)
        for end in range(0, len(data) - 20, 97):
            with pytest.raises(Refused):
                decode(data[:end], max_pixels=PIXELS)


# -- requests ---------------------------------------------------------------------------------------------------------


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


def test_a_body_and_a_form_say_the_same():
    raw = read(b"abc", {"content-type": "image/png"}, {"adapter": "cats", "top": "3"})
    assert (raw.image, raw.adapter, raw.top) == (b"abc", "cats", 3)
    assert read(*form(image=b"abc", adapter="cats", top="3")) == raw
    assert read(b"abc").adapter is None and read(b"abc").top == 5


def test_too_much_is_not_read():
    assert status_of(b"a" * 1001) == 413
    upload = parse(b"a" * 5000, {"content-length": None}, chunk=100)
    with pytest.raises(Refused, match="at most 1000 bytes"):
        asyncio.run(upload)
    assert status_of(b"a" * 5000, {"content-length": "10"}) == 413  # a lie
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


# -- adapters on demand -----------------------------------------------------------------------------------------------


class FakeBank:
    def __init__(self, factor=1):
        self.held, self.factor, self.most = {}, factor, 0

    def add(self, name, path):
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


def test_the_least_recently_used_goes_first(folder):
    for name in "abab":
        touch(folder, name)
    assert folder.bank.names == ["a", "b"] and folder.loads == 2
    touch(folder, "a")
    touch(folder, "c")
    assert folder.bank.names == ["a", "c"] and folder.evictions == 1
    assert folder.bytes == 200 and folder.bank.most <= 250


def test_what_is_in_use_stays(folder):
    with folder.hold("a"), folder.hold("b"):
        with pytest.raises(DoesNotFit, match="'c' does not fit the 250 bytes beside 2 in use"):
            folder.take("c")
        assert folder.bank.names == ["a", "b"]
        with folder.hold("a"):
            pass
    touch(folder, "c")
    assert folder.bank.names == ["a", "c"]  # a was used last
    with folder.hold("c"), pytest.raises(DoesNotFit):
        folder._make_room("d", 200)
    assert folder.bank.names == ["a", "c"]  # nothing goes for what does not fit even then
    with folder.hold("a") as oldest:
        touch(folder, "c")
        touch(folder, "d")
        assert folder.bank.names == ["a", "d"] and oldest in folder.bank.held


def test_files_that_are_replaced_deleted_or_bad(folder):
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
        folder.take("a")
    (folder.path / "c.safetensors").write_bytes(b"bad")
    with pytest.raises(ValueError):
        folder.take("c")
    (folder.path / "d.safetensors").write_bytes(b"d" * 251)
    with pytest.raises(ValueError, match="larger than the budget of 250"):
        folder.take("d")
    assert folder.names() == ["b", "c", "d"]
    touch(folder, "b")


def test_an_adapter_that_grows_in_memory(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.safetensors").write_bytes(b"x" * 100)
    folder = AdapterFolder(FakeBank(factor=2), tmp_path, 250)
    touch(folder, "a")
    touch(folder, "b")
    assert folder.bank.names == ["b"]
    tight = AdapterFolder(FakeBank(factor=3), tmp_path, 250)
    with pytest.raises(DoesNotFit):
        tight.take("a")
    assert not tight.bank.held and not tight.loaded


def test_many_threads(folder):
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
    assert not failures and not folder._held and folder.bank.most <= 250


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        AdapterFolder(FakeBank(), tmp_path / "none", 1)


# -- settings ---------------------------------------------------------------------------------------------------------


def test_images_are_prepared_as_efft_finetune_does(tmp_path):
    from efft_kernels.serving.app import Settings, base_model
    from efft_kernels.finetune.data import transform
    from efft_kernels.finetune.models import normalisation

    picture = Image.frombytes("RGB", (170, 90), torch.arange(90 * 170 * 3).remainder(251).byte().numpy().tobytes())
    model, made = base_model(Settings("test_vit", str(tmp_path), preparation="efft-finetune"))
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in normalisation(model, "imagenet"))
    want = (torch.as_tensor(transform(160, "none", "bicubic")(picture)) / 255 - mean) / std
    torch.testing.assert_close(made(picture), want)
    other = base_model(Settings("test_vit", str(tmp_path)))[1](picture)
    assert other.shape == want.shape and (other - want).abs().max() > 0.1


def test_settings():
    from efft_kernels.serving.app import Settings, _settings

    made = _settings({"model": "m", "adapters": "x", "replicas": "3", "batch_wait_ms": "2.5"})
    assert (made.replicas, made.batch_wait_ms, made.adapters) == (3, 2.5, os.path.abspath("x"))
    for args, says in [
        ({"model": "m"}, "must have adapters"),
        ({"model": "m", "adapters": "x", "repliccas": 2}, "got repliccas"),
        ({"model": "m", "adapters": "x", "replicas": "two"}, "of the types"),
        ({"model": "m", "adapters": "x", "replicas": 0}, "replicas must be at least 1, got 0"),
        ({"model": "m", "adapters": "x", "dtype": "int8"}, "dtype must be"),
        ({"model": "m", "adapters": "x", "preparation": "no"}, "preparation must be"),
    ]:
        with pytest.raises(ValueError, match=says):
            _settings(args)
    with pytest.raises(ValueError, match="device must be"):
        Settings("m", "x", device="tpu")


# -- the whole --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(settings, pictures, expected answers) of a tiny model with three adapters"""
    timm()
    sys.path.append(str(BENCHMARKS))
    import load_test

    folder = tmp_path_factory.mktemp("served")
    settings = load_test.make_adapters(folder, [3, 4, 5])
    Path(settings.adapters, "adapter-0.labels.txt").write_text("ant\nbee\ncat\n")
    files = load_test.pictures(4)
    return load_test, settings, files, load_test.expected(settings, files)


def test_a_mixed_batch_is_what_each_adapter_says_alone(served):
    from efft_kernels.serving.app import Classifier, Settings
    from efft_kernels.serving.uploads import Upload

    load_test, settings, files, want = served
    classifier = Classifier(Settings(**vars(settings) | {"adapter_bytes": 100_000}))
    names = [None, "adapter-0", "adapter-2", "adapter-1", None, "adapter-0"]
    uploads = [Upload(files[i % len(files)], name, 100) for i, name in enumerate(names)]
    images, keys = zip(*[classifier.prepare(upload) for upload in uploads])
    scores = classifier.classify(list(images), list(keys))
    for i, (name, upload, found) in enumerate(zip(names, uploads, scores)):
        answer = classifier.answer(upload, found)
        assert load_test.is_right(answer, name, want[i % len(files), name])
        labels = ["ant", "bee", "cat"] if name == "adapter-0" else "0123456789"
        assert answer["label"] == labels[answer["index"]]
    for key in keys:
        classifier.release(key)
    assert not classifier.folder._held

    Path(settings.adapters, "broken.safetensors").write_bytes(b"not an adapter")
    for name, status in (("broken", 422), ("nobody", 404)):
        with pytest.raises(Refused) as refused:
            classifier.prepare(Upload(files[0], name, 5))
        assert refused.value.status == status
        assert settings.adapters not in str(refused.value)  # paths are not for strangers
    with pytest.raises(Refused) as refused:
        classifier.prepare(Upload(files[0][:50], "adapter-0", 5))
    assert refused.value.status in (415, 422) and not classifier.folder._held
    Path(settings.adapters, "broken.safetensors").unlink()


def test_scores_that_are_no_numbers_are_refused(served):
    from efft_kernels.serving.app import Classifier
    from efft_kernels.serving.uploads import Upload

    _, settings, files, _ = served
    classifier = Classifier(settings)
    uploads = [Upload(files[0], name, 5) for name in ("adapter-0", "adapter-1")]
    images, keys = zip(*map(classifier.prepare, uploads))
    with torch.no_grad():
        classifier.bank.parameters(keys[0])[0].fill_(float("nan"))
    bad, good = classifier.classify(list(images), list(keys))
    with pytest.raises(Refused, match="'adapter-0' gives scores for this image that are not finite") as refused:
        classifier.answer(uploads[0], bad)
    assert refused.value.status == 422 and classifier.answer(uploads[1], good)["adapter"] == "adapter-1"


def test_what_a_thread_made_for_somebody_who_left_is_undone(caplog):
    from efft_kernels.serving.app import in_thread

    begun, go, undone = threading.Event(), threading.Event(), []

    def work(name):
        begun.set()
        go.wait(10)
        return name

    async def run(pool):
        tasks = [asyncio.create_task(in_thread(pool, work, name, undo=undone.append)) for name in ("one", "two", "three")]
        await asyncio.get_running_loop().run_in_executor(None, begun.wait, 10)
        tasks[0].cancel()  # under way
        tasks[1].cancel()  # not begun
        await asyncio.sleep(0)
        go.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with ThreadPoolExecutor(1) as pool:
        one, two, three = asyncio.run(run(pool))
    assert isinstance(one, asyncio.CancelledError) and isinstance(two, asyncio.CancelledError) and three == "three"
    assert undone == ["one"] and not caplog.records


@pytest.mark.parametrize("busy, least, most", [([], 0.5, 2), ([(0.2, 0.4)], 0.75, 2), ([(0, 99)], 2, 4)], ids=str)
def test_a_stop_waits_for_what_comes_late(busy, least, most, monkeypatch):
    """idle, or so it seems while a request is about to be tried again; and not for ever"""
    from efft_kernels.serving import app

    monkeypatch.setattr(app, "IDLE_S", 0.5)
    start = time.monotonic()

    class Handle:
        @property
        def busy(self):
            return self

        def remote(self):
            return self

        def result(self, timeout_s):
            return int(any(begin <= time.monotonic() - start < end for begin, end in busy))

    app._wait_until_idle(Handle(), 3, 2.0)
    assert least <= time.monotonic() - start < most


def test_a_deployment_on_loopback(served, tmp_path):
    """answers, refusals, a replica killed, and an orderly stop that answers what is under way"""
    pytest.importorskip("ray.serve", reason="Ray Serve, of the extra serve, is not installed")
    aiohttp = pytest.importorskip("aiohttp")
    load_test, settings, files, want = served
    from efft_kernels.serving.app import Settings

    settings = Settings(**vars(settings) | {"replicas": 2, "max_ongoing": 8, "max_queued": 40})
    server = load_test.Server(settings, 8971, tmp_path / "log")

    async def ask():
        async with aiohttp.ClientSession() as session:
            await server.ready(session)
            load = load_test.Load(server, session, files, want)
            await load.run(2.0, 15.0, len(load_test.malformed()), True, load_test.random.Random(0))
            gone = {"data": files[0], "timeout": aiohttp.ClientTimeout(total=0.02)}

            async def leave(i):
                try:
                    async with session.post(server.url, params={"adapter": f"adapter-{i % 3}"}, **gone):
                        pass
                except asyncio.TimeoutError:
                    pass

            await asyncio.gather(*[leave(i) for i in range(30)])
            # what those held is given back: all is idle, and every replica could drop every adapter
            end = time.monotonic() + 30
            described = [{"in_use": None}]
            idle = {"adapters": 0, "requests": 0}
            while any(found["in_use"] != idle for found in described) and time.monotonic() < end:
                described = []
                for _ in range(8):
                    async with session.get(server.url) as answer:
                        described.append(await answer.json())

            async def ask_once():
                async with session.post(server.url, data=files[0], headers={"content-type": "image/png"}) as answer:
                    return answer.status, answer.headers.get("retry-after")

            crowd = await asyncio.gather(*[ask_once() for _ in range(120)])

        # on connections of their own: one that is kept after an answer may be closed just when it is used again
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:

            async def one(i):
                query, image = {"adapter": "adapter-1", "top": "100"}, files[i % len(files)]
                headers = {"content-type": "image/png"}
                async with session.post(server.url, params=query, headers=headers, data=image) as answer:
                    return load_test.is_right(await answer.json(), "adapter-1", want[i % len(files), "adapter-1"])

            under_way = [asyncio.create_task(one(i)) for i in range(40)]
            await asyncio.sleep(0.5)
            server.process.send_signal(signal.SIGTERM)
            return load, described, crowd, await asyncio.gather(*under_way, return_exceptions=True)

    try:
        load, described, crowd, last = asyncio.run(ask())
    finally:
        stopped = server.stop()
    problems = load.problems[:5], server.log.read_text()[-2000:]
    assert load.counts["killed"] == 1 and load.counts["malformed"] >= 30
    assert not load.counts["wrong"] and not load.counts["accepted"], problems
    assert described[0]["adapters"] == [f"adapter-{i}" for i in range(3)]
    assert all(found["in_use"] == {"adapters": 0, "requests": 0} for found in described), described
    assert set(crowd) == {(200, None), (503, "1")}, problems
    assert load.counts["sent"] == 46 and not load.counts["lost"], problems
    assert last == [True] * 40 and stopped == 0, (last, problems)


def test_the_name_deploy():
    from efft_kernels import deploy
    from efft_kernels.serving import app

    assert deploy is app
    command = [sys.executable, "-m", "efft_kernels.deploy", "--help"]
    assert "python -m efft_kernels.serving" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
