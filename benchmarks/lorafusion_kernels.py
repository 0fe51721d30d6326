"""LoRAFusion's Triton kernels (arXiv 2510.00206, github.com/CentML/lorafusion), from a checkout, as variants of gpu.py.

Their launch settings are a table by GPU: each setting of the table is a variant of its own, and the fastest counts, so
that a GPU which the table does not know is not held against them. No dropout, the same rank and tensors as ours.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch

NAME = "lorafusion"  # how the names of the variants begin
DATA_CENTER = ("h100-80gb-hbm3", "a100-80gb-pcie", "a100-sxm4-80gb")  # the others are for less shared memory


def variants(checkout: Path, backward: bool) -> dict[str, Callable]:
    """{name: function of (x, weight, bias, down, up), or (dy, x, weight, down, up, p) of a backward with all gradients}

    Raises:
        ImportError: the checkout, or what its kernels import, is not there.
    """
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    from lorafusion.ops.triton_ops.config import HARDWARE_CONFIGS

    make = _backward if backward else _forward
    return {f"{NAME} {gpu}": make(settings) for gpu, settings in HARDWARE_CONFIGS.items() if gpu in DATA_CENTER}


def _forward(settings) -> Callable:
    from lorafusion.ops.triton_ops.fused_lora_xw_sb import fused_lora_xw_sb

    def forward(x, weight, bias, down, up):
        p = x @ down
        return fused_lora_xw_sb(x, weight, p, up.t(), 1.0, bias, config=settings.fused_lora_xw_sb), p

    return forward


def _backward(settings) -> Callable:
    from lorafusion.ops.triton_ops.fused_lora_dys_dyb import fused_lora_dys_dyb
    from lorafusion.ops.triton_ops.fused_lora_dyw_dsa import fused_lora_dyw_dsa

    def backward(dy, x, weight, down, up, p):
        dup, dp = fused_lora_dys_dyb(dy, up.t(), p, 1.0, config=settings.fused_lora_dys_dyb)
        ddown = dp.t() @ x
        mask = torch.empty(1, 1, dtype=torch.bool, device=dy.device).expand(dy.shape[0], weight.shape[1])  # not read
        dx = fused_lora_dyw_dsa(dy, weight, dp, down.t(), 0.0, mask, config=settings.fused_lora_dyw_dsa)
        return dx, ddown, dup

    return backward
