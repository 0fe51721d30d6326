"""plan: which Linears of a model a config adapts, in which groups, and what it leaves out."""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import nn

from .adapted_linear import AdaptedLinear
from .base_linears import refusal, tensors
from .configs import GroupSpec, MethodConfig
from .groups import make_group
from .layouts import LINEARS, LeftOut, check_called, left_out, survey
from .wrappers import module_at, on_unwrapped, refuse_sharded


@dataclass(frozen=True)
class Plan:
    """What :func:`inject` would do. ``print(plan)`` shows the table; ``parameters`` counts what would be trained."""

    model: str  # class name
    config: MethodConfig
    groups: tuple[GroupSpec, ...]
    left_out: tuple[LeftOut, ...] = ()

    @property
    def parameters(self) -> int:
        """Trained numbers in the factors, without the head."""
        return sum(self._count(group) for group in self.groups)

    def _count(self, group: GroupSpec) -> int:
        weights = {slot.site.path: torch.empty(0, device="meta") for slot in group.slots}
        return sum(p.numel() for p in make_group(group, self.config, weights).parameters())

    @property
    def fingerprint(self) -> str:
        """A hash of the Linears, their shapes and groups: equal for two models if an adapter of one fits the other."""
        data = json.dumps([_plain(asdict(group)) for group in self.groups], sort_keys=True)
        return hashlib.sha256(data.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        rows = [("path", "part", "block", "group", "slice", "weight [N, K]", "down, up", "parameters")]
        for group in self.groups:
            for slot in group.slots:
                site, cores = slot.site, slot.cores
                K, N, (P, Q) = site.in_features, site.out_features, group.rank
                slices = f"{cores[0]}" if len(cores) == 1 else f"{cores[0]}-{cores[-1]}"
                factors = f"[{K}, r], [r, {N}]" + " transposed" * slot.transposed
                rows.append(
                    (site.path, "+".join(site.chosen), f"{site.block}", group.name, slices, f"[{N}, {K}]", factors, "")
                )
            shape = f"{group.cores} x [{group.K}, {group.N}]"
            rows.append((f"= {group.name}", "", "", "", shape, f"rank {P}, {Q}", "", f"{self._count(group):,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        linears = sum(len(group.slots) for group in self.groups)
        if self.left_out:
            lines += ["left out:", *(f"  {line}" for line in _summary(self.left_out))]
        return "\n".join(
            [f"{self.model}, {self.config}", *lines, f"{linears} Linears, {self.parameters:,} trained parameters"]
        )


@on_unwrapped
def plan(model: nn.Module, config: MethodConfig) -> Plan:
    """Which Linears of the model the config adapts, in which groups, and which it leaves out. Changes nothing.

    Args:
        model: a vision transformer of timm or transformers, or another model with blocks in numbered containers. The
            role of a Linear in its block is read from its name, or from the names and shapes around it. The model may
            be on the meta device.
        config: EFFTConfig, FacTConfig, LoRAConfig, VeRAConfig or LoRAXSConfig.

    Raises:
        TypeError: config is none of these, or the class of a Linear to adapt may compute something else than
            nn.Linear. Supported are nn.Linear, the quantized Linears of torchao and bitsandbytes, and parametrized and
            weight-normed ones; the forward of those runs unchanged, and the update is added to its result.
        ValueError: nothing to adapt, a block that does not exist, a rank that does not fit, matrices of different
            shapes in one group, tied weights, or a model whose attention does not call its Linear.
    """
    return make_plan(model, config)


def make_plan(model: nn.Module, config: MethodConfig, *, by_structure: bool = True) -> Plan:
    """As :func:`plan`; without ``by_structure`` only from known names and one group for each stage and role, as in
    version 0.1."""
    if not isinstance(config, MethodConfig):
        raise TypeError(f"config must be an EFFTConfig or another config of efft_kernels, got {type(config).__name__}")
    every, reasons = survey(model, config, by_structure=by_structure)
    sites = [site for site in every if site.chosen]
    if not sites:
        there = f", but {patterns(reasons)} ({', '.join(dict.fromkeys(reasons.values()))})" if reasons else ""
        raise ValueError(
            f"{type(model).__name__} has no Linears that targets={config.targets} name in numbered blocks{there}; "
            f"known names inside a block are {', '.join(LINEARS)}"
        )
    found = {}
    for site in sites:
        module = module_at(model, site.path)
        _check_linear(model, site.path, module)
        refuse_sharded(module, f"an adapter of {site.path}")
        check_called(site, every)
        for tensor in tensors(module):
            if (other := found.setdefault(id(tensor), site.path)) != site.path:
                raise ValueError(f"{site.path} and {other} share one weight; adapt neither, or untie them")
    groups = tuple(config.arrange(sites, by_shape=by_structure))
    return Plan(type(model).__name__, config, groups, left_out(model, config, every, reasons))


def plan_of_file(model: nn.Module, config: MethodConfig, fits: Callable[[Plan], bool]) -> Plan:
    """The plan that fits a file: the present one, or, in a file of version 0.1, one that knows names alone. If neither
    does, the present one; errors as :func:`plan`."""
    made = []
    for by_structure in (True, False):
        with contextlib.suppress(TypeError, ValueError):
            made.append(make_plan(model, config, by_structure=by_structure))
            if fits(made[-1]):
                return made[-1]
    return made[0] if made else plan(model, config)


def _check_linear(model: nn.Module, path: str, module: nn.Linear) -> None:
    adapted = isinstance(module, AdaptedLinear)
    if reason := refusal(module, module.base if adapted else type(module)):
        raise TypeError(f"{path} {reason}")
    if adapted and module.efft[0] is not getattr(model, "efft", None):
        raise ValueError(
            f"{path} belongs to a part of the model that is already injected; inject the whole model or the part"
        )


def patterns(paths: Iterable[str]) -> str:
    """These paths in short: blocks.*.attn.q for those of all blocks."""
    found = dict.fromkeys(map(_pattern, paths))
    return ", ".join(list(found)[:3]) + ", ..." * (len(found) > 3)


def _pattern(path: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def _summary(items: Iterable[LeftOut]) -> list[str]:
    counts = {}
    for item in items:
        key = _pattern(item.path), item.kind, item.why
        counts[key] = counts.get(key, 0) + 1
    return [f"{path} ({f'{n} x ' if n > 1 else ''}{kind}): {why}" for (path, kind, why), n in counts.items()]


def _plain(spec: dict) -> dict:
    """a group as data, without options of sites that older versions did not have and that are not used"""
    for slot in spec["slots"]:
        if not slot["site"]["branch"]:
            del slot["site"]["branch"]
    return spec
