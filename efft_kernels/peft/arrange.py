"""The groups of the Linears that PEFT chose, and their factors."""

import re

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from torch import nn

from ..configs import ATTENTION, EFFTConfig, GroupSpec, Part, Site, Slot, fitting_rank, scaled_rank
from ..groups import EFFTGroup
from ..kernels import FLOATS
from ..layouts import check_called, find_sites
from .config import EFFTPeftConfig

_FUSED = ("qkv", "Wqkv", "c_attn", "query_key_value", "qkv_proj")


def arrange(
    model: nn.Module, config: EFFTPeftConfig, bases: dict[str, nn.Module], linears: dict[str, nn.Module]
) -> list[GroupSpec]:
    """The groups of these Linears: the paper's if they fit, otherwise by shape.

    Args:
        bases: path -> module, for all modules of the model, without the layers of other adapters around them.
        linears: path -> Linear, those to adapt.
    """
    method = config.method()
    sites = find_sites(model, method, bases, by_structure=False)
    known = {site.path: site for site in sites if site.path in linears}
    for path, site in known.items():
        if not site.chosen:
            name = "targets" if config.blocks is None or site.block in config.blocks else "blocks"
            raise ValueError(
                f"{name} must name {path}, which target_modules has chosen, got {name}={getattr(config, name)}"
            )
        check_called(site, sites)
    specs = []
    try:
        specs = method.arrange(list(known.values()), by_shape=False) if known else []
    except ValueError:  # shapes that do not fit the paper's groups
        known = {}
    return specs + _by_shape({path: linear for path, linear in linears.items() if path not in known}, method)


def _by_shape(linears: dict[str, nn.Module], method: EFFTConfig) -> list[GroupSpec]:
    """One group per role and shape; K is the smaller side, so matrices of a shape and its transpose share a group."""
    groups, blocks = {}, {}
    for path, linear in linears.items():
        K, N = _get_in_out_features(linear)
        attention = re.search("attn|attention", path.lower()) is not None
        fused = N == 3 * K and path.endswith(_FUSED)
        parts, N = (ATTENTION[:3], K) if fused else ((path.rpartition(".")[2],), N)
        transposed = K > N
        shape = (N, K) if transposed else (K, N)
        role = "attn" if attention else "ffn"
        key = (role, *shape) if method.variant == "efft2" else shape
        cores, calls, slots = groups.setdefault(key, ({}, {}, []))
        match = re.match(r".*?\.\d+(?=\.)", f".{path}")
        block = blocks.setdefault(match.group() if match else "", len(blocks))
        place = re.sub(r"\.\d+(?=\.)", ".*", f".{path}", count=1) if method.cores == "shared" else path
        numbers = [cores.setdefault((place, part), len(cores)) for part in parts]
        call = calls.setdefault(block if attention else path, len(calls))
        site = Site(path, parts, parts, block, 0, *_get_in_out_features(linear))
        columns = tuple(Part(core, 0, shape[1]) for core in numbers)
        slots.append(Slot(site, columns, transposed, call))
    specs = []
    for key, (cores, _, slots) in groups.items():
        *role, K, N = key
        ffn = role == ["ffn"]
        rank = scaled_rank(method.ffn_rank if ffn and method.ffn_rank is not None else method.rank, 1)
        name = "_".join([*role, f"{K}x{N}"])
        zero = method.zero_init[-1 if ffn else 0]
        specs.append(GroupSpec(name, K, N, fitting_rank(rank, (K, N), name), len(cores), tuple(slots), zero))
    return specs


def build(config: EFFTPeftConfig, specs: list[GroupSpec], linears: dict[str, nn.Module]) -> dict[str, EFFTGroup]:
    groups, method = {}, config.method()
    for spec in specs:
        weight = linears[spec.slots[0].site.path].weight
        if weight.dtype not in FLOATS:  # quantized
            weight = torch.empty(0, device=weight.device)
        groups[spec.name] = group = EFFTGroup(spec, method, {spec.slots[0].site.path: weight})
        if not config.init_weights:
            nn.init.xavier_uniform_(getattr(group, spec.zero))
    return groups
