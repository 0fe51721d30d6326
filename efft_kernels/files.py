"""Save and load adapters, and keep several named ones on a model. adapter_file.py has the format of the files."""

import contextlib
import functools
import math
import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path

import torch
from torch import Tensor, nn

from . import hub as hubs
from .adapter_file import AdapterFile, check_finite, check_needs, read_adapter, write
from .card import card
from .configs import MethodConfig
from .inject import (
    adapted_linears,
    adapters,
    as_before,
    build,
    check_bare,
    check_name,
    check_train,
    eject,
    install,
    mount,
    trained_modules,
)
from .kernels import FLOATS
from .layouts import classes_of, classifiers_of, head_state, heads_of
from .ops import check_backend
from .passes import Adapters
from .plans import Plan, plan, plan_of_file
from .preparation import Preparation
from .tensor_file import check_path
from .wrappers import before_parallel, on_unwrapped, outermost, unwrapped, whole


@on_unwrapped
def save_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    name: str | None = None,
    base_model: str = "",
    head: bool | None = None,
    preparation: Preparation | None = None,
    classes: Sequence[str] | None = None,
    multilabel: bool | None = None,
    hub: str | None = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Write one adapter, with the head and modules that were trained with it, to a safetensors file, atomically.

    The file also holds samples of the frozen weights, by which :func:`load_adapter` tells other weights of the same
    shapes; not of those that FSDP2 has sharded. Every process of a sharded model must call this, and writes its file.

    Args:
        model: an injected model.
        path: of the file; an existing one is replaced.
        name: of the adapter; None for the active one.
        base_model: name of the pre-trained model to record; empty for the name that timm or transformers gave it.
        head: whether to write the head; None writes it if it is trained, that is, if a parameter of it requires grad or
            it differs from the head before inject.
        preparation: how the training images were prepared, for programs that predict with the file. None for that of
            the file that this adapter was loaded from, if it states one; otherwise the new file states none.
        classes: names of the head's classes, in the order of its outputs; None as with preparation.
        multilabel: whether an image may have several of the classes, or none, so that scores are sigmoids and no
            softmax; None as with preparation, and False if nothing is stated.
        hub: "OWNER/NAME" of a repository on the Hugging Face hub to upload the file to, as adapter.safetensors, with a
            model card that is written from it. A repository that does not exist is made, with the visibility that the
            owner's account has as its default. ``load_adapter(model, "hf-hub:OWNER/NAME")`` reads it.
        metrics: name -> value, for the model card: what was measured with this adapter.

    Raises:
        TypeError: an argument has another type.
        ImportError: hub, without huggingface_hub.
        ValueError: a model without this adapter, or with all adapters disabled and no name given; head=True for a model
            without a head; another number of classes than the head has; within disable_adapter; factors that are
            parametrized or on the meta device, or numbers that are not finite. An existing file is unchanged then.
        OSError: the file cannot be written, or is a device, a FIFO or a folder; an existing one is unchanged then. Or
            the hub cannot be reached or refuses; the file is written then.

    Warns a UserWarning if a Linear of the adapter was removed from the model or replaced, or if the head changed since
    an adapter that is not active was.
    """
    check_path(path)
    if hubs.is_on_hub(path):
        raise ValueError(
            f"path must be a local file, which hub={path.removeprefix(hubs.PREFIX)!r} uploads, got {path!r}"
        )
    repo = None if hub is None else hubs.repository(hub)
    if metrics is not None and repo is None:
        raise ValueError("metrics are for the model card on a hub, so they need hub")
    given = {"base_model": base_model, "preparation": preparation, "multilabel": multilabel, "metrics": metrics}
    for (key, value), kind in zip(given.items(), (str, Preparation, bool, Mapping)):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{key} must be of type {kind.__name__}, got {value!r}")
    if not all(isinstance(value, int | float) for value in (metrics or {}).values()):
        raise TypeError(f"metrics must be numbers by name, got {metrics!r}")
    owner, trained = adapters(model), trained_head(model)
    name = known(owner, owner.active if name is None else name)
    groups = owner[name]
    if head is not False:
        _warn_of_shared(model, name)
    try:
        adapted_linears(model, groups)
    except ValueError as error:
        warnings.warn(f"the file holds all factors of the adapter, but {error}", stacklevel=3)
    if head and not head_state(model):
        raise ValueError(f"head must not be True for this {type(model).__name__}, which has none")
    state = trained if head is None else head_state(model) if head else {}
    stated = groups.classes if state or not trained else None  # not those of a head that is left out
    classes = stated if classes is None else _checked_names(model, classes)
    several = groups.multilabel if multilabel is None else multilabel
    preparation = preparation or groups.preparation
    write(path, model, groups, state, base_model, preparation, classes, owner.trained, several, trained)
    if repo is not None:
        publish(path, repo, metrics)


def publish(
    path: str | os.PathLike,
    repo: str,
    metrics: Mapping[str, float] | None = None,
    more: Mapping[str, bytes] | None = None,
) -> None:
    """Upload an adapter file with its model card, and more files by name; errors as :func:`save_adapter`."""
    text = card(read_adapter(path), repo, metrics)
    files = {hubs.ADAPTER: Path(path), hubs.CARD: text.encode(), **(more or {})}
    hubs.upload(repo, files, f"An adapter of efft_kernels, {Path(path).name}")


def _checked_names(model: nn.Module, classes: Sequence[str]) -> list[str]:
    unordered = not isinstance(classes, Collection) or isinstance(classes, str | Set | Mapping)
    if unordered or not all(isinstance(c, str) for c in classes):
        raise TypeError(f"classes must be a sequence of names, got {classes!r}")
    if len(classes) != (outputs := _outputs(model, classes)):
        raise ValueError(f"classes must name the {outputs} classes of the head, got {len(classes)} names")
    return list(classes)


def _outputs(model: nn.Module, classes: Sequence[str]) -> int:
    """the number of classes of the model's own head; of a model without one, that of the names"""
    return next((linear.out_features for _, linear in classifiers_of(model)), len(classes))


@on_unwrapped
def trained_head(model: nn.Module) -> dict[str, Tensor]:
    """The state of the head if a parameter of it requires grad or it is not as before inject, else an empty dict.

    Raises:
        ValueError: within disable_adapter, where the model has the head of before.
    """
    owner, now = adapters(model), {key: whole(t) for key, t in head_state(model).items()}
    if owner.swapped:
        raise ValueError("this needs the trained head, so it must be called outside of disable_adapter")
    before = {f"{path}.{key}": t for path, m in owner.modules_before.items() for key, t in m.state_dict().items()}
    differ = lambda t, old: not t.is_meta and (t.shape != old.shape or not torch.equal(t, old.to(t)))
    trained = any(p.requires_grad for module in heads_of(model).values() for p in module.parameters())
    return now if trained or any(key in before and differ(t, before[key]) for key, t in now.items()) else {}


@before_parallel
def load_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    name: str = "default",
    head: str | int | nn.Module = "train",
    factor_dtype: torch.dtype = torch.float32,
    backend: str | None = None,
    strict: bool = False,
) -> nn.Module:
    """Load an adapter from a file, put it on a model, in place, and make it the active one.

    Later changes of the file do not affect the model. ``model.efft[name].preparation`` and ``.classes`` are afterwards
    what the file states about its images and classes, or None.

    Args:
        model: the model it was made for, plain or with adapters of other names.
        path: a file written by :func:`save_adapter` of this or an earlier version, or its name on the Hugging Face hub:
            "hf-hub:OWNER/NAME", with "@REVISION" or "/FILE.safetensors" behind it if needed.
        name: of the adapter on this model.
        head: "train" loads the head of the file, with a new classifier if it has another number of classes, and trains
            it; if the file has none, the model's own is trained. "keep" leaves the model's head unchanged. A number of
            classes or a module replaces it as in :func:`inject`, which needs a plain model. If the head was a custom
            module when the file was written, the model must have that module before loading.
        factor_dtype: as :func:`inject`. A file holds factors in the dtype that they had; they are cast when loaded.
        backend: as :func:`inject`; needs a plain model.
        strict: refuse, instead of warning, if the adapter would not compute here what it was trained for: if the frozen
            weights differ from those it was trained on, as far as the samples in the file show, or if the model takes
            images of another size. Files of formats 1 and 2 do not state these.

    Returns:
        The model.

    Raises:
        FileNotFoundError: no such file.
        OSError: the hub cannot be reached; ImportError: huggingface_hub, which reads it, is missing.
        ValueError: not an adapter file, a truncated or damaged one, one for another model or, if strict, for other
            weights or images, or a name already taken; a model on the meta device; a head that does not fit the model,
            or that would replace one which other adapters use. The model is unchanged then.

    Warns a UserWarning if the file was trained on other weights or images, unless strict.
    """
    file = read_adapter(path)
    check_name(name)
    check_backend(backend)
    groups = filled(model, file, factor_dtype)
    injected = isinstance(getattr(model, "efft", None), Adapters)
    if injected and (head not in ("train", "keep") or backend is not None):
        raise ValueError("head and backend can only be chosen for a plain model, but this one is already injected")
    train, more, state = modules_in(model, groups.plan, file)
    fits = state or groups.classes is None or len(groups.classes) == _outputs(model, groups.classes)
    if not fits or (head != "train" and (state or head != "keep")):
        groups.classes, groups.multilabel = None, False  # those of another head
    state = state if head == "train" else {}
    if injected:
        _check_shared(model, state, path)
        _check_shared(model, more, path, train)
        check_needs(model, file, strict, groups)
        _mount_new(model, name, groups)
    else:
        check_bare(model)
        if lost := [key for key, t in head_state(model).items() if t.is_meta and state]:
            raise ValueError(
                f"{lost[0]} is on the meta device, where the head of {path} would be lost: load the weights of the "
                "model first, or the adapter with head='keep'"
            )
        head = _fitting(model, state, path) if state else head
        check_needs(model, file, strict, groups, new_head=head not in ("train", "keep"))
        install(model, name, groups, head, backend, train)
        _fill(model, state | more, (*heads_of(model), *train))
    set_adapter(model, name)
    return model


def _fitting(model: nn.Module, state: dict[str, Tensor], path) -> str | int:
    """the argument ``head`` of install that prepares the model for the head of a file"""
    try:
        return head_classes(model, state) or "train"
    except ValueError as why:
        raise ValueError(f"the head in {path} does not fit; load the adapter alone with head='keep': {why}") from why


def head_classes(model: nn.Module, state: dict[str, Tensor]) -> int | None:
    """The number of classes that the model's head needs to load this state; None if the state fits as it is.

    Raises:
        ValueError: the state does not fit for another reason, or has no classes.
    """
    own = head_state(model)
    for key, t in state.items():
        mine = own.get(key, t).dtype
        if t.dtype not in FLOATS if mine.is_floating_point else t.dtype != mine:
            raise ValueError(f"{key} must hold numbers of the kind of {mine}, got {t.dtype}")
    classes = classes_of(model, state)
    if classes == 0:
        raise ValueError("it must have at least one class, got 0")
    return classes


def modules_in(
    model: nn.Module, made: Plan, file: AdapterFile
) -> tuple[tuple[str, ...], dict[str, Tensor], dict[str, Tensor]]:
    """The modules that were trained in full with an adapter, their state, and that of the head."""
    try:
        train = check_train(model, file.trained, made)
    except ValueError as error:
        raise ValueError(f"{file.path} holds modules that this {type(model).__name__} lacks: {error}") from error
    heads = tuple(f"{path}." for path in heads_of(model))  # whose classes vary: what train named of one belongs to it
    train = tuple(path for path in train if not f"{path}.".startswith(heads))
    inside = tuple(f"{path}." for path in train)
    more = {key: t for key, t in file.head.items() if key.startswith(inside) and not key.startswith(heads)}
    own = {key: t for key, t in head_state(model, train).items() if not key.startswith(heads)}
    wanted, found = ({key: tuple(t.shape) for key, t in tensors.items()} for tensors in (own, more))
    if wanted != found:
        key = sorted(wanted.items() ^ found.items())[0][0]
        raise ValueError(f"{file.path} must hold {key} of shape {wanted.get(key)}, got {found.get(key)}")
    if lost := [key for key, t in own.items() if t.is_meta]:
        raise ValueError(f"{lost[0]} is on the meta device, where its values in {file.path} would be lost")
    return train, more, {key: t for key, t in file.head.items() if key not in more}


def _fill(model: nn.Module, state: dict[str, Tensor], paths: Iterable[str]) -> None:
    own = head_state(model, paths)
    with torch.no_grad():
        for key, t in state.items():
            own[key].copy_(t)


def _check_shared(model: nn.Module, state: dict[str, Tensor], path, paths: Iterable[str] | None = None) -> None:
    """Refuse a head, or modules at these paths, that differ from the model's: loading them would silently change what
    the other adapters give."""
    own = head_state(model, paths)
    own = own if paths is None else {key: own[key] for key in state}
    same = own.keys() == state.keys() and all(torch.equal(own[key], t.to(own[key])) for key, t in state.items())
    if state and not same:
        raise ValueError(
            f"{path} holds {'a head' if paths is None else ', '.join(paths)} that differs from the one of this model, "
            f"which serves {', '.join(map(repr, adapters(model)))}"
            + "; head='keep' loads the adapter without it, and an AdapterBank holds adapters with heads of their own"
            * (paths is None)
        )


@torch.inference_mode(False)
def filled(model: nn.Module, file: AdapterFile, factor_dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    """Groups for this model with the factors of a file, on its device; ``factor_dtype`` as for inject.

    Raises:
        ValueError: the file is for another model, or a factor is missing or has another shape; a Linear on meta.
    """
    made = plan_of_file(model, file.config, lambda made: made.fingerprint == file.fingerprint)
    if made.fingerprint != file.fingerprint:
        raise ValueError(
            f"{file.path} is an adapter of {file.trained_on}, whose Linears or shapes differ from those of this "
            f"{type(model).__name__}"
        )
    groups = build(made, model, factor_dtype, empty=True)
    own = groups.state_dict()
    if lost := [path for group in groups.values() for path in group.slots if next(group.parameters()).is_meta]:
        raise ValueError(f"{lost[0]} is on the meta device, where {file.path} would be lost: load its weights first")
    wanted = {key: tuple(t.shape) for key, t in own.items()}
    found = {key: tuple(t.shape) for key, t in file.factors.items()}
    if wanted != found:
        key = sorted(wanted.items() ^ found.items())[0][0]
        raise ValueError(f"{file.path} must hold {key} of shape {wanted.get(key)}, got {found.get(key)}")
    # copies: a tensor of a file that was read under inference_mode could not be trained
    groups.load_state_dict({key: t.to(own[key], copy=True) for key, t in file.factors.items()}, assign=True)
    check_finite(file.path, {key: t.to(own[key].dtype) for key, t in file.factors.items()} | file.head)
    groups.preparation, groups.classes, groups.multilabel = file.preparation, file.classes, file.multilabel
    groups.beside_head = any(f'"{key}"' in (file.frozen or "") for key in head_state(model))
    return groups


@before_parallel
def add_adapter(
    model: nn.Module, config: MethodConfig, name: str, *, factor_dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Put another adapter on an injected model, with new factors, and make it the active one.

    The head stays: all adapters of a model share it. An AdapterBank holds adapters with heads of their own.

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

    All adapters of a model share its head and the modules that ``train`` named; a UserWarning says if these changed
    since this adapter was active.

    Outputs that were computed before with another adapter still give gradients to its factors, so that one loss may
    compare two adapters.

    Raises:
        ValueError: a model without an adapter of this name.
    """
    owner = adapters(model)
    known(owner, name)
    if owner.active not in (None, name):
        owner.left_at[owner.active] = _sums_of_shared(model)
    if not owner.swapped:  # else the modules of before inject are there
        _warn_of_shared(model, name)
    owner.activate(name)
    return model


def _sums_of_shared(model: nn.Module) -> list[float]:
    """Sums of the values, and of their squares, of the head and of ``train`` modules. Versions of tensors would not do:
    fused optimizers do not count their writes.
    """
    tensors = [t.detach() for module in trained_modules(model).values() for t in module.state_dict().values()]
    wide = [t.double() for t in tensors if t.is_floating_point() and not t.is_meta]
    return [total.item() for t in wide for total in (t.sum(), t.square().sum())]


def _warn_of_shared(model: nn.Module, name: str) -> None:
    """Say that what all adapters share has changed since this one, which is not active, was."""
    owner = adapters(model)
    if name == owner.active or (before := owner.left_at.get(name)) is None:
        return
    now = _sums_of_shared(model)  # on another device they round otherwise
    if len(now) != len(before) or not all(map(functools.partial(math.isclose, abs_tol=1e-12), now, before)):
        shared = ", ".join(outermost(trained_modules(model)))
        warnings.warn(
            f"{shared}, which all adapters of a model share, changed since {name!r} was active, and its outputs with "
            "it; an AdapterBank holds adapters with heads of their own",
            stacklevel=4,
        )


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
        elif active in owner and owner.active != active:
            owner.left_at[active] = _sums_of_shared(unwrapped(model))


@on_unwrapped
def delete_adapter(model: nn.Module, name: str) -> nn.Module:
    """Remove an adapter. If it was the active one, none is active afterwards.

    Removing the last one gives the plain model back, with the head, the ``train`` modules and requires_grad of before
    it was injected, and its batch norms in its own mode. :func:`merge` takes adapters off and keeps what was trained.

    Raises:
        ValueError: a model without an adapter of this name.
    """
    owner = adapters(model)
    known(owner, name)
    if len(owner) == 1:
        eject(model)
        return model
    del owner[name]
    owner.left_at.pop(name, None)
    if owner.active == name:
        owner.active = None
    return model


def known(owner: nn.ModuleDict, name: str | None) -> str:
    if not isinstance(name, str | None):
        raise TypeError(f"name must be a str, got {name!r}")
    if name not in owner:
        raise ValueError(f"name must be one of the model's adapters, {', '.join(map(repr, owner))}, got {name!r}")
    return name


def _mount_new(model: nn.Module, name: str, groups: nn.ModuleDict) -> None:
    owner = adapters(model)
    if name in owner:
        raise ValueError(f"name must be new, but the model already has an adapter {name!r}")
    mount(model, name, groups)
