"""Trained parameters of every method on every model, counted from plans and compared with the formulas of the papers.

    python benchmarks/paper/parameter_counts.py

Models are built on the meta device by timm: no weights, no memory. Exits with 1 if a count differs from its formula.
"""

import sys
from collections.abc import Callable

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


def _rank(stages, d: int, r: int) -> int:
    return r * d // max(width for width, _ in stages)


def per_stage(formula: Callable[[int, int, int], int], r: int) -> Callable[[list], int]:
    """The sum of formula(width, blocks, rank) over the stages of a model; in Swin the rank grows with the width."""
    return lambda stages: sum(formula(d, L, _rank(stages, d, r)) for d, L in stages)


def efft2(stages, r: int, shared: bool = False) -> int:
    total = 0
    for d, L in stages:
        cores, r2 = 1 if shared else L, _rank(stages, d, r)
        r1 = r2 // 2 if len(stages) > 1 else r2  # of the FFN group
        total += 2 * d * r2 + 4 * cores * r2 * r2 + d * r1 + 4 * d * r2 + 2 * cores * r1 * r2
    return total


efft1 = lambda d, L, r: 5 * d * r + 3 * L * r * r
fact_tt = lambda d, L, r: 2 * d * r + 12 * L * r * r
fact_tk = lambda d, L, r: 2 * d * r + 12 * L * r + r**3
lora = lambda d, L, r: 2 * L * 2 * d * r
vera = lambda d, L, r: 2 * L * (r + d)
lora_xs = lambda d, L, r: 6 * L * r**2

METHODS = {
    "EFFT1 r=16": (EFFTConfig("efft1", rank=16), per_stage(efft1, 16)),
    "EFFT1 r=32": (EFFTConfig("efft1", rank=32), per_stage(efft1, 32)),
    "EFFT2 r=16": (EFFTConfig("efft2", rank=16), lambda m: efft2(m, 16)),
    "EFFT2 r=32": (EFFTConfig("efft2", rank=32), lambda m: efft2(m, 32)),
    "EFFT2 r=16 shared": (EFFTConfig("efft2", rank=16, cores="shared"), lambda m: efft2(m, 16, shared=True)),
    "FacT-TT r=16": (FacTConfig("tt", rank=16), per_stage(fact_tt, 16)),
    "FacT-TK r=16": (FacTConfig("tk", rank=16), per_stage(fact_tk, 16)),
    "LoRA q, v r=8": (LoRAConfig(rank=8), per_stage(lora, 8)),
    "VeRA q, v r=64": (VeRAConfig(rank=64), per_stage(vera, 64)),
    "LoRA-XS r=16": (LoRAXSConfig(rank=16), per_stage(lora_xs, 16)),
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
