"""export_lora: an adapter of any method as a folder that PEFT loads as a LoRA."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from .adapter_file import check_finite, name_of
from .calls import switches
from .dora import row_norms
from .files import known, trained_head
from .inject import adapted_linears, adapters
from .layouts import head_state, heads_of
from .low_rank import Pair
from .storage import write_bytes
from .wrappers import module_at, on_unwrapped, outermost

_PREFIX = "base_model.model."  # where PEFT's wrapper keeps the model


@on_unwrapped
def export_lora(model: nn.Module, folder: str | os.PathLike, *, name: str | None = None, base_model: str = "") -> None:
    """Write an adapter as a LoRA of PEFT: the folder that ``PeftModel.from_pretrained(base, folder)`` loads.

    Every method computes y = x W + b + (x @ down) @ up, so the LoRA is exact: lora_A = down.T and lora_B = up.T, with
    lora_alpha = r. Parts of a fused qkv that are not adapted are zeros in lora_B. A Linear of another rank than most
    has its rank in rank_pattern. With ``dora`` it is a DoRA (use_dora), with a magnitude for each output. A trained
    head and the ``train`` modules are modules_to_save. Dropout is not exported. The LoRA has a matrix for each Linear,
    so its file is larger than that of a method whose Linears share factors.

    Args:
        model: an injected model. The base that the LoRA is loaded on has its modules and names before :func:`inject`,
            with as many classes.
        folder: gets adapter_model.safetensors and adapter_config.json; it is made if it does not exist.
        name: of the adapter; None for the active one.
        base_model: name of the pre-trained model to record; empty for the name that timm or transformers gave it.

    Raises:
        ValueError: a model without this adapter, or with all adapters disabled and no name given; numbers that are not
            finite; a Linear that was removed or replaced, or whose weight its model reads without calling it (qkv of
            BEiT, EVA and Swin V2; any of a batch_first nn.TransformerEncoderLayer); a projection of an
            nn.MultiheadAttention other than in_proj, which PEFT computes otherwise, or any with ``dora``; a row of
            zeros in a weight with ``dora``; a head or module of ``train`` that PEFT cannot save, or whose name is the
            end of another module's, which PEFT would train as well; within disable_adapter.
        OSError: the folder cannot be written.
    """
    from safetensors.torch import save

    owner = adapters(model)
    groups = owner[known(owner, owner.active if name is None else name)]
    adapted_linears(model, groups)
    state = trained_head(model) | head_state(model, owner.trained)
    check_finite("the adapter", groups.state_dict() | state)
    with torch.no_grad():
        pairs = {path: pair for g in groups.values() for path, pair in g.pairs_without_dropout().items()}
    tensors, ranks = {}, {}
    for path, places in _layers(model, pairs).items():
        for place, (down, up, _, magnitude) in places.items():
            if magnitude is not None:
                weight = module_at(model, path).weight
                tensors[f"{place}.lora_magnitude_vector"] = _whole_magnitude(path, weight, down, up, magnitude)
            tensors[f"{place}.lora_A.weight"] = _own(down.mT)
            tensors[f"{place}.lora_B.weight"] = _own(up.mT)
            ranks[path] = down.shape[-1]
    heads = [key for key in heads_of(model) if any(name.startswith(f"{key}.") for name in state)]
    whole = outermost((*heads, *owner.trained))
    _check_whole(model, whole)
    tensors |= {key: _own(t) for key, t in state.items()}
    config = _config(ranks, model, whole, any(pair.magnitude is not None for pair in pairs.values()))
    config["base_model_name_or_path"] = base_model or name_of(model) or None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = save({_PREFIX + key: t for key, t in tensors.items()}, {"format": "pt"})
    write_bytes(folder / "adapter_model.safetensors", weights)
    write_bytes(folder / "adapter_config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def _layers(model: nn.Module, pairs: dict[str, Pair]) -> dict[str, dict[str, Pair]]:
    """path of a module that PEFT adapts -> where it keeps a pair -> that pair"""
    found = {}
    for path, pair in pairs.items():
        for module in (module for module, _, _ in switches(model, path) if hasattr(module, "_efft_switched")):
            calls = isinstance(module, nn.TransformerEncoderLayer) and not module.self_attn.batch_first
            if not calls and not isinstance(module, nn.MultiheadAttention):
                why = "reads without calling it, so that PEFT's update would have no effect; merge instead"
                raise ValueError(f"{path} has a weight that its model {why}")
        owner, _, name = path.rpartition(".")
        attention = module_at(model, owner)
        if not isinstance(attention, nn.MultiheadAttention):
            found[path] = {path: pair}
            continue
        if name != "in_proj":
            why = "adds twice" if name == "out_proj" else "does not take"  # PEFT 0.21
            raise ValueError(f"{path} is a part of an nn.MultiheadAttention whose update PEFT {why}; merge instead")
        if pair.magnitude is not None:
            raise ValueError(f"{path} is a part of an nn.MultiheadAttention, where PEFT has no dora; merge instead")
        down, up = pair.down, pair.up
        none = Pair(torch.zeros_like(down), torch.zeros_like(up[:, : attention.embed_dim]))  # PEFT adapts out_proj, too
        found[owner] = {owner: pair, f"{owner}.base_layer.out_proj": none}
    return found


@torch.no_grad()
def _whole_magnitude(path: str, weight: Tensor, down: Tensor, up: Tensor, magnitude: Tensor) -> Tensor:
    """the magnitudes with the norm at outputs that are not scaled, where this library keeps a 0"""
    norms = row_norms(weight, down, up).to(magnitude)
    if not norms.all():
        raise ValueError(f"{path} has a row of zeros, for which PEFT's dora gives NaN; merge instead")
    return torch.where(magnitude == 0, norms, magnitude)


def _own(t: Tensor) -> Tensor:
    """A contiguous copy: safetensors refuses tensors that share memory"""
    return t.detach().clone(memory_format=torch.contiguous_format)


def _config(ranks: dict[str, int], model: nn.Module, whole: list[str], dora: bool) -> dict:
    """adapter_config.json, with what a version of PEFT does not name left at its default"""
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    other = {path: rank for path, rank in ranks.items() if rank != usual}
    # PEFT takes the first pattern that is the end of a path, so longer paths come first; a Linear of the usual rank
    # is listed, too, where a pattern would fit it
    listed = {path: rank for path, rank in ranks.items() if path in other or _ends_with_one_of(path, other)}
    patterns = dict(sorted(listed.items(), key=lambda item: -len(item[0])))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": dora,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": _targets(ranks, model),
        "modules_to_save": whole or None,
    }


def _targets(ranks: dict[str, int], model: nn.Module) -> list[str] | str:
    """The paths; where one of them is also the end of another module's path, an expression for exactly these"""
    if any(path not in ranks and _ends_with_one_of(path, ranks) for path, _ in model.named_modules()):
        return "|".join(path.replace(".", r"\.") for path in ranks)
    return sorted(ranks)


def _ends_with_one_of(path: str, ends: Iterable[str]) -> bool:
    return any(path.endswith(f".{end}") for end in ends)


def _check_whole(model: nn.Module, whole: list[str]) -> None:
    for path, module in model.named_modules():
        if path in whole and isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
            raise ValueError(f"{path} must not be a {type(module).__name__} to be among modules_to_save of PEFT")
        for key in whole:
            if path.endswith(key) and path != key:
                raise ValueError(
                    f"{key} must be the end of no other module's path to be among modules_to_save of PEFT, which would "
                    f"save {path} as well"
                )
