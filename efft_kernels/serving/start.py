"""What the command checks itself before anything is started, so that errors are sentences and come within seconds."""

import errno
import glob
import ipaddress
import logging
import os
import socket
import time

import torch

from ..hub import is_on_hub
from .classifier import Classifier, read_labels
from .keys import read_keys
from .settings import ServerSettings, Settings
from .uploads import Refused, check_adapter_name

_LOADING_S = 5.0  # how long a start loads adapters, to warn of those that do not fit


log = logging.getLogger("efft_kernels.serving")


class StartError(Exception):
    """The service cannot start; the message, for the console, names the option. All functions below may raise it."""


def check_files(settings: Settings, server: ServerSettings) -> None:
    """Check what costs no time: names, files, the number of GPUs."""
    if server.name in ("docs", "health", "-"):
        raise StartError(f"--name must not be {server.name!r}, which is a path of the service at /")
    on_hub = is_on_hub(settings.adapters)
    if not (on_hub or os.path.isdir(settings.adapters)):
        raise StartError(f"--adapters must be a folder, and there is none at {settings.adapters}")
    for name in ("weights", "labels", "key_file"):
        path = getattr(settings, name)
        if path and not os.path.isfile(path):
            raise StartError(f"--{name.replace('_', '-')} must be a file, and there is none at {path}")
    labels = [] if on_hub else sorted(glob.glob(os.path.join(glob.escape(settings.adapters), "*.labels.txt")))
    for path in [settings.labels] * bool(settings.labels) + labels:
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


def check_model(settings: Settings) -> None:
    """Build the model once as each replica will build it, on the CPU, and load adapters of the folder into it: those
    that cannot be served are named in warnings.
    """
    try:
        classifier = Classifier(settings.model_copy(update={"device": "cpu"}))
    except ImportError:
        raise
    except Exception as error:  # timm and torch raise errors of many types for names and files that they cannot use
        raise StartError(f"{settings.model} cannot be served: {sentence(error)}") from error
    names, end = classifier.folder.files(), time.monotonic() + _LOADING_S
    for done, name in enumerate(names):
        if time.monotonic() > end:
            log.warning(
                "%d of %d adapters have been checked; the others will be when they are asked for", done, len(names)
            )
            break
        try:
            classifier.check(check_adapter_name(name))
        except Refused as error:
            if error.status == 400:  # the reasons of others are logged
                log.warning("adapter %r cannot be served: %s", name, error)


def free_port(host: str, port: int) -> int:
    """The port, or any free one for port 0."""
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
        raise StartError(
            f"the service cannot listen on {host}:{port}: {why.get(error.errno, error.strerror)}"
        ) from error


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def sentence(error: BaseException) -> str:
    """The message of an error on one line of limited length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 600 else text[:600] + " ..."
