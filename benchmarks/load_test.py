"""Load test of the service on loopback: no answer is lost or wrong, bad requests are refused, memory stays flat.

    python benchmarks/load_test.py                     # 5 minutes, two replicas of a tiny ViT

Starts ``python -m efft_kernels.serving`` with a random backbone and adapters that it makes, and sends pictures at a
fixed rate, each with a randomly chosen adapter, as raw bodies and as forms. The rate is half of what this machine
answers when 8 clients send as fast as they can for 5 s, and at most 20 per second; or --rate, which may exceed the
capacity: a request that waits for more than 30 s is then lost. The adapters do not all fit the budget, so some are
evicted and loaded again. Replicas are killed (SIGKILL) at equal distances in time, each just after 200 clients sent a
request at once, which they also do at the start and when the next one is up. Malformed requests are sent throughout.

    lost      good requests that had no answer of status 200 after 30 s of retries, or got a 4xx. A request is sent
              again after a broken connection, a time-out of 10 s, and the statuses that docs/serving.md says
              may be sent again
    wrong     answers with another best class, other classes, or a score that differs by more than 1e-4 from what the
              model with this adapter, loaded here by load_adapter, computes for the picture alone. Of two classes as
              close as that, either may be the best
    accepted  malformed requests that were not answered with 4xx
    memory    what each replica alone holds, without libraries and Ray's object store: the median of the last fifth of
              its life over that of the second fifth, flat if it grew by less than 5 %. The first fifth is warm-up
"""

import argparse
import asyncio
import io
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from importlib import metadata
from pathlib import Path

import psutil
import torch
from PIL import Image
from record import begun, prepare_folder, text_table, write_run
from safetensors.torch import save_file

import efft_kernels as ek
from efft_kernels.serving.classifier import base_model, default_preparation
from efft_kernels.serving.settings import Settings
from efft_kernels.serving.uploads import decode

REPEATABLE = 408, 500, 502, 503, 504
TOLERANCE = 1e-4
PATIENCE = 30.0  # seconds of retries
MOST = 20.0  # good requests per second, unless --rate is larger
MODEL = "test_vit"  # timm's smallest: 64 wide, 160 x 160 pixels


def make_adapters(folder: Path, classes: list[int]) -> Settings:
    """Write a checkpoint and an adapter for each number of classes to a folder; returns the settings to serve them."""
    adapters = folder / "adapters"
    adapters.mkdir()
    settings = Settings(model=MODEL, adapters=str(adapters), num_classes=10)
    model = base_model(settings)
    weights = folder / "base.safetensors"
    save_file(model.state_dict(), weights)
    settings = settings.model_copy(update={"weights": str(weights)})
    for i, count in enumerate(classes):
        model = base_model(settings)
        ek.inject(model, ek.EFFTConfig(rank=4, factor_dropout=0.0), head=count)
        torch.manual_seed(i + 1)
        with torch.no_grad():
            for p in model.efft.parameters():
                p.add_(torch.randn_like(p) * 0.1)
            for p in model.head.parameters():
                p.normal_(std=0.3)
        ek.save_adapter(model, adapters / f"adapter-{i}.safetensors")
    return settings


def pictures(count: int, seed: int = 0) -> list[bytes]:
    """Random pictures as files of several formats, modes and sizes."""
    import numpy

    rng, files = numpy.random.default_rng(seed), []
    for i in range(count):
        height, width = rng.integers(64, 400, 2)
        coarse = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype="uint8"))
        image = coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC)
        image = image.convert(("RGB", "L", "P", "CMYK")[i % 4])
        name = "JPEG" if image.mode == "CMYK" else ("PNG", "JPEG", "WEBP")[i % 3]
        if image.mode == "P" and name == "JPEG":
            name = "PNG"
        out = io.BytesIO()
        image.save(out, name)
        files.append(out.getvalue())
    return files


def expected(settings: Settings, files: list[bytes]) -> dict[tuple[int, str | None], list[float]]:
    """{(picture, adapter): probabilities}, one picture at a time, each adapter loaded into a new model."""
    found = {}
    names = [None, *sorted(path.stem for path in Path(settings.adapters).glob("*.safetensors"))]
    for name in names:
        model = base_model(settings)
        transform = default_preparation(model).transform()  # the files of these adapters state none
        if name is not None:
            ek.load_adapter(model, Path(settings.adapters, f"{name}.safetensors"))
        model.eval()
        with torch.inference_mode():
            for i, data in enumerate(files):
                x = transform(decode(data, max_pixels=settings.max_pixels))
                found[i, name] = model(x[None])[0].softmax(0).tolist()
    return found


def is_right(answer: dict, name: str | None, want: list[float]) -> bool:
    """Whether an answer is about this adapter, and has all its classes, the expected scores and best class."""
    scores = {found["index"]: found["score"] for found in answer["scores"]}
    return (
        answer["adapter"] == name
        and scores.keys() == set(range(len(want)))
        and all(abs(scores[i] - p) <= TOLERANCE for i, p in enumerate(want))
        and want[answer["index"]] >= max(want) - TOLERANCE
    )


def png(width: int, height: int, data: bytes = b"", bits: int = 8) -> bytes:
    """A PNG file whose header has this size, with any image data."""
    chunk = lambda kind, body: len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def malformed() -> dict[str, dict]:
    """{name: a request that must be refused, as arguments of Load.ask}"""

    def saved(kind, size=(64, 64), **options):
        out = io.BytesIO()
        Image.effect_noise(size, 90).convert("RGB").save(out, kind, **options)
        return out.getvalue()

    jpeg, good, frames = saved("JPEG"), saved("PNG"), [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    form = lambda body: {"headers": {"content-type": "multipart/form-data; boundary=x"}, "body": body}
    field = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    bodies = {
        "empty": b"",
        "noise": random.Random(0).randbytes(5000),
        "text": b"GET / HTTP/1.1",
        "only a header": good[:20],
        "truncated JPEG": jpeg[: len(jpeg) // 2],
        "truncated PNG": good[: len(good) // 2],
        "truncated WebP": saved("WEBP")[:-200],
        "GIF": saved("GIF"),
        "animated PNG": saved("PNG", save_all=True, append_images=frames),
        "animated WebP": saved("WEBP", save_all=True, append_images=frames),
        "bomb in a header": png(60_000, 60_000),
        "bomb with data": png(9_000, 9_000, zlib.compress(bytes(3 * 9_000 * 9_000 + 9_000), 9)),
        "no pixels": png(0, 0),
        "one pixel wide": png(1, 60_000, zlib.compress(bytes(4 * 60_000))),
        "ten thousand scans": jpeg[:-2] + scan * 10_000 + b"\xff\xd9",
        "too large": bytes(20 * 2**20 + 5000),
    }
    return {
        **{name: {"body": body} for name, body in bodies.items()},
        "path in the name": {"query": {"adapter": "../../etc/passwd"}, "body": good},
        "absolute name": {"query": {"adapter": "/etc/passwd"}, "body": good},
        "null byte in the name": {"query": {"adapter": "a\0b"}, "body": good},
        "long name": {"query": {"adapter": "a" * 5000}, "body": good},
        "unknown adapter": {"query": {"adapter": "nobody"}, "body": good},
        "top not a number": {"query": {"top": "many"}, "body": good},
        "top too large": {"query": {"top": "9" * 400}, "body": good},
        "JSON": {"headers": {"content-type": "application/json"}, "body": b"{}"},
        "form without an image": form(b'--x\r\nContent-Disposition: form-data; name="adapter"\r\n\r\na\r\n--x--\r\n'),
        "not a form": form(b"nothing of the kind"),
        "form cut off": form(field + good[:30]),
        "form without a boundary": {"headers": {"content-type": "multipart/form-data"}, "body": good},
        "form with many fields": form(b"".join([field.replace(b"image", b"a") + b"a\r\n"] * 500) + b"--x--\r\n"),
        "form with a truncated picture": form(field + good[:100] + b"\r\n--x--\r\n"),
        "PUT": {"method": "PUT", "body": good},
        "DELETE": {"method": "DELETE", "body": b""},
    }


class Server:
    """The service, started by its command in another process, with ``more`` options of the command."""

    def __init__(self, settings: Settings, port: int, log: Path, *more: str):
        given = {**settings.model_dump(exclude_defaults=True), "port": port}
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        command = [sys.executable, "-m", "efft_kernels.serving", *flags, *more]
        self.url, self.log = f"http://127.0.0.1:{port}/", log
        with open(log, "wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out)

    async def ready(self, seconds: float = 300) -> None:
        """Wait until the command says that it serves: all replicas are up."""
        end = time.monotonic() + seconds
        while "\nserving " not in self.log.read_text():
            if time.monotonic() > end or self.process.poll() is not None:
                raise RuntimeError(f"the server did not start: {self.log.read_text()[-3000:]}")
            await asyncio.sleep(0.2)

    def replicas(self) -> dict[int, psutil.Process]:
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::ServeReplica:"):
                    found[process.pid] = process
            except psutil.Error:
                pass
        return found

    def kill(self, rng: random.Random) -> None:
        """Kill one of the replicas."""
        os.kill(rng.choice(sorted(self.replicas())), signal.SIGKILL)

    def stop(self, seconds: float = 180) -> int:
        """Stop the service by SIGTERM, or SIGKILL after ``seconds``; returns its exit status."""
        left = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            for process in psutil.wait_procs(left, timeout=10)[1]:
                process.kill()


class Load:
    """Clients that send good and malformed requests, and what they counted."""

    def __init__(self, server: Server, session, files, want):
        self.server, self.session, self.files, self.want = server, session, files, want
        self.seconds, self.counts, self.statuses, self.again = [], Counter(), Counter(), Counter()
        self.refusals: dict[str, Counter] = {}
        self.problems: list[str] = []
        self.memory: dict[int, list[tuple[float, int]]] = {}

    async def ask(self, method="POST", query=None, headers=None, body=b"", form=None):
        """Send a request until its answer is final: (status, data), or (None, reason) if there was none in PATIENCE."""
        import aiohttp

        end, reason, wait = time.monotonic() + PATIENCE, "", 0.05
        while time.monotonic() < end:
            try:
                data = form() if form else body
                timeout = aiohttp.ClientTimeout(total=10)
                async with self.session.request(
                    method, self.server.url, params=query, headers=headers, data=data, timeout=timeout
                ) as answer:
                    if answer.status not in REPEATABLE:
                        return answer.status, await answer.json(content_type=None)
                    reason = str(answer.status)
            except (aiohttp.ClientError, asyncio.TimeoutError, ConnectionError) as error:
                reason = type(error).__name__
            self.again[reason] += 1
            await asyncio.sleep(wait)
            wait = min(2 * wait, 1.0)
        return None, reason

    async def good(self, i: int, name: str | None, as_form: bool) -> None:
        import aiohttp

        fields = {"top": "100"} | ({} if name is None else {"adapter": name})

        def form():
            made = aiohttp.FormData(fields)
            made.add_field("image", self.files[i], filename="picture")
            return made

        start = time.monotonic()
        if as_form:
            status, data = await self.ask(form=form)
        else:
            headers = {"content-type": "application/octet-stream"}
            status, data = await self.ask(query=fields, headers=headers, body=self.files[i])
        self.seconds.append(time.monotonic() - start)
        self.counts["sent"] += 1
        self.statuses[str(status)] += 1
        if status != 200:
            self.counts["lost"] += 1
            self.problems.append(f"lost: picture {i}, {name}: {status} {data}")
        elif not is_right(data, name, self.want[i, name]):
            self.counts["wrong"] += 1
            self.problems.append(f"wrong: picture {i}, {name}: {data}")

    async def bad(self, what: str, request: dict) -> None:
        try:
            status, data = await self.ask(**{"headers": {"content-type": "application/octet-stream"}, **request})
        except ValueError as error:  # the client library refuses to send it
            status, data = None, str(error)
        self.refusals.setdefault(what, Counter())[str(status)] += 1
        self.counts["malformed"] += 1
        if status is None or not 400 <= status < 500:
            self.counts["accepted"] += 1
            self.problems.append(f"accepted: {what}: {status} {data}")

    async def watch(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            for pid, process in self.server.replicas().items():
                try:
                    found = process.memory_info()
                    self.memory.setdefault(pid, []).append((time.monotonic(), found.rss - found.shared))
                except psutil.Error:
                    pass
            await asyncio.sleep(1)

    async def capacity(self, rng: random.Random, seconds: float = 5.0, clients: int = 8) -> float:
        """Good answers per second to this many clients, each of which sends its next request once it is answered."""
        names = sorted({name for _, name in self.want}, key=str)
        start = time.monotonic()

        async def client():
            while time.monotonic() < start + seconds:
                await self.good(rng.randrange(len(self.files)), rng.choice(names), False)

        await asyncio.gather(*[client() for _ in range(clients)])
        return self.statuses["200"] / (time.monotonic() - start)

    async def run(
        self, seconds: float, rate: float, bad: int, kills: int, rng: random.Random, clients: int = 16
    ) -> None:
        """Load for some seconds; before each of the kills of a replica, as many clients send a request at once.

        They also do 5 s from the start and 20 s after each kill: a replica shall have held the most that it will hold
        in the first fifth of its life, so that what grows later is a leak.
        """
        stop, tasks = asyncio.Event(), set()
        watching = asyncio.create_task(self.watch(stop))
        names = sorted({name for _, name in self.want}, key=str)
        total, bad_requests = max(1, int(seconds * rate)), list(malformed().items())
        start = time.monotonic()
        kills_at = [total * (i + 1) // (kills + 1) for i in range(kills)]
        crowds_at = {*kills_at, int(5 * rate), *(n + int(20 * rate) for n in kills_at)}

        def launch(coroutine):
            task = asyncio.create_task(coroutine)
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        sent_bad = 0
        for n in range(total):
            await asyncio.sleep(max(0.0, start + n / rate - time.monotonic()))
            launch(self.good(rng.randrange(len(self.files)), rng.choice(names), rng.random() < 0.3))
            while sent_bad < bad * (n + 1) // total:
                launch(self.bad(*bad_requests[sent_bad % len(bad_requests)]))
                sent_bad += 1
            for _ in range(clients * (n in crowds_at)):
                launch(self.good(rng.randrange(len(self.files)), rng.choice(names), False))
            if n in kills_at:  # it dies with some of them
                self.counts["killed"] += 1
                await asyncio.sleep(0.02)
                self.server.kill(rng)
        while tasks:
            await asyncio.wait(set(tasks))
        stop.set()
        await watching


def growth(samples: list[tuple[float, int]]) -> float | None:
    """Growth of the median from the second fifth of the samples to the last; None for too few samples."""
    rss = [bytes_ for _, bytes_ in samples]
    fifth = len(rss) // 5
    if fifth < 3:
        return None
    return statistics.median(rss[-fifth:]) / statistics.median(rss[fifth : 2 * fifth]) - 1


async def measure(args, server: Server, files, want) -> Load:
    import aiohttp

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=256)) as session:
        await server.ready()
        if args.rate is None:
            args.rate = min(MOST, 0.5 * await Load(server, session, files, want).capacity(random.Random(1)))
            if not args.rate:
                raise RuntimeError(f"nothing was answered in 5 s: {server.log.read_text()[-3000:]}")
        load = Load(server, session, files, want)
        kills = args.kills * (args.replicas > 1)
        await load.run(60 * args.minutes, args.rate, args.malformed, kills, random.Random(0), args.clients)
    return load


def summary(load: Load, args, stopped: int) -> dict:
    ordered = sorted(load.seconds)
    at = lambda q: ordered[min(len(ordered) - 1, int(q * len(ordered)))]
    memory = []
    for pid, samples in load.memory.items():
        first, largest = samples[0][1], max(bytes_ for _, bytes_ in samples)
        sizes = {"first_bytes": first, "largest_bytes": largest, "growth": growth(samples)}
        memory.append({"pid": pid, "samples": len(samples), **sizes})
    grown = [m["growth"] for m in memory if m["growth"] is not None]  # a replica that was killed has too few samples
    return {
        "rate": args.rate,
        **{name: load.counts[name] for name in ("sent", "lost", "wrong", "malformed", "accepted")},
        "replicas_killed": load.counts["killed"],
        "sent_again": dict(load.again),
        "seconds": {"median": at(0.5), "p90": at(0.9), "p99": at(0.99), "largest": ordered[-1]},
        "memory": memory,
        "memory_flat": max(grown) < 0.05 if grown else None,
        "exit_status_after_sigterm": stopped,
        "problems": load.problems[:50],
        "results": [
            {"request": what, "status": status, "count": count}
            for what, counts in {"image": load.statuses, **load.refusals}.items()
            for status, count in counts.items()
        ],
    }


def show(found: dict) -> None:
    rows = [["requests per second", f"{found['rate']:.1f}"]]
    rows += [[name, found[name]] for name in ("sent", "lost", "wrong", "malformed", "accepted", "replicas_killed")]
    rows.append(["sent again, by reason", ", ".join(f"{k}: {v}" for k, v in found["sent_again"].items()) or "none"])
    rows += [[f"{name}, s", f"{value:.3f}"] for name, value in found["seconds"].items()]
    for m in found["memory"]:
        grown = "too few samples" if m["growth"] is None else f"{m['growth']:+.1%}"
        first, largest = (m[name] / 2**20 for name in ("first_bytes", "largest_bytes"))
        rows.append([f"replica {m['pid']}, MiB", f"{first:.0f} to {largest:.0f}, {grown}"])
    flat = "not measured" if found["memory_flat"] is None else found["memory_flat"]
    rows += [["memory flat", flat], ["exit status", found["exit_status_after_sigterm"]]]
    print(text_table(["", "found"], rows))
    for problem in found["problems"][:10]:
        print(problem[:300])


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=5.0, help="duration of the load (default: 5)")
    p.add_argument("--rate", type=float, help="good requests per second (default: half the capacity, at most 20)")
    p.add_argument("--malformed", type=int, default=1000, help="malformed requests (default: 1000)")
    p.add_argument("--replicas", type=int, default=2, help="replicas of the service (default: 2)")
    p.add_argument("--kills", type=int, default=3, help="replicas to kill, if there are several (default: 3)")
    p.add_argument("--clients", type=int, default=200, help="that send a request at once, see above (default: 200)")
    p.add_argument("--adapters", type=int, default=12, help="of which two thirds fit the budget (default: 12)")
    p.add_argument("--port", type=int, default=8142, help="port of the service (default: 8142)")
    p.add_argument("--out", type=Path, help="folder for load_test.csv and load_test.json")
    args = p.parse_args(argv)
    rate = 1 if args.rate is None else args.rate
    if not all(value > 0 for value in (args.minutes, rate, args.replicas, args.adapters)) or args.malformed < 0:
        p.error("minutes, rate, replicas and adapters must be positive, malformed not negative")
    if args.out:
        prepare_folder(args.out)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        settings = make_adapters(Path(folder), [3 + i for i in range(args.adapters)])
        sizes = sorted(file.stat().st_size for file in Path(settings.adapters).iterdir())
        budget = max(sizes[-1], sum(sizes) * 2 // 3)
        settings = settings.model_copy(update={"replicas": args.replicas, "adapter_bytes": budget})
        files = pictures(24)
        want = expected(settings, files)
        server = Server(settings, args.port, Path(folder, "server.log"))
        try:
            load = asyncio.run(measure(args, server, files, want))
        finally:
            stopped = server.stop()
        found = summary(load, args, stopped)
    show(found)
    if args.out:
        record = begun("load_test", args) | {"complete": True}
        record["versions"] |= {name: metadata.version(name) for name in ("ray", "timm", "pillow")}
        write_run(args.out, {**record, **found})
    good = not (found["lost"] or found["wrong"] or found["accepted"] or stopped) and found["memory_flat"]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
