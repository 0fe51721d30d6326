"""Names of blocks, Linears and heads in vision transformers. The only file that knows models.

Models are recognised by the names of their modules (timm, transformers, DINOv2's repository); no library of models is
imported.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import dropwhile
from typing import NamedTuple

from torch import Tensor, nn

from .attention import OutputProjection, Projection, projections, with_projections
from .base_linears import refusal
from .configs import MethodConfig, Site
from .roles import POSITION, TOO_SMALL, UNKNOWN, block_of, list_of, roles
from .wrappers import module_at, named_modules, unwrapped

_BLOCK = re.compile(r"(?P<container>(?:.*\.)?(?:blocks|layers|layer))\.\d+")
# name inside a block -> the matrices that this Linear holds side by side
LINEARS = {
    "attn.qkv": ("q", "k", "v"),
    "mlp.w12": ("gate", "fc1"),
    "mlp.weights_in": ("gate", "fc1"),
    **{
        name: (part,)
        for part, names in {
            "q": "attn.q_proj attn.q attention.q_proj attention.attention.query attention.self.query self_attn.q_proj",
            "k": "attn.k_proj attn.k attention.k_proj attention.attention.key attention.self.key self_attn.k_proj",
            "v": "attn.v_proj attn.v attention.v_proj attention.attention.value attention.self.value self_attn.v_proj",
            "proj": "attn.proj attention.o_proj attention.output.dense self_attn.out_proj self_attn.o_proj",
            "gate": "mlp.fc1_g mlp.gate_proj",
            "fc1": "mlp.fc1 mlp.fc1_x mlp.up_proj intermediate.dense",
            "fc2": "mlp.fc2 mlp.down_proj mlp.w3 mlp.weights_out output.dense",
        }.items()
        for name in names.split()
    },
}
_READS = "it reads its projections itself, in a way that is not known"
HEADS = (
    *("head", "head_dist", "dist_head", "aux_head", "heads", "fc"),
    *("classifier", "cls_classifier", "distillation_classifier"),
)


@dataclass(frozen=True)
class LeftOut:
    """A layer that a plan does not adapt, and why: an entry of :attr:`efft_kernels.Plan.left_out`.

    Attributes:
        path: of the module; of a projection of an nn.MultiheadAttention, that of the attention and ".in_proj" or
            another name of its weight.
        kind: name of its class.
        why: a part of a sentence, for people.
        unexpected: whether it is a Linear or an attention of an adapted block that no option of the config leaves out,
            about which :func:`efft_kernels.inject` warns.
    """

    path: str
    kind: str
    why: str
    unexpected: bool


class _Found(NamedTuple):
    block: str  # path of the block
    container: str  # path of what holds the blocks
    path: str
    parts: tuple[str, ...]
    module: nn.Linear


def find_sites(
    model: nn.Module, config: MethodConfig, named: dict[str, nn.Module] | None = None, *, by_structure: bool = True
) -> list[Site]:
    """The Linears whose role in a block is known from their names, or from the structure of the block.

    Args:
        model, config: as :func:`efft_kernels.plan`.
        named: path -> module to search, None for all modules of the model.
        by_structure: also those that roles.py recognises.
    """
    return survey(model, config, named, by_structure=by_structure)[0]


def survey(
    model: nn.Module, config: MethodConfig, named: dict[str, nn.Module] | None = None, *, by_structure: bool = True
) -> tuple[list[Site], dict[str, str]]:
    """As :func:`find_sites`, and for the other Linears of blocks the reason why they have no role, by path."""
    named = dict(named_modules(model)) if named is None else named
    found, reasons = _known(named, config), {}
    if by_structure:
        more, reasons = _structural(model, named, found)
        order = {path: i for i, path in enumerate(named)}
        found = sorted([*found, *more], key=lambda item: order.get(item.path, -1)) if more else found
    blocks = {prefix: i for i, prefix in enumerate(dict.fromkeys(item.block for item in found))}
    if config.blocks is not None and (missing := set(config.blocks) - set(blocks.values())):
        raise ValueError(f"blocks must be from 0 to {len(blocks) - 1} for this model, got {sorted(missing)}")
    widths = {}  # of the blocks, which differ between the stages of a model
    for item in found:
        side = min(item.module.in_features, item.module.out_features // len(item.parts))
        widths[item.block] = max(side, widths.get(item.block, 0))
    stages = dict.fromkeys((item.container, widths[item.block]) for item in found)
    stages = {key: i for i, key in enumerate(stages)}
    hidden = {item.block: item.module.in_features for item in found if item.parts == ("fc2",)}
    sites, taken = [], set()
    for prefix, container, path, parts, module in found:
        if parts == ("fc1",) and module.out_features == 2 * hidden.get(prefix, 0):
            # a gated FFN in one Linear (SwiGLU)
            gate_last = getattr(module_at(model, path.rpartition(".")[0]), "gate_last", False)
            parts = ("fc1", "gate") if gate_last else ("gate", "fc1")
        block, branch = blocks[prefix], _branch(path[len(prefix) + 1 :], prefix, parts, taken)
        taken.update((prefix, branch, part) for part in parts)
        chosen = config.chosen(parts) if config.blocks is None or block in config.blocks else ()
        stage = stages[container, widths[prefix]]
        sites.append(Site(path, parts, chosen, block, stage, module.in_features, module.out_features, branch))
    return sites, reasons


def _branch(inside: str, prefix: str, parts: tuple[str, ...], taken: set) -> str:
    """what tells a Linear from others of its role in the block, as those of a second attention; mostly nothing"""
    for branch in ("", inside.rpartition(".")[0], inside):
        if not any((prefix, branch, part) in taken for part in parts):
            return branch
    return inside


def _known(named: Mapping[str, nn.Module], config: MethodConfig) -> list[_Found]:
    found = []
    for path, module in named.items():
        match = _BLOCK.match(path)
        parts = LINEARS.get(path[match.end() + 1 :]) if match else None
        if isinstance(named.get(path.rpartition(".")[0]), nn.MultiheadAttention):
            continue  # attention.py
        if parts and (inner := _linear_at(path, module, config.chosen(parts))):
            if path.endswith(".qkv") and getattr(named.get(path.rpartition(".")[0]), "use_global", False):
                parts = ("k", "v")  # GCViT, whose queries are global
            found.append(_Found(match.group(), match["container"], inner[0], parts, inner[1]))
    return found


def _structural(
    model: nn.Module, named: Mapping[str, nn.Module], known: list[_Found]
) -> tuple[list[_Found], dict[str, str]]:
    """The Linears that roles.py recognises, and why not for the others in blocks."""
    taken, containers = {item.path for item in known}, {item.block: item.container for item in known}
    heads = tuple(f"{path}." for path in heads_of(model))
    attentions = {path: m for path, m in named.items() if isinstance(m, nn.MultiheadAttention)}
    attentions = tuple(f"{path}." for path, m in attentions.items() if not projections(m))
    blocks: dict[str, dict[str, nn.Linear]] = {}
    for path, module in with_projections(named.items()):
        if not isinstance(module, nn.Linear) or path in taken or f"{path}.".startswith((*heads, *attentions)):
            continue
        prefix = next((p for p in _ancestors(path) if p in containers), None) or block_of(path)
        if prefix is not None:
            blocks.setdefault(prefix, {})[path[len(prefix) + 1 :]] = module
    found, reasons = [], {}
    for prefix, linears in blocks.items():
        inside = [item for item in known if item.block == prefix]
        attention = [item.path[len(prefix) + 1 :] for item in inside if item.parts[0] in ("q", "k", "v")]
        by_name = {path: LINEARS[path] for path in linears if path in LINEARS}
        by_name |= {path: linear.parts for path, linear in linears.items() if isinstance(linear, Projection)}
        by_name |= {path: ("proj",) for path, linear in linears.items() if _base(linear) is OutputProjection}
        rest = {path: linear for path, linear in linears.items() if path not in by_name}
        attention += [path for path, parts in by_name.items() if parts[0] in ("q", "k", "v")]
        for path, role in (by_name | roles(rest, attention)).items():
            own = linears[path]
            if not isinstance(role, str) and (why := refusal(own, _base(own))):
                role = why
            if isinstance(role, str):
                reasons[f"{prefix}.{path}"] = role
            else:
                container = containers.get(prefix) or _container(prefix)
                found.append(_Found(prefix, container, f"{prefix}.{path}", role, own))
    return found, reasons


def _base(module: nn.Module) -> type:
    """its class, or the one that it had before it was adapted"""
    return getattr(type(module), "base", type(module))


def _ancestors(path: str) -> Iterator[str]:
    while path := path.rpartition(".")[0]:
        yield path


def _container(prefix: str) -> str:
    names = prefix.split(".")
    while names and names[-1].isdigit():
        names.pop()
    return ".".join(names)


def left_out(
    model: nn.Module, config: MethodConfig, sites: list[Site], reasons: dict[str, str], named: dict | None = None
) -> tuple[LeftOut, ...]:
    """The Linears, attentions and pointwise convolutions that are not adapted, without those of the head.

    Args:
        model, config, named: as :func:`find_sites`.
        sites, reasons: from :func:`survey`.
    """
    own = {site.path: site for site in sites}
    adapted = {prefix for site in sites if site.chosen if (prefix := block_of(site.path))}
    # an entry of a list of adapted blocks in which no Linear is known, as an attention that stands beside its MLP
    lists, known = {list_of(prefix) for prefix in adapted}, {at for path in own for at in _ancestors(path)}
    beside = lambda path: any(at not in known and list_of(at) in lists for at in _ancestors(path))
    skipped = tuple(f"{path}." for path in heads_of(model))
    found = []
    for path, module in with_projections(named_modules(model) if named is None else named.items()):
        if (path in own and own[path].chosen) or f"{path}.".startswith(skipped):
            continue
        kind, inside = type(module).__name__, any(prefix in adapted for prefix in _ancestors(path))
        base = _base(module)
        if "in_proj_weight" in module._parameters and not projections(module):
            skipped += (f"{path}.",)
            found.append(LeftOut(path, kind, _READS, inside or beside(path)))
        elif path in own:
            site = own[path]
            name = "blocks" if config.chosen(site.parts) else "targets"
            found.append(LeftOut(path, base.__name__, f"{name}={getattr(config, name)} does not name it", False))
        elif isinstance(module, nn.Linear):
            inside = inside or beside(path)
            why = reasons.get(path, UNKNOWN) if inside else "it is outside of the adapted blocks"
            found.append(LeftOut(path, base.__name__, why, inside and why not in (POSITION, TOO_SMALL)))
        elif inside and kind == "Conv1D" and not isinstance(module, nn.modules.conv._ConvNd):
            found.append(LeftOut(path, kind, "it is no nn.Linear", True))
        elif inside and isinstance(module, nn.modules.conv._ConvNd) and set(module.kernel_size) == {1}:
            found.append(LeftOut(path, kind, "it is a convolution", False))
    return tuple(found)


def _linear_at(path: str, module: nn.Module, chosen: tuple[str, ...]) -> tuple[str, nn.Linear] | None:
    """(path, Linear) of a module that is named like a Linear: itself, or the only Linear in an nn.Sequential."""
    if isinstance(module, nn.Linear):
        return path, module
    inside = [(name, m) for name, m in named_modules(module) if isinstance(m, nn.Linear)]
    if type(module) is nn.Sequential and len(inside) == 1 and "." not in inside[0][0]:
        return f"{path}.{inside[0][0]}", inside[0][1]
    if chosen and (inside or hasattr(module, "in_features")):
        raise TypeError(
            f"{path} must be an nn.Linear, or an nn.Sequential with one, got {type(module).__name__}, which may "
            "compute something else; put one of them in its place, or leave it out with targets="
        )
    return None  # for example a convolution


def check_called(site: Site, sites: Iterable[Site]) -> None:
    """Refuse a fused projection whose parts differ in width, as the output projection beside it in ``sites`` may tell.

    Raises:
        ValueError: the message names the module.
    """
    n, N = len(site.parts), site.out_features
    if n == 1 or site.parts[0] not in ("q", "k"):
        return
    owner = lambda path: re.sub(r"\.\d+$", "", path).rpartition(".")[0]  # of qkv and of proj.0
    beside = (each for each in sites if each.parts == ("proj",) and owner(each.path) == owner(site.path))
    if N != n * next((each.in_features for each in beside), N // n):
        names = " and ".join(", ".join(site.parts).rsplit(", ", 1))
        raise ValueError(f"{site.path} must hold {names} of equal width, got {N} outputs")


def heads_of(model: nn.Module) -> dict[str, nn.Module]:
    """The classifier modules by path; empty for a model without any.

    They are the children with a known name (``HEADS``). A module that is not of timm or transformers, such as one's own
    network or a Lightning module around a model, is a wrapper: there a head may have any name, if it is made of Linears
    alone and stands behind the model, and otherwise it is looked for in the wrapped modules.
    """
    model = unwrapped(model)
    found = _heads_in(model, "")
    if any(True for head in found.values() for _ in head.parameters()):
        return found
    return next(filter(None, _heads_below(model)), {}) or found


def _heads_in(owner: nn.Module, prefix: str) -> dict[str, nn.Module]:
    # not getattr: a wrapper may hand out the attributes of the model in it
    children = {key: unwrapped(child) for key in HEADS if (child := owner._modules.get(key)) is not None}
    return {prefix + key: child for key, child in children.items() if not _pools(child)}


def _pools(head: nn.Module) -> bool:
    """whether it is no classifier, but how an encoder of transformers pools its tokens: with a query of its own"""
    return type(head).__module__.startswith("transformers.") and any(True for _ in head.parameters(recurse=False))


def _heads_below(model: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """what may be the heads, from the wrapper inwards"""
    level = {"": model}
    while level:
        inside = {}
        for prefix, owner in level.items():
            children = {f"{prefix}{key}": child for key, child in _children(owner).items()}
            if isinstance(owner, nn.ModuleList | nn.ModuleDict | nn.Sequential):
                continue
            if not _of_library(owner):
                inside |= children
            elif hasattr(owner, "timm_model"):  # of transformers, around a model of timm
                inside[f"{prefix}timm_model"] = unwrapped(owner.timm_model)
        yield {
            path: head
            for prefix, owner in level.items()
            for path, head in (_heads_in(owner, prefix) or _new_in(owner, prefix)).items()
            if any(True for _ in head.parameters())
        }
        level = {f"{path}.": child for path, child in inside.items()}


def _new_in(wrapper: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """The modules of Linears and norms alone that stand in a wrapper after a model with blocks."""
    children = _children(wrapper)
    models = {key for key, child in children.items() if any(_is_block_list(m) for m in child.modules())}
    if _of_library(wrapper) or not models or isinstance(wrapper, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        return {}
    if any(_is_block_list(children[key]) for key in models):  # a model itself
        return {}
    after = dropwhile(lambda item: item[0] not in models, children.items())  # a Linear before it embeds patches
    return {f"{prefix}{key}": child for key, child in after if key not in models and _all_linears(child)}


def _children(owner: nn.Module) -> dict[str, nn.Module]:
    return {key: unwrapped(child) for key, child in owner.named_children() if key != "efft"}


def _all_linears(module: nn.Module) -> bool:
    owners = [m for m in module.modules() if any(True for _ in m.parameters(recurse=False))]
    kinds = nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm
    return any(isinstance(m, nn.Linear) for m in owners) and all(isinstance(m, kinds) for m in owners)


def _is_block_list(module: nn.Module) -> bool:
    """whether it is a list of modules that hold Linears each"""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    return any(
        not isinstance(child, nn.Linear) and any(isinstance(m, nn.Linear) for m in child.modules()) for child in module
    )


def _of_library(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] in ("timm", "transformers", "torchvision")


def untrained_heads(model: nn.Module, trained: Iterable[str]) -> list[str]:
    """Paths of the modules that a model of transformers puts on its base model, and of those that a wrapper has beside
    its model, if they have parameters and none of the paths in ``trained`` reaches them."""
    trained, found, level = tuple(trained), [], {"": unwrapped(model)}
    while level:
        inside = {}
        for prefix, owner in level.items():
            children = {f"{prefix}{key}": child for key, child in _children(owner).items()}
            base = owner._modules.get(getattr(owner, "base_model_prefix", ""))
            base = None if base is None else unwrapped(base)
            if base is not None and base is not owner:
                beside = {path: child for path, child in children.items() if child is not base}
            elif not _of_library(owner) and not any(_is_block_list(child) for child in children.values()):
                models = {path for path, m in children.items() if any(_is_block_list(part) for part in m.modules())}
                beside = {path: m for path, m in children.items() if models and path not in models}
                inside |= {f"{path}.": children[path] for path in models}
            else:
                continue
            for path, child in beside.items():
                reached = any(f"{path}.".startswith(f"{t}.") or t.startswith(f"{path}.") for t in trained)
                if not reached and any(True for _ in child.parameters()):
                    found.append(path)
        level = inside
    return found


def head_state(model: nn.Module, paths: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Parameters and buffers of the head, or of the modules at these paths, named as in the model's state_dict."""
    modules = heads_of(model) if paths is None else {path: module_at(model, path) for path in paths}
    state = {f"{key}.{name}": t for key, head in modules.items() for name, t in head.state_dict().items()}
    return {key: t for key, t in state.items() if isinstance(t, Tensor)}


def classes_of(model: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """The number of classes that this model's head needs to load this state; None if the state fits as it is.

    Raises:
        ValueError: the state differs from the head in more than the number of classes.
    """
    own = {key: tuple(t.shape) for key, t in head_state(model).items()}
    found = {key: tuple(t.shape) for key, t in state.items()}
    if own == found:
        return None
    classes, fitted = set(), dict(own)
    for path, _ in classifiers_of(model):
        shape = found.get(f"{path}.weight", ())
        for key in own.keys() & {f"{path}.weight", f"{path}.bias"} if shape else ():
            fitted[key] = shape[0], *own[key][1:]
        classes.update(shape[:1])
    if fitted != found or len(classes) != 1:
        key = min((key for key in own.keys() | found.keys() if fitted.get(key) != found.get(key)), default="head")
        raise ValueError(
            f"{key} must be of shape {fitted.get(key)} for the head of this {type(model).__name__}, "
            f"got {found.get(key)}"
        )
    return classes.pop()


def norms_outside(model: nn.Module, heads: Iterable[str]) -> Iterator[nn.Module]:
    """The batch norms that are not part of the modules at these paths."""
    inside = tuple(f"{head}." for head in heads)
    for path, module in named_modules(model):
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not f"{path}.".startswith(inside):
            yield module


def classifiers_of(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The last Linear of each head, whose outputs are the classes, by path."""
    for key in heads_of(model):
        own = ((path, m) for path, m in named_modules(model) if f"{path}.".startswith(f"{key}."))
        yield from [(path, m) for path, m in own if isinstance(m, nn.Linear)][-1:]


def told_classes(model: nn.Module) -> dict[tuple[str, str], dict[str, object]]:
    """What timm and transformers keep of the classes: (path of a module, "" or "config") -> its attributes"""
    found = {}
    for path in dict.fromkeys(["", *(path.rpartition(".")[0] for path in heads_of(model))]):
        module = module_at(model, path)
        known = {"": vars(module), "config": dir(getattr(module, "config", None))}  # of a config also properties
        for part, names in known.items():
            keys = [key for key in ("num_classes", "num_labels", "id2label", "label2id") if key in names]
            found[path, part] = {key: getattr(getattr(module, part, module), key) for key in keys}
    return found


def tell_classes(model: nn.Module, told: Mapping[tuple[str, str], Mapping[str, object]]) -> None:
    """Write what :func:`told_classes` has found, in the modules that are still there."""
    for (path, part), values in told.items():
        with contextlib.suppress(AttributeError):
            module = module_at(model, path)
            for key, value in values.items():
                setattr(getattr(module, part, module), key, value)


def tell_number(model: nn.Module, classes: int) -> None:
    """Write the new number of classes where timm and transformers keep it."""
    told = told_classes(model)
    tell_classes(model, {at: {key: classes for key in told[at] if key.startswith("num_")} for at in told})


def input_size(model: nn.Module) -> tuple[int, int] | None:
    """(height, width) of the only images that the model takes; None if it takes several sizes or does not say."""
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    if not getattr(embed, "strict_img_size", False) or not isinstance(size, tuple | list) or len(size) != 2:
        return None
    return int(size[0]), int(size[1])
