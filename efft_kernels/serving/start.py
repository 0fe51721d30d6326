"""What the command checks itself before anything is started, so that errors are sentences and come within seconds."""

import errno
import ipaddress
import os
import socket

import torch

from .classifier import Classifier, read_labels
from .keys import read_keys
from .settings import ServerSettings, Settings


class StartError(Exception):
    """The service cannot start; the message is for the console."""


def check(settings: Settings, server: ServerSettings) -> None:
    """Check files, device and model: the model is built here once as each replica will build it, on the CPU.

    Raises:
        StartError: the first thing that is wrong, by the name of its option.
    """
    if server.name in ("docs", "health", "-"):
        raise StartError(f"--name must not be {server.name!r}, which is a path of the service at /")
    if not os.path.isdir(settings.adapters):
        raise StartError(f"--adapters must be a folder, and there is none at {settings.adapters}")
    for name in ("weights", "labels", "key_file"):
        path = getattr(settings, name)
        if path and not os.path.isfile(path):
            raise StartError(f"--{name.replace('_', '-')} must be a file, and there is none at {path}")
    labels = [settings.labels] if settings.labels else []
    for path in labels + sorted(e.path for e in os.scandir(settings.adapters) if e.name.endswith(".labels.txt")):
        try:
            read_labels(path)
        except UnicodeDecodeError as error:
            raise StartError(f"the labels in {path} must be UTF-8: {error.reason} at byte {error.start}") from error
        except OSError as error:
            raise StartError(f"the labels in {path} cannot be read: {error.strerror}") from error
    try:
        if settings.key_file:
            read_keys(settings.key_file)
    except (ValueError, OSError) as error:
        raise StartError(f"--key-file: {error}") from error
    if settings.device.startswith("cuda") and not server.address:
        found = torch.cuda.device_count()
        if found < settings.replicas:
            raise StartError(
                f"--device {settings.device} takes a GPU for each of {settings.replicas} replicas, and torch "
                f"{torch.__version__} finds {found} on this machine"
            )
    try:
        Classifier(settings.model_copy(update={"device": "cpu"}))
    except ImportError:
        raise
    except Exception as error:  # timm and torch raise errors of many types for names and files that they cannot use
        raise StartError(f"{settings.model} cannot be served: {sentence(error)}") from error


def free_port(host: str, port: int) -> int:
    """The port, or any free one for port 0.

    Raises:
        StartError: the service cannot listen there.
    """
    where = f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as made:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            made.listen()
            return made.getsockname()[1]
    except socket.gaierror as error:
        raise StartError(f"--host {host} is not an address of this machine: {error.strerror}") from error
    except OSError as error:
        why = {errno.EADDRINUSE: "another process listens there; choose another --port"}
        raise StartError(f"the service cannot listen on {where}: {why.get(error.errno, error.strerror)}") from error


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def sentence(error: BaseException) -> str:
    """The message of an error on one line of limited length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 600 else text[:600] + " ..."
