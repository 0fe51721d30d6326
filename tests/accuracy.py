"""The one tolerance of the tests: at most twice the error that plain torch makes in the same dtype."""

import torch
from torch import Tensor

from efft_kernels.kernels import reference


def assert_accurate(got: Tensor, plain: Tensor, exact: Tensor, what: str = "", summed: Tensor | None = None) -> None:
    """got: under test; plain: the torch path in the same dtype; exact: float64; summed: the sums of absolute values.

    The error of ``got`` against ``exact`` must be at most twice that of ``plain``, in the largest entry and in the
    Frobenius norm. In the largest entry one rounding of the result in its dtype is granted: there plain torch may be
    exact by luck. For
    float64, where plain torch is the truth, it is 100 roundings. Of fewer than 64 entries luck decides
    too much: there it is 8 roundings of what was summed, enough to tell a wrong index from a rounding.
    """
    assert got.shape == plain.shape == exact.shape, f"{what}: {got.shape}, {plain.shape}, {exact.shape}"
    assert got.dtype == plain.dtype, f"{what}: {got.dtype}, {plain.dtype}"
    if exact.numel() == 0:
        return
    assert torch.isfinite(got).all(), f"{what}: not finite"
    error, own = (got.double() - exact).abs(), (plain.double() - exact).abs()
    few = exact.numel() < 64 and summed is not None
    rounding = torch.finfo(got.dtype).eps * (8 * summed if few else exact.abs())
    if got.dtype == torch.float64:
        rounding *= 100
    by_luck = few or got.dtype == torch.float64
    for norm, granted in ((torch.max, rounding), (torch.linalg.vector_norm, rounding if by_luck else 0 * rounding)):
        assert norm(error) <= 2 * norm(own) + norm(granted), f"{what}: {norm(error):.3g}, plain {norm(own):.3g}"


def _check(backend, name, arguments, results) -> list[Tensor]:
    """One function of a backend module against float64, at most twice plain's error; returns what plain computed"""
    convert = lambda how: [how(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    as_list = lambda out: [out] if isinstance(out, Tensor) else list(out)
    function = getattr(reference, name)
    got, plain = as_list(getattr(backend, name)(*arguments)), as_list(function(*arguments))
    exact, summed = as_list(function(*convert(Tensor.double))), as_list(function(*convert(lambda t: t.double().abs())))
    assert len(got) == len(results)
    for result, *four in zip(results, got, plain, exact, summed):
        assert_accurate(*four[:3], result, four[3].abs())
    return plain


def check_lowrank_linear(backend, x, weight, bias, down, up, dy, needs=(True,) * 5) -> None:
    """Values and all gradients of a backend module (kernels/__init__.py) against float64, at most twice plain's error"""
    _, p = _check(backend, "lowrank_linear", (x, weight, bias, down, up), ("y", "p"))
    # the backward is judged on one and the same p
    names = [n for n, need in zip(("dx", "dweight", "dbias", "ddown", "dup"), needs) if need]
    _check(backend, "lowrank_linear_backward", (dy, x, weight, down, up, p, list(needs)), names)


def check_mixed_linear(backend, x, weight, bias, down, up, ids, dy, needs=(True,) * 5) -> None:
    """As :func:`check_lowrank_linear`, for samples with adapters of their own"""
    _, p = _check(backend, "mixed_linear", (x, weight, bias, down, up, ids), ("y", "p"))
    names = [n for n, need in zip(("dx", "dweight", "dbias", "ddown", "dup"), needs) if need]
    _check(backend, "mixed_linear_backward", (dy, x, weight, down, up, p, ids, list(needs)), names)


def check_lowrank_add(backend, y, x, down, up, dy, needs=(True,) * 3) -> None:
    """As :func:`check_lowrank_linear`, for the product beside somebody else's"""
    before = y.clone()
    _, p = _check(backend, "lowrank_add", (y, x, down, up), ("y", "p"))
    assert torch.equal(y, before), "y is not to be written to"
    names = [n for n, need in zip(("dx", "ddown", "dup"), needs) if need]
    _check(backend, "lowrank_add_backward", (dy, x, down, up, p, list(needs)), names)


def check_group_update(backend, sigma, v, scale, dup, needs=(True, True)) -> None:
    """As :func:`check_lowrank_linear`, for the group update"""
    up = backend.group_update(sigma, v, scale)
    S, P, N = up.shape
    assert up.stride() == (N, S * N, 1), f"up must have memory [P, S, N], got strides {up.stride()}"
    _check(backend, "group_update", (sigma, v, scale), ("up",))
    names = [n for n, need in zip(("dsigma", "dv"), needs) if need]
    _check(backend, "group_update_backward", (dup, sigma, v, scale, list(needs)), names)
