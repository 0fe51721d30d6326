"""lowrank_linear: y = x @ weight.T + bias + (x @ down) @ up, without forming down @ up."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels import Kernels, decisions, overwriting
from .checks import as_rows, check_dy, check_floats, check_linear, check_shape, check_tensors, no_view
from .dispatch import below_autograd, check_backend, direct_outside_autocast, once, register, remember, select
from .producers import cast_again, kept_for, kept_weight


def _check_backward(dy, x, weight, down, up, p, needs) -> None:
    check_dy(dy, x, weight, p, needs)
    check_linear(dy.new_empty(0, weight.shape[1]) if x is None else x, weight, None, down, up)
    check_floats("weight", weight, dy=dy, p=p)
    if p is not None:
        check_shape("p", p, as_rows(dy, "dy").shape[0], down.shape[1])


def _forward(x, weight, bias, down, up, backend=None):
    # all that the checks and the choice of a backend read, spelled out because this runs at every call
    key = (
        *("lowrank_linear", backend, x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15),
        *(weight.shape, weight.stride(), weight.dtype, weight.device, weight.data_ptr() & 15, weight.requires_grad),
        *(down.shape, down.stride(), down.dtype, down.device, up.shape, up.stride(), up.dtype, up.device),
        bias if bias is None else (bias.shape, bias.stride(), bias.dtype, bias.device),
    )
    compute = decisions.get(key)
    if compute is None:
        check_linear(x, weight, bias, down, up)
        kernels = select("lowrank_linear", backend, as_rows(x), weight, bias, down, up)
        compute = remember(key, _bound_forward(kernels, x, weight, bias, down, up))
    return compute(x, weight, bias, down, up)


def _bound_forward(kernels: Kernels, x: Tensor, weight: Tensor, *rest: Tensor | None) -> Callable:
    """The backend's forward for calls like this one, with x [..., K]"""
    bind = getattr(kernels, "bind_lowrank_linear", None)
    if bind and (bound := bind(x, weight, *rest)):
        return bound
    if x.dim() == 2:
        return lambda *given: kernels.lowrank_linear(*given)

    def forward(x, weight, bias, down, up):
        y, p = kernels.lowrank_linear(as_rows(x), weight, bias, down, up)
        return y.view(*x.shape[:-1], weight.shape[0]), p

    return forward


def _backward(dy, x, weight, down, up, p, needs, backend=None, overwrite_x=False):
    key = (
        *("lowrank_linear_backward", backend, overwrite_x, *needs),
        *(dy.shape, dy.stride(), dy.dtype, dy.device, dy.data_ptr() & 15),
        *(weight.shape, weight.stride(), weight.dtype, weight.device, weight.data_ptr() & 15, weight.requires_grad),
        *(down.shape, down.stride(), down.dtype, down.device, up.shape, up.stride(), up.dtype, up.device),
        x if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15),
        p if p is None else (p.shape, p.stride(), p.dtype, p.device),
    )
    compute = decisions.get(key)
    if compute is None:
        _check_backward(dy, x, weight, down, up, p, needs)
        rows = as_rows(dy, "dy"), as_rows(x), weight, down, up, p
        kernels = select("lowrank_linear_backward", backend, *rows, needs=needs)
        compute = remember(key, _bound_backward(kernels, overwrite_x, needs, dy, x, weight, down, up, p))
    return compute(dy, x, weight, down, up, p, needs)


def _bound_backward(
    kernels: Kernels, overwrite_x: bool, needs: list[bool], dy: Tensor, *rest: Tensor | None
) -> Callable:
    """The backend's backward for calls like this one, with dy [..., N] and x [..., K]"""
    bind = getattr(kernels, "bind_lowrank_linear_backward", None)
    if bind and (bound := bind(dy, *rest, needs)):
        return bound
    over = overwriting(kernels, overwrite_x)

    def backward(dy, x, weight, down, up, p, needs):
        grads = kernels.lowrank_linear_backward(as_rows(dy, "dy"), as_rows(x), weight, down, up, p, needs, *over)
        if needs[0] and dy.dim() != 2:
            grads[0] = grads[0].view(*dy.shape[:-1], weight.shape[1])
        return grads

    return backward


def _forward_fake(x, weight, bias, down, up, backend=None):
    check_linear(x, weight, bias, down, up)
    rows = math.prod(x.shape[:-1])
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(rows, down.shape[1])


def _backward_fake(dy, x, weight, down, up, p, needs, backend=None):
    N, K = weight.shape
    shapes = (*dy.shape[:-1], K), (N, K), (N,), down.shape, up.shape
    return [dy.new_empty(shape) for shape, need in zip(shapes, needs) if need]


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, x, weight, bias, down, up, backend):
        y, p = run(x, weight, bias, down, up, backend)
        _, _, need_weight, _, need_down, need_up, _ = ctx.needs_input_grad
        # x and p are activations: held only for the gradients that read them, and x only where it cannot be rebuilt
        ctx.recipe, kept = kept_for(x) if need_weight or need_down else (None, (None,))
        ctx.save_for_backward(kept_weight(weight), down, up, p if need_up else None, *kept)
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
            return (None,) * 7
        weight, down, up, p, *kept = ctx.saved_tensors
        weight = cast_again(weight, down.dtype)
        x, own = (kept[0], False) if ctx.recipe is None else ctx.recipe.x(kept)
        needs = list(ctx.needs_input_grad[1:6])
        args = dy, x, weight, down, up, p, needs, ctx.backend
        grads = (
            _backward(*args, overwrite_x=own)
            if direct_outside_autocast(dy, x, weight, down, up, p)
            else below_autograd(_backward_op, *args)
        )
        found = iter(grads)
        return None, *[next(found) if need else None for need in needs], None


_call = register(
    "lowrank_linear(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up, str? backend=None) "
    "-> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _LowRankLinear,
)
_backward_op = register(
    "lowrank_linear_backward(Tensor dy, Tensor? x, Tensor weight, Tensor down, Tensor up, Tensor? p, bool[] needs, "
    "str? backend=None) -> Tensor[]",
    _backward,
    _backward_fake,
)


def lowrank_linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    down: Tensor,  # [K, R]
    up: Tensor,  # [R, N]
    *,
    backend: str | None = None,
) -> Tensor:  # [..., N]
    """y = x @ weight.T + bias + (x @ down) @ up, without forming down @ up.

    The forward of every adapter of the family (LoRA, FacT, EFFT): they differ only in how (down, up) are made.
    Differentiable once, in all five tensors; only the gradients that are asked for are computed.

    Args:
        x: [..., K]; float32, bfloat16, float16 or float64. Any number of dimensions, any strides, also empty batches.
        weight: [N, K], usually frozen. On a CPU, a frozen weight is also kept in the layout of the kernel.
        bias: [N] or None.
        down: [K, R], any strides (``v.T`` is fine).
        up: [R, N], any strides (a slice of a wider matrix is fine).
        backend: a name from :func:`backends`, or None for the fastest that is proven for these inputs.

    Returns:
        [..., N] in the dtype of x; under autocast all inputs are first cast to its dtype (float64 stays).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`group_update`.
    """
    for t in (x, weight, down, up, x if bias is None else bias):
        if not isinstance(t, Tensor):
            check_tensors(x=x, weight=weight, bias=x if bias is None else bias, down=down, up=up)
    if backend is not None:
        check_backend(backend)
    return _call(x, weight, bias, down, up, backend)
