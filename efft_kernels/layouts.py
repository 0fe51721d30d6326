"""Names of blocks, Linears and heads in vision transformers. The only file that knows models.

Models are recognised by the names of their modules (timm, transformers, DINOv2's repository); no library of models is
imported.
"""

import re
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from .configs import MethodConfig, Site
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
HEADS = ("head", "head_dist", "heads", "fc", "classifier", "cls_classifier", "distillation_classifier")


def find_sites(model: nn.Module, config: MethodConfig, named: dict[str, nn.Module] | None = None) -> list[Site]:
    """The Linears whose role in a block is known from their names.

    Args:
        model, config: as :func:`efft_kernels.plan`.
        named: path -> module to search, None for all modules of the model.
    """
    linears = []  # (block prefix, container, path, parts, module)
    for path, module in named_modules(model) if named is None else named.items():
        match = _BLOCK.match(path)
        parts = LINEARS.get(path[match.end() + 1 :]) if match else None
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
            gate_last = getattr(module_at(model, path.rpartition(".")[0]), "gate_last", False)
            parts = ("fc1", "gate") if gate_last else ("gate", "fc1")
        block = blocks[prefix]
        chosen = config.chosen(parts) if config.blocks is None or block in config.blocks else ()
        shape = module.in_features, module.out_features
        sites.append(Site(path, parts, chosen, block, stages[container], *shape))
    return sites


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


def check_called(model: nn.Module, path: str, module: nn.Linear) -> None:
    """Refuse a fused projection that its attention does not call, or whose parts differ in width.

    Raises:
        ValueError: the message names the module and says what would work instead.
    """
    if module.out_features % 3 and path.endswith("qkv"):
        raise ValueError(f"{path} must hold q, k and v of equal width, got {module.out_features} outputs")
    parent = module_at(model, path.rpartition(".")[0])
    separate = getattr(parent, "q_bias", None) is not None and not getattr(parent, "qkv_bias_separate", False)
    if path.endswith(".qkv") and separate:
        raise ValueError(
            f"{type(model).__name__} is not supported with these targets: its {type(parent).__name__} at {path} keeps "
            "q and v biases apart and calls F.linear on the weight, past the Linear (as do BEiT, EVA and Swin V2 of "
            "timm); targets=('proj', 'mlp') would work"
        )


def heads_of(model: nn.Module) -> dict[str, nn.Module]:
    """The classifier modules by name; empty for a model without any."""
    found = {key: getattr(model, key, None) for key in HEADS}
    return {key: unwrapped(module) for key, module in found.items() if isinstance(module, nn.Module)}


def head_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the head, named as in the model's state_dict."""
    state = {f"{key}.{name}": t for key, head in heads_of(model).items() for name, t in head.state_dict().items()}
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


def norms_outside(model: nn.Module, heads: list[str]) -> Iterator[nn.Module]:
    """The batch norms that are not part of a head."""
    for path, module in named_modules(model):
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and path.partition(".")[0] not in heads:
            yield module


def classifiers_of(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The last Linear of each head, whose outputs are the classes, by path."""
    for key in heads_of(model):
        own = ((path, m) for path, m in named_modules(model) if f"{path}.".startswith(f"{key}."))
        yield from [(path, m) for path, m in own if isinstance(m, nn.Linear)][-1:]


def tell_classes(model: nn.Module, classes: int) -> None:
    """Write the new number of classes where timm and transformers keep it."""
    for owner in (model, getattr(model, "config", None)):
        for key in ("num_classes", "num_labels"):
            if key in vars(owner or object) or (owner is not model and hasattr(owner, key)):
                setattr(owner, key, classes)


def input_size(model: nn.Module) -> tuple[int, int] | None:
    """(height, width) of the only images that the model takes; None if it takes several sizes or does not say."""
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    if not getattr(embed, "strict_img_size", False) or not isinstance(size, tuple | list) or len(size) != 2:
        return None
    return int(size[0]), int(size[1])
