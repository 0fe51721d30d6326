"""LoRA adapters of Hugging Face PEFT on the kernels of this library."""

import torch
from peft.tuners import lora
from torch import Tensor, nn

from ..ops import check_backend
from ..wrappers import check_module
from .fused import add_update, is_plain


class FastLoraLinear(lora.Linear):
    """A LoRA layer of PEFT whose forward is one pass over x for all active adapters together.

    Made by changing the class of a layer: its parameters, names, configs and methods stay PEFT's. A call that the
    kernel cannot compute runs PEFT's own forward: dropout while training, mixed batches, merged or disabled adapters,
    variants such as DoRA, a bias in lora_B, hooks on the parts.
    """

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        if (
            not names
            or args
            or kwargs
            or self.disable_adapters
            or self.merged
            or not is_plain(self.base_layer)
            or any(_beyond(self, name) or _drops(self, name) for name in names)
            or not (x.dtype == self.base_layer.weight.dtype or torch.is_autocast_enabled(x.device.type))
        ):
            return super().forward(x, *args, **kwargs)
        downs = [self.lora_A[name].weight for name in names]  # each [R, K]
        ups = [_scaled_b(self, name) for name in names]  # each [N, R]
        down, up = (downs[0], ups[0]) if len(names) == 1 else (torch.cat(downs, 0), torch.cat(ups, 1))
        return add_update(self.base_layer, x, down.mT, up.mT, backend=self.efft_backend)


def _scaled_b(layer: lora.Linear, name: str) -> Tensor:
    b, scale = layer.lora_B[name].weight, layer.scaling[name]
    return b if scale == 1 else b * scale


def _drops(layer: lora.Linear, name: str) -> bool:
    dropout = layer.lora_dropout[name]
    return dropout.training and not isinstance(dropout, nn.Identity)


def _beyond(layer: lora.Linear, name: str) -> str | None:
    """What an adapter of a layer computes besides (x @ A.T) @ B.T * scaling and dropout; None if nothing."""
    if (variant := layer.lora_variant.get(name)) is not None:
        return type(variant).__name__
    if layer.lora_B[name].bias is not None:
        return "lora_bias=True"
    if not (is_plain(layer.lora_A[name]) and is_plain(layer.lora_B[name])):
        return f"hooks or a {type(layer.lora_A[name]).__name__} in its lora_A or lora_B"
    return None


def accelerate_lora(model: nn.Module, *, backend: str | None = None, strict: bool = True) -> nn.Module:
    """Run the LoRA layers of a PEFT model on the kernels of this library, in place: same outputs and gradients.

    Nothing is copied: optimizers, checkpoints, load_state_dict, merging, adding and switching adapters work as before.
    Calls that the kernel cannot compute, such as those with dropout while training, run PEFT's own code. Factors in
    float32 with a bfloat16 or float16 base, PEFT's default, enter the product in the dtype of the base, as under
    autocast; they and their gradients stay float32.

    Args:
        model: of get_peft_model, or any model with LoRA layers of PEFT in it.
        backend: a name from :func:`efft_kernels.backends`, or None for the fastest proven one.
        strict: refuse a model with a LoRA layer or adapter that cannot be accelerated. False leaves those as they are.

    Returns:
        The model; :func:`restore_lora` undoes this.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: no LoRA layer, an unknown backend; with strict, a layer that is not a plain Linear with LoRA
            (embeddings, convolutions, quantized weights), DoRA and other variants, or lora_bias, by name. The model is
            unchanged then.
    """
    check_module(model)
    check_backend(backend)
    found, refused = [layer for layer in model.modules() if isinstance(layer, FastLoraLinear)], []
    for path, layer in model.named_modules():
        if not isinstance(layer, lora.LoraLayer) or isinstance(layer, FastLoraLinear):
            continue
        if type(layer) is not lora.Linear or not is_plain(layer.base_layer):
            refused.append(f"{path}: a {type(layer).__name__} around {type(layer.get_base_layer()).__name__}")
            continue
        reasons = [f"{path}: adapter {name!r} has {why}" for name in layer.lora_A if (why := _beyond(layer, name))]
        refused += reasons
        if len(reasons) < len(layer.lora_A):
            found.append(layer)
    if strict and refused:
        more = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
        raise ValueError(
            f"accelerate_lora supports LoRA of nn.Linear, got {'; '.join(refused[:5])}{more}; strict=False leaves "
            "these to PEFT"
        )
    if not found:
        raise ValueError(f"{type(model).__name__} has no LoRA layer of PEFT that accelerate_lora supports")
    for layer in found:
        layer.efft_backend = backend
        if type(layer) is lora.Linear:
            layer.__class__ = FastLoraLinear
    return model


def restore_lora(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate_lora`: PEFT's own forwards run again, with all that was trained or loaded since."""
    check_module(model)
    for layer in model.modules():
        if type(layer) is FastLoraLinear:
            layer.__class__ = lora.Linear
            del layer.efft_backend
    return model
