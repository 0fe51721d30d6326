"""CUDA C++ kernels of csrc/cuda for bfloat16 and float16: one pass over x, or p and a sum over K that goes on over R.

Built by setup.py where nvcc is found; for GPUs with 163 KiB of shared memory for a block or more, compute capability
8.0, 9.0 and 10. Correct in a simulator of the instructions used (tests/test_cuda.py), compiled for all three
(tests/cuda/check.py). ``tuning/cuda_configs.json`` has what they were measured to do on GPUs, see tuning/tune.py: they are chosen
automatically where it shows them right and faster than plain torch, and run elsewhere when named.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .tuning.table import Table, gpu, key

TABLE = Table("cuda_configs.json")
_PACKAGE = Path(__file__).resolve().parents[1]
MAX_RANK = 256
MAX_SIZE = 1 << 30  # of dimensions and strides: the kernels count them in 32 bits
# of csrc/cuda/kernels.h
LARGE_TILE, SMALL_TILE, MAX_RANK_BESIDE = 128, 64, 64
# columns of a tile of y, of which p takes some where it is formed beside y
HOPPER_TILES, HOPPER_TILES_BESIDE, HOPPER_RANK_BESIDE = (128, 192, 256), (96, 128, 192), 32
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
    return f"{reason} (not yet run on a GPU)" if reason and not _has_run() else reason


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


def _has_run() -> bool:
    """whether a run of the tests is on record for any GPU"""
    return any(found.get("proven", {}).get("tests") for found in TABLE.read()[0]["gpus"].values())


def unproven() -> str | None:
    if not _has_run():
        return "not yet run on a GPU: its tests have passed in a simulator only, and nothing is measured"
    return TABLE.unproven(gpu(torch.cuda.current_device())[0], "cuda")


def slower(op: str, *tensors: Tensor | None) -> str | None:
    """None only where this op was measured at these sizes on this GPU, and was faster than plain torch"""
    record = None
    if op == "lowrank_linear":
        x, weight, _, _, up = tensors
        record = _record(op, x, weight.t(), len(up))
    elif op == "lowrank_linear_backward" and all(t is not None for t in tensors):  # all that was measured
        x, _, weight, _, up, _ = tensors
        record = _record(op, x, weight, len(up))
    if record is None:
        return "it has not been measured"
    if not _as_tuned(x) or not _as_tuned(weight):
        return "it has not been measured with rows apart or not on 16 bytes"
    if record.ms >= record.torch_ms:
        return f"measured here: {record.ms} ms, torch {record.torch_ms} ms"
    return None


def _as_tuned(matrix: Tensor) -> bool:
    """whether it is read as the contiguous ones are that tune.py makes: eight numbers at a time, if they can be"""
    return _describable(matrix) if matrix.shape[1] % 8 == 0 else matrix.is_contiguous()


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


def hopper_tile(M: int, N: int, R: int, single_pass: bool) -> int:
    """The columns of a tile with which y [M, N] takes the least time, by rounds of tiles on 132 multiprocessors.

    Tiles of 192 and 256 columns go to two blocks that share the rows of x, the others to one block each. Beside y, p
    costs as much as that many more columns of y. Storing y costs a tile about 32 columns.
    """

    def cost(BN: int) -> int:
        pair = 2 if BN >= 192 else 1
        rounds = _cdiv(_cdiv(M, 128) * _cdiv(_cdiv(N, BN), pair), 132 // pair)
        return rounds * (BN + 32 + single_pass * _cdiv(R, 16) * 16)

    return min(reversed(HOPPER_TILES_BESIDE if single_pass else HOPPER_TILES), key=cost)


def hopper_plan(M: int, N: int, R: int, w_k_major: bool) -> Plan:
    """p beside y where the kernel can form it there: it was faster at every size that was measured"""
    single = w_k_major and R <= HOPPER_RANK_BESIDE
    return Plan(single, True, hopper_tile(M, N, R, single))


def _formula(x: Tensor, w: Tensor, R: int, dup: bool) -> Plan:
    M, N = len(x), w.shape[1]
    if _is_hopper(x.device) and tile(M, N) == LARGE_TILE and _hopper_takes(x, w):
        return hopper_plan(M, N, R, w.stride(0) == 1)
    return Plan(single_pass(M, N, R, _ridge(x.device), dup), False, tile(M, N))


def _hopper_takes(x: Tensor, w: Tensor) -> bool:
    """whether x, w and y have rows, of w either way round, on 16 bytes"""
    rows = w.t() if w.stride(0) == 1 else w
    return w.shape[1] % 8 == 0 and _describable(x) and _describable(rows)


def _describable(matrix: Tensor) -> bool:
    """whether the copy engine can address it: rows contiguous and apart, everything on 16 bytes"""
    rows, columns = matrix.stride()
    return columns == 1 and rows >= matrix.shape[1] and rows % 8 == 0 and matrix.data_ptr() % 16 == 0


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


class Record(NamedTuple):
    """What is on record for y [M, N] = x [M, K] @ w and R ranks"""

    plan: Plan
    ms: float  # the whole op with this plan
    torch_ms: float  # plain torch, reference.py


def plans(arch: str, R: int) -> list[Plan]:
    """all that a GPU of this class can run, as far as the operands allow"""
    found = [Plan(False, False, tile) for tile in (SMALL_TILE, LARGE_TILE)]
    found += [Plan(True, False, tile) for tile in (SMALL_TILE, LARGE_TILE) if R <= MAX_RANK_BESIDE]
    if arch == "sm_90":
        found += [Plan(False, True, tile) for tile in HOPPER_TILES]
        found += [Plan(True, True, tile) for tile in HOPPER_TILES_BESIDE if R <= HOPPER_RANK_BESIDE]
    return found


def allows(x: Tensor, w: Tensor, plan: Plan) -> bool:
    """whether the operands of y [M, N] = x [M, K] @ w are as this plan needs them"""
    return not plan.hopper or _hopper_takes(x, w) and (w.stride(0) == 1 or not plan.single_pass)


@TABLE.remembered
def _on_record(op: str, name: str, arch: str, M: int, N: int, K: int, R: int) -> Record | None:
    """ValueError for a plan that this GPU cannot run: a table that was made by hand, or by another version"""
    entry = key(op, "half", M, N, K, R, exact=True)
    found = TABLE.tuned(name, entry)
    if found is None:
        return None
    able = plans(arch, R)
    if isinstance(found, dict) and all(isinstance(found.get(time), int | float) for time in ("ms", "torch_ms")):
        for plan in able:
            if found.get("use") == plan._asdict():
                return Record(plan, found["ms"], found["torch_ms"])
    raise ValueError(
        f"{TABLE.source(name, entry)}: {entry!r} of {name} must have ms, torch_ms and as use one of "
        f"{[plan._asdict() for plan in able]}, got {found}; tune again, or delete the entry"
    )


def _record(op: str, x: Tensor, w: Tensor, R: int) -> Record | None:
    found = _on_record(op, *_gpu(x.device), len(x), w.shape[1], x.shape[1], R)
    return found if found and allows(x, w, found.plan) else None


def _gpu(device: torch.device) -> tuple[str, str]:
    """(name, architecture class)"""
    return gpu(device.index) if device.type == "cuda" else ("simulator", "simulator")


def _plan(x: Tensor, w: Tensor, R: int, dup: bool = False) -> Plan:
    """for x [M, K] and y [M, N] = x @ w: as measured for these sizes on this GPU if on record, else by the formula"""
    # a product without dup is that of the forward, whatever the operands are
    record = _record("lowrank_linear_backward" if dup else "lowrank_linear", x, w, R)
    return record.plan if record else _formula(x, w, R, dup)


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
