"""Adapters on the Hugging Face hub: files by a name such as "hf-hub:OWNER/NAME", down and up, by huggingface_hub."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from .extras import need

PREFIX = "hf-hub:"
ADAPTER, CARD = "adapter.safetensors", "README.md"  # the names of files in a repository
_NAME = re.compile(r"(?!.*\.\.)(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[^@]+\.safetensors))?(?:@(?P<revision>[\w./-]+))?")


def is_on_hub(path: str | os.PathLike) -> bool:
    return isinstance(path, str) and path.startswith(PREFIX)


def repository(name: str) -> str:
    """OWNER/NAME, checked, of a repository to write to; "hf-hub:" may stand before it.

    Raises:
        ValueError: it is something else.
    """
    found = _NAME.fullmatch(name.removeprefix(PREFIX)) if isinstance(name, str) else None
    if not found or found["file"] or found["revision"]:
        raise ValueError(f"hub must be the name of a repository, 'OWNER/NAME', got {name!r}")
    return found["repo"]


def local_file(path: str | os.PathLike) -> str | os.PathLike:
    """The local copy of "hf-hub:OWNER/NAME", "hf-hub:OWNER/NAME@REVISION" or "hf-hub:OWNER/NAME/FILE.safetensors",
    downloaded if it is not in huggingface_hub's cache; another path is returned as it is.

    Raises:
        ImportError: huggingface_hub is missing.
        ValueError: a name of another form.
        FileNotFoundError: the hub has no such repository, revision or file, or not for this user.
        OSError: the hub cannot be reached.
    """
    if not is_on_hub(path):
        return path
    repo, file, revision = _parts(path)
    with _explained(path):
        return need("huggingface_hub", "hub").hf_hub_download(repo, file or ADAPTER, revision=revision)


def local_folder(path: str | os.PathLike, patterns: tuple[str, ...]) -> str | os.PathLike:
    """As :func:`local_file` for the files of a repository whose names fit the patterns: the folder with them."""
    if not is_on_hub(path):
        return path
    repo, file, revision = _parts(path)
    if file:
        raise ValueError(f"{path} must be a repository, '{PREFIX}OWNER/NAME', not a file in one")
    with _explained(path):
        found = need("huggingface_hub", "hub").snapshot_download(repo, revision=revision, allow_patterns=list(patterns))
    return found


def upload(repo: str, files: Mapping[str, bytes | Path], message: str) -> None:
    """Put files into a repository in one commit; the repository is made if it does not exist.

    Raises:
        ImportError: huggingface_hub is missing.
        OSError: the hub cannot be reached, or refuses; the message names the files that are safe.
    """
    library = need("huggingface_hub", "hub")
    api = library.HfApi()
    add = library.CommitOperationAdd
    safe = ", ".join(str(data) for data in files.values() if isinstance(data, Path))
    with _explained(repo, f"; {safe} is written"):
        api.create_repo(repo, exist_ok=True)
        api.create_commit(
            repo,
            [add(name, data if isinstance(data, bytes) else str(data)) for name, data in files.items()],
            commit_message=message,
        )


def _parts(path: str) -> tuple[str, str | None, str | None]:
    found = _NAME.fullmatch(path.removeprefix(PREFIX))
    if not found:
        raise ValueError(
            f"{path} must be '{PREFIX}OWNER/NAME', with /FILE.safetensors or @REVISION behind it if needed"
        )
    return found["repo"], found["file"], found["revision"]


@contextlib.contextmanager
def _explained(name: str, then: str = "") -> Iterator[None]:
    """Raise the errors of huggingface_hub as an OSError of one line, with ``then`` at the end of an upload's."""
    errors = need("huggingface_hub.errors", "hub")
    try:
        yield
    except errors.LocalEntryNotFoundError as error:  # a FileNotFoundError, though the file may well exist
        raise OSError(f"{name} cannot be downloaded and is not in the cache: {_first_line(error)}") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        raise FileNotFoundError(f"the hub has no {name}, or not for this user: {_first_line(error)}{then}") from error
    except errors.HfHubHTTPError as error:
        raise OSError(f"the hub refuses {name}: {_first_line(error)}{then}") from error
    except Exception as error:
        # an upload lets the errors of httpx through, which are no OSError, or before huggingface_hub 1.0 of requests
        kind = type(error)
        if not issubclass(kind, ConnectionError) and kind.__module__.partition(".")[0] not in ("httpx", "requests"):
            raise
        raise OSError(f"the hub cannot be reached for {name}: {_first_line(error)}{then}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
