"""Image classification with one backbone and any number of adapters, as a Ray Serve deployment.

Start it on one machine:

    python -m efft_kernels.serving --model vit_base_patch16_224 --weights base.safetensors --adapters adapters/

on a running Ray cluster by the same command with ``--address auto``; or by Ray's own, with any of the settings:

    serve run efft_kernels.serving.app:app model=vit_base_patch16_224 weights=base.safetensors adapters=adapters/

or from a file, for ``serve run`` and ``serve deploy``:

    applications:
    - name: efft
      import_path: efft_kernels.serving.app:app
      args: {model: vit_base_patch16_224, weights: base.safetensors, adapters: adapters/, replicas: 4}

On a cluster every node needs the files under the same paths.

Ask it:

    curl --data-binary @cat.jpg 'http://127.0.0.1:8000/?adapter=pets'
    curl -F image=@cat.jpg -F adapter=pets http://127.0.0.1:8000/
    {"adapter": "pets", "label": "Abyssinian", "index": 0, "score": 0.97,
     "scores": [{"label": "Abyssinian", "index": 0, "score": 0.97}, {"label": "Bengal", ...}, ...]}

``adapter`` is the name of a file of save_adapter in the folder, without its ending; without it the model answers as it
is. ``top`` says how many scores are wanted. Labels are the lines of ``NAME.labels.txt`` beside the adapter, or the
numbers of the classes. The folder is read when a name is asked for: put a file there, and it is served.

Requests of different adapters that arrive together are one batch, and one pass of the model. A body that is larger than
``max_bytes``, or an image of more than ``max_pixels``, is refused before it is decoded. While a request waits for a
replica Ray's proxy keeps of its body whatever arrives: where strangers ask, put a web server with a limit before it.

Answers: 200; 400, 404, 405, 411, 413, 415, 422 for requests that would be refused again; 408, 500, 502, 503, 504 for
those that may be sent again, because an answer changes nothing: 503, with Retry-After, where too many requests wait or
there is no room in the budget beside the adapters in use; 500 among others if a replica died with the request.
``GET /`` describes the service and one replica, ``GET /-/healthz`` says whether it is up. Metrics are Ray's,
and those with the prefix ``efft_``.

On SIGTERM or SIGINT requests under way are answered, then it stops. An image decoder that crashes, as no picture should
make it, takes one replica with it, and Ray starts another.
"""

import asyncio
import importlib.util
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

from ..extras import timm
from .folder import AdapterFolder, DoesNotFit
from .uploads import Refused, Upload, decode, read_upload

log = logging.getLogger("efft_kernels.serving")
RETRY_S = 1  # after which to ask again what was answered with 503


@dataclass(frozen=True)
class Settings:
    """What is served, and within which limits.

    Args:
        model: a model of timm, by name.
        adapters: folder with adapter files.
        weights: checkpoint of the model, a file; empty for random weights, to try it out.
        num_classes: of the checkpoint; 0 for the number that the model has in timm.
        preparation: of images: "model" as timm evaluates these weights, "efft-finetune" as that command trains by default
            (squashed to the square, ImageNet's mean and deviation). An adapter needs what it was trained with.
        labels: file with the names of the model's own classes, one a line.
        dtype: that the model computes in: float32, bfloat16 or float16.
        device: "cpu" or "cuda".
        backend: a name from efft_kernels.backends(), empty for the fastest that is proven.
        replicas: processes that hold the model.
        threads: that each of them computes with; as many CPUs of the cluster are reserved for it.
        max_batch: images in one pass of the model.
        batch_wait_ms: how long an image waits for others to make a batch with.
        adapter_bytes: memory for adapters in each replica.
        max_bytes: of one image file.
        max_pixels: of one image.
        max_ongoing: requests that a replica takes in at once; more wait.
        max_queued: requests that wait; more are answered with 503.
        stop_s: seconds for requests under way when a replica is stopped.
    """

    model: str
    adapters: str
    weights: str = ""
    num_classes: int = 0
    preparation: str = "model"
    labels: str = ""
    dtype: str = "float32"
    device: str = "cpu"
    backend: str = ""
    replicas: int = 1
    threads: int = 1
    max_batch: int = 16
    batch_wait_ms: float = 5.0
    adapter_bytes: int = 2**30
    max_bytes: int = 10 * 2**20
    max_pixels: int = 25_000_000
    max_ongoing: int = 32
    max_queued: int = 128
    stop_s: float = 20.0

    def __post_init__(self):
        for name in ("replicas", "threads", "max_batch", "adapter_bytes", "max_bytes", "max_pixels", "max_ongoing"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_classes", "batch_wait_ms", "max_queued", "stop_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.preparation not in ("model", "efft-finetune"):
            raise ValueError(f"preparation must be 'model' or 'efft-finetune', got {self.preparation!r}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {self.dtype!r}")
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda', got {self.device!r}")


# -- the model --------------------------------------------------------------------------------------------------------


class Classifier:
    """The model with its adapters: bytes of images in, classes out. Knows nothing of Ray."""

    def __init__(self, settings: Settings):
        from .bank import AdapterBank

        torch.set_num_threads(settings.threads)
        self.settings, self.dtype = settings, getattr(torch, settings.dtype)
        self.model, self.transform = base_model(settings)
        self.bank = AdapterBank(self.model, backend=settings.backend or None)
        self.folder = AdapterFolder(self.bank, settings.adapters, settings.adapter_bytes)
        self.own_labels = _lines(settings.labels) if settings.labels else []

    def prepare(self, upload: Upload) -> tuple[Tensor, str | None]:
        """(image [3, H, W], adapter's name in the bank, held until :meth:`release`)."""
        key = self._take(upload.adapter)  # before what costs more
        try:
            return self.transform(decode(upload.image, max_pixels=self.settings.max_pixels)), key
        except BaseException:
            self.release(key)
            raise

    def _take(self, adapter: str | None) -> str | None:
        if adapter is None:
            return None
        try:
            return self.folder.take(adapter)
        except FileNotFoundError as error:
            raise Refused(404, f"there is no adapter {adapter!r}") from error
        except DoesNotFit as error:
            raise Refused(503, str(error)) from error
        except ValueError as error:  # whose sentence has the path, which is not for strangers
            log.warning("adapter %r cannot be served: %s", adapter, error)
            raise Refused(422, f"adapter {adapter!r} cannot be served: its file does not fit the model") from error

    def release(self, key: str | None) -> None:
        if key is not None:
            self.folder.give(key)

    def classify(self, images: list[Tensor], keys: list[str | None]) -> list[Tensor]:  # each [classes]
        """Probabilities of each image under its adapter, from one pass of the model."""
        x = torch.stack(images).to(self.settings.device, self.dtype)
        with torch.inference_mode(), self.bank.use(keys):
            logits = self.model(x).float().cpu()
            return [row[: self.bank.classes(key)].softmax(0) for row, key in zip(logits, keys)]

    def answer(self, upload: Upload, scores: Tensor) -> dict:
        """What the request gets, as data for JSON.

        Raises:
            Refused: 422, scores that are no numbers: of an adapter that diverged, or that overflowed for this image.
        """
        if not scores.isfinite().all():
            raise Refused(422, f"adapter {upload.adapter!r} gives scores for this image that are not finite")
        labels = self._labels(upload.adapter, len(scores))
        best = scores.topk(min(upload.top, len(scores)))
        found = [
            {"label": labels[index] if labels else str(index), "index": index, "score": score}
            for score, index in zip(best.values.tolist(), best.indices.tolist())
        ]
        return {"adapter": upload.adapter, **found[0], "scores": found}

    def _labels(self, adapter: str | None, classes: int) -> list[str]:
        if adapter is None:
            labels = self.own_labels
        else:
            path = self.folder.path / f"{adapter}.labels.txt"
            labels = _lines(path) if path.is_file() else []
        return labels if len(labels) == classes else []


def base_model(settings: Settings):
    """(the model, in eval mode, without adapters; what makes its input of a PIL image)"""
    library = timm("serve")
    classes = {"num_classes": settings.num_classes} if settings.num_classes else {}
    torch.manual_seed(0)  # random weights, where no file is given, are those of all replicas
    model = library.create_model(settings.model, checkpoint_path=settings.weights, **classes)
    config = library.data.resolve_model_data_config(model)
    if settings.preparation == "efft-finetune":
        means = {"mean": library.data.IMAGENET_DEFAULT_MEAN, "std": library.data.IMAGENET_DEFAULT_STD}
        config |= {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bicubic", **means}
    transform = library.data.create_transform(**config, is_training=False)
    return model.to(settings.device, getattr(torch, settings.dtype)).eval(), transform


def _lines(path) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [line.strip() for line in file if line.strip()]


# -- the deployment ---------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Item:
    """An image on its way through a batch, and its adapter: the request's until the batch begins, then the batch's.

    Whoever asked may leave at any time; the others of the batch need all its adapters until it is done.
    """

    image: Tensor
    key: str | None
    in_batch: bool = False


async def in_thread(pool: ThreadPoolExecutor, call, *args, undo):
    """call(*args) in a thread of the pool. If nobody waits for it any more, undo(what it returned) follows it."""
    work = pool.submit(call, *args)
    try:
        return await asyncio.wrap_future(work)
    except asyncio.CancelledError:
        work.add_done_callback(lambda done: done.cancelled() or done.exception() or undo(done.result()))
        raise


def _ray():
    # before ray is imported: it reports nothing to its makers unless its user wants that
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if importlib.util.find_spec("ray") is None:
        raise ImportError("the deployment needs Ray Serve: pip install 'efft_kernels[serve]'")
    import ray
    from ray import serve

    return ray, serve


def app(args: dict):
    """The Ray Serve application; args are the fields of :class:`Settings`, numbers as text allowed.

    Raises:
        ValueError: an argument that is none of them, is missing, or has no such value.
    """
    from starlette.requests import Request
    from starlette.responses import JSONResponse

    _, serve = _ray()
    settings = _settings(args)

    class EFFTClassifier:
        def __init__(self, settings: dict):
            self.settings = settings = Settings(**settings)
            self.classifier = Classifier(settings)
            # one thread computes, some decode, and the event loop is free to answer health checks
            self.computing = ThreadPoolExecutor(1, "compute")
            self.decoding = ThreadPoolExecutor(max(1, settings.threads), "decode")
            self.busy_since, self.under_way = None, 0
            self.batched.set_max_batch_size(settings.max_batch)
            self.batched.set_batch_wait_timeout_s(settings.batch_wait_ms / 1e3)
            self._make_metrics(serve.metrics)

        def _make_metrics(self, metrics) -> None:
            seconds = [0.01, 0.03, 0.1, 0.3, 1, 3, 10]
            self.count = metrics.Counter("efft_requests", "answers", tag_keys=("status",))
            self.time = metrics.Histogram("efft_seconds", "from request to answer", boundaries=seconds)
            sizes = [1, 2, 4, 8, 16, 32, 64, 128]
            self.batch = metrics.Histogram("efft_batch", "images in a pass", boundaries=sizes)
            self.mixed = metrics.Histogram("efft_batch_adapters", "adapters in a pass", boundaries=sizes)
            self.held = metrics.Gauge("efft_adapter_bytes", "memory that adapters take")
            self.loads = metrics.Gauge("efft_adapter_loads", "adapters loaded since the start")
            self.evictions = metrics.Gauge("efft_adapter_evictions", "adapters dropped since the start")

        async def __call__(self, request: Request) -> JSONResponse:
            start = time.perf_counter()
            self.under_way += 1
            try:
                status, data = 200, await self.respond(request)
            except Refused as error:
                status, data = error.status, {"error": str(error)}
            except Exception:
                log.exception("a request failed")
                status, data = 500, {"error": "internal error"}
            finally:
                self.under_way -= 1
            self.count.inc(tags={"status": str(status)})
            self.time.observe(time.perf_counter() - start)
            headers = {"retry-after": str(RETRY_S)} if status == 503 else {"allow": "GET, POST"} if status == 405 else None
            return JSONResponse(data, status, headers)

        async def respond(self, request: Request) -> dict:
            if request.method == "GET":
                return self.describe()
            if request.method != "POST":
                raise Refused(405, f"the method must be POST, with an image, got {request.method}")
            upload = await read_upload(request, max_bytes=self.settings.max_bytes)
            loop = asyncio.get_running_loop()
            held = lambda found: self.classifier.release(found[1])
            image, key = await in_thread(self.decoding, self.classifier.prepare, upload, undo=held)
            item = Item(image, key)
            try:
                scores = await self.batched(item)
            finally:
                if not item.in_batch:
                    self.classifier.release(key)
            return await loop.run_in_executor(self.decoding, self.classifier.answer, upload, scores)

        @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.005)
        async def batched(self, items: list) -> list:
            images, keys = [item.image for item in items], [item.key for item in items]
            for item in items:
                item.in_batch = True
            self.busy_since = time.monotonic()
            try:
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self.computing, self.classifier.classify, images, keys)
            finally:
                self.busy_since = None
                for key in keys:
                    self.classifier.release(key)
                self.batch.observe(len(keys))
                self.mixed.observe(len(set(keys)))
                folder = self.classifier.folder
                self.held.set(folder.bytes)
                self.loads.set(folder.loads)
                self.evictions.set(folder.evictions)

        async def busy(self) -> int:
            """how many requests are under way"""
            return self.under_way

        def describe(self) -> dict:
            folder = self.classifier.folder
            limits = ("max_bytes", "max_pixels", "max_batch", "adapter_bytes")
            return {
                "model": self.settings.model,
                "adapters": folder.names(),
                "loaded": {"adapters": folder.loaded, "bytes": folder.bytes},
                "in_use": {"adapters": folder.in_use, "requests": self.under_way - 1},  # this one aside
                "limits": {name: getattr(self.settings, name) for name in limits},
            }

        def check_health(self) -> None:
            """Asked by Ray, which replaces a replica that raises"""
            if self.busy_since is not None and time.monotonic() - self.busy_since > 120:
                raise RuntimeError("a pass of the model has taken more than 120 s")

    resources = {"num_cpus": settings.threads, "num_gpus": int(settings.device.startswith("cuda"))}
    return serve.deployment(
        EFFTClassifier,
        name="EFFTClassifier",
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.max_ongoing,
        max_queued_requests=settings.max_queued,
        backpressure_config={"retry_after_s": RETRY_S},
        graceful_shutdown_timeout_s=settings.stop_s,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2,
        health_check_timeout_s=30,
        ray_actor_options=resources,
    ).bind(asdict(settings))


def _settings(args: dict) -> Settings:
    known = {field.name: field for field in fields(Settings)}
    if unknown := sorted(set(args) - set(known)):
        raise ValueError(f"settings must be among {', '.join(known)}, got {', '.join(unknown)}")
    if missing := [name for name in ("model", "adapters") if name not in args]:
        how = f"serve run efft_kernels.serving.app:app {missing[0]}=..."
        raise ValueError(f"settings must have {' and '.join(missing)}: {how}")
    try:
        made = {name: known[name].type(value) for name, value in args.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings must be of the types that Settings has: {error}") from error
    for name in ("adapters", "weights", "labels"):  # a replica has a working directory of its own
        if made.get(name):
            made[name] = os.path.abspath(made[name])
    return Settings(**made)


# -- the command ------------------------------------------------------------------------------------------------------


def main(
    settings: Settings,
    host: str = "127.0.0.1",
    port: int = 8000,
    address: str = "",
    object_store_bytes: int = 100 * 2**20,
    timeout_s: float = 60.0,
) -> None:
    """Serve images with one backbone and the adapters in a folder, until SIGTERM or SIGINT.

    Args:
        settings: what is served, and within which limits.
        host: that it listens on; 0.0.0.0 for all.
        port: that it listens on.
        address: of a running Ray cluster, "auto" for the one of this machine; empty starts Ray here.
        object_store_bytes: shared memory of a Ray that is started here; nothing large goes through it.
        timeout_s: after which a request is answered with 408.
    """
    import signal
    import threading

    ray, serve = _ray()
    application = app(asdict(settings))
    if address:
        ray.init(address=address, log_to_driver=False)
    else:
        cpus = max(settings.replicas * settings.threads, os.cpu_count() or 1)
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "warning"}
        ray.init(num_cpus=cpus, object_store_memory=object_store_bytes, **quiet)
    try:
        # ray has put handlers of its own there, which end the process at once
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        serve.start(http_options={"host": host, "port": port, "request_timeout_s": timeout_s})
        handle = serve.run(application, name="efft", route_prefix="/")
        print(f"serving {settings.model} on http://{host}:{port}, adapters of {settings.adapters}", flush=True)
        stop.wait()
        print("stopping", flush=True)
        _wait_until_idle(handle, 3 * settings.replicas, settings.stop_s)
        serve.delete("efft")
    finally:
        if not address:
            serve.shutdown()
        ray.shutdown()


# so long nothing must happen. Ray tries a request that found all replicas full again after up to half a second
IDLE_S = 2.0


def _wait_until_idle(handle, polls: int, seconds: float) -> None:
    """Until that many answers in a row, of replicas chosen by Ray and over IDLE_S, say that there is nothing to do.

    Deleting the application would drop the requests that still wait for a replica; as long as there are any, all
    replicas are busy, or were just now.
    """
    end, quiet, since = time.monotonic() + seconds, 0, time.monotonic()
    while (quiet < polls or time.monotonic() < since + IDLE_S) and time.monotonic() < end:
        try:
            busy = handle.busy.remote().result(timeout_s=max(0.1, end - time.monotonic()))
        except Exception as error:  # a replica that has just died, or a queue that is full
            log.info("while waiting for the last answers: %s", error)
            busy = True
        quiet, since = (0, time.monotonic()) if busy else (quiet + 1, since)
        time.sleep(0.1)


def command() -> None:
    """python -m efft_kernels.serving"""
    try:
        import jsonargparse
    except ImportError:
        raise SystemExit("the command needs jsonargparse: pip install 'efft_kernels[serve]'") from None
    parser = jsonargparse.ArgumentParser(prog="python -m efft_kernels.serving", description=__doc__.splitlines()[0])
    parser.add_class_arguments(Settings, as_group=False)
    parser.add_function_arguments(main, skip={"settings"}, as_group=False)
    parsed = vars(parser.parse_args())
    names = {field.name for field in fields(Settings)}
    main(
        Settings(**{name: value for name, value in parsed.items() if name in names}),
        **{name: value for name, value in parsed.items() if name not in names},
    )
