"""Run the application until SIGTERM or SIGINT, on a Ray that is started here or on a running cluster."""

import logging
import os
import signal
import threading
import time

from .settings import ServerSettings, Settings

log = logging.getLogger("efft_kernels.serving")
# how long no request may be under way before the application is deleted: Ray retries a request that found all replicas
# full after up to half a second
IDLE_S = 2.0


def run(settings: Settings, server: ServerSettings) -> None:
    """Serve until SIGTERM or SIGINT, then answer the requests under way and stop.

    Raises:
        ImportError: Ray Serve is not installed.
    """
    from .app import app  # ray takes seconds to import

    application = app(settings)
    import ray
    from ray import serve

    if server.address:
        ray.init(address=server.address, log_to_driver=False)
    else:
        ray.init(
            num_cpus=max(settings.replicas * settings.threads, os.cpu_count() or 1),
            object_store_memory=server.object_store_bytes,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="warning",
        )
    try:
        # after ray.init, whose own handlers would end the process at once
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        serve.start(http_options={"host": server.host, "port": server.port, "request_timeout_s": server.timeout_s})
        handle = serve.run(application, name="efft", route_prefix="/")
        url = f"http://{server.host}:{server.port}"
        print(f"serving {settings.model} on {url}, adapters from {settings.adapters}", flush=True)
        stop.wait()
        print("stopping", flush=True)
        wait_until_idle(handle, 3 * settings.replicas, settings.stop_s)
        serve.delete("efft")
    finally:
        if not server.address:
            serve.shutdown()
        ray.shutdown()


def wait_until_idle(handle, polls: int, seconds: float) -> None:
    """Wait until ``polls`` polls in a row, over at least IDLE_S, find no request under way, or ``seconds`` have passed.

    Ray chooses the replica that answers each poll. Deleting the application would drop requests that still wait for a
    replica; while there are any, all replicas are busy or were a moment ago.
    """
    end, quiet, since = time.monotonic() + seconds, 0, time.monotonic()
    while (quiet < polls or time.monotonic() < since + IDLE_S) and time.monotonic() < end:
        try:
            busy = handle.requests_under_way.remote().result(timeout_s=max(0.1, end - time.monotonic()))
        except Exception as error:  # a replica that has just died, or a full queue
            log.info("while waiting for the last answers: %s", error)
            busy = True
        quiet, since = (0, time.monotonic()) if busy else (quiet + 1, since)
        time.sleep(0.1)
