"""Run the application until SIGTERM or SIGINT, on a Ray of its own or on a running cluster."""

import logging
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request

from . import cluster
from .settings import ServerSettings, Settings
from .start import StartError, check_files, check_model, free_port, is_loopback, sentence

log = logging.getLogger("efft_kernels.serving")
# how long no request may be under way before the application is deleted: Ray retries a request that found all replicas
# full after up to half a second
IDLE_S = 2.0
_SAY_S = 15.0  # between two sentences about what a start waits for


class Stopped(Exception):
    """A signal came before the service was up."""


def run(settings: Settings, server: ServerSettings) -> None:
    """Serve until SIGTERM or SIGINT, then answer the requests under way and stop. A start ends at these signals, too.

    Raises:
        ImportError: Ray Serve is not installed.
        StartError: the service cannot start; the message says why.
    """
    stop = threading.Event()
    _on_signals(lambda *_: stop.set())
    try:
        cluster.demand_token(server)
        check_files(settings, server)
        if not settings.weights:
            print("warning: without --weights the model is random, and so are its answers", file=sys.stderr, flush=True)
        host, port = server.host, server.port
        if not server.address:
            port = free_port(host, port)
        print(f"checking {settings.model} and the adapters in {settings.adapters}", flush=True)
        check_model(settings)
        _go_on(stop)
        # read when Ray is imported: a thread of Serve that calls Ray after its end would begin or join another one
        os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
        from .app import app  # imports Ray, which takes seconds

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        application = app(settings)
        with cluster.ray_for(settings, server):
            _on_signals(lambda *_: stop.set())  # ray.init sets handlers of its own, which end the process at once
            _go_on(stop)
            from ray import serve

            if server.address and (found := cluster.listening(server)):
                host, port = found
            elif server.address:
                port = free_port(host, port)
            if not (settings.key_file or is_loopback(host)):
                print(
                    f"warning: the service listens on {host} without an API key: whoever reaches it can use it. "
                    "--key-file names a file of keys",
                    file=sys.stderr,
                    flush=True,
                )
            claim = cluster.claim_name(server)
            http = {"host": host, "port": port, "request_timeout_s": server.timeout_s}
            try:
                _deploy(application, settings, server, http, stop)
                url = f"http://{host}:{port}{server.prefix}"
                print(f"serving {settings.model} on {url}, adapters from {settings.adapters}", flush=True)
                stop.wait()
                print("stopping", flush=True)
                _drain(serve.get_app_handle(server.name), settings, server)
            except Stopped:
                if _answers(http, server.prefix):  # by the first replicas, while others start
                    _drain(serve.get_app_handle(server.name), settings, server)
                raise
            finally:
                if server.address:
                    serve.delete(server.name)
                else:
                    cluster.end_proxies()
                del claim
    except Stopped:
        print("stopped before the service was up", flush=True)
    _on_signals(signal.SIG_IGN)  # a further one would end the interpreter, which is about to, with another status


def _on_signals(handler) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _go_on(stop: threading.Event) -> None:
    if stop.is_set():
        raise Stopped


def _deploy(application, settings: Settings, server: ServerSettings, http: dict, stop: threading.Event) -> None:
    """Deploy the application and wait until it answers."""
    import ray
    from ray import serve
    from ray.serve.api import RunTarget

    start, said = time.monotonic(), time.monotonic()
    target = RunTarget(application, name=server.name, route_prefix=server.prefix)
    while True:
        try:
            serve.start(http_options=http)
            serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
            break
        except Exception as error:  # Ray raises errors of many types
            # Serve starts its HTTP server again, with more time, where that was too slow on a busy machine
            again = isinstance(error, ray.exceptions.ActorDiedError) and time.monotonic() - start < server.start_s
            if not again:
                raise StartError(f"Ray Serve cannot deploy the service: {sentence(error)}") from error
        _go_on(stop)
        stop.wait(1.0)
    need = {"CPU": settings.replicas * settings.threads}
    if settings.device.startswith("cuda"):
        need["GPU"] = settings.replicas
    while True:
        found = serve.status().applications.get(server.name)
        state = found.status.value if found else "NOT_STARTED"
        if state == "DEPLOY_FAILED":
            raise StartError(f"the replicas cannot start: {sentence(Exception(found.message))}")
        # this machine may have no replica, and then its Serve does not listen here
        if state == "RUNNING" and (_answers(http, server.prefix) or server.address):
            return
        _go_on(stop)
        waited = time.monotonic() - start
        have = ray.cluster_resources()
        lacking = [f"{n} {what} (it has {have.get(what, 0):g})" for what, n in need.items() if have.get(what, 0) < n]
        why = f"the cluster must have {' and '.join(lacking)}" if lacking else f"the application is {state}"
        if waited > server.start_s:
            raise StartError(f"the service is not up after {waited:.0f} s: {why}")
        if time.monotonic() - said > _SAY_S:
            said = time.monotonic()
            print(f"waiting for {waited:.0f} s: {why}", flush=True)
        stop.wait(0.2)


def _answers(http: dict, prefix: str) -> bool:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(http["host"], http["host"])
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{host}:{http['port']}{prefix.rstrip('/')}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError as error:
        log.info("while starting: %s", error)
        return False


def _drain(handle, settings: Settings, server: ServerSettings) -> None:
    if not server.address:
        try:
            cluster.fail_health_checks()
        except Exception as error:  # a proxy that has died
            log.warning("health checks of Ray do not fail while the service stops: %s", error)
    wait_until_idle(handle, server.drain_s, settings.stop_s)


def wait_until_idle(handle, least: float, most: float) -> None:
    """Have all replicas refuse new requests, and wait until for IDLE_S none was under way in any of them: at least
    ``least`` seconds, and not longer than that or ``most``.

    Deleting the application would drop requests that still wait for a replica; while there are any, replicas are busy
    or were a moment ago. Replicas that start meanwhile are told at the next turn.
    """
    start = since = time.monotonic()
    while (now := time.monotonic()) < start + max(least, most) and not (now >= start + least and now >= since + IDLE_S):
        try:
            busy = sum(handle.broadcast("stop").results(timeout_s=5))
        except Exception as error:  # a replica that has just died
            log.info("while waiting for the last answers: %s", error)
            busy = True
        if busy:
            since = time.monotonic()
        time.sleep(0.1)
