"""EFFT as a method of Hugging Face PEFT.

Importing this file registers the method, so that ``get_peft_model(model, EFFTPeftConfig(...))`` and all that uses it
(saving, loading, several adapters, merging, Trainer) work as for PEFT's own methods. The tuner owns each factor once,
as ``efft_factors.<adapter>.<group>.<factor>``; layers refer to the factors without registering them, so they stay
shared.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _find_minimal_target_modules,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, PeftType, register_peft_method
from peft.utils.integrations import init_empty_weights
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..base_linears import computes_in
from ..configs import ATTENTION, EFFTConfig, GroupSpec, Part, Site, Slot, fitting_rank, scaled_rank
from ..groups import EFFTGroup
from ..layouts import call_linear, check_called, find_sites, uncall_linear
from ..ops import merge_
from ..passes import Adapters
from ..precision import LOW
from .fused import FLOATS, add_update, is_plain


def _register_type(name: str) -> None:
    """Add a member to PeftType, an enum that cannot be extended by subclassing."""
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_, member._value_, member._sort_order_ = name, name, len(PeftType)
    member.__objclass__ = PeftType
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member


_register_type("EFFT")


@dataclass
class EFFTPeftConfig(PeftConfig):
    """EFFT (arXiv 2311.06749) for PEFT: dW_s = scale * U @ Sigma_s @ V, with U and V shared by a group of matrices.

    Linears whose role in a block is known to :func:`efft_kernels.inject` form the groups of the paper, as there. Those
    of other models, or of shapes that do not fit the paper's groups (grouped-query attention), form one group per
    shape and role, attention or not ("efft1": per shape). A matrix and one of the transposed shape share a group.

    Args:
        variant, rank, scale, cores, factor_dropout, zero_init, targets, trainable_scale, ffn_rank: as
            :class:`efft_kernels.EFFTConfig`. ``targets`` chooses among the Linears that are known by name, and among
            the parts of a fused projection; all other Linears in ``target_modules`` are adapted.
        target_modules: names of the Linears, or a regular expression, or "all-linear", as for other methods of PEFT.
            None for what ``targets`` names, or, in a model without known Linears, for PEFT's default for LoRA.
        exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as for other methods of PEFT.
        init_weights: True for factors whose update is zero at the start; False draws all of them at random, for tests.

    Raises:
        ValueError: an option outside its range.
    """

    variant: str = "efft2"
    rank: int | list[int] = 16
    scale: float = 10.0
    cores: str = "per_block"
    factor_dropout: float = 0.1
    zero_init: str = "v"
    targets: list[str] = field(default_factory=lambda: ["attn", "mlp"])
    trainable_scale: bool = False
    ffn_rank: int | list[int] | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    init_weights: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.EFFT
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list | tuple):
                setattr(self, name, set(value))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform, got None")
        method = self.method()
        self.scale, self.factor_dropout = method.scale, method.factor_dropout  # as numbers that JSON can hold

    def method(self) -> EFFTConfig:
        """The same options as a config of this library."""
        names = "variant rank scale cores factor_dropout zero_init targets trainable_scale ffn_rank".split()
        return EFFTConfig(**{name: getattr(self, name) for name in names})


_FUSED = ("qkv", "Wqkv", "c_attn", "query_key_value", "qkv_proj")


def _arrange(
    model: nn.Module, config: EFFTPeftConfig, bases: dict[str, nn.Module], linears: dict[str, nn.Module]
) -> list[GroupSpec]:
    """The groups of these Linears: the paper's if they fit, otherwise by shape.

    Args:
        bases: path -> module, for all modules of the model, without the layers of other adapters around them.
        linears: path -> Linear, those to adapt.
    """
    method = config.method()
    known = {site.path: site for site in find_sites(model, method, bases, by_structure=False) if site.path in linears}
    for path, site in known.items():
        if not site.chosen:
            raise ValueError(f"targets must name a matrix of {path}, chosen by target_modules, got {config.targets}")
        check_called(model, path, linears[path])
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


class _Factors(Adapters):
    """The groups of one adapter, which give the layers their pairs as on an injected model."""

    def __init__(self, name: str, groups: dict[str, EFFTGroup]):
        super().__init__()
        self.update(groups)
        self._active = name  # not an adapter in a ModuleDict of adapters: the groups are those below

    def groups(self) -> list[nn.Module]:
        return list(self.values())

    def linear_at(self, model: nn.Module, path: str) -> nn.Module:
        return model.get_submodule(path).get_base_layer()

    def dtype_for(self, linear: nn.Module) -> torch.dtype | None:
        return computes_in(linear) if is_plain(linear) else None

    def group_of(self, path: str) -> EFFTGroup:
        return next(group for group in self.values() if path in group.slots)

    @torch.no_grad()
    def pair_without_dropout(self, path: str) -> tuple[Tensor, Tensor]:
        """(down, up) of one Linear without dropout, whatever mode the group is in."""
        pair = self.group_of(path).pairs_without_dropout(path=path)[path]
        return pair.down, pair.up


def _build(config: EFFTPeftConfig, specs: list[GroupSpec], linears: dict[str, nn.Module]) -> dict[str, EFFTGroup]:
    groups, method = {}, config.method()
    for spec in specs:
        weight = linears[spec.slots[0].site.path].weight
        if weight.dtype not in FLOATS:  # quantized
            weight = torch.empty(0, device=weight.device)
        groups[spec.name] = group = EFFTGroup(spec, method, {spec.slots[0].site.path: weight})
        if not config.init_weights:
            nn.init.xavier_uniform_(getattr(group, spec.zero))
    return groups


def _stamp(weight: Tensor) -> tuple:
    """A value that changes when the weight is written, moved or cast."""
    version = -1 if weight.is_inference() else weight._version
    return weight.data_ptr(), weight.dtype, weight.device, version


class EFFTPeftLinear(nn.Module, BaseTunerLayer):
    """A Linear, or a Conv1D of transformers, with EFFT adapters: base(x) + the sum of their (x @ down) @ up."""

    adapter_layer_names = ("efft_factors",)

    def __init__(self, base_layer: nn.Module, path: str):
        super().__init__()
        self.base_layer, self.path = base_layer, path
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        # adapter -> factors; not registered as a submodule, because the tuner owns them
        self.__dict__["efft_factors"] = nn.ModuleDict()
        self._disable_adapters, self.merged_adapters, self._kept = False, [], None

    def update_layer(self, adapter_name: str, factors: _Factors) -> None:
        self.efft_factors[adapter_name] = factors
        self.set_adapter(self.active_adapters)

    def adding(self) -> list[str]:
        """The adapters whose update the next forward adds."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.efft_factors]

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        pairs = [self.efft_factors[name].pair(self.path, self.get_base_layer()) for name in self.adding()]
        if not pairs:
            return self.base_layer(x, *args, **kwargs)
        if len(pairs) == 1:
            return add_update(self.base_layer, x, pairs[0].down, pairs[0].up, *args, **kwargs)
        down, up = torch.cat([pair.down for pair in pairs], 1), torch.cat([pair.up for pair in pairs], 0)
        return add_update(self.base_layer, x, down, up, *args, **kwargs)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update of the base layer's weight, in the layout of that weight: [N, K], or [K, N] for a Conv1D."""
        down, up = self.efft_factors[adapter].pair_without_dropout(self.path)
        delta = down @ up
        return delta if isinstance(self.get_base_layer(), Conv1D) else delta.mT

    def _pair_beside(self, weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """(down, up) of an adapter for merging: float32 beside bfloat16 and float16 weights"""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        down, up = self.efft_factors[name].pair_without_dropout(self.path)
        return down.to(weight.device, dtype), up.to(weight.device, dtype)

    def _weight(self) -> Tensor:  # [N, K]
        """A view of the base layer's weight, for writing."""
        base = self.get_base_layer()
        weight = base._parameters.get("weight")
        if type(weight) is not nn.Parameter or weight.dtype not in FLOATS:
            raise TypeError(
                f"{self.path} must have a plain floating-point weight to merge into, got a {type(base).__name__} "
                f"with a {type(base.weight).__name__} of {base.weight.dtype}"
            )
        weight = weight.detach()
        return weight.mT if isinstance(base, Conv1D) else weight

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the update to the weight of the base layer, rounded once to its dtype.

        Args:
            safe_merge: merge into a copy first, which replaces the weight only if all of it is finite.
            adapter_names: the adapters to merge; None for the active ones.

        Raises:
            ValueError: with safe_merge, the merged weight is not finite.
            TypeError: a quantized or parametrized weight. The layer is unchanged then.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.efft_factors:
                continue
            weight = self._weight()
            if self._kept is None or self._kept[1] != _stamp(weight):
                before = weight.clone() if not self.merged else None
            else:
                before = self._kept[0]
            down, up = self._pair_beside(weight, name)
            merged = weight.clone() if safe_merge else weight
            merge_([merged], [down], [up])
            if safe_merge:
                if not torch.isfinite(merged).all():
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
                weight.copy_(merged)
            self.merged_adapters.append(name)
            self._kept = None if before is None else (before, _stamp(weight))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the weight of before :meth:`merge` bit for bit, or subtract the updates if it was changed since."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        weight = self._weight()
        if self._kept is not None and self._kept[1] == _stamp(weight):
            weight.copy_(self._kept[0])
        else:
            for name in reversed(self.merged_adapters):
                down, up = self._pair_beside(weight, name)
                merge_([weight], [-down], [up])
        self.merged_adapters.clear()
        self._kept = None

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name not in self.efft_factors:
            return
        group = self.efft_factors[adapter_name].group_of(self.path)
        if not any(p.is_meta for p in group.parameters()):
            # to the dtype it was created in, that of the base layer, or the one that _cast_adapter_dtype set
            group.to(device or self.get_base_layer().weight.device, group._like["dtype"])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def __repr__(self) -> str:
        return f"efft.{super().__repr__()}"


class EFFTPeftModel(BaseTuner):
    """The tuner that get_peft_model creates for :class:`EFFTPeftConfig`: it owns the factors and places the layers."""

    prefix = "efft_"
    tuner_layer_cls = EFFTPeftLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    uses_shared_state = True

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        if "efft_factors" not in self._modules:
            self.efft_factors = nn.ModuleDict()
            self._layers, self._hooks = [], ()
        before = {p: p.requires_grad for p in self.efft_factors.parameters()}
        self._making = adapter_name, low_cpu_mem_usage
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except BaseException:
            self._forget(adapter_name)
            raise
        finally:
            del self._making
        for p, trained in before.items():  # another adapter changes nothing about the existing ones
            p.requires_grad_(trained)
        self._layers = [module for module in model.modules() if isinstance(module, EFFTPeftLinear)]
        call_linear(model, *(layer.path for layer in self._layers))
        if not self._hooks:
            self._hooks = (
                model.register_forward_pre_hook(partial(_begin, self)),
                model.register_forward_hook(partial(_end, self), always_call=True),
            )

    def _prepare_adapter_config(self, peft_config: EFFTPeftConfig, model_config: dict) -> EFFTPeftConfig:
        if peft_config.target_modules is None:
            bases = self._bases()
            if paths := {site.path for site in find_sites(self.model, peft_config.method(), bases) if site.chosen}:
                # endings of paths, because PEFT applies layers_to_transform to no others
                peft_config.target_modules = _find_minimal_target_modules(paths, set(bases) - paths)
                return peft_config
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: EFFTPeftConfig, model: nn.Module) -> None:
        """Create the factors, before any module is replaced: everything that can be refused is refused here."""
        adapter_name, low_cpu_mem_usage = self._making
        peft_config = _maybe_include_all_linear_layers(peft_config, model)
        bases = self._bases()
        linears = {path: base for path, base in bases.items() if self._check_target_module_exists(peft_config, path)}
        for path, base in linears.items():
            if not isinstance(base, nn.Linear | Conv1D):
                raise TypeError(f"{path} must be an nn.Linear or a Conv1D of transformers, got {type(base).__name__}")
        found = {}
        for path, base in linears.items():
            if (other := found.setdefault(id(base.weight), path)) != path:
                raise ValueError(f"{path} and {other} share one weight; adapt neither, or untie them")
        specs = _arrange(model, peft_config, bases, linears) if linears else []
        taken = {spec.name for spec in specs} | {"u", "sigma", "v", "scale", "model", "efft_factors", "modules_to_save"}
        taken |= {group for factors in self.efft_factors.values() for group in factors}
        taken |= {name for path in bases for name in path.split(".")} - set(self.efft_factors)
        if adapter_name in taken:  # PEFT leaves keys with such a part out of the files of the other adapters
            raise ValueError(
                f"adapter_name must differ from the names of groups, factors and modules, got {adapter_name!r}"
            )
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            factors = _Factors(adapter_name, _build(peft_config, specs, linears))
        self.efft_factors[adapter_name] = factors.train(model.training)

    def _bases(self) -> dict[str, nn.Module]:
        """path -> module, without the layers of other adapters around it; the insides of such layers are left out."""
        found, layer = {}, None
        for path, module in self.model.named_modules():
            if layer is not None and path.startswith(layer):
                continue
            if isinstance(module, EFFTPeftLinear):
                layer, module = f"{path}.", module.get_base_layer()
            if path:
                found[path] = module
        return found

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        factors = self.efft_factors[adapter_name]
        if isinstance(target, EFFTPeftLinear):
            target.update_layer(adapter_name, factors)
            return
        layer = EFFTPeftLinear(target, current_key).train(target.training)
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, factors)
        self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        if autocast_adapter_dtype:
            for group in self.efft_factors[adapter_name].groups():
                if group.floor in LOW:
                    group.floor = group._like["dtype"] = torch.float32
                    group.to(torch.float32)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._forget(adapter_name)

    def _forget(self, adapter_name: str) -> None:
        if adapter_name in self.efft_factors:
            del self.efft_factors[adapter_name]

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for layer in self._layers:
            layer._weight()  # refuses a weight that cannot be written, before the first one is

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge as other methods of PEFT do; after an error all layers are as before."""
        before = [layer.merged_adapters[:] for layer in self._layers]
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except BaseException:
            for layer, names in zip(self._layers, before):
                if layer.merged_adapters != names:
                    layer.unmerge()
                    layer.merge(adapter_names=names)
            raise

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge and safe_merge and not any(layer.merged for layer in self._layers):
            self.merge_adapter(adapter_names, safe_merge=True)  # one layer that fails keeps all from being unloaded
            self.unmerge_adapter()
        uncall_linear(self.model, *(layer.path for layer in self._layers))
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for hook in self._hooks:
            hook.remove()
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names must be None, because EFFT has no mixed batches in PEFT")
        yield

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        owner = "base_model.efft_factors."
        if key.startswith(f"{owner}{adapter_name}."):
            return owner + key.removeprefix(f"{owner}{adapter_name}.")
        return super()._remove_adapter_name_from_key(key, adapter_name)


def _begin(tuner: EFFTPeftModel, model: nn.Module, args) -> None:
    for name in dict.fromkeys(name for layer in tuner._layers for name in layer.adding()):
        tuner.efft_factors[name].begin(model)


def _end(tuner: EFFTPeftModel, model: nn.Module, args, output) -> None:
    for factors in tuner.efft_factors.values():
        factors.end(model, output)


if PeftType.EFFT not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(name="efft", config_cls=EFFTPeftConfig, model_cls=EFFTPeftModel, prefix="efft_")
