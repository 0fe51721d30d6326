"""The tolerance of all tests: at most twice the error of plain torch in the same dtype.

Errors of the kernels are measured against the contract (kernels/__init__.py) in float64. Those of float64 are measured
in numpy's longdouble, which has a mantissa of 64 bits on x86-64, more on some others, and is slow.
"""

import numpy as np
import torch
from torch import Tensor

from efft_kernels.kernels import reference

Wide = np.ndarray  # of float64 or longdouble
_WIDER = np.finfo(np.longdouble).eps < 0.01 * np.finfo(np.float64).eps


def wide(t: Tensor) -> Wide:
    """The numbers of a tensor in a dtype whose roundings are less than a millionth of those of the tensor's, if any."""
    exact = t.detach().cpu().double().numpy()
    return exact.astype(np.longdouble) if t.dtype == torch.float64 else exact


def assert_accurate(
    got: Tensor, plain: Tensor, exact: Tensor | Wide, what: str = "", summed: Tensor | Wide | None = None
) -> None:
    """Assert that the error of ``got`` is at most twice that of ``plain``, in the maximum and in the Frobenius norm.

    The maximum is granted one more rounding of the result in its dtype, because plain torch may be exact there by
    chance. With fewer than 64 entries chance weighs more: both norms are granted 8 roundings of what was summed, which
    still tells a wrong index from a rounding. Float64 is granted 100 roundings if ``exact`` is not more exact.

    Args:
        got: the result under test.
        plain: the result of plain torch in the same dtype.
        exact: the result in float64 or longdouble.
        what: a name for messages.
        summed: as ``exact``, of the absolute values of all inputs.
    """
    assert got.shape == plain.shape == exact.shape, f"{what}: {got.shape}, {plain.shape}, {exact.shape}"
    assert got.dtype == plain.dtype, f"{what}: {got.dtype}, {plain.dtype}"
    if got.numel() == 0:
        return
    assert torch.isfinite(got).all(), f"{what}: not finite"
    judged = got.dtype != torch.float64 or (_WIDER and not isinstance(exact, Tensor))
    exact, summed = (wide(t) if isinstance(t, Tensor) else t for t in (exact, summed))
    error, own = abs(wide(got) - exact), abs(wide(plain) - exact)
    few = got.numel() < 64 and summed is not None
    rounding = torch.finfo(got.dtype).eps * (8 * summed if few else abs(exact))
    if not judged:
        rounding = 100 * rounding
    for norm, granted in ((np.max, rounding), (lambda a: np.sqrt((a * a).sum()), rounding * (few or not judged))):
        assert norm(error) <= 2 * norm(own) + norm(granted), f"{what}: {norm(error):.3g}, plain {norm(own):.3g}"


class _Exact:
    """The contract on arrays. Each function returns the list of all its results, needed or not."""

    @staticmethod
    def group_update(sigma, v, scale):
        return [scale * (sigma @ v)]

    @staticmethod
    def group_update_backward(dup, sigma, v, scale):
        return [scale * (dup @ v.T), scale * (sigma.swapaxes(1, 2) @ dup).sum(0)]

    @staticmethod
    def efft_linear(x, weight, bias, u, sigma, v, scale, dy):
        """y and the gradients of x, u, sigma, v"""
        p, slices = x @ u, dy.reshape(len(dy), len(sigma), v.shape[1]).swapaxes(0, 1)
        y = x @ weight.T + (0 if bias is None else bias) + scale * np.concatenate(p @ sigma @ v, 1)
        dq = scale * slices @ v.T
        dp = (dq @ sigma.swapaxes(1, 2)).sum(0)
        dv = scale * ((p @ sigma).swapaxes(1, 2) @ slices).sum(0)
        return [y, dy @ weight + dp @ u.T, x.T @ dp, p.T @ dq, dv]

    @staticmethod
    def lowrank_linear(x, weight, bias, down, up):
        p = x @ down
        return [x @ weight.T + p @ up + (0 if bias is None else bias), p]

    @staticmethod
    def lowrank_linear_backward(dy, x, weight, down, up, p):
        dp = dy @ up.T
        return [dy @ weight + dp @ down.T, dy.T @ x, dy.sum(0), x.T @ dp, p.T @ dy]

    @staticmethod
    def mixed_linear(x, weight, bias, down, up, ids):
        y, p = x @ weight.T + (0 if bias is None else bias), np.zeros((len(x), down.shape[2]), x.dtype)
        for rows, a in _samples(x, ids):
            p[rows] = x[rows] @ down[a]
            y[rows] += p[rows] @ up[a]
        return [y, p]

    @staticmethod
    def mixed_linear_backward(dy, x, weight, down, up, p, ids):
        dx, ddown, dup = dy @ weight, np.zeros_like(down), np.zeros_like(up)
        for rows, a in _samples(dy, ids):
            dp = dy[rows] @ up[a].T
            dx[rows] += dp @ down[a].T
            ddown[a] += x[rows].T @ dp
            dup[a] += p[rows].T @ dy[rows]
        return [dx, dy.T @ x, dy.sum(0), ddown, dup]


def _samples(rows, ids):
    each = len(rows) // max(1, len(ids))
    return [(slice(i * each, (i + 1) * each), a) for i, a in enumerate(ids) if a >= 0]


def exactly(name: str, arguments, change=lambda t: t) -> list[np.ndarray]:
    """The needed results of one function of the contract, with ``change`` applied to its floating-point tensors."""
    needs = arguments[-1] if name.endswith("backward") else None
    given = arguments if needs is None else arguments[:-1]
    found = [
        (wide(change(a)) if a.is_floating_point() else a.cpu().numpy()) if isinstance(a, Tensor) else a for a in given
    ]
    results = getattr(_Exact, name)(*found)
    return results if needs is None else [result for result, need in zip(results, needs) if need]


def _check(backend, name, arguments, results) -> list[Tensor]:
    """Check one function of a backend module against the contract; returns the results of plain torch."""
    as_list = lambda out: [out] if isinstance(out, Tensor) else list(out)
    got, plain = (as_list(getattr(module, name)(*arguments)) for module in (backend, reference))
    exact, summed = exactly(name, arguments), map(abs, exactly(name, arguments, Tensor.abs))  # scale may be negative
    for result, *four in zip(results, got, plain, exact, summed, strict=True):
        if four[0].numel():  # an error of plain torch would loosen the tolerance
            assert np.max(abs(wide(four[1]) - four[2])) <= 64 * torch.finfo(four[1].dtype).eps * np.max(four[3]), result
        assert_accurate(*four[:3], result, four[3])
    return plain


def check_lowrank_linear(backend, x, weight, bias, down, up, dy, needs=(True,) * 5) -> None:
    """Check values and the needed gradients of a backend module against the contract."""
    _, p = _check(backend, "lowrank_linear", (x, weight, bias, down, up), ("y", "p"))
    # the backward gets the same p for every backend
    names = [n for n, need in zip(("dx", "dweight", "dbias", "ddown", "dup"), needs) if need]
    _check(backend, "lowrank_linear_backward", (dy, x, weight, down, up, p, list(needs)), names)


def check_mixed_linear(backend, x, weight, bias, down, up, ids, dy, needs=(True,) * 5) -> None:
    """As :func:`check_lowrank_linear`, for a batch with an adapter per sample."""
    _, p = _check(backend, "mixed_linear", (x, weight, bias, down, up, ids), ("y", "p"))
    names = [n for n, need in zip(("dx", "dweight", "dbias", "ddown", "dup"), needs) if need]
    _check(backend, "mixed_linear_backward", (dy, x, weight, down, up, p, ids, list(needs)), names)


def check_group_update(backend, sigma, v, scale, dup, needs=(True, True)) -> None:
    """As :func:`check_lowrank_linear`, for the group update."""
    up = backend.group_update(sigma, v, scale)
    S, P, N = up.shape
    assert up.stride() == (N, S * N, 1), f"up must have memory [P, S, N], got strides {up.stride()}"
    _check(backend, "group_update", (sigma, v, scale), ("up",))
    names = [n for n, need in zip(("dsigma", "dv"), needs) if need]
    _check(backend, "group_update_backward", (dup, sigma, v, scale, list(needs)), names)
