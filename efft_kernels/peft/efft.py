"""EFFT as a method of Hugging Face PEFT.

Importing this file registers the method, so that ``get_peft_model(model, EFFTPeftConfig(...))`` and all that uses it
(saving, loading, several adapters, merging, Trainer) work as for PEFT's own methods. The tuner owns each factor once,
as ``efft_factors.<adapter>.<group>.<factor>``; layers refer to the factors without registering them, so they stay
shared.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, _find_minimal_target_modules, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, PeftType, register_peft_method
from peft.utils.integrations import init_empty_weights
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..calls import call_linear, uncall_linear
from ..layouts import left_out, survey
from ..plans import patterns
from ..precision import LOW
from .arrange import arrange, build
from .config import EFFTPeftConfig
from .layer import EFFTPeftLinear, Factors


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
            bases, method = self._bases(), peft_config.method()
            sites, reasons = survey(self.model, method, bases)
            if paths := {site.path for site in sites if site.chosen}:
                missed = [item.path for item in left_out(self.model, method, sites, reasons, bases) if item.unexpected]
                if missed := [*missed, *sorted(paths - bases.keys())]:  # projections of an attention are no modules
                    said = f"layers of its adapted blocks are not adapted ({patterns(missed)})"
                    warnings.warn(f"{type(self.model).__name__}: {len(missed)} {said}", stacklevel=2)
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
        specs = arrange(model, peft_config, bases, linears) if linears else []
        taken = {spec.name for spec in specs} | {"u", "sigma", "v", "scale", "rank_weights", "channel_scale"}
        taken |= {"model", "efft_factors", "modules_to_save"}
        taken |= {group for factors in self.efft_factors.values() for group in factors}
        taken |= {name for path in bases for name in path.split(".")} - set(self.efft_factors)
        if adapter_name in taken:  # PEFT leaves keys with such a part out of the files of the other adapters
            raise ValueError(
                f"adapter_name must differ from the names of groups, factors and modules, got {adapter_name!r}"
            )
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            factors = Factors(adapter_name, build(peft_config, specs, linears))
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
