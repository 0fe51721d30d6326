"""Adapter files, and several named adapters on one model.

An adapter file is a safetensors file. It holds the factors, the head if it was trained with them, and as metadata the
config, the fingerprint of the plan, the class and name of the base model and the version of this library. It holds no
code.
"""

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from .configs import MethodConfig
from .inject import adapted_linears, adapters, as_before, build, check_bare, check_name, eject, install, mount, plan
from .layouts import classes_of, head_state, heads_of
from .ops import check_backend
from .passes import Adapters
from .storage import write_bytes
from .wrappers import before_parallel, on_unwrapped, unwrapped

_FORMAT = "efft_kernels adapter 2"
_HEADLESS = "efft_kernels adapter 1"  # the older format: the same without a head
_HEAD = "head/"  # prefix of a tensor of the head; the rest is its name in the model's state_dict


@on_unwrapped
def save_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    name: str | None = None,
    base_model: str = "",
    head: bool | None = None,
) -> None:
    """Write one adapter, with the head that was trained with it, to a safetensors file, atomically.

    Args:
        model: an injected model.
        path: of the file; an existing one is replaced.
        name: of the adapter; None for the active one.
        base_model: name of the pre-trained model to record; empty for the name that timm or transformers gave it.
        head: whether to write the head; None writes it if it is trained, that is, if a parameter of it requires grad.

    Raises:
        ValueError: a model without this adapter, or with all adapters disabled and no name given; head=True for a model
            without a head.
        Warns a UserWarning if a Linear of the adapter was removed from the model or replaced.
        OSError: the file cannot be written; an existing one is unchanged then.
    """
    owner = adapters(model)
    groups = owner[_known(owner, owner.active if name is None else name)]
    try:
        adapted_linears(model, groups)
    except ValueError as error:
        warnings.warn(f"the file holds all factors of the adapter, but {error}", stacklevel=3)
    if head and not head_state(model):
        raise ValueError(f"head must not be True for this {type(model).__name__}, which has none")
    write(path, model, groups, trained_head(model) if head is None else head_state(model) if head else {}, base_model)


@on_unwrapped
def trained_head(model: nn.Module) -> dict[str, Tensor]:
    """The state of the head if a parameter of it requires grad, else an empty dict."""
    trained = any(p.requires_grad for module in heads_of(model).values() for p in module.parameters())
    return head_state(model) if trained else {}


def write(
    path: str | os.PathLike, model: nn.Module, groups: nn.ModuleDict, head: dict[str, Tensor], base_model: str = ""
) -> None:
    """Write the file of an adapter of this model: its groups, and the state of its head."""
    from safetensors.torch import save

    tensors = {key: t.detach().contiguous() for key, t in groups.state_dict().items()}
    # clones, because parts of a head may share memory, which safetensors refuses
    tensors |= {_HEAD + key: t.detach().clone(memory_format=torch.contiguous_format) for key, t in head.items()}
    metadata = {
        "format": _FORMAT,
        "version": sys.modules[__package__].__version__,
        "config": json.dumps(groups.plan.config.to_dict()),
        "fingerprint": groups.plan.fingerprint,
        "model": type(model).__name__,
        "base_model": base_model or _name_of(model),
    }
    write_bytes(Path(path), save(tensors, metadata))


@before_parallel
def load_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    name: str = "default",
    head: str | int | nn.Module = "train",
    factor_dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> nn.Module:
    """Load an adapter from a file, put it on a model, in place, and make it the active one.

    Args:
        model: the model it was made for, plain or with adapters of other names.
        path: a file written by :func:`save_adapter` of this or an earlier version.
        name: of the adapter on this model.
        head: "train" loads the head of the file, with a new classifier if it has another number of classes, and trains
            it; if the file has none, the model's own is trained. "keep" leaves the model's head unchanged. A number of
            classes or a module replaces it as in :func:`inject`, which needs a plain model. If the head was a custom
            module when the file was written, the model must have that module before loading.
        factor_dtype: as :func:`inject`. A file holds factors in the dtype that they had; they are cast when loaded.
        backend: as :func:`inject`; needs a plain model.

    Returns:
        The model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an adapter file, a truncated or corrupt one, one for another model, or a name already taken; a
            head that does not fit the model, or that would replace one which other adapters use. The model is
            unchanged then.
    """
    config, metadata, tensors, state = read(path)
    check_name(name)
    check_backend(backend)
    groups = filled(model, config, metadata, tensors, path, factor_dtype)
    if isinstance(getattr(model, "efft", None), Adapters):
        if head not in ("train", "keep") or backend is not None:
            raise ValueError("head and backend can only be chosen for a plain model, but this one is already injected")
        if head == "train":
            _check_shared(model, state, path)
        _mount_new(model, name, groups)
    else:
        check_bare(model)
        state = state if head == "train" else {}
        if lost := [key for key, t in head_state(model).items() if t.is_meta and state]:
            raise ValueError(
                f"{lost[0]} is on the meta device, where the head of {path} would be lost: load the weights of the "
                "model first, or the adapter with head='keep'"
            )
        install(model, name, groups, _fitting(model, state, path) if state else head, backend)
        _fill_head(model, state)
    set_adapter(model, name)
    return model


def _fitting(model: nn.Module, state: dict[str, Tensor], path) -> str | int:
    """the argument ``head`` of install that prepares the model for the head of a file"""
    try:
        return classes_of(model, state) or "train"
    except ValueError as error:
        raise ValueError(
            f"the head in {path} does not fit; load the adapter alone with head='keep': {error}"
        ) from error


def _fill_head(model: nn.Module, state: dict[str, Tensor]) -> None:
    own = head_state(model)
    with torch.no_grad():
        for key, t in state.items():
            own[key].copy_(t)


def _check_shared(model: nn.Module, state: dict[str, Tensor], path) -> None:
    """Refuse a head that differs from the model's, for it would silently change what the other adapters give."""
    own = head_state(model)
    same = own.keys() == state.keys() and all(torch.equal(own[key], t.to(own[key])) for key, t in state.items())
    if state and not same:
        raise ValueError(
            f"{path} holds a head that differs from the one of this model, which serves "
            f"{', '.join(map(repr, adapters(model)))}; head='keep' loads the adapter without it"
        )


@torch.inference_mode(False)
def filled(
    model: nn.Module,
    config: MethodConfig,
    metadata: dict,
    tensors: dict[str, Tensor],
    path,
    factor_dtype: torch.dtype = torch.float32,
) -> nn.ModuleDict:
    """Groups for this model with the factors of a file, on its device; ``factor_dtype`` as for inject.

    Raises:
        ValueError: the file is for another model, or a factor is missing or has another shape.
    """
    made = plan(model, config)
    if made.fingerprint != metadata["fingerprint"]:
        raise ValueError(
            f"{path} is an adapter of {metadata['base_model'] or metadata['model']}, whose Linears or shapes differ "
            f"from those of this {type(model).__name__}"
        )
    groups = build(made, model, factor_dtype, empty=True)
    own = groups.state_dict()
    wanted = {key: tuple(t.shape) for key, t in own.items()}
    found = {key: tuple(t.shape) for key, t in tensors.items()}
    if wanted != found:
        key = sorted(wanted.items() ^ found.items())[0][0]
        raise ValueError(f"{path} must hold {key} of shape {wanted.get(key)}, got {found.get(key)}")
    # copies: a tensor of a file that was read under inference_mode could not be trained
    groups.load_state_dict({key: t.to(own[key], copy=True) for key, t in tensors.items()}, assign=True)
    return groups


def read(path: str | os.PathLike) -> tuple[MethodConfig, dict[str, str], dict[str, Tensor], dict[str, Tensor]]:
    """Read an adapter file: its config, metadata, factors, and the state of the head, which is empty if it has none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an adapter file, or a truncated or corrupt one.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no adapter file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file; it may be truncated or corrupt: {error}"
        ) from error
    if metadata.get("format") not in (_FORMAT, _HEADLESS):
        raise ValueError(
            f"{path} must be a file written by save_adapter ({_FORMAT!r}), got format {metadata.get('format')!r}"
        )
    in_head = [key for key in tensors if key.startswith(_HEAD) and metadata["format"] != _HEADLESS]
    state = {key.removeprefix(_HEAD): tensors.pop(key) for key in in_head}
    try:
        config = MethodConfig.from_dict(json.loads(metadata["config"]))
        return config, {key: metadata[key] for key in ("fingerprint", "model", "base_model", "version")}, tensors, state
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} has damaged metadata, or was written by another version of efft_kernels: {error}"
        ) from error


def _name_of(model: nn.Module) -> str:
    timm = getattr(model, "pretrained_cfg", None) or {}
    names = (
        timm.get("architecture") if isinstance(timm, dict) else None,
        getattr(getattr(model, "config", None), "_name_or_path", None),
    )
    return next((name for name in names if name), "")


@before_parallel
def add_adapter(
    model: nn.Module, config: MethodConfig, name: str, *, factor_dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Put another adapter on an injected model, with new factors, and make it the active one.

    Args:
        model, config: as :func:`plan`.
        name: of the new adapter.
        factor_dtype: as :func:`inject`.

    Raises:
        ValueError, TypeError: as :func:`plan`; a model without adapters, or a name that is taken. The model is
            unchanged then.
    """
    adapters(model)
    check_name(name)
    _mount_new(model, name, build(plan(model, config), model, factor_dtype))
    return set_adapter(model, name)


@on_unwrapped
def set_adapter(model: nn.Module, name: str) -> nn.Module:
    """Make this adapter the active one: its update is added and its factors are trained. The others are frozen.

    Outputs that were computed before with another adapter still give gradients to its factors, so that one loss may
    compare two adapters.

    Raises:
        ValueError: a model without an adapter of this name.
    """
    owner = adapters(model)
    _known(owner, name)
    owner.activate(name)
    return model


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context the model computes what it did before it was injected, with the head that it had then.

    A model that was injected on the meta device keeps its head, which had no values then.

    Raises:
        ValueError: a model without adapters.
    """
    owner = adapters(model)
    active, owner.active = owner.active, None
    try:
        with as_before(unwrapped(model)):
            yield model
    finally:
        if owner.active is None and active in owner:  # neither switched nor deleted in between
            owner.active = active


@on_unwrapped
def delete_adapter(model: nn.Module, name: str) -> nn.Module:
    """Remove an adapter. If it was the active one, none is active afterwards.

    Removing the last one gives the plain model back, with requires_grad of its parameters as before it was injected.

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


def _mount_new(model: nn.Module, name: str, groups: nn.ModuleDict) -> None:
    owner = adapters(model)
    if name in owner:
        raise ValueError(f"name must be new, but the model already has an adapter {name!r}")
    mount(model, name, groups)
