"""The format of adapter files: what one holds, written and read.

An adapter file is a safetensors file. Its tensors are the factors and, if it was trained with them, the head. Its
metadata are the config, the fingerprint of the plan, the class and name of the base model, the version of this library,
and what the adapter needs to be right: samples of the frozen weights, the preparation of images and the names of the
classes. A digest covers all of it. It holds no code. Files of the formats 1 (without a head) and 2 (without what the
adapter needs) are read.
"""

import json
import os
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from . import frozen_weights
from .base_linears import is_parametrized_class
from .configs import MethodConfig
from .kernels import FLOATS
from .layouts import classifiers_of, head_state, heads_of, input_size
from .preparation import Preparation
from .tensor_file import read_tensors, write_tensors
from .wrappers import whole

_FORMAT = "efft_kernels adapter "  # and its number
_LATEST = 3
_HEAD = "head/"  # prefix of a tensor of the head; the rest is its name in the model's state_dict


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """The contents of an adapter file. Tensors are copies: later changes of the file do not affect them."""

    path: str
    format: int  # 1 to 3
    version: str  # of the library that wrote it
    config: MethodConfig
    fingerprint: str  # of the plan: Linears, shapes and groups
    model: str  # class
    base_model: str  # name of the pre-trained model; may be empty
    factors: dict[str, Tensor]
    head: dict[str, Tensor]  # named as in the model's state_dict; empty for an adapter without one
    preparation: Preparation | None  # of images; None if the file does not state it
    classes: tuple[str, ...] | None  # names; None if the file does not state them
    frozen: str | None = field(repr=False)  # samples of the frozen weights; None in files of formats 1 and 2
    trained: tuple[str, ...] = ()  # paths of modules that were trained in full; ``head`` has their tensors, too
    multilabel: bool = False  # an image may have several of the classes, or none

    @property
    def trained_on(self) -> str:
        """What to call the base model in a message."""
        return self.base_model or self.model


def write(
    path: str | os.PathLike,
    model: nn.Module,
    groups: nn.ModuleDict,
    head: dict[str, Tensor],
    base_model: str = "",
    preparation: Preparation | None = None,
    classes: Sequence[str] | None = None,
    trained: Sequence[str] = (),
    multilabel: bool = False,
    unfrozen: Collection[str] = (),
) -> None:
    """Write the file of an adapter of this model: its groups, the state of its head and of the ``trained`` modules,
    which is the model's where ``head`` does not have it. ``unfrozen`` names what is neither in the file nor frozen."""
    own, more = head_state(model), head_state(model, trained)
    for key, group in groups.items():
        if is_parametrized_class(type(group)) or group._forward_pre_hooks:  # a parametrization, or pruning
            raise ValueError(f"the factors of group {key!r} must be plain parameters, but something computes one")
    factors, kept = ({key: whole(t) for key, t in state.items()} for state in (groups.state_dict(), more | head))
    check_finite("the adapter", factors | kept)
    metadata = {
        "format": f"{_FORMAT}{_LATEST}",
        "version": sys.modules[__package__].__version__,
        "config": json.dumps(groups.plan.config.to_dict()),
        "fingerprint": groups.plan.fingerprint,
        "model": type(model).__name__,
        "base_model": base_model or name_of(model),
        "frozen": frozen_weights.sample(model, {*head, *more, *(unfrozen if groups.beside_head else own)}),
        **({"train": json.dumps(list(trained))} if trained else {}),
        **stated(preparation, classes, multilabel),
    }
    write_tensors(path, factors | {_HEAD + key: t for key, t in kept.items()}, metadata)


def check_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError, which begins with ``name``, for NaN and infinity, and for tensors without values."""
    for key, t in tensors.items():
        if t.is_meta:
            raise ValueError(f"{name} must hold values, but {key} is on the meta device, offloaded or not loaded")
        if t.is_floating_point() and not t.isfinite().all():
            kind = str(t.dtype).removeprefix("torch.")
            raise ValueError(f"{name} must hold finite numbers, but {key} has NaN or infinity in {kind}")


def stated(preparation: Preparation | None, classes: Sequence[str] | None, multilabel: bool = False) -> dict[str, str]:
    """The metadata that say how images are prepared, what the classes are called, and if an image may have several of
    them; without what is not known."""
    made = {}
    if preparation is not None:
        made["preparation"] = preparation.to_json()
    if classes is not None:
        made["classes"] = json.dumps(list(classes))
    return {**made, "multilabel": "true"} if multilabel else made


def read_stated(metadata: dict[str, str]) -> tuple[Preparation | None, tuple[str, ...] | None]:
    """(preparation, classes) that :func:`stated` gave.

    Raises:
        TypeError, ValueError: it is something else.
    """
    preparation = Preparation.from_json(metadata["preparation"]) if "preparation" in metadata else None
    classes = json.loads(metadata["classes"]) if "classes" in metadata else None
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise ValueError("classes must be a list of names")
    return preparation, None if classes is None else tuple(classes)


def read_adapter(path: str | os.PathLike) -> AdapterFile:
    """Read an adapter file, of this or an earlier version, without a model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an adapter file, a truncated or damaged one, or one with factors that are not floating-point
            numbers.
    """
    known = {f"{_FORMAT}{number}": number for number in range(1, _LATEST + 1)}
    metadata, tensors = read_tensors(path, digested=[name for name, number in known.items() if number > 2])
    if metadata.get("format") not in known:
        raise ValueError(
            f"{path} must be a file written by save_adapter ({_FORMAT}{_LATEST} or earlier), got format "
            f"{metadata.get('format')!r}"
        )
    number = known[metadata["format"]]
    in_head = [key for key in tensors if key.startswith(_HEAD) and number > 1]
    head = {key.removeprefix(_HEAD): tensors.pop(key) for key in in_head}
    _check_dtypes(path, tensors)
    try:
        config = MethodConfig.from_dict(json.loads(metadata["config"]))
        names = {key: metadata[key] for key in ("fingerprint", "model", "base_model", "version")}
        preparation, classes = read_stated(metadata)
        frozen = metadata["frozen"] if number > 2 else None
        trained = json.loads(metadata.get("train", "[]"))
        if not isinstance(trained, list) or not all(isinstance(key, str) for key in trained):
            raise ValueError("train must be a list of paths")
    except (KeyError, TypeError, ValueError, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{path} has damaged metadata, or was written by another version of efft_kernels: {error}"
        ) from error
    return AdapterFile(
        str(path),
        number,
        config=config,
        factors=tensors,
        head=head,
        preparation=preparation,
        classes=classes,
        frozen=frozen,
        trained=tuple(trained),
        multilabel=metadata.get("multilabel") == "true",
        **names,
    )


def _check_dtypes(path: str | os.PathLike, factors: dict[str, Tensor]) -> None:
    for key, t in factors.items():
        if t.dtype not in FLOATS:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
            raise ValueError(f"{path} must hold {key} as one of {names}, got {str(t.dtype).removeprefix('torch.')}")


def name_of(model: nn.Module) -> str:
    timm = getattr(model, "pretrained_cfg", None) or {}
    names = (
        timm.get("architecture") if isinstance(timm, dict) else None,
        getattr(getattr(model, "config", None), "_name_or_path", None),
    )
    return next((name for name in names if name), "")


def check_needs(
    model: nn.Module, file: AdapterFile, strict: bool, groups: nn.ModuleDict | None = None, new_head: bool = False
) -> None:
    """Refuse a file that fits the model by its shapes, but was trained on other weights or images. The model's own
    head may be another one if it is about to be replaced (``new_head``), or missing. Beside another head the groups of
    the file have no classes.

    Raises:
        ValueError: if strict; otherwise a UserWarning says the same.
    """
    problems = []
    if file.frozen is not None:
        heads = tuple(f"{path}." for path in heads_of(model))
        other, compared = frozen_weights.differences(model, file.frozen, heads)
        another = any(key.startswith(heads) for key in other)
        if another and groups is not None:
            groups.classes, groups.multilabel, groups.beside_head = None, False, False
        new_head |= not any(True for _ in classifiers_of(model))
        if other := [key for key in other if not new_head or not key.startswith(heads)]:
            problems.append(
                f"it was trained on other weights of {file.trained_on} than this {type(model).__name__} has: "
                f"{len(other)} of {compared} sampled tensors differ, such as {other[0]}"
            )
    size = input_size(model)
    if file.preparation is not None and size not in (None, file.preparation.size):
        problems.append(
            f"it was trained on images of {_by(file.preparation.size)} pixels, but this {type(model).__name__} takes "
            f"{_by(size)}"
        )
    if problems:
        sentence = f"{file.path} does not fit: {'; '.join(problems)}"
        if strict:
            raise ValueError(f"{sentence}; strict=False loads it with a warning")
        warnings.warn(sentence, stacklevel=3)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
