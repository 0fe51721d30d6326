"""CUDA C++ kernels of csrc/cuda for bfloat16 and float16: one pass over x, or p and a sum over K that goes on over R.

Built by setup.py where nvcc is found; for GPUs with 163 KiB of shared memory for a block or more, compute capability
8.0, 9.0 and 10. Not yet run on a GPU: correct in a simulator of the instructions used (tests/test_cuda.py), compiled
for all three (tests/cuda/check.py), they only run when named.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_PACKAGE = Path(__file__).resolve().parents[1]
MAX_RANK = 256
MAX_SIZE = 1 << 30  # of dimensions and strides: the kernels count them in 32 bits
# of csrc/cuda/kernels.h
LARGE_TILE, SMALL_TILE, MAX_RANK_BESIDE = 128, 64, 64
HOPPER_TILES, HOPPER_RANK_BESIDE = (128, 192, 256), 32
# FLOP per byte at which memory and tensor cores take equally long, by the major compute capability
RIDGE = {8: 180, 9: 184, 10: 230}


@functools.cache
def _load():
    """(the library's operators, None), or (None, why there are none)"""
    library = next(_PACKAGE.glob("_cuda*.so"), None)
    if library is None:
        return None, "it is not built: nvcc and a CUDA build of torch are needed when efft_kernels is installed"
    newest = max((f.stat().st_mtime for f in (_PACKAGE.parent / "csrc" / "cuda").glob("*")), default=0)
    if newest > library.stat().st_mtime:
        return None, "csrc/cuda has changed since it was built: python setup.py build_ext --inplace"
    try:
        torch.ops.load_library(str(library))
    except Exception as error:
        return None, f"it could not be loaded: {error}"
    return torch.ops.efft_cuda, None


def _ops():
    return _load()[0]


# -- what can run, what should ----------------------------------------------------------------------------------------


def unavailable() -> str | None:
    reason = _load()[1]
    if not reason and not torch.cuda.is_available():
        reason = "it needs a CUDA GPU, and torch sees none"
    return f"{reason} (not yet run on a GPU)" if reason else None


def unsupported(op: str, *tensors: Tensor | None) -> str | None:
    if op.startswith("mixed"):
        return "it has no kernels for mixed batches, triton has"
    given = [t for t in tensors if t is not None]
    for t in given:
        if t.dtype not in (torch.bfloat16, torch.float16) or t.layout != torch.strided:
            return f"it takes strided bfloat16 and float16 tensors, not {t.dtype} {t.layout}"
    if reason := _unsupported_device(given[0].device):
        return reason
    if (R := _rank(op, tensors)) > MAX_RANK:
        return f"it goes to rank {MAX_RANK}, not {R}"
    for t in given:
        if max(*t.shape, *t.stride()) > MAX_SIZE:
            return f"it counts sizes and strides to {MAX_SIZE}, not {max(*t.shape, *t.stride())}"
    return None


@functools.cache
def _unsupported_device(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs CUDA tensors, these are on {device}"
    capability = torch.cuda.get_device_capability(device)
    # 8.6, 8.9 and 12.x have 99 KiB of shared memory for a block, earlier ones no cp.async
    if capability not in ((8, 0), (9, 0), (10, 0), (10, 3)):
        return f"its kernels are for compute capability 8.0, 9.0 and 10, not {capability[0]}.{capability[1]}"
    return None


def _rank(op: str, tensors: tuple) -> int:
    """the largest rank among the arguments of an op"""
    if op == "group_update":  # sigma, v
        return max(tensors[0].shape[1:])
    if op == "group_update_backward":  # dup, sigma, v
        return max(tensors[1].shape[1:])
    if op == "merge_":  # all weights, all downs, all ups
        count = len(tensors) // 3
        return max(down.shape[1] for down in tensors[count : 2 * count])
    return tensors[2 if op.startswith("lowrank_add") else 3].shape[-1]


def unproven() -> str | None:
    return "not yet run on a GPU: its tests have passed in a simulator only, and nothing is measured"


def slower(op: str, *tensors: Tensor | None) -> str | None:
    return "it has not been measured"


# -- which kernel -----------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How y [M, N] is computed: the last arguments of the library's operators"""

    single_pass: bool  # p is formed beside y, instead of by a pass of its own over x
    hopper: bool  # by the kernel for compute capability 9.0, instead of the one for all
    tile: int  # columns of a tile of y


def tile(M: int, N: int) -> int:
    """128 x 128 where these are enough for every multiprocessor, else 64 x 64"""
    return LARGE_TILE if _cdiv(M, LARGE_TILE) * _cdiv(N, LARGE_TILE) >= 128 else SMALL_TILE


def single_pass(M: int, N: int, R: int, ridge: int, dup: bool = False) -> bool:
    """Whether p is formed inside the product y [M, N] = x @ w, instead of by a pass of its own over x.

    Inside, p costs ``block`` / BN of the product again, once per column of tiles. A pass of its own re-reads x, which
    costs ridge / N of the product, unless dup needs a pass over x (which is then dy) anyway: p comes out of that one.
    """
    if R > MAX_RANK_BESIDE:  # the accumulator of p would not fit the registers beside that of y
        return False
    BN, block = tile(M, N), _cdiv(R, 16) * 16
    if N <= BN:  # one tile spans the columns: nothing is formed twice
        return True
    if dup:
        return False
    # few tiles, which all run at once: the time is that of launching, and of one block walking along K
    return _cdiv(M, BN) * _cdiv(N, BN) <= 264 and BN == SMALL_TILE or block * N < ridge * BN


def hopper_tile(M: int, N: int, single_pass: bool) -> int:
    """The columns of a tile with which y [M, N] takes the least time, by rounds of tiles on 132 multiprocessors.

    128 columns are for a block alone, the others for two blocks side by side. Beside y, p costs what 32 columns would,
    shared by these two: the tensor cores' least product takes as long.
    """

    def cost(BN: int) -> int:
        pair = 1 if BN == 128 else 2
        rounds = _cdiv(_cdiv(M, 128) * _cdiv(_cdiv(N, BN), pair), 132 // pair)
        return rounds * (BN + single_pass * 32 // pair)

    return min(reversed(HOPPER_TILES), key=cost)


def hopper_plan(M: int, N: int, R: int, w_k_major: bool, ridge: int) -> Plan:
    """A pass of its own over x costs ridge / N of the product and a launch, taken as much again"""
    single = w_k_major and R <= HOPPER_RANK_BESIDE
    BN = hopper_tile(M, N, single)
    single = single and (BN == 128 >= N or (32 if BN == 128 else 16) * N < 2 * ridge * BN)
    return Plan(single, True, hopper_tile(M, N, single))


def _plan(x: Tensor, w: Tensor, R: int, dup: bool = False) -> Plan:
    """for x [M, K] and y [M, N] = x @ w"""
    M, N = len(x), w.shape[1]
    rows = w.t() if w.stride(0) == 1 else w
    if _is_hopper(x.device) and tile(M, N) == LARGE_TILE and N % 8 == 0 and _describable(x) and _describable(rows):
        return hopper_plan(M, N, R, rows is not w, RIDGE[9])
    return Plan(single_pass(M, N, R, _ridge(x.device), dup), False, tile(M, N))


def _describable(matrix: Tensor) -> bool:
    """whether the copy engine can address it: rows contiguous and apart, everything on 16 bytes"""
    rows, columns = matrix.stride()
    return columns == 1 and rows >= matrix.shape[1] and rows % 8 == 0 and matrix.data_ptr() % 16 == 0


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def _ridge(device: torch.device) -> int:
    return RIDGE[torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


# -- the contract -----------------------------------------------------------------------------------------------------


def group_update(
    sigma: Tensor,  # [S, P, Q]
    v: Tensor,  # [Q, N]
    scale: float,
) -> Tensor:  # [S, P, N], memory [P, S, N]
    """up[s] = scale * sigma[s] @ v"""
    return _ops().group_update(sigma, v, scale).transpose(0, 1)


def group_update_backward(
    dup: Tensor,  # [S, P, N]
    sigma: Tensor,  # [S, P, Q]
    v: Tensor,  # [Q, N]
    scale: float,
    needs: list[bool],  # (sigma, v)
) -> list[Tensor]:
    """dsigma[s] = scale * dup[s] @ v.T;  dv = sum_s scale * sigma[s].T @ dup[s]"""
    return _ops().group_update_backward(dup, sigma, v, scale, *needs)


def lowrank_linear(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    down: Tensor,  # [K, R]
    up: Tensor,  # [R, N]
) -> tuple[Tensor, Tensor]:  # y [M, N], p [M, R]
    """p = x @ down;  y = x @ weight.T + bias + p @ up"""
    return _ops().lowrank_linear(x, weight, bias, down, up, *_plan(x, weight.t(), up.shape[0]))


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
    need_x, need_weight, need_bias, need_down, need_up = needs
    plan = _plan(dy, weight, up.shape[0], need_up)
    low = [x if need_down else None, weight if need_x else None, down, up, p if need_up else None]
    fused = iter(_ops().lowrank_linear_backward(dy, *low, *plan) if need_x or need_down or need_up else ())
    grads = [next(fused)] if need_x else []
    # nothing low-rank about these two, and only a trained weight or bias asks for them
    if need_weight:
        grads.append(torch.mm(dy.t(), x))
    if need_bias:
        grads.append(dy.sum(0))
    return grads + list(fused)


def lowrank_add(
    y: Tensor,  # [M, N]
    x: Tensor,  # [M, K]
    down: Tensor,  # [K, R]
    up: Tensor,  # [R, N]
) -> tuple[Tensor, Tensor]:  # y + p @ up [M, N], p [M, R]
    """p = x @ down;  y + p @ up: one pass over x, then the merge of p and up into a copy of y"""
    p = _ops().lowrank_p(x, down)
    z = y.clone(memory_format=torch.contiguous_format)
    if len(z):
        merge_([z], [up.t()], [p.t()])
    return z, p


def lowrank_add_backward(
    dy: Tensor,  # [M, N]
    x: Tensor,  # [M, K]
    down: Tensor,  # [K, R]
    up: Tensor,  # [R, N]
    p: Tensor,  # [M, R]
    needs: list[bool],  # (x, down, up)
) -> list[Tensor]:
    """dp = dy @ up.T;  dx = dp @ down.T;  ddown = x.T @ dp;  dup = p.T @ dy, the last two in one pass over dy"""
    need_x, need_down, need_up = needs
    # a product of R terms per entry has nothing to fuse
    grads = [torch.mm(_ops().lowrank_p(dy, up.t()), down.t())] if need_x else []
    if need_down or need_up:
        low = x if need_down else None, None, down, up, p if need_up else None
        grads += _ops().lowrank_linear_backward(dy, *low, *Plan(False, False, SMALL_TILE))
    return grads


def merge_(
    weights: list[Tensor],  # each [N, K]
    downs: list[Tensor],  # each [K, R]
    ups: list[Tensor],  # each [R, N]
) -> None:
    """weight += (down @ up).T, in place; the sum is formed in float32 and rounded once"""
    if weights:
        _ops().merge_(weights, downs, ups)
