"""DoRA (arXiv 2402.09353): the outputs of an adapted Linear, times a trained magnitude over the norm of W + dW."""

import torch
from torch import Tensor

from .precision import without_autocast


@torch.no_grad()
def row_norms(weight: Tensor, down: Tensor | None = None, up: Tensor | None = None) -> Tensor:
    """||W_n + (down @ up).T_n|| of each output n, in float32 or wider, without forming the update:

        ||W_n||^2 + 2 (W down)_n . up_n + up_n . (down.T down) up_n

    Args:
        weight: [N, K].
        down, up: [..., K, R] and [..., R, N]; None for the norms of the weight alone.

    Returns:
        [..., N], without a graph.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    with without_autocast(weight.device):
        weight = weight.to(wide)
        squares = torch.linalg.vector_norm(weight, dim=-1).square()
        if down is not None:
            down, rows = down.to(wide), up.to(wide).mT
            squares = squares + ((2 * (weight @ down) + rows @ (down.mT @ down)) * rows).sum(-1)
        return squares.clamp(min=0).sqrt()


def gain(weight: Tensor, down: Tensor, up: Tensor, magnitude: Tensor) -> Tensor:
    """magnitude / ||W + dW|| - 1 of each output, differentiable in the magnitude alone (section 4.3 of the paper).

    It is 0 where the magnitude is: at outputs that are not adapted, and those whose row of W is zeros.

    Args:
        weight, down, up: as :func:`row_norms`.
        magnitude: [..., N].
    """
    norms = row_norms(weight, down, up)
    relative = magnitude / torch.where(norms == 0, 1.0, norms)
    return torch.where(magnitude == 0, 0.0, relative - 1)


def scaled(y: Tensor, bias: Tensor | None, gain: Tensor) -> Tensor:
    """y with its product, all but the bias, times 1 + gain: gains near 0 keep their digits in bfloat16."""
    product = y if bias is None else y - bias.to(y.dtype)
    return y + product * gain.to(y.dtype)


@torch.no_grad()
def dense_update(weight: Tensor, down: Tensor, up: Tensor, magnitude: Tensor) -> Tensor:
    """What a merge adds to the weight [N, K], in float32 or wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight, down, up = (t.to(wide) for t in (weight, down, up))
    update, more = (down @ up).mT, gain(weight, down, up, magnitude.to(wide)).unsqueeze(-1)
    return update + (weight + update) * more
