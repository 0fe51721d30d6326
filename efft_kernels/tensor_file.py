"""Safetensors files with a digest of their contents: read into memory, so that a loaded tensor is never a mapping."""

import json
import os
import struct
from collections.abc import Collection, Mapping
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from .hub import local_file
from .storage import read_regular, write

_DIGEST = "digest"  # metadata: SHA-256 of everything else in the file


def check_path(path: object) -> None:
    """Raise TypeError for what is no path."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be that of a file, got {path!r}")


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with a digest of its contents, atomically.

    Raises:
        OSError: the file cannot be written; an existing one is unchanged then.
    """
    from safetensors.torch import save

    # clones, because tensors may share memory, which safetensors refuses
    copies = {key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
    data = save(copies, {**metadata, _DIGEST: _digest(copies, metadata)})
    header, end = _header(data)
    # equal contents are equal files: safetensors has a random order
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors are aligned
    start, rest = struct.pack("<Q", len(text)) + text, memoryview(data)[end:]
    write(Path(path), lambda file: (file.write(start), file.write(rest)))


def _header(data: bytes) -> tuple[dict, int]:
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), end


def read_tensors(path: str | os.PathLike, digested: Collection[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a safetensors file. Later changes of the file do not affect the tensors.

    Args:
        path: of the file, or its name on a hub (hub.py).
        digested: values of the metadata ``format`` of files that must have a digest; others, older ones, have none.

    Raises:
        TypeError: path is no path.
        FileNotFoundError: there is no such file.
        OSError: the hub cannot be reached.
        ValueError: it is no regular file, no complete safetensors file, or its contents differ from their digest.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    check_path(path)
    local = local_file(path)
    try:
        data = read_regular(local)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no adapter file {path}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        tensors = load(data)
        metadata = _header(data)[0].get("__metadata__") or {}
    except (SafetensorError, KeyError, ValueError, RecursionError, RuntimeError, AssertionError) as why:
        raise ValueError(f"{path} is not a complete safetensors file; it may be truncated or corrupt: {why}") from why
    digest = metadata.pop(_DIGEST, None)
    if metadata.get("format") in digested and digest != _digest(tensors, metadata):
        raise ValueError(f"{path} is damaged: its contents differ from the digest that was written with them")
    return metadata, tensors


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for key, t in sorted(tensors.items()):
        digest.update(f"{key} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
