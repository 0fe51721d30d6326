"""docs/models.md: its rows are what plans of these models are."""

import sys
from pathlib import Path

import pytest

from efft_kernels import extras

extras.timm()  # transformers cannot be imported before, where torchvision was built for another torch
pytest.importorskip("transformers")
ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import models_table
from torch import nn

import efft_kernels as ek


def test_nothing_but_heads_is_left_out_in_silence():
    found = [*models_table.timm_models(("eva", "hiera", "volo")), *models_table.transformers_models(("cvt",))]
    for _, name, model in found:
        made = ek.plan(model, models_table.CONFIG)
        said = {slot.site.path for group in made.groups for slot in group.slots} | {each.path for each in made.left_out}
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.MultiheadAttention) and path not in said:
                inside = any(path.startswith(f"{each}.") for each in said)
                assert inside or path.startswith(("head", "aux_head", "classifier")), f"{name}: {path}"


@pytest.mark.slow
def test_the_whole_table():
    made, text = models_table.markdown(models_table.rows()), models_table.PAGE.read_text()
    assert made in text, "python benchmarks/models_table.py --write"
