"""Configs: their checks, their JSON, their parameter counts."""

import dataclasses
import json

import benchmark_scripts  # noqa: F401, which has parameter_counts found
import numpy as np
import parameter_counts
import pytest
import torch
from models import METHODS, timm, vit
from refusals import refuses

import efft_kernels as ek
from efft_kernels.configs import MethodConfig


def again(config):
    """What its JSON is read as."""
    return MethodConfig.from_dict(json.loads(json.dumps(config.to_dict())))


def test_parameter_counts_equal_the_formulas():
    for name, stages in parameter_counts.MODELS.items():
        with torch.device("meta"):
            model = timm().create_model(name, weight_init="skip")
        for method, counted, formula in parameter_counts.count(model, stages):
            assert counted == formula, f"{method} on {name}: counted {counted}, formula {formula}"


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_counts_what_is_trained(method):
    model = vit()
    counted = ek.plan(model, METHODS[method]).parameters
    ek.inject(model, METHODS[method], head="keep")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == counted
    assert sum(p.numel() for p in ek.adapter_parameters(model)) == counted


FLAGS = "trainable_scale rank_weights channel_scale rank_stabilized dora"


@pytest.mark.parametrize(
    "names, values, says",
    [
        ("rank", [0, (4, 4, 4), 4.0, True, None], "an int of at least 1 or a pair of them"),
        ("ffn_rank", [0, "4"], "an int of at least 1 or a pair of them"),
        ("scale", [float("nan"), "10", 10**400, True, None], "a finite number"),
        ("factor_dropout rank_dropout", [1.0, -0.1, "a", None], "a number in [0, 1)"),
        (FLAGS, ["no", 1, None], "True or False"),
        ("targets", [5, (("q",),), ("atn",), "attn", ()], "a non-empty tuple out of"),
        ("blocks", [3, (), (-1,)], "None or a non-empty tuple of block numbers"),
        ("variant", ["efft3"], "one of 'efft1', 'efft2'"),
        ("cores", ["per_head"], "one of 'per_block', 'shared'"),
        ("init", ["kaiming"], "one of 'xavier', 'released'"),
        ("zero_init", [("v",), "w"], "one of 'v', 'u', 'vv', 'vu', 'uv', 'uu'"),
    ],
)
def test_a_bad_option_is_named(names, values, says):
    for name, value in ((name, value) for name in names.split() for value in values):
        with pytest.raises(ValueError) as error:
            ek.EFFTConfig(**{name: value})
        said = str(error.value)
        assert said.startswith(f"{name} must be {says}") and said.endswith(f", got {value!r}"), said


def test_options_that_do_not_fit_the_method_or_the_model_are_named():
    refuses(ValueError, "zero_init must be one of 'v', 'u', got 'vv'", ek.EFFTConfig, "efft1", zero_init="vv")
    refuses(ValueError, "ffn_rank must be None for efft1", ek.EFFTConfig, "efft1", ffn_rank=4)
    refuses(ValueError, "rank must be an int for tk", ek.FacTConfig, "tk", rank=(2, 3))
    refuses(ValueError, "activation_dropout must be", ek.FacTConfig, activation_dropout=-0.1)
    refuses(ValueError, "rank must be an int for LoRAConfig", ek.LoRAConfig, rank=(2, 3))
    says = "rank must be at most 192 in group 'attn' of 192 x 192 slices"
    refuses(ValueError, says, ek.plan, vit(), ek.EFFTConfig(rank=193))


@pytest.mark.parametrize("method", METHODS)
def test_configs_survive_json_and_are_frozen(method):
    config = METHODS[method]
    assert again(config) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 5


def test_ranges_and_lists_are_taken():
    config = ek.EFFTConfig(rank=[4, 6], blocks=range(2), targets=["attn"])
    assert (config.rank, config.blocks, config.targets) == ((4, 6), (0, 1), ("attn",))


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
def test_numpy_scalars_are_taken(kind):
    two, zero = kind(2), kind(0)
    for config in (ek.EFFTConfig(scale=two, factor_dropout=zero), ek.FacTConfig(scale=two, activation_dropout=zero)):
        assert again(config) == config
        numbers = (config.scale, getattr(config, "factor_dropout", 0.0), getattr(config, "activation_dropout", 0.0))
        assert numbers == (2, 0, 0) and {type(x) for x in numbers} <= {float, int}


def test_numpy_ranks_and_blocks_are_taken():
    config = ek.EFFTConfig(rank=np.int64(8), blocks=np.arange(2).tolist() + [np.int32(3)])
    assert again(config) == config
    assert (config.rank, config.blocks) == (8, (0, 1, 3)) and {type(b) for b in (config.rank, *config.blocks)} == {int}
    assert ek.EFFTConfig(rank=(np.int64(4), 2)).rank == (4, 2)
    for wrong in (np.float64(8), np.bool_(True), np.int64(0), "8"):
        refuses(ValueError, "rank must be an int of at least 1", ek.EFFTConfig, rank=wrong)
