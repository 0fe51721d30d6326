"""The one tolerance of the tests: at most twice the error that plain torch makes in the same dtype."""

import torch
from torch import Tensor

from efft_kernels.kernels import reference


def assert_accurate(got: Tensor, plain: Tensor, exact: Tensor, what: str = "") -> None:
    """got: under test; plain: the torch path in the same dtype; exact: float64.

    The error of ``got`` against ``exact`` must be at most twice that of ``plain``, in the largest entry and in the
    Frobenius norm. One rounding of the result in its dtype is always granted: plain torch may be exact by luck.
    """
    assert got.shape == plain.shape == exact.shape, f"{what}: {got.shape}, {plain.shape}, {exact.shape}"
    assert got.dtype == plain.dtype, f"{what}: {got.dtype}, {plain.dtype}"
    if exact.numel() == 0:
        return
    assert torch.isfinite(got).all(), f"{what}: not finite"
    error, own = (got.double() - exact).abs(), (plain.double() - exact).abs()
    rounding = torch.finfo(got.dtype).eps * exact.abs()
    for norm in (torch.max, torch.linalg.vector_norm):
        assert norm(error) <= 2 * norm(own) + norm(rounding), f"{what}: {norm(error):.3g}, plain {norm(own):.3g}"


def check_lowrank_linear(backend, x, weight, bias, down, up, dy, needs=(True,) * 5) -> None:
    """Values and all gradients of a backend module (kernels/__init__.py) against float64, at most twice plain's error"""
    double = lambda *ts: [None if t is None else t.double() for t in ts]
    y, p = backend.lowrank_linear(x, weight, bias, down, up)
    plain_y, plain_p = reference.lowrank_linear(x, weight, bias, down, up)
    exact_y, exact_p = reference.lowrank_linear(*double(x, weight, bias, down, up))
    assert_accurate(y, plain_y, exact_y, "y")
    assert_accurate(p, plain_p, exact_p, "p")
    # the backward is judged on one and the same p
    grads = backend.lowrank_linear_backward(dy, x, weight, down, up, plain_p, list(needs))
    plain = reference.lowrank_linear_backward(dy, x, weight, down, up, plain_p, list(needs))
    exact = reference.lowrank_linear_backward(*double(dy, x, weight, down, up, plain_p), list(needs))
    names = [n for n, need in zip(("dx", "dweight", "dbias", "ddown", "dup"), needs) if need]
    assert len(grads) == len(names)
    for name, *triple in zip(names, grads, plain, exact):
        assert_accurate(*triple, name)


def check_group_update(backend, sigma, v, scale, dup, needs=(True, True)) -> None:
    """As :func:`check_lowrank_linear`, for the group update"""
    up = backend.group_update(sigma, v, scale)
    exact = reference.group_update(sigma.double(), v.double(), scale)
    assert_accurate(up, reference.group_update(sigma, v, scale), exact, "up")
    S, P, N = up.shape
    assert up.stride() == (N, S * N, 1), f"up must have memory [P, S, N], got strides {up.stride()}"
    grads = backend.group_update_backward(dup, sigma, v, scale, list(needs))
    plain = reference.group_update_backward(dup, sigma, v, scale, list(needs))
    exact = reference.group_update_backward(dup.double(), sigma.double(), v.double(), scale, list(needs))
    names = [n for n, need in zip(("dsigma", "dv"), needs) if need]
    assert len(grads) == len(names)
    for name, *triple in zip(names, grads, plain, exact):
        assert_accurate(*triple, name)
