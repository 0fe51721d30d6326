"""The mean of several adapters as one adapter: exact, with the ranks of all of them side by side."""

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .adapter_file import AdapterFile, check_needs, read_adapter, write
from .configs import MethodConfig
from .files import filled, modules_in
from .groups import EFFTGroup, FacTTuckerGroup
from .inject import build
from .low_rank import Group
from .per_matrix import LoRAGroup, LoRAXSGroup, VeRAGroup
from .plans import Plan, plan_of_file
from .wrappers import on_unwrapped


@on_unwrapped
@torch.no_grad()
def average_adapters(
    model: nn.Module,
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    weights: Sequence[float] | None = None,
) -> None:
    """Write the mean of several adapters, such as those of several seeds, to a file as one adapter, atomically.

    Its update of each matrix is the weighted mean of theirs, exactly: the factors stand side by side and the cores as
    blocks on a diagonal, so the rank is the sum of the ranks (that of LoRA-XS, whose outer factors are those of the
    weights, stays). One forward costs that of one adapter of this rank. The file is loaded, trained, merged and served
    as any other. Heads and ``train`` modules are averaged entry by entry (Model soups, arXiv 2203.05482), which
    suits runs that started from nearly the same ones, as with ``efft-finetune --head-init probe``.

    Args:
        model: the one that the adapters were made for, plain or injected. It is not changed.
        paths: files of :func:`efft_kernels.save_adapter`, of one method and for the same Linears. Ranks and scales may
            differ; dropout and other options are those of the first.
        out: the file to write.
        weights: of the mean, one for each path; they are divided by their sum. None weighs all alike.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no paths, or weights that do not fit them; adapters of different methods or Linears; heads of which
            some are missing or differ in shape or classes; other ``multilabel``; ranks whose sum the matrices do not
            allow; a mean that is no adapter of its method: that of VeRA, of adapters with dora, or of adapters with
            channel_scale that share factors between layers.
        OSError: the file cannot be written; an existing one is unchanged then.

    Warns a UserWarning of adapters that were trained on other weights than the model has, and of a preparation or
    classes that not all files state alike: the mean then states none.
    """
    if isinstance(paths, str | os.PathLike) or not (paths := list(paths)):
        raise ValueError(f"paths must be a non-empty sequence of adapter files, got {paths!r}")
    weights = _normalised(weights, len(paths))
    files = [read_adapter(path) for path in paths]
    adapters, heads = [filled(model, file, torch.float64) for file in files], [file.head for file in files]
    for file in files:
        check_needs(model, file, strict=False)
    trained, _, in_head = modules_in(model, adapters[0].plan, files[0])
    for adapter, head, path in zip(adapters, heads, paths):
        _check_alike(adapter, adapters[0], path, paths[0])
        shapes, first = ({key: tuple(t.shape) for key, t in h.items()} for h in (head, heads[0]))
        if shapes != first:
            key = min(key for key, _ in shapes.items() ^ first.items())
            raise ValueError(
                f"{path} must hold head {key} of shape {first.get(key)}, as {paths[0]}, got {shapes.get(key)}"
            )
    multilabel, classes = _agreed(files, "multilabel", must=True), _agreed(files, "classes", must=bool(in_head))
    preparation = _agreed(files, "preparation")
    made = build(_plan_of_mean(model, adapters), model, empty=True)
    for key, group in made.items():
        own = group.state_dict()
        mean = _mean(group, [adapter[key] for adapter in adapters], weights)
        group.load_state_dict({name: mean[name].to(t) for name, t in own.items()}, assign=True)
    head = {key: sum(w * h[key].double() for w, h in zip(weights, heads)).to(t) for key, t in heads[0].items()}
    made.beside_head = all(adapter.beside_head for adapter in adapters)
    write(out, model, made, head, files[0].base_model, preparation, classes, trained, multilabel)


def _normalised(weights: Sequence[float] | None, count: int) -> list[float]:
    try:  # by position: a dict would give its keys, and a text its letters
        found = [1.0] * count if weights is None else [float(weights[i] + 0) for i in range(len(weights))]
    except (TypeError, KeyError):
        found = []
    if len(found) != count or not math.isfinite(total := sum(found)) or not total:
        raise ValueError(f"weights must be {count} finite numbers whose sum is not 0, got {weights!r}")
    return [w / total for w in found]


def _agreed(files: Sequence[AdapterFile], name: str, must: bool = False):
    """What all files state; None, with a warning, if they do not agree, although what is stated ``must``."""
    found = {getattr(file, name): file.path for file in files}
    first, *others = [value for value in found if value is not None] or [None]
    if must and others:
        raise ValueError(f"{found[others[0]]} must have the {name} of {found[first]}, {first}, got {others[0]}")
    if len(found) > 1:
        warnings.warn(f"the mean states no {name}, in which {' and '.join(found.values())} differ", stacklevel=5)
    return first if len(found) == 1 else None


def _check_alike(adapter: Mapping[str, Group], first: Mapping[str, Group], path, first_path) -> None:
    def layout(groups):
        return {key: (type(g), replace(g.spec, rank=(0, 0), zero="")) for key, g in groups.items()}

    if layout(adapter) != layout(first):
        raise ValueError(f"{path} must be of the method and for the Linears of {first_path}")
    for group in adapter.values():
        if group.magnitude is not None:
            raise ValueError(f"{path} cannot be averaged: the mean of adapters with dora=True is no such adapter")
        shares = not isinstance(group, LoRAGroup) or isinstance(group, LoRAXSGroup)
        if isinstance(group, VeRAGroup) or (shares and group.channel_scale is not None):
            what = "VeRA" if isinstance(group, VeRAGroup) else "adapters with channel_scale that share factors"
            raise ValueError(f"{path} cannot be averaged: the mean of {what} is no adapter of that method")
        if isinstance(group, LoRAXSGroup):
            other = first[group.spec.name]
            n = min(group.a.shape[-1], other.a.shape[-1])
            if not torch.equal(group.a[..., :n], other.a[..., :n]) or not torch.equal(
                group.v[..., :n, :], other.v[..., :n, :]
            ):
                raise ValueError(f"{path} must have the outer factors of {first_path}: those of the same weights")


def _plan_of_mean(model: nn.Module, adapters: list[nn.ModuleDict]) -> Plan:
    """The plan with the smallest rank that has room for all ranks in every group."""
    configs = [adapter.plan.config for adapter in adapters]
    first: MethodConfig = configs[0]
    changes = {"scale": first.scale or 1.0}
    for name in ("trainable_scale", "channel_scale"):  # folded into the factors
        if hasattr(first, name):
            changes[name] = False
    if hasattr(first, "rank_weights"):
        changes["rank_weights"] = any(config.rank_weights for config in configs)
    xs = isinstance(next(iter(adapters[0].values())), LoRAXSGroup)
    joined = max if xs else sum
    needed = {key: tuple(joined(a[key].spec.rank[i] for a in adapters) for i in range(2)) for key in adapters[0]}

    def together(ranks: list) -> int | tuple[int, int]:
        if all(isinstance(rank, int) for rank in ranks):
            return joined(ranks)
        return tuple(joined((r, r)[i] if isinstance(r, int) else r[i] for r in ranks) for i in range(2))

    def larger(rank):
        return None if rank is None else rank + 1 if isinstance(rank, int) else (rank[0] + 1, rank[1] + 1)

    changes["rank"] = together([config.rank for config in configs])
    if any(getattr(config, "ffn_rank", None) is not None for config in configs):
        changes["ffn_rank"] = together([c.rank if c.ffn_rank is None else c.ffn_rank for c in configs])
    linears = {group.name: group.slots for group in adapters[0].plan.groups}
    while True:  # a stage that is narrower than the widest rounds its share of the rank
        config = replace(first, **changes)
        made = plan_of_file(model, config, lambda made: {g.name: g.slots for g in made.groups} == linears)
        if all(have >= need for group in made.groups for have, need in zip(group.rank, needed[group.name])):
            return made
        changes |= {name: larger(changes[name]) for name in ("rank", "ffn_rank") if name in changes}


def _mean(made: Group, groups: list[Group], weights: list[float]) -> dict[str, Tensor]:
    """The state of a group whose update is the weighted mean of those of these groups, float64."""
    P, Q = made.spec.rank
    factors = [w * float(group.scale) / made.scale for w, group in zip(weights, groups)]
    terms = [group.rank_weights if group.rank_weights is not None else _ones(group) for group in groups]
    found = {"rank_weights": _fill(torch.cat(terms, -1), Q)} if made.rank_weights is not None else {}
    if isinstance(made, LoRAXSGroup):
        widest = max(groups, key=lambda group: group.a.shape[-1])
        sigma = widest.sigma.new_zeros(made.sigma.shape)
        for group, factor, term in zip(groups, factors, terms):
            r = group.sigma.shape[-1]
            sigma[..., :r, :r] += factor * term.unsqueeze(-1) * group.sigma
        ones = {"rank_weights": sigma.new_ones(made._terms())} if found else {}
        return {"a": widest.a, "v": widest.v, "sigma": sigma, **ones}
    if isinstance(made, LoRAGroup):
        b = []
        for group, factor in zip(groups, factors):
            L, m, _, N = group.b.shape
            channels = 1.0 if group.channel_scale is None else group.channel_scale.view(L, m, 1, N)
            b.append(factor * channels * group.b)
        a = torch.cat([group.a for group in groups], -1)
        return {"a": _fill(a, P, 0.0), "b": _fill(torch.cat(b, -2).mT, P, 0.0).mT, **found}
    assert isinstance(made, EFFTGroup)
    found["u"] = _fill(torch.cat([group.u for group in groups], 1), P, 0.0)
    found["v"] = _fill(torch.cat([group.v for group in groups], 0).T, Q, 0.0).T
    tucker = isinstance(made, FacTTuckerGroup)
    cores = found["u"].new_zeros(P, P, Q) if tucker else found["u"].new_zeros(made.spec.cores, P, Q)
    p = q = 0
    for group, factor in zip(groups, factors):
        r1, r2 = group.spec.rank
        if tucker:
            cores[p : p + r1, p : p + r1, q : q + r2] = factor * group.c
        else:
            cores[:, p : p + r1, q : q + r2] = factor * group.sigma
        p, q = p + r1, q + r2
    if tucker:
        return found | {"c": cores, "p": _fill(torch.cat([group.p for group in groups], 1), P, 0.0)}
    return found | {"sigma": cores}


def _ones(group: Group) -> Tensor:
    return next(group.parameters()).new_ones(group._terms())


def _fill(t: Tensor, size: int, value: float = 1.0) -> Tensor:
    """t with its last dimension filled up to a size"""
    return nn.functional.pad(t, (0, size - t.shape[-1]), value=value)
