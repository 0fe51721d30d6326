"""What every kernel is launched with: tile sizes from triton_configs.json, by sizes, dtype and GPU."""

import functools
import json
from pathlib import Path

import torch
import triton
from torch import Tensor

from ..tuning import table
from ..tuning.table import gpu

CONFIGS = Path(table.__file__).with_name("triton_configs.json")
DEFAULTS = json.loads(CONFIGS.read_text())


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def block(R: int) -> int:
    """The block that a rank is padded to: a power of two, at least 16, which the tensor cores need"""
    return max(16, triton.next_power_of_2(R))


def precision(tensor: Tensor) -> str:
    """How tl.dot multiplies float32: with TF32 where the user allows it to torch"""
    tf32 = tensor.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def describable(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can address it: contiguous rows that do not overlap, all aligned to 16 bytes"""
    rows, columns = matrix.stride()
    apart = rows >= matrix.shape[1] and rows * matrix.element_size() % 16 == 0
    return columns == 1 and apart and matrix.data_ptr() % 16 == 0


def architecture(tensor: Tensor) -> str:
    """The class of GPU that tile sizes are listed for; the interpreter's own for CPU tensors"""
    return gpu(tensor.device.index if tensor.is_cuda else None)[1]


def kind_of(tensor: Tensor) -> str:
    """The kind of dtype that tile sizes depend on: "half", "tf32" or "fp32\""""
    if tensor.dtype != torch.float32:
        return "half"
    return "tf32" if precision(tensor) == "tf32" else "fp32"


@functools.lru_cache(maxsize=4096)
def lookup(kernel: str, arch: str, kind: str, M: int, N: int, R: int) -> dict | None:
    """What to launch a kernel with: the first default row that matches, or None"""
    sizes = {"M": M, "N": N, "R": block(R), "tiles": cdiv(M, 128) * cdiv(N, 128)}
    for row in DEFAULTS["defaults"][arch][kernel]:
        where = row["where"]
        if kind in where["kind"] and all(
            where.get(f"min_{size}", value) <= value <= where.get(f"max_{size}", value) for size, value in sizes.items()
        ):
            return row["use"]
    return None


def ragged(*tensors: Tensor | None) -> bool:
    """Whether rows of one of them start at addresses that 16 elements do not divide, which are loaded one by one.

    Their addresses and masks need registers of their own. With tiles that fill the registers the compiler spills, and
    where wgmma reads what such loads bring, ptxas 12.8 was seen to make wrong code then (p of the single pass).
    """
    return any(t.data_ptr() % 16 or any(s % 16 and s != 1 for s in t.stride()) for t in tensors if t is not None)


def config(kernel: str, tensor: Tensor, M: int, N: int, K: int, R: int, ragged: bool = False) -> dict:
    """Tile sizes, num_warps and num_stages for a kernel at these sizes; LookupError if no row of CONFIGS matches"""
    arch = architecture(tensor)
    if ragged and kind_of(tensor) == "half" and arch != "interpreter":
        return dict(DEFAULTS["ragged"][kernel])
    found = lookup(kernel, arch, kind_of(tensor), M, N, R)
    if found is None:
        entry = f"{kernel} for {arch} {kind_of(tensor)} M{M} N{N} K{K} R{R}"
        raise LookupError(f"no configuration of {entry} in {CONFIGS}")
    return dict(found)
