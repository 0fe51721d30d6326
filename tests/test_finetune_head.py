"""The start of a run: a head from a linear probe, and the warning of a run that stays at chance."""

import math
from dataclasses import replace

import pytest
import torch
from models import timm
from refusals import refuses

timm()
for package in ("accelerate", "torchmetrics", "jsonargparse", "tensorboard"):
    pytest.importorskip(package)
from test_finetune_data import folder
from test_finetune_run import assert_close_runs, end, killed_and_resumed, tiny, train_in_two_processes

from efft_kernels.finetune import head_init, loop, methods, prepared
from efft_kernels.finetune.loop import train
from efft_kernels.layouts import classifiers_of

pytestmark = pytest.mark.usefixtures("undrawn_module")
PROBE = dict(head_init="probe", augment="none")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("photos"), ("train", "test"), ("a", "b", "c"), n=8)


def begun(data, out, **changes):
    """A run that is prepared, before its first step."""
    torch.set_num_threads(1)
    settings = tiny(data, out, **{**PROBE, **changes})
    accelerator, opened = prepared.make_accelerator(settings), prepared.open_images(settings, 1)
    return prepared.prepare(settings, accelerator, out, opened, show=False)[0]


def inputs(run) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """logits of all training images, and the inputs of the classifiers"""
    seen, hook = {}, lambda path: lambda module, args: seen.update({path: args[0]})
    hooks = [head.register_forward_pre_hook(hook(path)) for path, head in classifiers_of(run.model)]
    pixels = torch.stack([run.data.train[i][0] for i in range(len(run.data.train))])
    with torch.no_grad():
        y = loop.logits(run.model.eval(), run.normalise(pixels))
    for hook in hooks:
        hook.remove()
    return y, seen


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["test_vit", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224"], ids=["vit", "two", "swin"]
)
def test_every_head_is_a_probe_of_the_untouched_model(model, photos, tmp_path):
    """the probe's recipe, step by step, on features that were computed apart"""
    size = 64 if model.startswith("swin") else 32
    run = begun(photos, tmp_path, model=model, image_size=size, method="efft2", rank=2)
    _, features = inputs(run)
    labels = torch.tensor(run.data.train.labels)
    recipe = replace(head_init.RECIPE, epochs=40, lr=0.02)
    assert head_init.probe_head(run, recipe) > 90
    y, after = inputs(run)
    heads = dict(classifiers_of(run.model))
    assert len(heads) == (2 if "distilled" in model else 1) and features.keys() == heads.keys()
    assert (y.argmax(1) == labels).double().mean() > 0.9
    for path, x in features.items():
        assert torch.equal(after[path], x), "the backbone is untouched"
        mean, deviation = x.mean(0), x.std(0, correction=0) + 1e-6
        probe = torch.nn.Linear(x.shape[1], 3)
        torch.nn.init.zeros_(probe.weight), torch.nn.init.zeros_(probe.bias)
        optimizer = torch.optim.AdamW(probe.parameters(), lr=0.02, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
        generator = torch.Generator().manual_seed(0)
        for _ in range(40):
            rows = torch.randperm(len(x), generator=generator)
            torch.nn.functional.cross_entropy(probe(((x - mean) / deviation)[rows]), labels[rows]).backward()
            optimizer.step(), optimizer.zero_grad(), schedule.step()
        torch.testing.assert_close(heads[path](x), probe((x - mean) / deviation), rtol=1e-3, atol=1e-4)


def test_a_head_without_a_bias_or_without_a_linear(photos, tmp_path):
    run = begun(photos, tmp_path)
    head = run.model.head
    run.model.head = torch.nn.Linear(head.in_features, 3, bias=False)
    assert head_init.probe_head(run, replace(head_init.RECIPE, epochs=40, lr=0.02)) > 60
    run.model.head = torch.nn.Identity()
    says = "needs a head that ends in an nn.Linear, but that of VisionTransformer does"
    refuses(ValueError, says, head_init.probe_head, run)


@pytest.mark.slow
def test_a_new_run_probes_and_a_resumed_one_does_not(photos, tmp_path, caplog):
    caplog.set_level("INFO", logger="efft_kernels.finetune")
    settings = tiny(photos, tmp_path / "whole", **PROBE)
    train(settings, progress=False)
    assert sum("linear probe" in message for message in caplog.messages) == 1
    plain = train(tiny(photos, tmp_path / "random", augment="none"), progress=False)
    probed = end(tmp_path / "whole")["history"]
    assert probed[0]["train"]["loss"] < plain.history[0]["train"]["loss"]
    assert killed_and_resumed(replace(settings, out=str(tmp_path / "killed")), 1, seed=1, seconds=0.05) <= 1
    assert end(tmp_path / "killed") == end(tmp_path / "whole")


@pytest.mark.slow
def test_two_learning_rates_survive_a_kill(photos, tmp_path):
    settings = tiny(photos, tmp_path / "whole", lr_ratio=8.0, rank_dropout=0.3, rank_weights=True, channel_scale=True)
    run = begun(photos, tmp_path, lr_ratio=8.0)
    progress, schedule = loop.begin(run, None)
    schedule.step_update(4)
    first, second = (group["lr"] for group in progress.optimizer.param_groups)
    assert second == pytest.approx(8 * first)
    train(settings, progress=False)
    killed_and_resumed(replace(settings, out=str(tmp_path / "killed")), 1, seed=1, seconds=0.05)
    assert end(tmp_path / "killed") == end(tmp_path / "whole")
    with pytest.raises(ValueError, match="lr_ratio must be 1 for a method without low-rank factors"):
        train(tiny(photos, tmp_path / "ssf", method="ssf", rank=None, lr_ratio=2.0), progress=False)


def test_a_learning_rate_below_min_lr_does_not_rise(photos, tmp_path):
    run = begun(photos, tmp_path, head_init="random", lr=1e-6, min_lr=1e-5)
    progress, schedule = loop.begin(run, None)
    schedule.step_update(run.steps * run.settings.epochs - 1)
    assert all(group["lr"] <= 1e-6 for group in progress.optimizer.param_groups)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_the_probe_of_two_processes_is_that_of_one(fsdp, photos, tmp_path):
    exact = dict(PROBE, lr_ratio=4.0, dtype="float64", drop_path=0.0, factor_dropout=0.0, epochs=2)
    train(settings := tiny(photos, tmp_path / "one", **exact), progress=False)
    train_in_two_processes(replace(settings, out=str(tmp_path / "two"), fsdp=fsdp))
    assert_close_runs(tmp_path / "two", tmp_path / "one")


def test_a_run_at_chance_is_named_once(photos, tmp_path, caplog):
    """at a learning rate of 0.5; the warning comes with the first epoch after warm-up, and names what to change"""
    caplog.set_level("WARNING", logger="efft_kernels.finetune")
    found = train(tiny(photos, tmp_path, lr=0.5, scale=3.0, warmup_epochs=1.5, epochs=4), progress=False)
    said = [message for message in caplog.messages if "may never learn" in message]
    loss = found.history[2]["train"]["loss"]
    assert said == [
        f"epoch 3, the first after the warm-up, has a loss of {loss:.3f}, above the 1.099 of guessing among 3 classes: "
        "the run may never learn; try drop_path 0 (0.2 now), a smaller lr (0.5 now) or scale (3 now)"
    ]
    assert "has moved" not in caplog.text
    train(tiny(photos, tmp_path / "overflow", scale=1e30, epochs=1), progress=False)
    said = "epoch 1 has ended, and no factor that starts at zero has moved: the adapter changes nothing; try another "
    assert caplog.messages[-1] == said + "lr (0.003 now) or scale (1e+30 now)"


def test_a_run_that_learns_is_left_in_peace():
    settings = tiny("photos", "out", epochs=10, warmup_epochs=1.0)
    says = loop.at_chance
    assert says(settings, 2, math.log(5) - 1e-6, 5) is None and says(settings, 2, math.log(5) + 1e-6, 5)
    assert says(settings, 1, 9.0, 5) is None and says(settings, 3, 9.0, 5) is None
    assert "scale (10 now)" in says(settings, 2, 9.0, 5), "the default of the method"
    linear = replace(settings, method="linear", rank=None)
    assert "scale" not in says(linear, 2, 9.0, 5) and not methods.METHODS["linear"].options


def test_a_folder_of_an_earlier_version_had_the_defaults(photos, tmp_path):
    made = begun(photos, tmp_path, head_init="random").identity
    old = {name: value for name, value in made.items() if name != "head_init"}
    prepared.check_same(tmp_path, old, made)
    refuses(ValueError, "differs in head_init", prepared.check_same, tmp_path, old, made | {"head_init": "probe"})
