"""mixed_linear: a low-rank linear for a batch whose samples have different adapters."""

import math

import torch
from torch import Tensor

from ..kernels import decisions, overwriting
from ..kernels.memory import check_memory
from .checks import as_rows, check_dy, check_floats, check_linear, check_product, check_shape, check_tensors, no_view
from .dispatch import below_autograd, check_backend, decide, direct_outside_autocast, once, register, signature
from .producers import cast_again, kept_for, kept_weight


def _check(x, weight, bias, down, up, ids) -> None:
    check_floats("x", x, down=down, up=up)
    check_shape("down", down, "A", "K", "R")
    check_shape("up", up, down.shape[0], down.shape[2], "N")
    check_memory("down", down)
    check_memory("up", up)
    check_linear(x, weight, bias, down[0], up[0])
    check_product("down", down, *down.shape)
    check_product("up", up, *up.shape)
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, got {ids.dtype}")
    if ids.device != x.device:
        raise ValueError(f"ids must be on the device of x, {x.device}, got {ids.device}")
    if ids.dim() != 1:
        raise ValueError(f"ids must be [B], got {list(ids.shape)}")
    _check_runs(math.prod(x.shape[:-1]), ids)


def _check_runs(rows: int, ids: Tensor) -> None:
    B = ids.shape[0]
    if rows % B if B else rows:
        raise ValueError(f"the rows of x must be a multiple of the {B} ids, got {rows}")


def _check_backward(dy, x, weight, down, up, p, ids, needs) -> None:
    check_dy(dy, x, weight, p, needs)
    _check(dy.new_empty(0, weight.shape[1]) if x is None else x, weight, None, down, up, ids)
    check_floats("weight", weight, dy=dy, p=p)
    M = as_rows(dy, "dy").shape[0]
    _check_runs(M, ids)
    if p is not None:
        check_shape("p", p, M, down.shape[2])


def _check_values(ids: Tensor, A: int) -> None:
    """On a CPU only: a GPU's host would have to wait for the values. Kernels there skip ids that are out of range."""
    check_memory("ids", ids)
    if ids.device.type == "cpu" and ids.numel():
        first, last = ids.aminmax()
        if first < -1 or last >= A:
            raise ValueError(f"ids must be from -1 to {A - 1} for {A} adapters, got {int(first)} to {int(last)}")


def _forward(x, weight, bias, down, up, ids, backend=None):
    key = ("mixed_linear", backend, *signature(x, weight, bias, down, up, ids))
    kernels = decisions.get(key)
    if kernels is None:
        _check(x, weight, bias, down, up, ids)
        kernels = decide(key, as_rows(x), weight, bias, down, up, ids)
    _check_values(ids, down.shape[0])
    y, p = kernels.mixed_linear(as_rows(x), weight, bias, down, up, ids.contiguous())
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1]), p


def _backward(dy, x, weight, down, up, p, ids, needs, backend=None, overwrite_x=False):
    key = ("mixed_linear_backward", backend, *needs, *signature(dy, x, weight, down, up, p, ids))
    kernels = decisions.get(key)
    if kernels is None:
        _check_backward(dy, x, weight, down, up, p, ids, needs)
        kernels = decide(key, as_rows(dy, "dy"), as_rows(x), weight, down, up, p, ids, needs=needs)
    _check_values(ids, down.shape[0])
    rows, over = (as_rows(dy, "dy"), as_rows(x)), overwriting(kernels, overwrite_x)
    grads = kernels.mixed_linear_backward(*rows, weight, down, up, p, ids.contiguous(), needs, *over)
    if needs[0] and dy.dim() != 2:
        grads[0] = grads[0].view(*dy.shape[:-1], weight.shape[1])
    return grads


def _forward_fake(x, weight, bias, down, up, ids, backend=None):
    _check(x, weight, bias, down, up, ids)
    rows = math.prod(x.shape[:-1])
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(rows, down.shape[2])


def _backward_fake(dy, x, weight, down, up, p, ids, needs, backend=None):
    N, K = weight.shape
    shapes = (*dy.shape[:-1], K), (N, K), (N,), down.shape, up.shape
    return [dy.new_empty(shape) for shape, need in zip(shapes, needs) if need]


class _MixedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, x, weight, bias, down, up, ids, backend):
        y, p = run(x, weight, bias, down, up, ids, backend)
        _, _, need_weight, _, need_down, need_up, _, _ = ctx.needs_input_grad
        # x and p are activations: held only for the gradients that read them, and x only where it cannot be rebuilt
        ctx.recipe, kept = kept_for(x) if need_weight or need_down else (None, (None,))
        ctx.save_for_backward(kept_weight(weight), down, up, p if need_up else None, ids, *kept)
        ctx.backend = backend
        y = no_view(y)
        if run is _forward:  # nobody outside reads p
            return y
        ctx.mark_non_differentiable(p)
        ctx.set_materialize_grads(False)  # otherwise autograd allocates a zero gradient for p in every backward
        return y, p

    @staticmethod
    @once
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 8
        weight, down, up, p, ids, *kept = ctx.saved_tensors
        weight = cast_again(weight, down.dtype)
        x, own = (kept[0], False) if ctx.recipe is None else ctx.recipe.x(kept)
        args = dy, x, weight, down, up, p, ids, list(ctx.needs_input_grad[1:6]), ctx.backend
        grads = (
            _backward(*args, overwrite_x=own)
            if direct_outside_autocast(dy, x, weight, down, up, p, ids)
            else below_autograd(_backward_op, *args)
        )
        found = iter(grads)
        return None, *[next(found) if need else None for need in ctx.needs_input_grad[1:6]], None, None


_call = register(
    "mixed_linear(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up, Tensor ids, str? backend=None) "
    "-> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _MixedLinear,
)
_backward_op = register(
    "mixed_linear_backward(Tensor dy, Tensor? x, Tensor weight, Tensor down, Tensor up, Tensor? p, Tensor ids, "
    "bool[] needs, str? backend=None) -> Tensor[]",
    _backward,
    _backward_fake,
)


def mixed_linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    down: Tensor,  # [A, K, R]
    up: Tensor,  # [A, R, N]
    ids: Tensor,  # [B]
    *,
    backend: str | None = None,
) -> Tensor:  # [..., N]
    """A low-rank linear for a batch whose samples have different adapters, in one pass.

    The rows of x, its leading dimensions flattened, are B runs of equal length, one for each id. A row m of run b has
    y[m] = x[m] @ weight.T + bias + (x[m] @ down[ids[b]]) @ up[ids[b]], and without the last term where ids[b] is -1.
    Differentiable once, in all five float arguments; gradients of adapters that no id names are zero.

    Args:
        x, weight, bias: as :func:`lowrank_linear`. The number of rows is a multiple of B: x is [B, T, K] for images,
            [B * W, T, K] where the W windows of each image follow each other.
        down: [A, K, R], up: [A, R, N], the factors of A adapters, any strides.
        ids: [B] of int64, each from -1 to A - 1. On a GPU the host does not read them; an id that is out of range
            counts as -1 there.
        backend: a name from :func:`backends`, or None for the fastest that is proven for these inputs.

    Returns:
        [..., N] in the dtype of x; under autocast all inputs but the ids are first cast to its dtype (float64 stays).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`group_update`.
    """
    check_tensors(x=x, weight=weight, bias=x if bias is None else bias, down=down, up=up, ids=ids)
    if backend is not None:
        check_backend(backend)
    return _call(x, weight, bias, down, up, ids, backend)
