"""efft_linear: a Linear with an EFFT update, as one group_update and one lowrank_linear."""

from torch import Tensor

from . import few_rows
from .checks import check_shape, check_tensors
from .group_update import group_update
from .lowrank_linear import lowrank_linear


def _check(x, weight, u, sigma, v) -> None:
    check_tensors(x=x, weight=weight, u=u, sigma=sigma, v=v)
    if sigma.dim() == 2:
        sigma = sigma.unsqueeze(0)
    # one expression for the good case: this runs at every call, the sentences below only before an error
    if sigma.dim() == u.dim() + 1 == v.dim() + 1 == weight.dim() + 1 == 3:
        (S, P, Q), (q, N), (K, p) = sigma.shape, v.shape, u.shape
        if p == P and q == Q and weight.shape == (S * N, K) and S * P * Q * N * K > 0:
            return
    check_shape("sigma", sigma, "S", "P", "Q")
    S, P, Q = sigma.shape
    check_shape("v", v, Q, "N")
    check_shape("weight", weight, S * v.shape[1], "K")
    check_shape("u", u, weight.shape[1], P)


def efft_linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [S * N, K]
    bias: Tensor | None,  # [S * N]
    u: Tensor,  # [K, P]
    sigma: Tensor,  # [P, Q] or [S, P, Q]
    v: Tensor,  # [Q, N]
    scale: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:  # [..., S * N]
    """y = x @ weight.T + bias + scale * x @ u @ sigma @ v, without forming the dense update.

    With sigma [S, P, Q] the S slices are side by side, as in a fused qkv: columns s*N to (s+1)*N get
    scale * x @ u @ sigma[s] @ v. This is x W + dW of EFFT (arXiv 2311.06749, section 3.2) with
    dW_s = scale * U @ Sigma_s @ V, computed as one :func:`group_update` and one :func:`lowrank_linear`. Up to
    16 rows on a CPU are multiplied from left to right where that costs less: ((x @ U) @ Sigma_s) @ V.

    Args:
        x, weight, bias: as in :func:`lowrank_linear`.
        u: [K, P], sigma: [P, Q] or [S, P, Q], v: [Q, N]; with the dtype and device of x.
        scale: a finite number, within the range of float32 for all dtypes but float64.
        backend: a name from :func:`backends`, or None for the fastest that is proven for these inputs.

    Returns:
        [..., S * N] in the dtype of x.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`group_update`.
    """
    try:
        y = few_rows.take(x, weight, bias, u, sigma, v, scale, backend)
    except (AttributeError, RuntimeError):  # it looks at no more than it must
        _check(x, weight, u, sigma, v)
        raise
    if y is not None:
        return y
    _check(x, weight, u, sigma, v)
    up = group_update(sigma if sigma.dim() == 3 else sigma.unsqueeze(0), v, scale, backend=backend)
    # [S, P, N] -> [P, S * N], a view
    up = up.squeeze(0) if up.shape[0] == 1 else up.transpose(0, 1).flatten(1)
    return lowrank_linear(x, weight, bias, u, up, backend=backend)
