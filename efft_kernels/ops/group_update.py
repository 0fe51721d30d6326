"""group_update: up[s] = scale * sigma[s] @ v, the right factors of a tensor-train group."""

import torch
from torch import Tensor

from ..kernels import decisions
from .checks import check_floats, check_product, check_scale, check_shape, check_tensors, no_view
from .dispatch import below_autograd, check_backend, decide, direct_outside_autocast, once, register, signature


def _check(sigma, v, scale) -> None:
    check_floats("sigma", sigma, v=v)
    check_shape("sigma", sigma, "S", "P", "Q")
    check_shape("v", v, sigma.shape[2], "N")
    check_product("sigma", sigma, *sigma.shape)
    check_product("v", v, *v.shape)
    check_product("sigma and v", v, *sigma.shape[:2], v.shape[1])
    check_scale(scale, sigma.dtype)


def _check_backward(dup, sigma, v, scale, needs) -> None:
    _check(sigma, v, scale)
    check_floats("sigma", sigma, dup=dup)
    check_shape("dup", dup, *sigma.shape[:2], v.shape[1])
    if len(needs) != 2:
        raise ValueError(f"needs must be two bools, for (sigma, v), got {needs}")


def _forward(sigma, v, scale, backend=None):
    key = ("group_update", backend, scale, *signature(sigma, v))
    kernels = decisions.get(key)
    if kernels is None:
        _check(sigma, v, scale)
        kernels = decide(key, sigma, v)
    return kernels.group_update(sigma, v, scale)


def _backward(dup, sigma, v, scale, needs, backend=None):
    key = ("group_update_backward", backend, scale, *needs, *signature(dup, sigma, v))
    kernels = decisions.get(key)
    if kernels is None:
        _check_backward(dup, sigma, v, scale, needs)
        kernels = decide(key, dup, sigma, v)
    return kernels.group_update_backward(dup, sigma, v, scale, needs)


def _forward_fake(sigma, v, scale, backend=None):
    _check(sigma, v, scale)
    S, P, _ = sigma.shape
    return sigma.new_empty(P, S, v.shape[1]).transpose(0, 1)


def _backward_fake(dup, sigma, v, scale, needs, backend=None):
    return [t.new_empty(t.shape) for t, need in zip((sigma, v), needs) if need]


class _GroupUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, sigma, v, scale, backend):
        ctx.save_for_backward(sigma, v)
        ctx.scale, ctx.backend = scale, backend
        return no_view(run(sigma, v, scale, backend))

    @staticmethod
    @once
    def backward(ctx, dup):
        sigma, v = ctx.saved_tensors
        _, need_sigma, need_v, _, _ = ctx.needs_input_grad
        args = dup, sigma, v, ctx.scale, [need_sigma, need_v], ctx.backend
        grads = _backward(*args) if direct_outside_autocast(dup, sigma, v) else below_autograd(_backward_op, *args)
        return None, grads[0] if need_sigma else None, grads[-1] if need_v else None, None, None


_call = register(
    "group_update(Tensor sigma, Tensor v, float scale, str? backend=None) -> Tensor",
    _forward,
    _forward_fake,
    _GroupUpdate,
)
_backward_op = register(
    "group_update_backward(Tensor dup, Tensor sigma, Tensor v, float scale, bool[] needs, str? backend=None) "
    "-> Tensor[]",
    _backward,
    _backward_fake,
)


def group_update(
    sigma: Tensor,  # [S, P, Q]
    v: Tensor,  # [Q, N]
    scale: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:  # [S, P, N]
    """up[s] = scale * sigma[s] @ v, for every slice of a tensor-train group in one launch.

    The update of one matrix is dW_s = scale * U @ Sigma_s @ V (EFFT, arXiv 2311.06749, section 3.2); the result is its
    right factor, which :func:`lowrank_linear` calls ``up``. Differentiable in sigma and v.

    Args:
        sigma: the cores, [S, P, Q]; float32, bfloat16, float16 or float64, any strides.
        v: [Q, N], with the dtype and device of sigma.
        scale: a finite number, within the range of float32 for all dtypes but float64.
        backend: a name from :func:`backends`, or None for the fastest that is proven for these inputs.

    Returns:
        [S, P, N] in the dtype of sigma. Its memory is [P, S, N], so ``up.transpose(0, 1).flatten(1)``, the slices side
        by side as a fused qkv needs them, is a view.

    Raises:
        TypeError: an argument that is not a tensor, a dtype other than the four, or two different dtypes.
        ValueError: a shape that does not fit, different devices, a scale that is not finite, an unknown backend.
        RuntimeError: the named backend cannot run this; the message says why. Also under torch.func transforms and
            forward-mode differentiation.
    """
    check_tensors(sigma=sigma, v=v)
    scale = check_scale(scale)
    if backend is not None:
        check_backend(backend)
    return _call(sigma, v, scale, backend)
