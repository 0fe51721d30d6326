"""The kernel contract: the functions that every backend of this folder defines, as the protocol :class:`Kernels`.

Letters, used in Python, Triton, CUDA, tests and documentation alike (``csrc/cpu/kernels.h`` has its own, a, b, c, d, u
and q, with K and N of the product at hand: in a backward they change places, and u is ``down.T``):

    M  rows of x (all leading dimensions flattened)      K  input features      N  output features
    R  rank of the adapter                               S  slices of a group
    P, Q  the two ranks of a core: sigma is [S, P, Q]
    B  samples of a mixed batch, of M / B rows each      A  adapters of a mixed batch

A backward returns the list of the gradients that were asked for, in the order of ``needs``, and computes no others.
All floating-point tensors of one call have one dtype and one device. Any strides are accepted everywhere: fc2 passes
``down = v.T``, a fused qkv passes a slice of a wider ``up``. Sums run in float32 (float64 for float64), are split by
shape alone and reduced in a fixed order, without atomics, so two runs are bit-equal, on a CPU with any number of
threads. They are rounded once, to the dtype of the inputs. In ``reference`` all that is as torch's products have it.

Backends know nothing of methods, models or modules, and import torch only. Their arguments were checked (ops/).
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # what the operators and factors may be of

# call -> what computes it: the backend that ops/ chose for it, or a function bound to that backend. A backend empties
# it when something changes that `unsupported` or `slower` depend on besides their arguments, such as a table of
# measurements
decisions: dict[tuple, "Kernels | Callable"] = {}


def largest_rank(op: str, tensors: tuple) -> int:
    """The largest rank among the arguments of an op, given in the op's order."""
    if op == "group_update":  # sigma, v
        return max(tensors[0].shape[1:])
    if op == "group_update_backward":  # dup, sigma, v
        return max(tensors[1].shape[1:])
    if op == "merge_":  # all weights, all downs, all ups
        count = len(tensors) // 3
        return max(down.shape[1] for down in tensors[count : 2 * count])
    return tensors[3].shape[-1]


class Kernels(Protocol):
    """A backend: a module with these functions, whose parameters may be without annotations there."""

    def unavailable(self) -> str | None:
        """Why it cannot run in this process at all, or None."""

    def unsupported(self, op: str, *tensors: Tensor | None) -> str | None:
        """Why it cannot run this op on these tensors (the op's own, in its order), or None."""

    def unproven(self, device: torch.device) -> str | None:
        """What is missing on record before it may be chosen automatically on this device, or None."""

    def slower(self, op: str, *tensors: Tensor | None, needs: list[bool] | None = None) -> str | None:
        """Why plain torch is the better choice for these tensors, or None; ``needs`` are those of a backward."""

    def group_update(
        self,
        sigma: Tensor,  # [S, P, Q]
        v: Tensor,  # [Q, N]
        scale: float,
    ) -> Tensor:  # [S, P, N]
        """up[s] = scale * sigma[s] @ v

        The memory of the result is [P, S, N], so the slices side by side, ``up.transpose(0, 1).reshape(P, S * N)``,
        and any run of neighbouring slices are views.
        """

    def group_update_backward(
        self,
        dup: Tensor,  # [S, P, N]
        sigma: Tensor,  # [S, P, Q]
        v: Tensor,  # [Q, N]
        scale: float,
        needs: list[bool],  # (sigma, v)
    ) -> list[Tensor]:
        """dsigma[s] = scale * dup[s] @ v.T;  dv = sum_s scale * sigma[s].T @ dup[s]"""

    def lowrank_linear(
        self,
        x: Tensor,  # [M, K]
        weight: Tensor,  # [N, K]
        bias: Tensor | None,  # [N]
        down: Tensor,  # [K, R]
        up: Tensor,  # [R, N]
    ) -> tuple[Tensor, Tensor]:  # y [M, N], p [M, R]
        """p = x @ down;  y = x @ weight.T + bias + p @ up"""

    def lowrank_linear_backward(
        self,
        dy: Tensor,  # [M, N]
        x: Tensor | None,  # [M, K]; None where no gradient that is asked for reads it
        weight: Tensor,  # [N, K]
        down: Tensor,  # [K, R]
        up: Tensor,  # [R, N]
        p: Tensor | None,  # [M, R]; None where no gradient that is asked for reads it
        needs: list[bool],  # (x, weight, bias, down, up)
    ) -> list[Tensor]:
        """dp = dy @ up.T;  dx = dy @ weight + dp @ down.T;  ddown = x.T @ dp;  dup = p.T @ dy

        dweight = dy.T @ x and dbias = sum_m dy, without a low-rank part.
        """

    def mixed_linear(
        self,
        x: Tensor,  # [M, K]
        weight: Tensor,  # [N, K]
        bias: Tensor | None,  # [N]
        down: Tensor,  # [A, K, R]
        up: Tensor,  # [A, R, N]
        ids: Tensor,  # [B] of int64
    ) -> tuple[Tensor, Tensor]:  # y [M, N], p [M, R]
        """a = ids[m // (M / B)];  p[m] = x[m] @ down[a];  y[m] = x[m] @ weight.T + bias + p[m] @ up[a]

        An id below zero stands for no adapter: p[m] = 0 there. M is a multiple of B.
        """

    def mixed_linear_backward(
        self,
        dy: Tensor,  # [M, N]
        x: Tensor | None,  # [M, K]
        weight: Tensor,  # [N, K]
        down: Tensor,  # [A, K, R]
        up: Tensor,  # [A, R, N]
        p: Tensor | None,  # [M, R]
        ids: Tensor,  # [B] of int64
        needs: list[bool],  # (x, weight, bias, down, up)
    ) -> list[Tensor]:
        """dp = dy @ up[a].T;  dx = dy @ weight + dp @ down[a].T;  ddown[a] = sum x.T @ dp;  dup[a] = sum p.T @ dy

        The sums run over the rows of adapter a; an adapter without rows gets zeros. No value of one sample, not even a
        nan, reaches the results of another or the gradients of an adapter that is not its own.
        """

    def merge_(
        self,
        weights: list[Tensor],  # each [N, K]
        downs: list[Tensor],  # each [K, R]
        ups: list[Tensor],  # each [R, N]
    ) -> None:
        """weight += (down @ up).T, in place; the sum is formed in float32 (float64 for float64) and rounded once

        Three lists of equal length, of one dtype and device, but for float32 factors beside bfloat16 and float16
        weights; nothing but the weights is written.
        """


def overwriting(kernels: Kernels, overwrite_x: bool) -> list[bool]:
    """The last argument of a backward of these kernels, overwrite_x, where they take it: those with OVERWRITES_X do.

    It lets a backward write dx in the place of x, which was rebuilt for this call alone. A new tensor is made where x
    is not contiguous, where a trained weight reads it too, and where threads or oneDNN cannot compute in place.
    """
    return [True] if overwrite_x and getattr(kernels, "OVERWRITES_X", False) else []


class FewRows(Protocol):
    """What cpu and reference have besides, for efft_linear of a few rows: from left to right.

    Sizes are those of efft_linear; M rows give p [M, P] and q [M, S * Q], of float16 in float32, as what is between the
    products of a backward: its range may be too small for them where it is not for the results.
    """

    def for_few_rows(self, x: Tensor, weight: Tensor, backward: bool) -> str | None:
        """By what this pass is computed: "kernel", "torch" (the reference), or None, in both: as more rows are."""

    def few_rows(self, x, weight, bias, u, sigma, v, scale: float) -> list[Tensor]:  # y, p, q
        """p = x @ u;  q = p @ sigma;  y = x @ weight.T + bias + scale * q @ v"""

    def few_rows_backward(self, dy, x, weight, u, sigma, v, p, q, scale: float, needs: list[bool]) -> list[Tensor]:
        """dq = scale * dy @ v.T;  dp = dq @ sigma.T;  dx = dy @ weight + dp @ u.T;  du = x.T @ dp;
        dsigma = p.T @ dq;  dv = scale * q.T @ dy, of which needs (x, u, sigma, v) asks for some
        """
