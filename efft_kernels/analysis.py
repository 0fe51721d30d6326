"""What an adapter costs, and which subspaces its updates span."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .groups import make_group
from .inject import Plan, adapters
from .precision import beside

Matrix = Tensor | tuple[Tensor, Tensor]  # a matrix, or (left, right) for left @ right


def subspace_similarity(a: Matrix, b: Matrix, i: int, j: int) -> float:
    """phi(A, B, i, j) = ||U_A^i.T U_B^j||_F^2 / min(i, j): how much of the smaller of two subspaces lies in the other.

    1 if one contains the other, 0 if they are orthogonal, about max(i, j) / d for random subspaces of d dimensions
    (LoRA, arXiv 2106.09685, section 7.2; EFFT, arXiv 2311.06749, section 3.4).

    Args:
        a, b: matrices [d, n] and [d, m], or a pair (left [d, r], right [r, n]) that stands for its product without
            forming it, such as ``(down, up)`` of an adapter. Their left singular vectors U are compared.
        i, j: number of leading left singular vectors of a and b.

    Returns:
        A number in [0, 1], computed in float64.

    Raises:
        TypeError: a or b is no floating-point tensor.
        ValueError: shapes that do not fit, entries that are not finite, or i or j outside of 1 to the rank of its
            matrix (singular vectors beyond the rank are arbitrary).
    """
    left, right = _basis(a, i, "a", "i"), _basis(b, j, "b", "j")
    return _overlaps(left, right)[:i, :j].sum().item() / min(i, j)


def subspace_map(a: Matrix, b: Matrix, i: int | None = None, j: int | None = None) -> Tensor:
    """:func:`subspace_similarity` for all subspaces of 1 to i and 1 to j directions at once.

    Args:
        a, b: as for :func:`subspace_similarity`.
        i, j: the largest numbers of directions; None for the rank of the matrix.

    Returns:
        Tensor [i, j], float64: entry [p, q] is phi(a, b, p + 1, q + 1).
    """
    left, right = _basis(a, i, "a", "i"), _basis(b, j, "b", "j")
    # sums over all directions before some are taken, so that an entry has the same bits whatever i and j are
    sums = _overlaps(left, right).cumsum(0).cumsum(1)[:i, :j]
    count = [torch.arange(1, n + 1, dtype=sums.dtype, device=sums.device) for n in sums.shape]
    return sums / torch.minimum(count[0][:, None], count[1])


@torch.no_grad()
def updates(model: nn.Module) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """The update of each matrix by the active adapter, without dropout and as a pair of factors.

    Args:
        model: an injected model.

    Returns:
        (path of the Linear, part such as "q" or "fc2") -> (down [K, R], up [R, N]), copies;
        dW = down @ up for y = x W.

    Raises:
        ValueError: a model without adapters, or with one of ``dora``, whose updates are no products of factors.
    """
    found = {}
    for group in adapters(model).groups():
        pairs = group.pairs_without_dropout("reference")
        for path, slot in group.slots.items():
            down, up, _, magnitude = pairs[path]
            if magnitude is not None:
                raise ValueError("updates must be of low rank, and those of dora=True, which scales W, are not")
            for part, columns in zip(slot.site.parts, up.split(slot.site.width, 1)):
                if part in slot.site.chosen:
                    found[path, part] = (down.clone(), columns.clone())  # not the factors themselves
    return found


def _basis(matrix: Matrix, count: int | None, name: str, count_name: str) -> Tensor:
    """All left singular vectors [d, rank], float64, of a matrix that has ``count`` of them."""
    pair = isinstance(matrix, tuple | list)
    given = matrix if pair else (matrix,)
    if wrong := [part for part in given if not (isinstance(part, Tensor) and part.is_floating_point())]:
        raise TypeError(f"{name} must be floating-point tensors, got {getattr(wrong[0], 'dtype', wrong[0])!r}")
    parts = [part.detach().double() for part in given]
    if any(part.ndim != 2 for part in parts) or (pair and (len(parts) != 2 or parts[0].shape[1] != parts[1].shape[0])):
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise ValueError(f"{name} must be a matrix [d, n] or a pair [d, r], [r, n], got {shapes}")
    if not all(torch.isfinite(part).all() for part in parts):
        raise ValueError(f"{name} must be finite")
    if pair:
        # left right = Q (R right), so only a matrix of r rows is decomposed
        rotation, small = torch.linalg.qr(parts[0])
        vectors, values, _ = torch.linalg.svd(small @ parts[1], full_matrices=False)
        vectors = rotation @ vectors
    else:
        vectors, values, _ = torch.linalg.svd(parts[0], full_matrices=False)
    # values below this come from the rounding of entries, and of what made them, which wide dtypes leave more room for
    eps, size = max(torch.finfo(part.dtype).eps for part in given), max(parts[0].shape[0], parts[-1].shape[1])
    rank = int((values > eps * min(size, max(4, 1e-4 / eps)) * values[:1].sum()).sum())
    count = rank if count is None else count
    if type(count) is not int or not 1 <= count <= rank:
        raise ValueError(f"{count_name} must be from 1 to the rank of {name}, which is {rank}, got {count!r}")
    return vectors[:, :rank]


def _overlaps(left: Tensor, right: Tensor) -> Tensor:
    """Squared cosines [i, j] between the vectors of two bases."""
    if left.shape[0] != right.shape[0]:
        raise ValueError(f"a and b must have as many rows, got {left.shape[0]} and {right.shape[0]}")
    return (left.mT @ right.to(left.device)).square()


class Cost(NamedTuple):
    """What one forward, and one forward and backward, of the adapted Linears cost. A multiply-add is two FLOPs."""

    parameters: int  # trained, without the head
    frozen_parameters: int  # of the weights of the adapted Linears
    flops: int  # of the frozen products x W
    adapter_flops: int  # of (x down) up, which the adapter adds
    update_flops: int  # of computing (down, up) from the factors, and norms of W + dW, once per forward
    train_flops: int  # of the frozen products, forward and backward: no gradient of a frozen weight
    adapter_train_flops: int  # of (x down) up, forward and backward
    bytes: int  # of the frozen weights
    adapter_bytes: int  # of the trained factors, which are float32 beside narrower weights; AdamW's state is twice that


def cost(plan: Plan, rows: int, dtype: torch.dtype = torch.float32) -> Cost:
    """Parameters, FLOPs and bytes of a planned adapter, for ``rows`` tokens (images times tokens per image).

    The number of tokens is taken as the same in all stages, although a Swin has fewer from stage to stage.

    Raises:
        TypeError, ValueError: a plan that is none; rows that is no int of at least 1.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, as plan() makes, got {type(plan).__name__}")
    if type(rows) is not int or rows < 1:
        raise ValueError(f"rows must be an int of at least 1, got {rows!r}")
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton

    frozen = added = update = 0
    for spec in plan.groups:
        empty = {slot.site.path: torch.empty(0) for slot in spec.slots}
        group = make_group(spec, plan.config, empty).requires_grad_(False)
        with FlopCounterMode(display=False) as counted:
            pairs = group.low_rank_pairs("reference")
        update += counted.get_total_flops()
        for slot in spec.slots:
            K, N = slot.site.in_features, slot.site.out_features
            frozen += K * N
            pair = pairs[slot.site.path]
            R = pair.down.shape[1]
            added += R * (K + N)
            if pair.magnitude is not None:  # the norms of W and of W + dW (dora.row_norms)
                update += 2 * K * N * (R + 1) + 2 * R * R * (K + N)
    size = dtype.itemsize
    return Cost(
        plan.parameters, frozen, 2 * rows * frozen, 2 * rows * added, update,
        4 * rows * frozen, 6 * rows * added, size * frozen, beside(dtype, torch.float32).itemsize * plan.parameters,
    )  # fmt: skip
