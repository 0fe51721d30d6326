"""Trained parameters of every method on every model, counted from plans and compared with the formulas of the papers.

    python benchmarks/paper/parameter_counts.py

Models are built on the meta device by timm: no weights, no memory. Exits with 1 if a count differs from its formula.
"""

import sys

import torch
from torch import nn

from efft_kernels import EFFTConfig, FacTConfig, LoRAConfig, LoRAXSConfig, VeRAConfig, plan
from efft_kernels.extras import timm

# name -> (width, blocks) of each stage
MODELS = {
    "vit_tiny_patch16_224": [(192, 12)],
    "vit_small_patch16_224": [(384, 12)],
    "vit_base_patch16_224": [(768, 12)],
    "vit_large_patch16_224": [(1024, 24)],
    "vit_huge_patch14_224": [(1280, 32)],
    "swin_tiny_patch4_window7_224": [(96, 2), (192, 2), (384, 6), (768, 2)],
    "swin_small_patch4_window7_224": [(96, 2), (192, 2), (384, 18), (768, 2)],
    "swin_base_patch4_window7_224": [(128, 2), (256, 2), (512, 18), (1024, 2)],
    "swin_large_patch4_window7_224": [(192, 2), (384, 2), (768, 18), (1536, 2)],
}


def _swin_rank(stages, d: int, r: int) -> int:
    return r * d // max(width for width, _ in stages)


def efft1(stages, r: int) -> int:
    ranks = [(d, L, _swin_rank(stages, d, r)) for d, L in stages]
    return sum(5 * d * q + 3 * L * q * q for d, L, q in ranks)


def efft2(stages, r: int, shared: bool = False) -> int:
    total = 0
    for d, L in stages:
        cores, r2 = 1 if shared else L, _swin_rank(stages, d, r)
        r1 = r2 // 2 if len(stages) > 1 else r2  # of the FFN group
        total += 2 * d * r2 + 4 * cores * r2 * r2 + d * r1 + 4 * d * r2 + 2 * cores * r1 * r2
    return total


def fact_tt(stages, r: int) -> int:
    ranks = [(d, L, _swin_rank(stages, d, r)) for d, L in stages]
    return sum(2 * d * q + 12 * L * q * q for d, L, q in ranks)


def fact_tk(stages, r: int) -> int:
    ranks = [(d, L, _swin_rank(stages, d, r)) for d, L in stages]
    return sum(2 * d * q + 12 * L * q + q**3 for d, L, q in ranks)


def lora(stages, r: int) -> int:
    return sum(2 * L * 2 * d * _swin_rank(stages, d, r) for d, L in stages)


def vera(stages, r: int) -> int:
    return sum(2 * L * (_swin_rank(stages, d, r) + d) for d, L in stages)


def lora_xs(stages, r: int) -> int:
    return sum(6 * L * _swin_rank(stages, d, r) ** 2 for d, L in stages)


METHODS = {
    "EFFT1 r=16": (EFFTConfig("efft1", rank=16), lambda m: efft1(m, 16)),
    "EFFT1 r=32": (EFFTConfig("efft1", rank=32), lambda m: efft1(m, 32)),
    "EFFT2 r=16": (EFFTConfig("efft2", rank=16), lambda m: efft2(m, 16)),
    "EFFT2 r=32": (EFFTConfig("efft2", rank=32), lambda m: efft2(m, 32)),
    "EFFT2 r=16 shared": (EFFTConfig("efft2", rank=16, cores="shared"), lambda m: efft2(m, 16, shared=True)),
    "FacT-TT r=16": (FacTConfig("tt", rank=16), lambda m: fact_tt(m, 16)),
    "FacT-TK r=16": (FacTConfig("tk", rank=16), lambda m: fact_tk(m, 16)),
    "LoRA q, v r=8": (LoRAConfig(rank=8), lambda m: lora(m, 8)),
    "VeRA q, v r=64": (VeRAConfig(rank=64), lambda m: vera(m, 64)),
    "LoRA-XS r=16": (LoRAXSConfig(rank=16), lambda m: lora_xs(m, 16)),
}


def count(model: nn.Module, stages) -> list[tuple[str, int, int]]:
    """(method, count, count by the formula) for each method."""
    return [(name, plan(model, config).parameters, formula(stages)) for name, (config, formula) in METHODS.items()]


def main() -> int:
    wrong = 0
    for model_name, stages in MODELS.items():
        with torch.device("meta"):
            model = timm().create_model(model_name)
        print(f"{model_name}: {sum(p.numel() for p in model.parameters()):,} frozen")
        for method, counted, formula in count(model, stages):
            wrong += counted != formula
            print(f"  {method:<20}{counted:>12,}" + f"   formula: {formula:,}" * (counted != formula))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
