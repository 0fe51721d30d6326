"""CUDA C++ kernels of csrc/cuda for bfloat16 and float16: one pass over x, or p and a sum over K that continues over R.

Built by setup.py where nvcc is found, else at first use, for compute capability 8.0 and 9.0. They are chosen
automatically on a GPU on which ``python -m efft_kernels.tune`` proved them and found them faster than plain torch
(tuning/), and run elsewhere when named.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import build, largest_rank
from .memory import checked
from .tuning import table

_PACKAGE = Path(__file__).resolve().parents[1]
MAX_RANK = 256
MAX_SIZE = 1 << 30  # of dimensions and strides, which the kernels count in 32 bits
# As in csrc/cuda/kernels.h.
LARGE_TILE, SMALL_TILE, MAX_RANK_BESIDE = 128, 64, 64
# Columns of a tile of y; p takes additional ones where it is computed inside the matmul.
HOPPER_TILES, HOPPER_TILES_BESIDE, HOPPER_RANK_BESIDE = (128, 192, 256), (96, 128, 192), 32
# FLOP per byte at which memory and tensor cores take equally long, by the major compute capability.
RIDGE = {8: 180, 9: 184}


ARCHITECTURES = {(8, 0): "80", (9, 0): "90a"}  # of csrc/cuda, by compute capability


@functools.cache
def _load():
    """(the library's operators, None), (None, None) where it is compiled at first use, or (None, why there are none)"""
    library = next(_PACKAGE.glob("_cuda*.so"), None)
    if library is None or not build.belongs(library, "cuda"):
        library, reason = _compiled()
        if library is None:
            return None, reason
    try:
        torch.ops.load_library(str(library))
    except Exception as error:
        return None, f"it could not be loaded: {error}"
    return torch.ops.efft_cuda, None


def _compiled() -> tuple[Path | None, str | None]:
    """(the library in the user's cache, None), (None, None) if it can be compiled, or (None, why it cannot)"""
    if build.csrc() is None:
        return None, "it is not built, and there is no csrc/ to compile it from"
    if not torch.cuda.is_available():
        return None, "it is not built for these sources, and torch sees no GPU to compile it for"
    if (capability := torch.cuda.get_device_capability()) not in ARCHITECTURES:
        return None, f"its kernels are for compute capability 8.0 and 9.0, not {capability[0]}.{capability[1]}"
    library = build.compiled("cuda", ARCHITECTURES[capability])
    if library.exists():
        return library, None
    if build.cuda_home() is None:
        return None, "it is not built, and there is no nvcc to compile it: pip install 'efft_kernels[cuda]' brings one"
    return None, None


@functools.cache
def load():
    """The operators, compiled for the current GPU if they are not yet, which takes minutes.

    Raises:
        RuntimeError: they are not built and cannot be compiled, or could not be loaded.
    """
    found, reason = _load()
    if reason:
        raise RuntimeError(reason)
    if found is None:
        arch = ARCHITECTURES[torch.cuda.get_device_capability()]
        about = f"the CUDA kernels for {torch.cuda.get_device_name()} (sm_{arch}; about two minutes on eight cores)"
        torch.ops.load_library(str(build.compile_library("cuda", about, build.cuda_home(), arch)))
        found = torch.ops.efft_cuda
    return found


@functools.cache
def sources() -> str:
    """The digest of the sources that the library was compiled from."""
    library, folder = next(_PACKAGE.glob("_cuda*.so"), None), build.csrc()
    return (library and build.carried(library)) or (build.digest(folder / "cuda") if folder else "none")


table.SOURCES["cuda"] = sources


def unavailable() -> str | None:
    reason = _load()[1]
    if not reason and not torch.cuda.is_available():
        reason = "it needs a CUDA GPU, and torch sees none"
    return reason


def unsupported(op: str, *tensors: Tensor | None) -> str | None:
    if op.startswith("mixed"):
        return "it has no kernels for mixed batches, triton has"
    given = [t for t in tensors if t is not None]
    for t in given:
        if t.dtype not in (torch.bfloat16, torch.float16) or t.layout != torch.strided:
            return f"it takes strided bfloat16 and float16 tensors, not {t.dtype} {t.layout}"
    if reason := _unsupported_device(given[0].device):
        return reason
    if (R := largest_rank(op, tensors)) > MAX_RANK:
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
    # 8.6, 8.9 and 12.x have 99 KiB of shared memory per block, earlier ones no cp.async; on 10.x Triton is faster.
    if capability not in ((8, 0), (9, 0)):
        return f"its kernels are for compute capability 8.0 and 9.0, not {capability[0]}.{capability[1]}"
    return None


def unproven(device: torch.device) -> str | None:
    return table.unproven("cuda", device)


def slower(op: str, *tensors: Tensor | None, needs: list[bool] | None = None) -> str | None:
    """None only where this op was measured at these sizes on this GPU and gained enough over plain torch."""
    reason = table.slower("cuda", op, tensors, needs)
    if reason is None and op in (table.LINEAR, table.BACKWARD):
        x, weight = tensors[0], tensors[2 if op == table.BACKWARD else 1]
        if not _as_tuned(x) or not _as_tuned(weight):
            return "it has not been measured with rows apart or not on 16 bytes"
        w = weight.t() if op == table.LINEAR else weight
        if not allows(
            x, w, _recorded(op, x.device, x.dtype, len(x), *weight.shape, largest_rank(op, tensors), _wanted(op, needs))
        ):
            return "the plan that was measured does not take these operands"
    return reason


def _as_tuned(matrix: Tensor) -> bool:
    """Whether it is read like the contiguous operands that were tuned: eight numbers at a time if they allow it."""
    return _describable(matrix) if matrix.shape[1] % 8 == 0 else matrix.is_contiguous()


class KernelPlan(NamedTuple):
    """How y [M, N] is computed: the last arguments of the library's operators."""

    single_pass: bool  # p is computed inside the matmul, instead of in a separate pass over x
    hopper: bool  # by the kernel for compute capability 9.0, instead of the one for all
    tile: int  # columns of a tile of y


def tile(M: int, N: int) -> int:
    """128 x 128 where that gives every multiprocessor a tile, otherwise 64 x 64."""
    return LARGE_TILE if _cdiv(M, LARGE_TILE) * _cdiv(N, LARGE_TILE) >= 128 else SMALL_TILE


def single_pass(M: int, N: int, R: int, ridge: int, dup: bool = False) -> bool:
    """Whether p is computed inside the matmul y [M, N] = x @ w, rather than in a separate pass over x.

    Inside, p costs ``block`` / BN of the matmul, repeated for every column of tiles. A separate pass reads x a second
    time, which costs ridge / N of the matmul, unless dup needs a pass over x (then dy) anyway: that pass yields p too.
    """
    if R > MAX_RANK_BESIDE:  # the accumulators of p and y would not fit into the registers together
        return False
    BN, block = tile(M, N), _cdiv(R, 16) * 16
    if N <= BN:  # one tile spans the columns: nothing is computed twice
        return True
    if dup:
        return False
    # Few tiles, which all run at once: the time is that of a launch plus one block's loop over K.
    return (_cdiv(M, BN) * _cdiv(N, BN) <= 264 and BN == SMALL_TILE) or block * N < ridge * BN


def hopper_tile(M: int, N: int, K: int, R: int, single_pass: bool) -> int:
    """Columns of a tile with which y [M, N], summed over K terms, takes the least time on 132 multiprocessors.

    Counted in columns of the tensor cores, with constants fitted to an H200: a step of 64 terms costs the columns of
    the tile, plus those of p if it is computed inside. Tiles of 192 and 256 columns go to pairs of adjacent blocks, and
    each pays for storing y after its sum. With 96 and 128 columns one tile is stored while the next is summed, so that
    only a short sum waits for the store of the previous tile.
    """
    steps = _cdiv(K, 64) + (not single_pass) * _cdiv(R, 64)

    def cost(BN: int) -> float:
        pair = 2 if BN >= 192 else 1
        rounds = _cdiv(_cdiv(M, 128) * _cdiv(_cdiv(N, BN), pair), 132 // pair)
        products = steps * (BN + single_pass * _cdiv(R, 16) * 16)
        return rounds * (products + 728 if pair == 2 else max(products + 360, (products + 1350) / 2))

    return min(reversed(HOPPER_TILES_BESIDE if single_pass else HOPPER_TILES), key=cost)


def hopper_plan(M: int, N: int, K: int, R: int, w_k_major: bool) -> KernelPlan:
    """p inside the matmul where the kernel can compute it there: on an H200 that was faster at every size measured."""
    single = w_k_major and R <= HOPPER_RANK_BESIDE
    return KernelPlan(single, True, hopper_tile(M, N, K, R, single))


def _formula(x: Tensor, w: Tensor, R: int, dup: bool) -> KernelPlan:
    M, N = len(x), w.shape[1]
    if _is_hopper(x.device) and tile(M, N) == LARGE_TILE and _hopper_takes(x, w):
        return hopper_plan(M, N, x.shape[1], R, w.stride(0) == 1)
    return KernelPlan(single_pass(M, N, R, _ridge(x.device), dup), False, tile(M, N))


def _hopper_takes(x: Tensor, w: Tensor) -> bool:
    """Whether the rows of x, y and w, or of w transposed, are aligned to 16 bytes."""
    rows = w.t() if w.stride(0) == 1 else w
    return w.shape[1] % 8 == 0 and _describable(x) and _describable(rows)


def _describable(matrix: Tensor) -> bool:
    """Whether TMA can address it: contiguous rows that do not overlap, all aligned to 16 bytes."""
    rows, columns = matrix.stride()
    return columns == 1 and rows >= matrix.shape[1] and rows % 8 == 0 and matrix.data_ptr() % 16 == 0


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def plans(arch: str, R: int) -> list[KernelPlan]:
    """All plans that a GPU of this class can run, as far as the operands allow."""
    found = [KernelPlan(False, False, tile) for tile in (SMALL_TILE, LARGE_TILE)]
    found += [KernelPlan(True, False, tile) for tile in (SMALL_TILE, LARGE_TILE) if R <= MAX_RANK_BESIDE]
    if arch == "sm_90":
        found += [KernelPlan(False, True, tile) for tile in HOPPER_TILES]
        found += [KernelPlan(True, True, tile) for tile in HOPPER_TILES_BESIDE if R <= HOPPER_RANK_BESIDE]
    return found


def allows(x: Tensor, w: Tensor, plan: KernelPlan) -> bool:
    """Whether the operands of y [M, N] = x [M, K] @ w are as this plan needs them."""
    return not plan.hopper or (_hopper_takes(x, w) and (w.stride(0) == 1 or not plan.single_pass))


@table.cached
def _recorded(
    op: str, device: torch.device, dtype: torch.dtype, M: int, N: int, K: int, R: int, needs: tuple | None
) -> KernelPlan | None:
    """The fastest plan on record for a weight [N, K]; ValueError for one that this GPU cannot run."""
    found = table.choice(device, table.key(op, dtype, K, N, R, needs), M)
    if found is None or "cuda" not in found.plans:
        return None
    plan, able = found.plans["cuda"], plans(arch(device), R)
    if plan not in [each._asdict() for each in able]:
        raise ValueError(
            f"{table.user_file()}: the plan of {op} for M {M}, K {K}, N {N} must be one of "
            f"{[each._asdict() for each in able]}, got {plan}; tune again, or delete the file"
        )
    return KernelPlan(**plan)


def _wanted(op: str, needs: list[bool] | None) -> tuple | None:
    return None if op == table.LINEAR else tuple(needs or table.ALL)


def arch(device: torch.device) -> str:
    """The architecture class; Hopper for the simulator on the CPU, which can run every plan."""
    return table.gpu(device.index)[1] if device.type == "cuda" else "sm_90"


def _plan(op: str, x: Tensor, weight: Tensor, R: int, needs: list[bool] | None = None) -> KernelPlan:
    """The plan measured for these sizes on this GPU if on record, otherwise by the formula.

    x is the op's first tensor, weight [N, K]; the matmul is x @ weight.T in the forward and dy @ weight in the
    backward.
    """
    w = weight.t() if needs is None else weight
    if forced := table.overridden("cuda"):
        plan = KernelPlan(**forced)
    else:
        plan = _recorded(op, x.device, x.dtype, len(x), *weight.shape, R, _wanted(op, needs))
    return plan if plan and allows(x, w, plan) else _formula(x, w, R, bool(needs and needs[4]))


@functools.cache
def _ridge(device: torch.device) -> int:
    return RIDGE[torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


@checked(addresses=True)
def group_update(sigma, v, scale):
    """up[s] = scale * sigma[s] @ v"""
    return load().group_update(sigma, v, scale).transpose(0, 1)


@checked(addresses=True)
def group_update_backward(dup, sigma, v, scale, needs):
    """dsigma[s] = scale * dup[s] @ v.T;  dv = sum_s scale * sigma[s].T @ dup[s]"""
    return load().group_update_backward(dup, sigma, v, scale, *needs)


@checked(addresses=True)
def lowrank_linear(x, weight, bias, down, up):
    """p = x @ down;  y = x @ weight.T + bias + p @ up"""
    return load().lowrank_linear(x, weight, bias, down, up, *_plan(table.LINEAR, x, weight, up.shape[0]))


def bind_lowrank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, plan: KernelPlan | None = None
) -> Callable | None:
    """The forward with the plan for calls like this one, of x [..., K]; None where x has no one step from row to row.

    On the host a call is then one call of the library's operator, which checks its operands' memory.

    plan: None for the one that is chosen for these sizes.
    """
    rows = _rows(x)
    if rows is None or (plan is None and table.overridden("cuda")) or not _plain(x, weight, bias, down, up):
        return None
    plan = plan or _plan(table.LINEAR, rows, weight, up.shape[0])
    operator = load().lowrank_linear.default
    return lambda x, weight, bias, down, up: operator(x, weight, bias, down, up, *plan)


def bind_lowrank_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    p: Tensor | None,
    needs: list[bool],
    plan: KernelPlan | None = None,
) -> Callable | None:
    """The same for the backward, of dy [..., N] and x [..., K], where weight and bias are frozen."""
    need_x, need_weight, need_bias, need_down, need_up = needs
    rows = _rows(dy)
    if need_weight or need_bias or not (need_x or need_down or need_up):
        return None
    if plan is None and table.overridden("cuda"):
        return None
    if rows is None or (need_down and _rows(x) is None) or not _plain(dy, x, weight, down, up, p):
        return None
    plan = plan or _plan(table.BACKWARD, rows, weight, up.shape[0], needs)
    operator = load().lowrank_linear_backward.default

    def backward(dy, x, weight, down, up, p, needs):
        return operator(
            dy, x if need_down else None, weight if need_x else None, down, up, p if need_up else None, *plan
        )

    return backward


def _plain(*tensors: Tensor | None) -> bool:
    """Whether none is a view of complex numbers, whose values may have to be negated when they are read."""
    # such a view steps over the other part of each number; the stride of a dimension of size 1 is arbitrary
    return all(t is None or not t.numel() or any(s == 1 < n for n, s in zip(t.shape, t.stride())) for t in tensors)


def _rows(t: Tensor) -> Tensor | None:
    """t as [rows, columns], or None where that takes a copy"""
    try:
        return t.view(-1, t.shape[-1])
    except RuntimeError:
        return None


@checked(addresses=True)
def lowrank_linear_backward(dy, x, weight, down, up, p, needs):
    """dp = dy @ up.T;  dx = dy @ weight + dp @ down.T;  ddown = x.T @ dp;  dup = p.T @ dy"""
    need_x, need_weight, need_bias, need_down, need_up = needs
    plan = _plan(table.BACKWARD, dy, weight, up.shape[0], needs)
    low = [x if need_down else None, weight if need_x else None, down, up, p if need_up else None]
    fused = iter(load().lowrank_linear_backward(dy, *low, *plan) if need_x or need_down or need_up else ())
    grads = [next(fused)] if need_x else []
    # these two have no low-rank part, and only a trained weight or bias needs them
    if need_weight:
        grads.append(torch.mm(dy.t(), x))
    if need_bias:
        grads.append(dy.sum(0))
    return grads + list(fused)


@checked()
def merge_(weights, downs, ups):
    """weight += (down @ up).T, in place; the sum is formed in float32 and rounded once"""
    if weights:
        load().merge_(weights, downs, ups)
