"""Where the C++ kernels are chosen over plain torch, by rules of shape and dtype for each kind of processor.

From measurements with one thread against reference.py. Where the tuner has timed an op on a processor, that record
goes before the rules; it does not time few rows.
"""

import functools
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from . import largest_rank, processor

Needs: TypeAlias = list[bool] | None


@functools.cache
def of(isa: str) -> Callable[..., str | None] | str:
    """The rules for this processor and instruction set, or why there are none.

    Rules are asked with an operation, the gradients that its backward is to give, and its tensors, and answer None
    where the kernel is chosen, else why it is not.
    """
    if isa == "avx2":
        return _avx2
    if isa == "avx512_bf16" and processor.amd():
        return _amd_avx512
    if isa == "avx512" and processor.intel():
        return "plain torch has AMX, these kernels do not" if "amx_tile" in processor.words() else _intel_avx512
    return f"the {isa} kernels have not been measured on a processor like this one"


def _avx2(op: str, needs: Needs, *tensors: Tensor | None) -> str | None:
    """Measured on a Zen 3"""
    first = tensors[0]
    wide = first.dtype in (torch.float32, torch.float64)  # plain torch has no fast 16-bit matmul on AVX2
    if op == "merge_":
        return "one product per weight is as fast" if wide else None
    if op.startswith("group"):
        S, P, N = *tensors[-2].shape[:2], tensors[-1].shape[1]
        if S * P * N > 8192 and (first.dtype == torch.float32 or (wide and op == "group_update")):
            return f"one plain product is as fast for {S} slices of [{P}, {N}]"
        return None
    weight = tensors[2 if op.endswith("backward") else 1]
    M, (N, K) = first.shape[0], weight.shape
    if op.startswith("mixed") and M < 6 * len(tensors[-1]):
        return f"{M // max(1, len(tensors[-1]))} rows a sample are less than a tile"
    if M < (4 if wide else 2):
        return f"{M} rows are as fast row by row"
    if first.dtype == torch.float32 and (N * K < 65536 or (N * K < 131072 and M < 1024)):
        return f"a weight of [{N}, {K}] is too small to gain at {M} rows"
    if first.dtype == torch.float32 and op.endswith("_linear") and K > 1024 and M >= 512:
        return f"a sum over {K} passes through memory in blocks, which plain torch does as fast"
    if wide and weight.requires_grad:
        return "a weight that is trained would be packed at every call"
    if weight.requires_grad and M < 16:
        return f"a weight that is trained would be packed for {M} rows"
    return None


def _amd_avx512(op: str, needs: Needs, *tensors: Tensor | None) -> str | None:
    """Measured on a Zen 5, where plain torch is oneDNN with AVX-512 in float32 and bfloat16"""
    first = tensors[0]
    dtype, half = first.dtype, first.dtype in (torch.bfloat16, torch.float16)
    if op == "merge_":
        return None if half else "one product per weight is as fast"
    if op.startswith("group"):
        S, P, N = *tensors[-2].shape[:2], tensors[-1].shape[1]
        large = dtype == torch.bfloat16 and S * P * N > 262144
        return f"one plain product is as fast for {S} slices of [{P}, {N}]" if large else None
    backward = op.endswith("backward")
    weight = tensors[2 if backward else 1]
    M, (N, K) = first.shape[0], weight.shape
    if op.startswith("mixed"):
        rows = M // max(1, len(tensors[-1]))
        if rows < ((100 if half else 8) if backward else 2 if half else 4):
            return f"{rows} rows a sample are less than pays for the kernel"
    if weight.requires_grad and dtype != torch.float16:
        return "a weight that is trained would be packed at every call"
    if dtype == torch.float32:
        few = 1 if N * K >= 65536 else 8
    elif dtype == torch.float64:
        few = 4
    else:
        few = 2 if N * K <= 4096 else 1
    if M < few:
        return f"{M} rows of {K} to {N} are as fast in plain torch"
    if dtype == torch.bfloat16 and N * K <= 4096 and M >= 1024:
        return f"a weight of [{N}, {K}] is too small to gain at {M} rows"
    return None


def _intel_avx512(op: str, needs: Needs, *tensors: Tensor | None) -> str | None:
    """Measured on an Emerald Rapids without AMX, also with oneDNN held to what an Ice Lake has.

    These kernels convert 16-bit floats to float32, by which Intel's processors compute faster than by vdpbf16ps, plain
    torch's instruction for bfloat16; without it, or for float16 without AVX512-FP16, plain torch is slower still.
    For float32 and float64 plain torch calls MKL, which uses AVX-512 there.
    """
    first = tensors[0]
    if first.dtype in (torch.float32, torch.float64):
        return "MKL is as fast"
    if first.dtype == torch.float16 and "avx512_fp16" in processor.words():
        return "plain torch has AVX512-FP16"
    if op == "merge_":
        small = max(t.numel() for t in tensors[: len(tensors) // 3]) < 1 << 19
        small |= largest_rank(op, tensors) > 64
        return "one product per weight is as fast" if small else None
    if op.startswith("group"):
        S, P, N = *tensors[-2].shape[:2], tensors[-1].shape[1]
        large = op == "group_update" and S * P * N > 600_000
        return f"one plain product is as fast for {S} slices of [{P}, {N}]" if large else None
    backward = op.endswith("backward")
    weight = tensors[2 if backward else 1]
    M, (N, K) = first.shape[0], weight.shape
    rows = M // max(1, len(tensors[-1])) if op.startswith("mixed") else M
    if op.startswith("mixed") and rows < (4 if backward else 2):
        return f"{rows} rows a sample are less than pays for the kernel"
    if weight.requires_grad:
        return "a weight that is trained would be packed at every call"
    if M < (4 if first.dtype == torch.float16 else 2 if N * K <= 4096 else 1):
        return f"{M} rows of {K} to {N} are as fast in plain torch"
    if N * K <= 4096 and M >= 1024:
        return f"a weight of [{N}, {K}] is too small to gain at {M} rows"
    if backward and needs and not needs[0] and M < 128 and N * K > 1 << 19:
        return f"the factors' gradients alone, of {M} rows, are as fast in plain torch"
    return None


# the largest number of rows, times entries of the weight, that the kernel of few rows takes on AVX2 (a Zen 3)
_FEW_ROWS_AVX2 = {torch.float32: 1 << 25, torch.float64: 1 << 25, torch.bfloat16: 1 << 23, torch.float16: 1 << 20}

# (forward, backward) of float16 on an Emerald Rapids, each: rows of any weight that the kernel takes, and the largest
# number of rows times entries that it takes besides
_FEW_ROWS_INTEL_F16 = (2, 1 << 21), (1, 5 << 19)


def way_of_few_rows(isa: str, x: Tensor, weight: Tensor, backward: bool) -> str | None:
    """How efft_linear multiplies at most 16 rows: "kernel", "torch", or None for as it multiplies more rows"""
    if x.dtype not in _FEW_ROWS_AVX2:
        return None
    rows, entries = x.numel() // x.shape[-1], weight.numel()
    rules = of(isa)
    if rules is _avx2:
        return "kernel" if rows * entries < _FEW_ROWS_AVX2[x.dtype] else None
    if rules is _intel_avx512:
        always, most = _FEW_ROWS_INTEL_F16[backward] if x.dtype == torch.float16 else (rows, 0)
        return "kernel" if rows <= always or rows * entries <= most else "torch"
    # not measured: plain torch goes from left to right, which is less work than forming sigma v, but on AMD, where that
    # has a fast kernel
    return None if rules is _amd_avx512 else "torch"
