"""plan, inject, merge, unmerge: adapting a whole model. The only file that knows how models are laid out.

Models are read by the names of their modules (timm, transformers, DINOv2's own), never imported.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from .adapted import AdaptedLinear, Adapters
from .factors import GroupSpec, Site, _Config
from .ops import check_backend, merge_
from .base_linears import DenseWeights, dense, keeps_product, kept_in, kind, refusal, tensors

_BLOCK = re.compile(r"(?P<container>(?:.*\.)?(?:blocks|layers|layer))\.\d+")
# name inside a block -> the matrices it holds side by side
_LINEARS = {
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
_HEADS = ("head", "head_dist", "heads", "fc", "classifier", "cls_classifier", "distillation_classifier")


# -- plan -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What :func:`inject` would do. ``print(plan)`` shows the table; ``parameters`` counts what would be trained."""

    model: str  # class name
    config: _Config
    groups: tuple[GroupSpec, ...]

    @property
    def parameters(self) -> int:
        """Trained numbers in the factors, without the head."""
        return sum(self._count(group) for group in self.groups)

    def _count(self, group: GroupSpec) -> int:
        weights = {slot.site.path: torch.empty(0, device="meta") for slot in group.slots}
        return sum(p.numel() for p in self.config.group(group, self.config, weights).parameters())

    @property
    def fingerprint(self) -> str:
        """Equal for two models exactly if an adapter of one fits the other: the Linears, their shapes and groups."""
        data = json.dumps([asdict(group) for group in self.groups], sort_keys=True)
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
        return "\n".join(
            [f"{self.model}, {self.config}", *lines, f"{linears} Linears, {self.parameters:,} trained parameters"]
        )


def plan(model: nn.Module, config: _Config) -> Plan:
    """Which Linears of the model the config adapts, in which groups. Reads names and shapes; changes nothing.

    Args:
        model: a vision transformer of timm or transformers, or one with the same module names: blocks in a list called
            ``blocks``, ``layers`` or ``layer``. On the meta device, too.
        config: EFFTConfig, FacTConfig, LoRAConfig, VeRAConfig or LoRAXSConfig.

    Raises:
        TypeError: config is none of them, or a Linear that would be adapted is of a class that may compute something
            else than nn.Linear. Known are nn.Linear, the quantized ones of torchao and bitsandbytes, and parametrized
            and weight-normed ones: they keep their own product, and the update is added to it.
        ValueError: nothing to adapt, a block that does not exist, a rank that does not fit, matrices of a group that
            differ in shape, tied weights, or a model whose attention does not call its Linear.
    """
    if not isinstance(config, _Config):
        raise TypeError(f"config must be an EFFTConfig or another config of efft_kernels, got {type(config).__name__}")
    sites = [site for site in find_sites(model, config) if site.chosen]
    if not sites:
        raise ValueError(
            f"{type(model).__name__} has no Linears that targets={config.targets} name; known names inside a block "
            f"are {', '.join(_LINEARS)}"
        )
    found = {}
    for site in sites:
        module = model.get_submodule(site.path)
        _check_linear(model, site.path, module)
        for tensor in tensors(module):
            if (other := found.setdefault(id(tensor), site.path)) != site.path:
                raise ValueError(f"{site.path} and {other} share one weight; adapt neither, or untie them")
    return Plan(type(model).__name__, config, tuple(config.arrange(sites)))


def find_sites(model: nn.Module, config: _Config, named: dict[str, nn.Module] | None = None) -> list[Site]:
    """The Linears whose place in a block is known by their names, out of all of the model or of ``named``."""
    linears = []  # (block prefix, container, path, parts, module)
    for path, module in model.named_modules() if named is None else named.items():
        match = _BLOCK.match(path)
        parts = _LINEARS.get(path[match.end() + 1 :]) if match else None
        if parts and (inner := _linear_at(path, module, config.chosen(parts))):
            linears.append((match.group(), match["container"], *inner[:1], parts, *inner[1:]))
    blocks = {prefix: i for i, prefix in enumerate(dict.fromkeys(prefix for prefix, *_ in linears))}
    stages = {container: i for i, container in enumerate(dict.fromkeys(container for _, container, *_ in linears))}
    if config.blocks is not None and (missing := set(config.blocks) - set(blocks.values())):
        raise ValueError(f"blocks must be from 0 to {len(blocks) - 1} for this model, got {sorted(missing)}")
    hidden = {prefix: module.in_features for prefix, _, _, parts, module in linears if parts == ("fc2",)}
    sites = []
    for prefix, container, path, parts, module in linears:
        if parts == ("fc1",) and module.out_features == 2 * hidden.get(prefix, 0):
            # a gated FFN in one Linear (SwiGLU)
            gate_last = getattr(model.get_submodule(path.rpartition(".")[0]), "gate_last", False)
            parts = ("fc1", "gate") if gate_last else ("gate", "fc1")
        block = blocks[prefix]
        chosen = config.chosen(parts) if config.blocks is None or block in config.blocks else ()
        shape = module.in_features, module.out_features
        sites.append(Site(path, parts, chosen, block, stages[container], *shape))
    return sites


def _linear_at(path: str, module: nn.Module, chosen: tuple[str, ...]) -> tuple[str, nn.Linear] | None:
    """(path, Linear) of what has the name of a Linear: itself, or the only one in an nn.Sequential, beside a norm"""
    if isinstance(module, nn.Linear):
        return path, module
    inside = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    if type(module) is nn.Sequential and len(inside) == 1 and "." not in inside[0][0]:
        return f"{path}.{inside[0][0]}", inside[0][1]
    if chosen and (inside or hasattr(module, "in_features")):
        raise TypeError(
            f"{path} must be an nn.Linear, or an nn.Sequential with one, got {type(module).__name__}, which may compute "
            "something else; put one of them in its place, or leave it out with targets="
        )
    return None  # a convolution, say


def _check_linear(model: nn.Module, path: str, module: nn.Linear) -> None:
    adapted = isinstance(module, AdaptedLinear)
    if reason := refusal(module, module.base if adapted else type(module)):
        raise TypeError(f"{path} {reason}")
    if adapted and module.efft[0] is not getattr(model, "efft", None):
        raise ValueError(f"{path} belongs to a part of the model that is already injected; inject the whole or the part")
    check_called(model, path, module)


def check_called(model: nn.Module, path: str, module: nn.Linear) -> None:
    """ValueError for a fused projection that its attention does not call, or whose parts differ in width."""
    if module.out_features % 3 and path.endswith("qkv"):
        raise ValueError(f"{path} must hold q, k and v of equal width, got {module.out_features} outputs")
    parent = model.get_submodule(path.rpartition(".")[0])
    separate = getattr(parent, "q_bias", None) is not None and not getattr(parent, "qkv_bias_separate", False)
    if path.endswith(".qkv") and separate:
        raise ValueError(
            f"{type(model).__name__} is not supported with these targets: its {type(parent).__name__} at {path} keeps "
            "q and v biases apart and calls F.linear on the weight, past the Linear (as do BEiT, EVA and Swin V2 of "
            "timm); targets=('proj', 'mlp') would work"
        )


# -- inject -----------------------------------------------------------------------------------------------------------


def inject(
    model: nn.Module,
    config: _Config,
    *,
    name: str = "default",
    head: str | int | nn.Module = "train",
    backend: str | None = None,
) -> nn.Module:
    """Put adapters on a model, in place, and freeze the rest. Outputs stay as they were: the updates start at zero.

    Afterwards the model owns the factors once, as ``efft.<name>.<group>.<factor>``; all other names in its state_dict
    are unchanged. Batch norms outside the head keep their statistics.

    Args:
        model, config: as :func:`plan`.
        name: of the adapter; adapter.py has functions for several.
        head: the classifier is trained ("train"), left as it is ("keep"), or replaced and trained: a number of classes,
            or a module.
        backend: a name from :func:`efft_kernels.backends`, or None for the fastest that is proven.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: as :func:`plan`; a model that is already injected or merged, a name that cannot be used,
            no head to replace. Nothing has been changed then.
    """
    check_bare(model)
    check_name(name)
    check_backend(backend)
    return install(model, name, build(plan(model, config), model), head, backend)


def build(made: Plan, model: nn.Module, *, empty: bool = False) -> nn.ModuleDict:
    """The groups of a plan, not yet on the model: with new factors, or empty for factors to be loaded."""
    groups = nn.ModuleDict()
    for spec in made.groups:
        linears = {slot.site.path: model.get_submodule(slot.site.path) for slot in spec.slots}
        dtypes, devices = map(set, zip(*map(kept_in, linears.values())))
        dtypes = dtypes - {None} or {torch.float32}
        if len(dtypes) > 1 or len(devices) > 1:
            kinds = ", ".join(sorted(map(str, dtypes | devices)))
            raise ValueError(f"the Linears of group {spec.name!r} must be of one dtype and device, got {kinds}")
        dtype, device = *dtypes, *devices
        weights = DenseWeights(linears, dtype)
        if empty:
            weights = dict.fromkeys(linears, torch.empty(0, dtype=dtype, device=device))
        groups[spec.name] = made.config.group(spec, made.config, weights)
    groups.plan = made
    return groups


def install(model: nn.Module, name: str, groups: nn.ModuleDict, head, backend: str | None) -> nn.Module:
    """The part of inject that changes the model, after everything that can fail."""
    heads = list(heads_of(model))
    replacements = _replacements(model, heads, head)
    if head != "keep":
        _check_trainable(model, heads, [getattr(owner, key) for owner, key, _ in replacements])
    flags = {key: p.requires_grad for key, p in model.named_parameters()}

    for owner, key, module in replacements:
        setattr(owner, key, module)
    if isinstance(head, nn.Module):
        head = next((linear.out_features for _, linear in classifiers_of(model)), "train")
    if isinstance(head, int):
        _tell_classes(model, head)
    model.requires_grad_(False)
    if head != "keep":
        for key in heads:
            getattr(model, key).requires_grad_(True)
    _attach(model, Adapters(backend, tuple(_norms(model, heads))))
    model.efft.flags = flags
    mount(model, name, groups)
    model.efft.active = name
    return model


def _attach(model: nn.Module, owner: Adapters) -> None:
    model.efft = owner.train(model.training)
    owner.hooks = (
        model.register_forward_pre_hook(_before),
        model.register_forward_hook(_after, always_call=True),
    )


def _detach(model: nn.Module) -> list[str]:
    """Plain Linears again; the paths of those that were not."""
    paths = [path for path, module in model.named_modules() if isinstance(module, AdaptedLinear)]
    for path in paths:
        model.get_submodule(path).release()
    for hook in model.efft.hooks:
        hook.remove()
    del model.efft
    return paths


def mount(model: nn.Module, name: str, groups: nn.ModuleDict) -> None:
    """Register the groups on an injected model and swap the Linears that they need and that are still plain."""
    model.efft[name] = groups.train(model.training)
    for group in groups.values():
        for path in group.slots:
            linear = model.get_submodule(path)
            if not isinstance(linear, AdaptedLinear):
                AdaptedLinear.adopt(linear, path, model.efft)


def eject(model: nn.Module) -> None:
    """Take all adapters off: the plain model with the parameters frozen and trained that were so before inject."""
    flags = model.efft.flags
    _detach(model)
    parameters = dict(model.named_parameters())
    for key in flags.keys() & parameters.keys():  # a head that was replaced may have other names
        parameters[key].requires_grad_(flags[key])


def adapters(model: nn.Module) -> Adapters:
    """The adapters of an injected model; a sentence for any other."""
    if isinstance(getattr(model, "efft", None), Adapters):
        return model.efft
    state = "is merged, unmerge it first" if hasattr(model, "_efft_merged") else "has none, inject it first"
    raise ValueError(f"the model must have adapters, but this {type(model).__name__} {state}")


def check_name(name: str) -> None:
    if not isinstance(name, str) or not name or "." in name or hasattr(Adapters(), name):
        raise ValueError(f"name must be a non-empty word without dots that is no attribute of a module, got {name!r}")


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What to hand the optimizer: the trained factors of the active adapter, and the head where it is trained.

    Raises:
        ValueError: a model without adapters.
    """
    found = [p for group in adapters(model).groups() for p in group.parameters()]
    found += [p for module in heads_of(model).values() for p in module.parameters()]
    return [p for p in dict.fromkeys(found) if p.requires_grad]


def heads_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that classify, by name: empty for a model without any."""
    return {key: getattr(model, key) for key in _HEADS if isinstance(getattr(model, key, None), nn.Module)}


def head_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the head, under the names that the model's state_dict gives them."""
    state = {f"{key}.{name}": t for key, head in heads_of(model).items() for name, t in head.state_dict().items()}
    return {key: t for key, t in state.items() if isinstance(t, Tensor)}


def classes_of(model: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """How many classes the head of this model must get to hold this state; None if it holds it as it is.

    Raises:
        ValueError: it differs in more than the number of classes.
    """
    own = {key: tuple(t.shape) for key, t in head_state(model).items()}
    found = {key: tuple(t.shape) for key, t in state.items()}
    if own == found:
        return None
    classes, fitted = set(), dict(own)
    for path, linear in classifiers_of(model):
        shape = found.get(f"{path}.weight", ())
        for name in ("weight", "bias")[: 1 + (linear.bias is not None)] if shape else ():
            fitted[f"{path}.{name}"] = shape[0], *own[f"{path}.{name}"][1:]
        classes.update(shape[:1])
    if fitted != found or len(classes) != 1:
        key = min((key for key in own.keys() | found.keys() if fitted.get(key) != found.get(key)), default="head")
        raise ValueError(
            f"{key} must be of shape {fitted.get(key)} for the head of this {type(model).__name__}, "
            f"got {found.get(key)}"
        )
    return classes.pop()


def _before(model: nn.Module, args) -> None:
    model.efft.begin()


def _after(model: nn.Module, args, output) -> None:
    model.efft.end(output)


def check_bare(model: nn.Module) -> None:
    if hasattr(model, "_efft_merged"):
        raise ValueError("the model is merged; unmerge it first")
    if isinstance(getattr(model, "efft", None), Adapters):
        names = ", ".join(map(repr, model.efft))
        raise ValueError(f"the model is already injected with {names}; add_adapter puts a further adapter beside it")
    if any(p.is_inference() for p in model.parameters()) and not torch.is_inference_mode_enabled():
        raise ValueError("the model's parameters were made under inference_mode, which forbids to change or train them")
    if hasattr(model, "efft"):
        raise ValueError(f"the model already has an attribute 'efft', a {type(model.efft).__name__}")


def _norms(model: nn.Module, heads: list[str]) -> Iterator[nn.Module]:
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and path.partition(".")[0] not in heads:
            yield module


def _replacements(model: nn.Module, heads: list[str], head) -> list[tuple[nn.Module, str, nn.Module]]:
    """(owner, attribute, new module) for each head to replace"""
    if head in ("train", "keep"):
        return []
    if isinstance(head, bool) or not isinstance(head, int | nn.Module) or (isinstance(head, int) and head < 1):
        raise ValueError(f"head must be 'train', 'keep', a number of classes or a module, got {head!r}")
    if isinstance(head, nn.Module):
        if len(heads) != 1:
            raise ValueError(
                f"head can be a module only where there is one head, got {heads} in {type(model).__name__}"
            )
        return [(model, heads[0], head)]
    found = []
    for path, old in classifiers_of(model):
        dtype, device = kept_in(old)
        new = nn.Linear(old.in_features, head, old.bias is not None, device=device, dtype=dtype)
        nn.init.trunc_normal_(new.weight, std=0.02)
        if new.bias is not None:
            nn.init.zeros_(new.bias)
        owner, _, attribute = path.rpartition(".")
        found.append((model.get_submodule(owner), attribute, new.train(old.training)))
    if not found:
        raise ValueError(f"{type(model).__name__} has no classifier Linear to replace among {_HEADS}")
    return found


def _check_trainable(model: nn.Module, heads: list[str], replaced: list[nn.Module]) -> None:
    gone = {id(part) for module in replaced for part in module.modules()}
    for path, module in model.named_modules():
        if path.partition(".")[0] in heads and id(module) not in gone:
            if isinstance(module, nn.Linear) and (what := kind(module)):
                raise ValueError(
                    f"{path} is quantized ({what}) and cannot be trained: leave the head out of the quantization, give "
                    "head='keep', or a number of classes for a new one"
                )


def classifiers_of(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The last Linear of each head, which has an output for each class."""
    for key in heads_of(model):
        own = ((path, m) for path, m in model.named_modules() if f"{path}.".startswith(f"{key}."))
        yield from [(path, m) for path, m in own if isinstance(m, nn.Linear)][-1:]


def _tell_classes(model: nn.Module, classes: int) -> None:
    for owner in (model, getattr(model, "config", None)):
        for key in ("num_classes", "num_labels"):
            if key in vars(owner or object) or (owner is not model and hasattr(owner, key)):
                setattr(owner, key, classes)


# -- merge ------------------------------------------------------------------------------------------------------------


@dataclass
class _Merged:
    """What unmerge needs: kept on the model, but in no state_dict."""

    adapters: Adapters
    names: list[str]  # paths of the Linears that were adapted
    weights: dict[str, Tensor] | None  # before the merge
    modules: dict[str, nn.Linear]  # those that a plain Linear has taken the place of


def merge(model: nn.Module, *, keep_weights: bool = True, dequantize: bool = False) -> nn.Module:
    """Add the active adapter's updates to the weights and put plain nn.Linears back, in place: no cost at inference.

    Args:
        model: an injected model.
        keep_weights: hold a copy of the weights that change, for :func:`unmerge`. False saves that memory for good.
        dequantize: put a plain Linear, with the dense weight, where an adapted one is quantized, parametrized or
            weight-normed. Such ones are refused otherwise.

    Returns:
        The model. Its state_dict has the names of the model before :func:`inject`.

    Warns:
        UserWarning: weights are bfloat16 or float16; says which part of the update their rounding lost.

    Raises:
        ValueError: a model that has no adapters, is merged already, or whose adapter is disabled; a weight that is
            quantized or computed anew at every forward, or that a part of the model uses which is not adapted.
    """
    owner = adapters(model)
    if owner.active is None:
        raise ValueError("merge needs an active adapter, but all are disabled")
    linears = {path: model.get_submodule(path) for group in owner.groups() for path in group.slots}
    own = {path: linear for path, linear in linears.items() if keeps_product(linear, linear.base)}
    if own and not dequantize:
        path, linear = next(iter(own.items()))
        raise ValueError(f"{path} {_unmergeable(linear)}; merge(model, dequantize=True) puts a plain nn.Linear there")
    _check_unshared(model, {path: linear for path, linear in linears.items() if path not in own})
    with torch.no_grad():
        pairs = {path: pair for g in owner.groups() for path, pair in _eval_pairs(g, owner.backend).items()}
        plain = {path: _plain(linear, pairs[path].down.dtype) for path, linear in own.items()}
        weights = {path: plain.get(path, linear).weight for path, linear in linears.items()}
        if any(weight.is_inference() for weight in weights.values()) and not torch.is_inference_mode_enabled():
            raise ValueError("the weights were made under inference_mode, which forbids to merge into them outside it")
        low = [path for path, weight in weights.items() if weight.dtype in (torch.bfloat16, torch.float16)]
        launches = {}
        for path, weight in weights.items():
            launches.setdefault((weight.dtype, weight.device), []).append(path)
        # of several launches one may fail after another has written
        keep = {path for path in weights if keep_weights and path not in own or path in low or len(launches) > 1}
        kept = {path: weights[path].clone() for path in weights if path in keep}
        try:
            for (dtype, _), paths in launches.items():
                downs, ups = ([pair.to(dtype) for pair in side] for side in zip(*(pairs[path][:2] for path in paths)))
                merge_([weights[path] for path in paths], downs, ups, backend=owner.backend)
        except BaseException:
            for path, weight in kept.items():
                weights[path].copy_(weight)
            raise
        loss = _loss([(kept[path], weights[path], pairs[path]) for path in low]) if low else 0.0
    names = _detach(model)
    for path, linear in plain.items():
        model.set_submodule(path, linear)
    before = {path: weight for path, weight in kept.items() if path not in own} if keep_weights else None
    record = _Merged(owner, names, before, own if keep_weights else {})
    model._efft_merged = (record,)  # a tuple, which registers nothing
    if low:  # at the very end: a warning may be an error
        warnings.warn(
            f"merging into {weights[low[0]].dtype} weights lost {loss:.1%} of the update to rounding; "
            "model.float() before merge avoids it",
            stacklevel=2,
        )
    return model


def _unmergeable(linear: AdaptedLinear) -> str:
    """why an update cannot be added to the weight of this Linear, after its path"""
    if what := kind(linear):
        return f"is quantized ({what}), and rounding the sum to its few bits would lose most of the update"
    return "computes its weight anew at every forward (a parametrization, norm or pruning), which would undo the merge"


def _plain(linear: AdaptedLinear, dtype: torch.dtype) -> nn.Linear:
    """A Linear with the dense weight, in this dtype, and the bias of one that keeps its own product."""
    new = nn.Linear(linear.in_features, linear.out_features, False, device="meta", dtype=dtype)
    new.weight = nn.Parameter(dense(linear).to(dtype, copy=True).contiguous(), requires_grad=False)
    if linear.bias is not None:
        new.bias = nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)
    return new.train(linear.training)


def _check_unshared(model: nn.Module, linears: dict[str, nn.Linear]) -> None:
    merged = {id(linear.weight): path for path, linear in linears.items()}
    for name, module in model.named_modules():
        for key, p in module._parameters.items():
            if id(p) in merged and module is not linears[merged[id(p)]]:
                raise ValueError(
                    f"{merged[id(p)]} shares its weight with {name or type(model).__name__}.{key}, which the merge "
                    "would change, too; untie them first, or leave the adapter beside the weight"
                )


def unmerge(model: nn.Module) -> nn.Module:
    """Undo :func:`merge`: the weights as they were before it, bit for bit, and the adapters back on.

    What was loaded or written into those weights after the merge is lost.

    Raises:
        ValueError: a model that is not merged, was merged with keep_weights=False, or whose Linears were replaced since.
    """
    if not hasattr(model, "_efft_merged"):
        raise ValueError(f"the model must be merged to be unmerged, but this {type(model).__name__} is not")
    (merged,) = model._efft_merged
    if merged.weights is None:
        raise ValueError("the model was merged with keep_weights=False: its former weights are gone")
    shapes = {path: tuple(weight.shape) for path, weight in merged.weights.items()}
    shapes |= {path: (linear.out_features, linear.in_features) for path, linear in merged.modules.items()}
    for path, shape in shapes.items():
        found = model.get_submodule(path)
        if type(found) is not nn.Linear or found.weight.shape != shape:
            raise ValueError(f"{path} must be the nn.Linear that merge left there, got {found}")
    device = model.get_submodule(merged.names[0]).weight.device
    with torch.no_grad():
        for path, weight in merged.weights.items():
            model.get_submodule(path).weight.copy_(weight)
    for path, linear in merged.modules.items():
        model.set_submodule(path, linear.to(device).train(model.get_submodule(path).training))
    del model._efft_merged
    _attach(model, merged.adapters.to(device))
    for path in merged.names:
        AdaptedLinear.adopt(model.get_submodule(path), path, model.efft)
    return model


def _eval_pairs(group, backend):
    """pairs without dropout, whatever mode the group is in"""
    training = group.training
    try:
        return group.eval().hand_out(group.slots.values(), backend)
    finally:
        group.train(training)


def _loss(merged: list[tuple[Tensor, Tensor, tuple]]) -> float:
    """||what was added - what should have been|| / ||what should have been||, over all weights"""
    missing = total = 0.0
    for before, after, (down, up, _) in merged:
        wanted = (down.float() @ up.float()).T
        missing += (after.float() - before.float() - wanted).square().sum().item()
        total += wanted.square().sum().item()
    return (missing / total) ** 0.5 if total else 0.0
