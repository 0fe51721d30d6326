"""The Ray Serve application: image classification with one backbone and any number of adapters.

``python -m efft_kernels.serving`` starts it (cli.py), or Ray's own tools, with the same settings as arguments.
docs/serving.md describes requests and answers, and api.py states them as OpenAPI. Requests for different adapters that
arrive together share a batch and one forward of the model. An image decoder that crashes, which no image should cause,
takes one replica with it; Ray starts another.
"""

import asyncio
import contextlib
import ctypes
import logging
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor

try:
    from ray import serve
    from starlette.requests import Request
except ImportError as error:
    raise ImportError("the service needs Ray Serve: pip install 'efft_kernels[serve]'", name=error.name) from error

from torch import Tensor

from . import api
from .classifier import Classifier, Prepared
from .keys import has_key, read_keys
from .places import Uploads
from .settings import Settings
from .uploads import Refused, read_upload

log = logging.getLogger("efft_kernels.serving")
STUCK_S = 120.0  # a replica whose forward takes longer is replaced
_UNLIMITED = 100_000  # a replica counts requests itself, once their image has arrived: slow clients take no places


def app(settings: Settings) -> serve.Application:
    """Build the application. Ray passes the arguments of ``serve run`` or of a config file as :class:`Settings`."""
    # Ray reads this when it starts: it reports usage to its makers only if its user asks for it
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    gpus, one_heap = int(settings.device.startswith("cuda")), {"env_vars": {"MALLOC_ARENA_MAX": "1"}}
    return serve.deployment(
        serve.ingress(_http)(EFFTClassifier),
        name="EFFTClassifier",
        num_replicas=settings.replicas,
        max_ongoing_requests=_UNLIMITED,
        max_queued_requests=settings.max_queued,
        backpressure_config={"retry_after_s": api.RETRY_S},
        graceful_shutdown_timeout_s=settings.stop_s,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2,
        health_check_timeout_s=30,
        ray_actor_options={"num_cpus": settings.threads, "num_gpus": gpus, "runtime_env": one_heap},
    ).bind(settings)


def _http():
    """Called by Ray in each replica."""
    return api.build(lambda: serve.get_replica_context().servable_object)


class EFFTClassifier:
    """One replica: HTTP requests (api.py) in, batches to its :class:`Classifier`, JSON out."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.classifier = Classifier(settings)
        # one thread computes and the others decode, so that the event loop can answer health checks
        self.computing = ThreadPoolExecutor(1, "compute")
        self.decoding = ThreadPoolExecutor(settings.threads, "decode")
        self.forward_since: float | None = None
        self.keys = read_keys(settings.key_file) if settings.key_file else ()
        self.uploads = Uploads(settings.max_uploads * settings.max_bytes, settings.upload_s)
        self.under_way = self.accepted = 0  # requests; those of them whose image has arrived
        # those it works on, and its share of those that wait
        self.most_accepted = settings.max_ongoing + math.ceil(settings.max_queued / settings.replicas)
        # decoded images take more memory than their files, so those of two batches at least, and no more, are held
        self.working = asyncio.Semaphore(max(settings.max_ongoing, 2 * settings.max_batch))
        self.stopping = False
        wait_s = settings.batch_wait_ms / 1e3
        self.batched = serve.batch(max_batch_size=settings.max_batch, batch_wait_timeout_s=wait_s)(self._compute)
        self._make_metrics()

    def _make_metrics(self) -> None:
        metrics = serve.metrics
        seconds = [0.01, 0.03, 0.1, 0.3, 1, 3, 10]
        sizes = [1, 2, 4, 8, 16, 32, 64, 128]
        self.answers = metrics.Counter("efft_requests", "answers", tag_keys=("status",))
        self.seconds = metrics.Histogram("efft_seconds", "seconds from request to answer", boundaries=seconds)
        self.batch_images = metrics.Histogram("efft_batch", "images in a forward", boundaries=sizes)
        self.batch_adapters = metrics.Histogram("efft_batch_adapters", "adapters in a forward", boundaries=sizes)
        self.adapter_bytes = metrics.Gauge("efft_adapter_bytes", "memory of the loaded adapters")
        self.loads = metrics.Gauge("efft_adapter_loads", "adapters loaded since the start")
        self.evictions = metrics.Gauge("efft_adapter_evictions", "adapters evicted since the start")

    async def classify(self, request: Request) -> dict:
        """The answer to a POST as data for JSON.

        Raises:
            Refused: the request cannot be answered with 200.
        """
        start, status = time.perf_counter(), 200
        self.under_way += 1
        try:
            return await self._answer(request)
        except Refused as error:
            status = error.status
            raise
        except Exception as error:
            log.exception("a request failed")
            status = 500
            raise Refused(500, "internal error") from error
        finally:
            self.under_way -= 1
            self.answers.inc(tags={"status": str(status)})
            self.seconds.observe(time.perf_counter() - start)

    async def _answer(self, request: Request) -> dict:
        if self.stopping:
            raise Refused(503, "the service is stopping")
        self.check_key(request)
        self._check_room()
        upload = await self.uploads.receive(
            lambda room: read_upload(request, max_bytes=self.settings.max_bytes, room=room)
        )
        self._check_room()
        self.accepted += 1
        try:
            loop = asyncio.get_running_loop()
            async with self.working:
                prepared = await loop.run_in_executor(self.decoding, self.classifier.prepare, upload)
                scores = await self.batched(prepared)
            if isinstance(scores, Refused):
                raise scores
            return await loop.run_in_executor(self.decoding, self.classifier.answer, prepared, scores)
        finally:
            self.accepted -= 1

    def check_key(self, request: Request) -> None:
        """Raise Refused, 401, for a request without one of the API keys, if there are any."""
        if self.keys and not has_key(request.headers, self.keys):
            raise Refused(401, "the request must have an API key, as the header Authorization: Bearer KEY")

    def _check_room(self) -> None:
        if self.accepted >= self.most_accepted:
            raise Refused(503, f"{self.accepted} requests wait already")

    async def _compute(self, images: list[Prepared]) -> list[Tensor | Refused]:
        """Classify the images of requests that arrived together."""
        self.forward_since = time.monotonic()
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.computing, self.classifier.classify, images)
        finally:
            self.forward_since = None
            self.batch_images.observe(len(images))
            self.batch_adapters.observe(len({one.upload.adapter for one in images}))
            folder = self.classifier.folder
            self.adapter_bytes.set(folder.bytes)
            self.loads.set(folder.loads)
            self.evictions.set(folder.evictions)

    async def stop(self) -> int:
        """Refuse new requests from now on. Called through the handle; returns the number of requests under way."""
        self.stopping = True
        return self.under_way

    def describe(self) -> dict:
        """The answer to GET: the model, the adapters in the folder, and the state of this replica."""
        folder = self.classifier.folder
        limits = ("max_bytes", "max_pixels", "max_batch", "adapter_bytes")
        return {
            "model": self.settings.model,
            "classes": self.classifier.classes,
            "adapters": folder.names(),
            "loaded": {"adapters": folder.loaded, "bytes": folder.bytes},
            "in_use": {"adapters": folder.in_use, "requests": self.under_way},
            "limits": {name: getattr(self.settings, name) for name in limits},
        }

    def check_health(self) -> None:
        """Called by Ray every two seconds, which replaces a replica whose check raises. It also frees memory."""
        if self.forward_since is not None and time.monotonic() - self.forward_since > STUCK_S:
            raise RuntimeError(f"a forward of the model has taken more than {STUCK_S:.0f} s")
        self.decoding.submit(release_memory)


def release_memory() -> None:
    """Have glibc return freed memory to the system; under another C library nothing is done.

    After the first large buffer was freed, glibc serves buffers of up to 32 MiB from its heaps and keeps what smaller
    allocations lie behind. This call returns it, but not the ends of heaps other than the first, so a replica has one
    heap for all threads (MALLOC_ARENA_MAX).
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
