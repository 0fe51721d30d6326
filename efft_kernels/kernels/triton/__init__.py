"""The contract in Triton, for NVIDIA GPUs from compute capability 8.0 on. Importing this file needs triton.

Every kernel gives each output element to one program and sums in an order that the shapes alone decide, without
atomics, so two runs are bit-equal. Tile sizes are data (``tuning/triton_configs.json``); nothing is tuned at a first
call. Under TRITON_INTERPRET=1 the same code runs on CPU tensors, for tests.
"""

import functools
import hashlib
import json
from pathlib import Path

import torch
import triton
from torch import Tensor

from .. import build, largest_rank
from ..tuning import table
from ..tuning.table import gpu
from .group_update import group_update, group_update_backward
from .launch import DEFAULTS, precision
from .lowrank_linear import WAYS, lowrank_linear, lowrank_linear_backward, planned_single_pass
from .merge import merge_, merge_kernel
from .mixed_linear import mixed_linear, mixed_linear_backward

__all__ = [
    *("group_update", "group_update_backward", "lowrank_linear", "lowrank_linear_backward"),
    *("mixed_linear", "mixed_linear_backward", "merge_"),
    *("unavailable", "unsupported", "unproven", "slower", "WAYS", "planned_single_pass"),
]

MAX_RANK = 256
# offsets inside a tile, of 512 rows or columns at most, are 32-bit; the offset of the tile itself is 64-bit
MAX_STRIDE = 1 << 21
# whether kernels run in triton's interpreter, which their decorators decided when this folder was imported
INTERPRETED = not isinstance(merge_kernel, triton.runtime.JITFunction)


@functools.cache
def sources() -> str:
    """The digest of the kernels' sources, and of the tiles that they are launched with."""
    tiles = hashlib.sha256(json.dumps(DEFAULTS, sort_keys=True).encode()).hexdigest()
    return build.python_digest(sorted(Path(__file__).parent.glob("*.py"))) + tiles[:8]


table.SOURCES["triton"] = sources


def unavailable() -> str | None:
    if INTERPRETED:
        return None
    if torch.version.cuda is None:
        return "triton needs a CUDA build of torch (or TRITON_INTERPRET=1, for tests on the CPU)"
    if not torch.cuda.is_available():
        return "triton needs a CUDA GPU, and torch sees none (TRITON_INTERPRET=1 runs its tests on the CPU)"
    return None


def unsupported(op: str, *tensors: Tensor | None) -> str | None:
    given = [tensor for tensor in tensors if tensor is not None]
    dtype, device = given[0].dtype, given[0].device
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"triton has float32, bfloat16 and float16 kernels, not {dtype}"
    if INTERPRETED:
        if dtype == torch.bfloat16:
            return "triton's interpreter multiplies bfloat16 wrongly"
    elif device.type != "cuda":
        return f"triton needs CUDA tensors, these are on {device}"
    elif gpu(device.index)[1] not in DEFAULTS["defaults"]:
        return f"triton kernels need compute capability 8.0, {gpu(device.index)[0]} is older"
    elif dtype == torch.float32 and op != "merge_" and precision(given[0]) != "tf32":
        # one sum after the other, where plain torch's order is more than twice as exact
        return "triton multiplies float32 on a GPU with TF32 alone, which torch is not allowed to use"
    R = largest_rank(op, tensors)
    if R > MAX_RANK:
        return f"triton kernels go to rank {MAX_RANK}, not {R}"
    stride = max(max(tensor.stride()[-2:]) for tensor in given)  # slices and adapters are counted in 64 bits
    if stride > MAX_STRIDE:
        return f"triton kernels address strides up to {MAX_STRIDE} elements, not {stride}"
    return None


def unproven(device: torch.device) -> str | None:
    if INTERPRETED:
        return "the interpreter is for tests"
    return table.unproven("triton", device)


def slower(op: str, *tensors: Tensor | None, needs: list[bool] | None = None) -> str | None:
    """None only where this op was measured at these sizes on this GPU and gained enough over plain torch."""
    return table.slower("triton", op, tensors, needs)
