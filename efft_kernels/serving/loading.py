"""Adapters of a bank, made from files and injected models."""

from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from os import PathLike

import torch
from torch import Tensor, nn

from .. import frozen_weights
from ..adapted_linear import AdaptedLinear
from ..adapter_file import AdapterFile, check_needs, read_adapter
from ..base_linears import has_own_forward, kept_in, kind
from ..files import filled, head_classes, trained_head
from ..inject import adapters
from ..layouts import classifiers_of, head_state
from ..wrappers import unwrapped


class Unreadable(ValueError):
    """A file that is no adapter, of whatever model."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter of a bank: its factors and, if it brought a head, its classifiers."""

    groups: nn.ModuleDict
    heads: dict[str, nn.Linear]  # path -> classifier; empty for an adapter that uses the model's
    model: nn.Module  # for which it was read
    base_model: str  # as its file names it

    def parameters(self) -> list[nn.Parameter]:
        return [p for module in (self.groups, *self.heads.values()) for p in module.parameters()]

    @cached_property
    def kind(self) -> str:
        """A digest, quick to compare, of what adapters of one batch have in common: the method, and the plan but for
        rank and initial values."""
        specs = [replace(spec, rank=(0, 0), zero="") for spec in self.groups.plan.groups]
        return sha256(repr(([type(group) for group in self.groups.values()], specs)).encode()).hexdigest()

    def bytes(self) -> int:
        modules = self.groups, *self.heads.values()
        return sum(t.nbytes for module in modules for t in (*module.parameters(), *module.buffers()))


def load(model: nn.Module, source: str | PathLike | nn.Module, factor_dtype: torch.dtype, strict: bool) -> Adapter:
    """An adapter for the model of a bank; arguments and errors as :meth:`AdapterBank.add`."""
    if isinstance(source, nn.Module):
        file = _file_of(unwrapped(source))
    elif isinstance(source, str | PathLike):
        try:
            file = read_adapter(source)
        except ValueError as error:
            raise Unreadable(str(error)) from error
    else:
        what = type(source).__name__
        raise TypeError(f"source must be the path of an adapter file or an injected model, got {what}")
    if file.trained:
        raise ValueError(
            f"{file.path} was trained with modules of its own ({', '.join(file.trained)}), which a bank keeps for no "
            "adapter; load_adapter takes it"
        )
    groups = filled(model, file, factor_dtype)
    heads = _load_heads(model, file.head, file.path) if file.head else {}
    check_needs(model, file, strict, None if heads else groups)
    return Adapter(groups, heads, model, file.base_model)


def check_plain(linear: nn.Linear, path: str, source) -> None:
    """Refuse a Linear that is quantized, or whose weight is recomputed."""
    if has_own_forward(linear, linear.base if isinstance(linear, AdaptedLinear) else type(linear)):
        raise ValueError(
            f"{source} adapts {path}, whose weight must be plain in a bank, got "
            f"{kind(linear) or 'one that is recomputed'}; inject takes such a model, for one adapter at a time"
        )


def _load_heads(model: nn.Module, state: dict[str, Tensor], source) -> dict[str, nn.Linear]:
    """The classifiers in a head's state, with the dtype and device of the model's."""
    for path, linear in classifiers_of(model):
        check_plain(linear, path, source)
    try:
        head_classes(model, state)
    except ValueError as error:
        raise ValueError(f"the head in {source} does not fit: {error}") from error
    own, heads, rest = head_state(model), {}, set(state)
    for path, linear in classifiers_of(model):
        weight, (dtype, device) = state[f"{path}.weight"], kept_in(linear)
        if device.type == "meta":
            raise ValueError(f"{path} is on the meta device, where {source} would be lost: load its weights first")
        made = nn.Linear(linear.in_features, len(weight), linear.bias is not None, device="meta")
        made.weight = nn.Parameter(weight.to(device, dtype, copy=True))
        if linear.bias is not None:
            made.bias = nn.Parameter(state[f"{path}.bias"].to(device, dtype, copy=True))
        heads[path] = made
        rest -= {f"{path}.weight", f"{path}.bias"}
    for key in sorted(rest):
        if not torch.equal(own[key], state[key].to(own[key])):
            raise ValueError(
                f"the head in {source} must differ from the model's in its last Linear alone, which a bank keeps "
                f"for each adapter, but {key} differs too"
            )
    return heads


def _file_of(model: nn.Module) -> AdapterFile:
    """What a file of a model's active adapter would hold."""
    owner, name = adapters(model), type(model).__name__
    if owner.active is None:
        raise ValueError(f"this {name} must have an active adapter, but all are disabled")
    groups, head = owner[owner.active], trained_head(model)
    return AdapterFile(
        path=f"this {name}",
        format=0,
        version="",
        config=groups.plan.config,
        fingerprint=groups.plan.fingerprint,
        model=name,
        base_model="",
        factors=groups.state_dict(),
        head=head,
        preparation=groups.preparation,
        classes=groups.classes,
        frozen=frozen_weights.sample(model, head if groups.beside_head else head_state(model)),
        trained=owner.trained,
        multilabel=groups.multilabel,
    )
