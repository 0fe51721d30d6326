"""The modules of methods that EFFT is compared with, added to a frozen backbone by hooks.

A module is registered on the Linear, norm or block that it extends. Its hook is a function that looks it up there, so
that a copy of the model uses the modules of the copy.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..configs import EFFTConfig, Site
from ..inject import plan
from ..layouts import heads_of

_BLOCK = re.compile(r"(.*(?:blocks|layers|layer)\.\d+)\.")


def sites(model: nn.Module, *parts: str) -> list[Site]:
    """The Linears of all blocks that contain one of these parts, in the order of the blocks."""
    groups = plan(model, EFFTConfig("efft2", rank=1, targets=parts)).groups
    found = {slot.site.path: slot.site for group in groups for slot in group.slots}
    return sorted(found.values(), key=lambda site: site.block)


def _blocks(model: nn.Module) -> list[nn.Module]:
    paths = {site.block: _BLOCK.match(site.path)[1] for site in sites(model, "attn", "mlp")}
    return [model.get_submodule(path) for path in paths.values()]


def _put(owner: nn.Module, name: str, module: nn.Module) -> None:
    like = next(p for p in owner.parameters())
    owner.add_module(name, module.to(like.device, like.dtype).train(owner.training))


def _per_block(name: str, value: int | tuple[int, ...], n: int, least: int = 1) -> list[int]:
    sizes = [value] * n if type(value) is int else list(value)
    if len(sizes) != n or not all(type(size) is int and size >= least for size in sizes):
        raise ValueError(f"{name} must be an int of at least {least}, or {n} of them, one per block, got {value!r}")
    return sizes


class Bottleneck(nn.Module):
    """scale * up(act(down(x))), which is zero at the start."""

    def __init__(self, d_in: int, d_out: int, width: int, act, scale: float = 1.0):
        super().__init__()
        self.down, self.up = nn.Linear(d_in, width), nn.Linear(width, d_out)
        self.act, self.scale = act, scale
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:  # [..., d_in] -> [..., d_out]
        return self.scale * self.up(self.act(self.down(x)))


def _after(module: nn.Module, args, out: Tensor) -> Tensor:
    return out + module.adapter(out)


def add_adapters(model: nn.Module, bottleneck: int | tuple[int, ...], placement: str = "pfeiffer") -> None:
    """Add x + up(gelu(down(x))) to the output of each FFN, with placement "houlsby" of each attention as well.

    Raises:
        ValueError: an unknown placement, or a bottleneck that is not an int or one int per block.
    """
    if placement not in ("pfeiffer", "houlsby"):
        raise ValueError(f"placement must be 'pfeiffer' or 'houlsby', got {placement!r}")
    found = sites(model, "fc2", *(["proj"] if placement == "houlsby" else []))
    blocks = sorted({site.block for site in found})
    widths = dict(zip(blocks, _per_block("bottleneck", bottleneck, len(blocks), 0)))
    for site in found:
        d, width = site.out_features, widths[site.block]
        if width:
            linear = model.get_submodule(site.path)
            _put(linear, "adapter", Bottleneck(d, d, width, F.gelu))
            linear.register_forward_hook(_after)


class _FFNInput:
    """The input of the first Linear of an FFN, kept until the last Linear has used it."""

    x: Tensor | None = None


def _keep_input(module: nn.Module, args) -> None:
    module.ffn_input.x = args[0]


def _add_parallel(module: nn.Module, args, out: Tensor) -> Tensor:
    x, module.ffn_input.x = module.ffn_input.x, None
    return out + module.adaptformer(x)


def add_adaptformers(model: nn.Module, bottleneck: int, scale: float) -> None:
    """Add scale * up(relu(down(x))) parallel to each FFN, where x is the normed input of the FFN (equation 2 of
    AdaptFormer, arXiv 2205.13535).

    It is added to the output of the FFN's last Linear, so layer scale and stochastic depth of the block apply to it.

    Raises:
        ValueError: a scale or bottleneck that is not a number, or a block whose FFN is not two Linears.
    """
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    (width,) = _per_block("bottleneck", bottleneck, 1)
    first = {site.block: site.path for site in sites(model, "gate", "fc1")}
    last = sites(model, "fc2")
    if set(first) != {site.block for site in last}:
        raise ValueError(f"adaptformer needs an FFN of two Linears in every block of {type(model).__name__}")
    for site in last:
        one, two = model.get_submodule(first[site.block]), model.get_submodule(site.path)
        one.ffn_input = two.ffn_input = _FFNInput()
        _put(two, "adaptformer", Bottleneck(one.in_features, site.out_features, width, F.relu, scale))
        one.register_forward_pre_hook(_keep_input)
        two.register_forward_hook(_add_parallel)


class ScaleShift(nn.Module):
    """x * scale + shift along one axis; at the start close to the identity, as in SSF: normal with deviation 0.02."""

    def __init__(self, d: int, axis: int = -1):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.empty(d)), nn.Parameter(torch.empty(d))
        self.axis = axis
        nn.init.normal_(self.scale, mean=1.0, std=0.02)
        nn.init.normal_(self.shift, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return x * self.scale.view(shape) + self.shift.view(shape)


def _scaled(module: nn.Module, args, out: Tensor) -> Tensor:
    return module.ssf(out)


def add_ssf(model: nn.Module) -> None:
    """Add a scale and shift after the patch embedding, every norm, and every Linear of a block, not in the head."""
    heads = tuple(f"{key}." for key in heads_of(model))
    chosen = [(site.path, site.out_features, -1) for site in sites(model, "attn", "mlp")]
    for path, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and not f"{path}.".startswith(heads):
            if path.rpartition(".")[2] not in ("q_norm", "k_norm"):
                chosen.append((path, module.normalized_shape[-1], -1))
    convolutions = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    chosen += [(path, m.out_channels, 1) for path, m in convolutions[:1]]
    for path, d, axis in chosen:
        module = model.get_submodule(path)
        _put(module, "ssf", ScaleShift(d, axis))
        module.register_forward_hook(_scaled)


class Prompt(nn.Module):
    """n learned tokens of width d, appended to the input."""

    def __init__(self, n: int, d: int, patch: int):
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(n, d))
        bound = (6 / (3 * patch**2 + d)) ** 0.5
        nn.init.uniform_(self.tokens, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, d] -> [B, T + n, d]
        return torch.cat([x, self.tokens.expand(len(x), -1, -1).to(x.dtype)], 1)


def _prompted(module: nn.Module, args, kwargs):
    name = None if args else "hidden_states"
    x = args[0] if args else kwargs[name]
    x = x[:, : x.shape[1] - module.replaced] if module.replaced else x
    x = module.prompt(x) if hasattr(module, "prompt") else x
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, name: x})


def _stripped(module: nn.Module, args, out):
    n = module.appended
    return out[:, :-n] if isinstance(out, Tensor) else (out[0][:, :-n], *out[1:])


def add_prompts(model: nn.Module, tokens: int | tuple[int, ...], deep: bool, least: int = 1) -> None:
    """Append learned tokens before the first block, and remove them after the last.

    Attention does not depend on the order of tokens, so prompts can stand anywhere; at the end, the model's own tokens
    keep their positions.

    Args:
        tokens: how many; with ``deep`` also one number per block.
        deep: whether each block gets new prompts in place of those of the block before.
        least: smallest number that is allowed.

    Raises:
        ValueError: a model with stages or with positions in its attention, or a wrong number of tokens.
    """
    attention = sites(model, "attn")
    rope = next((k for k in ("rope", "rel_pos_bias", "shared_rel_pos") if getattr(model, k, None) is not None), None)
    if len({site.stage for site in attention}) > 1 or rope:
        raise ValueError(
            f"prompts need blocks that take any number of tokens, but {type(model).__name__} has "
            + ("stages" if rope is None else f"positions in its attention ({rope})")
        )
    blocks = _blocks(model)
    sizes = _per_block("tokens", tokens, len(blocks) if deep else 1, least)
    d = attention[0].in_features
    patch = next((m.kernel_size[0] for m in model.modules() if isinstance(m, nn.Conv2d)), 16)
    before = 0
    for block, n in zip(blocks, sizes):
        block.replaced, before = before, n
        if n:
            _put(block, "prompt", Prompt(n, d, patch))
        block.register_forward_pre_hook(_prompted, with_kwargs=True)
    blocks[-1].appended = before
    if before:
        blocks[-1].register_forward_hook(_stripped)


class QVUpdate(nn.Module):
    """The update x A B of q and v in a projection whose output is [..., q k v], with zeros for k."""

    def __init__(self, site: Site, rank: int):
        super().__init__()
        chosen = [i for i, part in enumerate(site.parts) if part in ("q", "v")]
        self.parts, self.chosen = len(site.parts), chosen
        self.a = nn.Parameter(nn.init.xavier_uniform_(torch.empty(len(chosen) * rank, site.in_features)).T.contiguous())
        self.b = nn.Parameter(torch.zeros(len(chosen), rank, site.width))

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        p = (x @ self.a).unflatten(-1, (len(self.chosen), -1))
        update = torch.einsum("...mr,mrn->...mn", p, self.b)
        zero = torch.zeros_like(update[..., 0, :])
        columns = [update[..., self.chosen.index(i), :] if i in self.chosen else zero for i in range(self.parts)]
        return torch.cat(columns, -1)


def _updated(module: nn.Module, args, out: Tensor) -> Tensor:
    return out + module.lora(args[0])


def _add_lora(model: nn.Module, lora_rank: int | tuple[int, ...]) -> None:
    found = sites(model, "q", "v")
    blocks = sorted({site.block for site in found})
    ranks = dict(zip(blocks, _per_block("lora_rank", lora_rank, len(blocks), 0)))
    for site in found:
        if ranks[site.block]:
            linear = model.get_submodule(site.path)
            _put(linear, "lora", QVUpdate(site, ranks[site.block]))
            linear.register_forward_hook(_updated)


def add_noah(
    model: nn.Module, bottleneck: int | tuple[int, ...], lora_rank: int | tuple[int, ...], tokens: int | tuple[int, ...]
) -> None:
    """Add adapters after each FFN, LoRA on q and v, and deep prompts, with sizes per block; a size of 0 adds none.

    NOAH's released code uses a single A for q, k and v, which has as many parameters as A and B for each of q and v.
    """
    n = len(_blocks(model))
    for name, value in (("bottleneck", bottleneck), ("lora_rank", lora_rank), ("tokens", tokens)):
        _per_block(name, value, n, 0)
    add_prompts(model, tokens, deep=True, least=0)
    add_adapters(model, bottleneck)
    _add_lora(model, lora_rank)
