"""The Ray that runs the service: one of its own, or a running cluster; that it asks for a token; who has which name.

Ray is imported in the functions, because it reads RAY_AUTH_MODE at its import.
"""

import contextlib
import ctypes
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator

from .settings import ServerSettings, Settings
from .start import StartError, sentence

log = logging.getLogger("efft_kernels.serving")
_EXPOSED = "whoever reaches its ports could run code there. Say --insecure to serve all the same"


def demand_token(server: ServerSettings) -> None:
    """Have Ray demand its token of every caller, unless --insecure was given; before Ray is imported."""
    if not server.insecure and (mode := os.environ.setdefault("RAY_AUTH_MODE", "token")).lower() != "token":
        raise StartError(f"RAY_AUTH_MODE is {mode!r}, so Ray would not ask for a token: {_EXPOSED}")


@contextlib.contextmanager
def ray_for(settings: Settings, server: ServerSettings) -> Iterator[None]:
    """Start a Ray, or connect to the cluster of ``server.address``; within the context there is one."""
    # Ray reports usage to its makers only if its user asks for it
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # seconds that the HTTP server of Serve has to start in: 5 by default, which a busy machine may take longer than
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    # Ray runs its workers at niceness 15, and the replicas are workers: a busy machine would give them next to no time
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray

    try:
        if server.address:
            _check_reachable(server.address)
            ray.init(address=server.address, log_to_driver=False, logging_level="error")
        else:
            ray.init(
                address="local",  # whatever RAY_ADDRESS says, and whether or not a Ray runs on this machine
                num_cpus=max(settings.replicas * settings.threads, os.cpu_count() or 1),
                object_store_memory=server.object_store_bytes,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
            )
    except StartError:
        raise
    except Exception as error:  # Ray raises errors of many types
        what = f"no Ray cluster can be reached at --address {server.address}" if server.address else "Ray cannot start"
        raise StartError(f"{what}: {sentence(error)}") from error
    try:
        control = ray.get_runtime_context().gcs_address
        if not server.insecure and answers_without_token(control):
            raise StartError(f"the Ray cluster at {control} asks for no token: {_EXPOSED}")
        yield
    finally:
        with _signals_ignored():
            ray.shutdown()


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
    """Ignore SIGTERM and SIGINT while Ray ends.

    Ray's C++ sets them back to their defaults at its end, past Python's handlers, so a further signal would end this
    process with another status.
    """
    numbers, done = (signal.SIGTERM, signal.SIGINT), threading.Event()

    def ignore():
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        while not done.wait(0.001):
            for number in numbers:
                libc.signal(number, int(signal.SIG_IGN))

    thread = threading.Thread(target=ignore, daemon=True)
    if os.name == "posix":
        thread.start()
    try:
        yield
    finally:
        done.set()
        if thread.ident:
            thread.join()
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                if (handler := signal.getsignal(number)) is not None:  # None: it was not set by Python
                    signal.signal(number, handler)


def _check_reachable(address: str) -> None:
    host, colon, port = address.rpartition(":")
    if address == "auto":
        return
    if "://" in address or not colon or not port.isdecimal():
        raise StartError(f"--address must be auto or HOST:PORT, got {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise StartError(f"no Ray cluster can be reached at --address {address}: {error}") from error


def answers_without_token(address: str) -> bool:
    """Whether the control store of a Ray cluster answers a caller that has no token."""
    import grpc

    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            call(b"", timeout=10)
        except grpc.RpcError as error:
            # unavailable: it speaks TLS alone, which has certificates of its own
            turned_away = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
            return error.code() not in (*turned_away, grpc.StatusCode.UNAVAILABLE)
    return True


def claim_name(server: ServerSettings):
    """Claim the name of the service on the cluster for as long as this process lives; keep what is returned."""
    import ray
    from ray import serve

    class Claim:
        """An actor whose name is the claim: it ends with the process that made it."""

    try:
        made = ray.remote(num_cpus=0)(Claim).options(name=f"serving {server.name}", namespace="efft_kernels").remote()
    except ValueError as error:
        raise StartError(f"this cluster has a service named {server.name!r}: choose another --name") from error
    if server.name in serve.status().applications and not server.replace:
        raise StartError(
            f"this cluster has an application named {server.name!r} whose command has ended, or which was not started "
            "by this command: choose another --name, or say --replace to take its place"
        )
    return made


def listening(server: ServerSettings) -> tuple[str, int] | None:
    """Host and port of the Serve that runs on the cluster, which all its applications share; None if none runs."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    options = client.http_config
    for name in ("host", "port"):
        if name in server.model_fields_set and getattr(server, name) != getattr(options, name):
            raise StartError(
                f"Ray Serve on this cluster listens on {options.host}:{options.port} for all its applications: leave "
                f"out --{name}, or shut it down by `serve shutdown`"
            )
    return options.host, options.port


def fail_health_checks() -> None:
    """Let Ray's own health check, /-/healthz, fail. It is shared by all applications."""
    import ray

    for proxy in _proxies():
        ray.get(proxy.update_draining.remote(True), timeout=5)


def end_proxies() -> None:
    """End the HTTP servers of Serve, just before Ray is: without the application they would answer 404."""
    import ray

    for proxy in _proxies():
        ray.kill(proxy, no_restart=True)


def _proxies() -> list:
    import ray

    found = ray.util.list_named_actors(all_namespaces=True)
    names = [one["name"] for one in found if one["namespace"] == "serve" and "SERVE_PROXY_ACTOR" in one["name"]]
    return [ray.get_actor(name, namespace="serve") for name in names]
