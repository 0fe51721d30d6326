"""NOAH's search: sub-architectures of the supernet, the evolutionary search, and a whole search on few images."""

import random

import pytest
import torch
from benchmark_scripts import need, refused
from models import timm

timm()
need("tqdm", "accelerate", "torchmetrics")

import noah_search
import runs
from noah_search import KINDS, SIZES, Supernet, evolve
from record import read_csv
from test_paper_vtab1k import few_images

from efft_kernels.finetune import methods
from efft_kernels.finetune.models import make_model


def test_chosen_sizes_compute_what_a_model_of_these_sizes_does():
    large, small = (make_model("test_vit", 3, 32, "random").double().eval() for _ in range(2))
    small.load_state_dict(large.state_dict())
    net = Supernet(large)
    for parameter in methods.trainable_parameters(large):
        torch.nn.init.normal_(parameter)
    sizes = tuple(random.Random(1).choices(SIZES, k=len(KINDS) * len(large.blocks)))
    net.choose((10,) * len(sizes))  # another choice before leaves nothing behind
    net.choose(sizes)
    methods.apply("noah", small, {kind: sizes[i::3] for i, kind in enumerate(KINDS)})
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            module, _, last = name.rpartition(".")
            parameter.copy_(getattr(large.get_submodule(module), last))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(large(x), small(x), rtol=1e-12, atol=1e-12)
    assert net.count(sizes) == methods.count(small)


@pytest.mark.slow
def test_evolution_finds_the_best_sizes_within_the_budget():
    chance, scored = random.Random(0), []
    goal = tuple(chance.choices(SIZES, k=9))

    def score(sizes):
        scored.append(sizes)
        return -sum(abs(a - b) for a, b in zip(sizes, goal))

    assert evolve(score, 9, lambda sizes: True, chance, 20, 20) == (goal, 0)
    assert len(set(scored)) == len(scored) <= 20 * 21 < 3**9 / 20  # once each, and few of all
    scored.clear()
    _, best = evolve(score, 9, lambda sizes: sum(sizes) < sum(goal), chance, 20, 20)
    assert all(sum(sizes) < sum(goal) for sizes in scored) and best >= -5
    with pytest.raises(ValueError, match="--budget"):
        evolve(score, 9, lambda sizes: False, chance, 5, 1)


@pytest.mark.slow
def test_a_search_is_recorded_and_its_sizes_are_tested(tmp_path, capsys, monkeypatch):
    few_images(monkeypatch, 800)
    monkeypatch.setattr(noah_search, "opened", runs.opened)
    monkeypatch.setattr(runs, "measure", lambda run, places: runs.recorded(run, {"top1": 50.0 + run.seed}, 1.0, 1.0))
    options = ["--quick", "--population", "2", "--generations", "1", "--supernet-epochs", "1", "--seeds", "2"]
    options += ["--workers", "1", "--out", str(tmp_path)]
    for _ in range(2):  # the second time nothing is left to do
        assert noah_search.main(options) == 0
        assert "dsprites_loc: 50.0, 51.0 % with" in capsys.readouterr().out
        searched, *tested = read_csv(tmp_path / "runs.csv")
        assert (searched["part"], len(tested)) == ("val", 2) and 0 <= searched["top1"] <= 100
        assert all(row["settings.tokens"] == tested[0]["settings.tokens"] for row in tested)
        monkeypatch.setattr(noah_search, "search", None)


@pytest.mark.parametrize("options", [["--budget", "nan"], ["--supernet-epochs", "0"], ["--rank", "4"]])
def test_arguments_that_do_not_fit_or_have_no_effect_are_refused(options, capsys):
    refused(noah_search.main, options, options[0], capsys)


def test_a_budget_that_nothing_fits_is_refused_before_the_supernet_is_trained(tmp_path, capsys, monkeypatch):
    few_images(monkeypatch, 800)
    monkeypatch.setattr(noah_search, "opened", runs.opened)
    monkeypatch.setattr(noah_search, "evolve", None)
    assert noah_search.main(["--quick", "--budget", "0.001", "--out", str(tmp_path)]) == 2
    assert "--budget must allow the smallest sizes, " in capsys.readouterr().err
