"""The layer that PEFT puts around a Linear, and the factors that it adds with."""

import warnings

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..base_linears import computes_in
from ..groups import EFFTGroup
from ..kernels import FLOATS
from ..ops import merge_
from ..passes import Adapters
from .fused import add_update, is_plain


class Factors(Adapters):
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

    def update_layer(self, adapter_name: str, factors: Factors) -> None:
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

    def add_to(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """As :meth:`efft_kernels.adapted_linear.AdaptedLinear.add_to`: for an attention that adds a bias of its own."""
        y, own = self(x), self.get_base_layer().bias
        return y if bias is own else y - (0 if own is None else own) + (0 if bias is None else bias)

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
