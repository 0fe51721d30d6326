"""merge and unmerge: add the updates of an injected model to its weights, and undo that."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapted_linear import AdaptedLinear
from .attention import Projection, with_projections
from .base_linears import PLAIN, dense, has_own_forward, kept_in, kind
from .calls import call_linear
from .dora import dense_update
from .inject import adapted_linears, adapters, attach, detach
from .low_rank import Pair
from .ops import merge_
from .passes import Adapters
from .wrappers import module_at, named_modules, on_unwrapped, put_at, refuse_sharded


@dataclass
class _Merged:
    """What unmerge needs. It is stored on the model, but not in its state_dict."""

    adapters: Adapters
    names: list[str]  # paths of the Linears that were adapted
    weights: dict[str, Tensor]  # before the merge
    modules: dict[str, nn.Linear]  # those that a plain Linear has replaced


@on_unwrapped
def merge(model: nn.Module, *, keep_weights: bool = True, dequantize: bool = False) -> nn.Module:
    """Add the active adapter's updates to the weights and restore plain nn.Linears, in place: no cost at inference.

    Args:
        model: an injected model.
        keep_weights: keep a copy of the weights that change, for :func:`unmerge`. False saves that memory: the merge
            cannot be undone, and the model is a plain one, which may be injected again. An interruption meanwhile
            (Ctrl-C) may leave some weights merged if all are float32 or wider: of others a copy is made for a while.
        dequantize: replace an adapted Linear that is quantized, parametrized or weight-normed by a plain one with the
            dense weight. Without it such Linears are refused.

    Returns:
        The model. Its state_dict has the names of the model before :func:`inject`.

    Warns:
        UserWarning: weights are bfloat16 or float16; it says how much of the update their rounding lost.

    Raises:
        ValueError: a model that has no adapters, is already merged, or whose adapter is disabled; an adapted Linear
            that was removed or replaced; a weight that is on the meta device; a weight that is
            quantized or recomputed at every forward, or that is shared with a module that is not adapted; a model that
            FSDP2 has sharded.
    """
    owner = adapters(model)
    if owner.active is None:
        raise ValueError("merge needs an active adapter, but all are disabled")
    linears = adapted_linears(model, owner[owner.active])
    refuse_sharded(model, "merge", [*linears.values(), owner[owner.active]])
    own = {path: linear for path, linear in linears.items() if has_own_forward(linear, linear.base)}
    if own and not dequantize:
        path, linear = next(iter(own.items()))
        raise ValueError(f"{path} {_unmergeable(linear)}; merge(model, dequantize=True) puts a plain nn.Linear there")
    _check_unshared(model, {path: linear for path, linear in linears.items() if path not in own})
    with torch.no_grad():
        pairs = {path: pair for g in owner.groups() for path, pair in g.pairs_without_dropout(owner.backend).items()}
        plain = {path: _plain(linear, kept_in(linear)[0] or torch.float32) for path, linear in own.items()}
        weights = {path: plain.get(path, linear).weight for path, linear in linears.items()}
        if any(weight.is_inference() for weight in weights.values()) and not torch.is_inference_mode_enabled():
            raise ValueError("the weights were created under inference_mode and cannot be changed outside of it")
        if away := [path for path, weight in weights.items() if weight.is_meta]:
            raise ValueError(
                f"{away[0]}.weight is on the meta device, offloaded or not loaded yet: nothing can be added to it"
            )
        low = [path for path, weight in weights.items() if weight.dtype in (torch.bfloat16, torch.float16)]
        launches = {}
        scaled = [path for path in weights if pairs[path].magnitude is not None]
        for path, weight in weights.items():
            if path not in scaled:
                launches.setdefault((weight.dtype, weight.device), []).append(path)
        # one of several launches may fail after another has written
        keep = {
            path
            for path in weights
            if (keep_weights and path not in own) or path in low or len(launches) + len(scaled) > 1
        }
        kept = {path: weights[path].clone() for path in weights if path in keep}
        try:
            for path in scaled:
                weights[path].copy_(weights[path] + _update(weights[path], pairs[path]))
            for (dtype, _), paths in launches.items():
                wide = torch.promote_types(dtype, torch.float32)
                downs, ups = ([pair.to(wide) for pair in side] for side in zip(*(pairs[path][:2] for path in paths)))
                merge_([weights[path] for path in paths], downs, ups, backend=owner.backend)
        except BaseException:
            for path, weight in kept.items():
                weights[path].copy_(weight)
            raise
        loss = _loss([(kept[path], weights[path], pairs[path]) for path in low]) if low else 0.0
    names = detach(model)
    for path, linear in plain.items():
        put_at(model, path, linear)
    if keep_weights:
        before = {path: weight for path, weight in kept.items() if path not in own}
        model._efft_merged = (_Merged(owner, names, before, own),)  # a tuple, which registers nothing
    if low:  # last, because a warning may be turned into an error
        warnings.warn(
            f"merging into {weights[low[0]].dtype} weights lost {loss:.1%} of the update to rounding; "
            "model.float() before merge avoids it",
            stacklevel=3,
        )
    return model


def _unmergeable(linear: AdaptedLinear) -> str:
    """why an update cannot be added to the weight of this Linear; the sentence begins with its path"""
    if what := kind(linear):
        return f"is quantized ({what}), and rounding the sum to its few bits would lose most of the update"
    return "recomputes its weight at every forward (a parametrization, norm or pruning), which would undo the merge"


def _plain(linear: AdaptedLinear, dtype: torch.dtype) -> nn.Linear:
    """A plain Linear with the dense weight and the bias of one that has its own forward, in this dtype."""
    new = nn.Linear(linear.in_features, linear.out_features, False, device="meta", dtype=dtype)
    new.weight = nn.Parameter(dense(linear).to(dtype, copy=True).contiguous(), requires_grad=False)
    if linear.bias is not None:
        new.bias = nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)
    return new.train(linear.training)


def _check_unshared(model: nn.Module, linears: dict[str, nn.Linear]) -> None:
    merged = {id(linear.weight): path for path, linear in linears.items()}
    for name, module in named_modules(model):
        for key, p in module._parameters.items():
            linear = linears.get(merged.get(id(p)))
            owner = linear.attention[0] if isinstance(linear, Projection) else linear
            if linear is not None and module is not owner:
                raise ValueError(
                    f"{merged[id(p)]} shares its weight with {name or type(model).__name__}.{key}, which the merge "
                    "would change as well; untie them first, or do not merge"
                )


@on_unwrapped
def unmerge(model: nn.Module) -> nn.Module:
    """Undo :func:`merge`: restore the weights bit for bit, and put the adapters back on.

    Anything loaded or written into those weights after the merge is lost.

    Raises:
        ValueError: a model that is not merged, was merged with keep_weights=False, is sharded, or lacks a Linear that
            merge left.
    """
    if not hasattr(model, "_efft_merged"):
        raise ValueError(
            f"the model must be merged to be unmerged, but this {type(model).__name__} is not, or was merged with "
            "keep_weights=False, so that its original weights are gone"
        )
    (merged,) = model._efft_merged
    shapes = {path: tuple(weight.shape) for path, weight in merged.weights.items()}
    shapes |= {path: (linear.out_features, linear.in_features) for path, linear in merged.modules.items()}
    there = dict(named_modules(model))
    refuse_sharded(model, "unmerge", [there[path] for path in shapes if path in there])
    modules = dict(with_projections(named_modules(model)))
    for path in merged.names:
        found = modules.get(path)
        if found is None or (path in shapes and (type(found) not in PLAIN or found.weight.shape != shapes[path])):
            raise ValueError(f"{path} must be the nn.Linear that merge left there, got {found}")
    with torch.no_grad():
        for path, weight in merged.weights.items():
            module_at(model, path).weight.copy_(weight)
    for path, linear in merged.modules.items():
        now = module_at(model, path)
        put_at(model, path, linear.to(now.weight.device).train(now.training))
    del model._efft_merged
    for group in (group for groups in merged.adapters.values() for group in groups.values()):
        group.to(kept_in(module_at(model, next(iter(group.slots))))[1])  # which may differ between parts of a model
    attach(model, merged.adapters)
    for path in merged.names:
        AdaptedLinear.adopt(module_at(model, path), path, model.efft)
        call_linear(model, path)
    return model


def _update(weight: Tensor, pair: Pair) -> Tensor:
    """what is to be added to the weight, float32 or wider"""
    down, up, _, magnitude = pair
    if magnitude is not None:
        return dense_update(weight, down, up, magnitude)
    return (down.float() @ up.float()).T


def _loss(merged: list[tuple[Tensor, Tensor, Pair]]) -> float:
    """||what was added - what should have been|| / ||what should have been||, over all weights"""
    missing = total = 0.0
    for before, after, pair in merged:
        wanted = _update(before, pair)
        missing += (after.float() - before.float() - wanted).square().sum().item()
        total += wanted.square().sum().item()
    return (missing / total) ** 0.5 if total else 0.0
