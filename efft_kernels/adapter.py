"""Adapter files, and several named adapters on one model.

A file is a safetensors file: the factors, and in its metadata the config, the fingerprint of the plan, the class and
name of the base model and the version of this library. It holds neither code nor the head.
"""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from .adapted import Adapters
from .factors import _Config
from .inject import Plan, adapters, build, check_bare, check_name, eject, install, mount, plan
from .ops import check_backend

_FORMAT = "efft_kernels adapter 1"


# -- files ------------------------------------------------------------------------------------------------------------


def save_adapter(model: nn.Module, path: str | os.PathLike, *, name: str | None = None, base_model: str = "") -> None:
    """Write one adapter to a safetensors file, whole or not at all.

    Args:
        model: an injected model.
        path: of the file, which is replaced if it exists.
        name: of the adapter, None for the active one.
        base_model: what to call the pre-trained model in the file; empty for the name timm or transformers gave it.

    Raises:
        ValueError: a model without this adapter, or with all adapters disabled and no name given.
        OSError: the file cannot be written; an existing one is untouched then.
    """
    from safetensors.torch import save

    owner = adapters(model)
    groups = owner[_known(owner, owner.active if name is None else name)]
    tensors = {key: t.detach().contiguous() for key, t in groups.state_dict().items()}
    metadata = {
        "format": _FORMAT,
        "version": sys.modules[__package__].__version__,
        "config": json.dumps(groups.plan.config.to_dict()),
        "fingerprint": groups.plan.fingerprint,
        "model": type(model).__name__,
        "base_model": base_model or _name_of(model),
    }
    _write(Path(path), save(tensors, metadata))


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    name: str = "default",
    head: str | int | nn.Module = "train",
    backend: str | None = None,
) -> nn.Module:
    """Put the adapter of a file on a model, in place, and make it the active one.

    Args:
        model: the model it was made for, plain or with adapters of other names.
        path: a file of :func:`save_adapter`.
        name: what to call the adapter here.
        head, backend: as :func:`inject`, for a plain model.

    Returns:
        The model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an adapter file, a truncated or corrupt one, one for another model, or a name already taken.
            The model has not been changed then.
    """
    config, metadata, tensors = _read(Path(path))
    check_name(name)
    check_backend(backend)
    made = plan(model, config)
    if made.fingerprint != metadata["fingerprint"]:
        raise ValueError(
            f"{path} is an adapter of {metadata['base_model'] or metadata['model']}, whose Linears or shapes differ "
            f"from those of this {type(model).__name__}"
        )
    groups = _filled(made, model, tensors, path)
    if isinstance(getattr(model, "efft", None), Adapters):
        if head != "train" or backend is not None:
            raise ValueError("head and backend are for a plain model, but this one is already injected")
        _mount_beside(model, name, groups)
    else:
        check_bare(model)
        install(model, name, groups, head, backend)
    set_adapter(model, name)
    return model


def _filled(made: Plan, model: nn.Module, tensors: dict[str, Tensor], path) -> nn.ModuleDict:
    """groups that hold these tensors, in the dtype and on the device of the model"""
    groups = build(made, model, empty=True)
    own = groups.state_dict()
    wanted = {key: tuple(t.shape) for key, t in own.items()}
    found = {key: tuple(t.shape) for key, t in tensors.items()}
    if wanted != found:
        key = sorted(wanted.items() ^ found.items())[0][0]
        raise ValueError(f"{path} must hold {key} of shape {wanted.get(key)}, got {found.get(key)}")
    groups.load_state_dict({key: t.to(own[key]) for key, t in tensors.items()}, assign=True)
    return groups


def _read(path: Path) -> tuple[_Config, dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"there is no adapter file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file, it may be truncated or corrupt: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} must be a file of save_adapter ({_FORMAT!r}), got format {metadata.get('format')!r}")
    try:
        config = _Config.from_dict(json.loads(metadata["config"]))
        return config, {key: metadata[key] for key in ("fingerprint", "model", "base_model", "version")}, tensors
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has damaged metadata, or is of another version of efft_kernels: {error}") from error


def _write(path: Path, data: bytes) -> None:
    """All of the file or nothing: written beside it, brought to the disk, then renamed over it."""
    path = path.resolve()  # a link stays one
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes files that only their owner reads
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _name_of(model: nn.Module) -> str:
    timm = getattr(model, "pretrained_cfg", None) or {}
    names = (
        timm.get("architecture") if isinstance(timm, dict) else None,
        getattr(getattr(model, "config", None), "_name_or_path", None),
    )
    return next((name for name in names if name), "")


# -- several adapters -------------------------------------------------------------------------------------------------


def add_adapter(model: nn.Module, config: _Config, name: str) -> nn.Module:
    """Put a further adapter on an injected model, with new factors, and make it the active one.

    Args:
        model, config: as :func:`plan`.
        name: of the new adapter.

    Raises:
        ValueError, TypeError: as :func:`plan`; a model without adapters, or a name that is taken. Nothing has been
            changed then.
    """
    adapters(model)
    check_name(name)
    _mount_beside(model, name, build(plan(model, config), model))
    return set_adapter(model, name)


def set_adapter(model: nn.Module, name: str) -> nn.Module:
    """Make this adapter the one that acts and is trained; the factors of the others are frozen.

    Raises:
        ValueError: a model without an adapter of this name.
    """
    owner = adapters(model)
    _known(owner, name)
    for other, groups in owner.items():
        groups.requires_grad_(other == name)
    owner.active = name
    return model


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context the model computes what it computed before it was injected.

    Raises:
        ValueError: a model without adapters.
    """
    owner = adapters(model)
    active, owner.active = owner.active, None
    try:
        yield model
    finally:
        if owner.active is None and active in owner:  # neither switched nor deleted meanwhile
            owner.active = active


def delete_adapter(model: nn.Module, name: str) -> nn.Module:
    """Drop an adapter. No adapter is active after the active one; with the last one the model is plain again.

    The parameters of a plain model are frozen and trained as they were before it was injected.

    Raises:
        ValueError: a model without an adapter of this name.
    """
    owner = adapters(model)
    _known(owner, name)
    if len(owner) == 1:
        eject(model)
        return model
    del owner[name]
    if owner.active == name:
        owner.active = None
    return model


def _known(owner: nn.ModuleDict, name: str | None) -> str:
    if name not in owner:
        raise ValueError(f"name must be one of the model's adapters, {', '.join(map(repr, owner))}, got {name!r}")
    return name


def _mount_beside(model: nn.Module, name: str, groups: nn.ModuleDict) -> None:
    owner = adapters(model)
    if name in owner:
        raise ValueError(f"name must be new, but the model already has an adapter {name!r}")
    mount(model, name, groups)
