"""The sizes (M, K, N, R) of the Linears of vision transformers."""

import torch

from ... import extras

# images of 224 x 224: width and tokens (patches and class token)
_VIT = {"vit_b": (768, 197), "vit_l": (1024, 197), "vit_h": (1280, 257)}
# width of stage 1; its 56 * 56 patches become a quarter, and the width twice as large, from stage to stage
_SWIN = {"swin_t": 96, "swin_b": 128, "swin_l": 192}
MODELS = (*_VIT, *_SWIN)


def model_shapes(name: str, batch: int, rank: int) -> list[tuple[int, int, int, int]]:
    """(M, K, N, R) of each kind of Linear in the blocks of a model, each once.

    Args:
        name: one of MODELS, or a model of timm (which must be installed), of whose blocks the Linears are counted.

    Raises:
        ValueError: a name that neither knows.
    """
    if name in _VIT:
        width, tokens = _VIT[name]
        return _block(width, batch * tokens, rank)
    if name in _SWIN:
        return [size for s in range(4) for size in _block(_SWIN[name] << s, batch * (56 >> s) ** 2, rank)]
    return list(dict.fromkeys((batch * rows, K, N, rank) for rows, K, N in _timm_linears(name)))


def _block(width: int, M: int, R: int) -> list[tuple[int, int, int, int]]:
    """qkv, proj, fc1, fc2"""
    return [(M, K, N, R) for K, N in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))]


def _timm_linears(name: str) -> list[tuple[int, int, int]]:
    """(rows of one image, K, N) of the Linears that a forward of the model calls, but for heads"""
    try:
        with torch.device("meta"):
            model = extras.timm().create_model(name, num_classes=0).eval()
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"model must be one of {MODELS} or a name of timm's, got {name!r}: {error}") from error
    found: list[tuple[int, int, int]] = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            note = lambda module, given: found.append((given[0].shape[:-1].numel(), *reversed(module.weight.shape)))
            module.register_forward_pre_hook(note)
    with torch.no_grad():
        model(torch.zeros(1, *model.default_cfg["input_size"], device="meta"))
    if not found:
        raise ValueError(f"model must have Linears before its head, got {name!r}, which has none")
    return list(dict.fromkeys(found))
