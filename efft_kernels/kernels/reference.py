"""The contract in plain torch: the truth for tests, and the path taken where plain GEMMs win. Runs on any device.

Float64 inputs are computed in float64 throughout; other dtypes as torch's own matrix products do (float32 sums,
one rounding per product).
"""

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


def unavailable() -> str | None:
    return None


def unsupported(op: str, *tensors: Tensor | None) -> str | None:
    return None


def unproven() -> str | None:
    return None


def slower(op: str, *tensors: Tensor | None) -> str | None:
    return None


@functools.cache
def amd_processor() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()


@functools.cache
def _onednn_leads() -> bool:
    """Whether torch's other CPU library has the faster float32 product: MKL, the default, keeps AMD's AVX-512 idle"""
    return amd_processor() and torch.backends.mkldnn.is_available() and "AVX512" in torch.backends.cpu.get_cpu_capability()


def _product(
    a: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
) -> Tensor:  # [M, N]
    """a @ weight.T + bias"""
    # row by row oneDNN gains nothing, and costs more per call
    if a.is_cpu and a.dtype == torch.float32 and a.shape[0] >= 8 and _onednn_leads():
        return torch.ops.mkldnn._linear_pointwise(a, weight, bias, "none", [], "")
    return F.linear(a, weight, bias)


def group_update(
    sigma: Tensor,  # [S, P, Q]
    v: Tensor,  # [Q, N]
    scale: float,
) -> Tensor:  # [S, P, N], memory [P, S, N]
    """up[s] = scale * sigma[s] @ v"""
    S, P, Q = sigma.shape
    N = v.shape[1]
    # one product of the slices side by side gives the [P, S, N] memory without a copy afterwards
    up = torch.mm(sigma.transpose(0, 1).reshape(P * S, Q) * scale, v)
    return up.view(P, S, N).transpose(0, 1)


def group_update_backward(
    dup: Tensor,  # [S, P, N]
    sigma: Tensor,  # [S, P, Q]
    v: Tensor,  # [Q, N]
    scale: float,
    needs: list[bool],  # (sigma, v)
) -> list[Tensor]:
    """dsigma[s] = scale * dup[s] @ v.T;  dv = sum_s scale * sigma[s].T @ dup[s]"""
    S, P, Q = sigma.shape
    N = v.shape[1]
    grads = []
    dup = dup.transpose(0, 1).reshape(P * S, N)
    if needs[0]:
        grads.append((torch.mm(dup, v.t()) * scale).view(P, S, Q).transpose(0, 1).contiguous())
    if needs[1]:
        grads.append(torch.mm((sigma.transpose(0, 1).reshape(P * S, Q) * scale).t(), dup))
    return grads


def lowrank_linear(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    down: Tensor,  # [K, R]
    up: Tensor,  # [R, N]
) -> tuple[Tensor, Tensor]:  # y [M, N], p [M, R]
    """p = x @ down;  y = x @ weight.T + bias + p @ up"""
    p = torch.mm(x, down)
    return _product(x, weight, bias).addmm_(p, up), p


def lowrank_linear_backward(
    dy: Tensor,  # [M, N]
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    down: Tensor,  # [K, R]
    up: Tensor,  # [R, N]
    p: Tensor,  # [M, R]
    needs: list[bool],  # (x, weight, bias, down, up)
) -> list[Tensor]:
    """dp = dy @ up.T;  dx = dy @ weight + dp @ down.T;  ddown = x.T @ dp;  dup = p.T @ dy"""
    grads = []
    dp = torch.mm(dy, up.t()) if needs[0] or needs[3] else None
    if needs[0]:
        grads.append(_product(dy, weight.t(), None).addmm_(dp, down.t()))
    if needs[1]:
        grads.append(torch.mm(dy.t(), x))
    if needs[2]:
        grads.append(dy.sum(0))
    if needs[3]:
        grads.append(torch.mm(x.t(), dp))
    if needs[4]:
        grads.append(torch.mm(p.t(), dy))
    return grads


def merge_(
    weights: list[Tensor],  # each [N, K]
    downs: list[Tensor],  # each [K, R]
    ups: list[Tensor],  # each [R, N]
) -> None:
    """weight += (down @ up).T, in place; the sum is formed in float32 (float64 for float64) and rounded once"""
    for weight, down, up in zip(weights, downs, ups):
        if weight.dtype in (torch.float32, torch.float64):
            weight.addmm_(up.t(), down.t())
        else:
            weight.copy_(torch.addmm(weight.float(), up.t().float(), down.t().float()))
