"""The methods that can be compared: published parameter counts, trained parameters, files."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import assert_bits, images, swin, timm, vit, vit_of_transformers
from refusals import refuses

from efft_kernels.finetune import methods
from efft_kernels.finetune.baselines import Prompt
from efft_kernels.finetune.models import logits
from efft_kernels.layouts import heads_of

SMALL = {
    "vpt-shallow": {"tokens": 3},
    "vpt-deep": {"tokens": 3},
    "adapter": {"bottleneck": 4, "placement": "houlsby"},
    "adaptformer": {"bottleneck": 4},
    "lora": {"rank": 2},
    **{name: {"rank": 4, "scale": 1.0} for name in ("fact-tt", "fact-tk", "efft1", "efft2")},
    "noah": {"bottleneck": (4, 0), "lora_rank": (0, 2), "tokens": (2, 0)},
}
# trained parameters on ViT-B/16 without the head: formulas of the papers, published figures in millions
COUNTS = [
    ("full", {}, 85_798_656, 85.8),
    ("linear", {}, 0, 0.0),
    # per block 3d + d + 4d + d biases of Linears and 2d of norms; patch embedding and last norm
    ("bitfit", {}, 12 * 11 * 768 + 2 * 768, 0.103),
    ("vpt-shallow", {"tokens": 82}, 82 * 768, 0.063),  # lengths are tuned per task; this one gives the mean
    ("vpt-deep", {"tokens": 50}, 12 * 50 * 768, None),
    ("adapter", {}, 12 * (2 * 768 * 8 + 8 + 768), 0.157),
    ("adapter", {"placement": "houlsby"}, 24 * (2 * 768 * 8 + 8 + 768), None),
    ("adaptformer", {}, 12 * (2 * 768 * 8 + 8 + 768), 0.157),
    ("lora", {}, 294_912, 0.295),
    # 11 d per block, patch embedding, last norm; the published 0.24 includes heads, of 49.5 classes on average
    ("ssf", {}, 2 * (12 * 11 + 2) * 768, None),
    ("fact-tt", {"rank": 16}, 2 * 768 * 16 + 144 * 16**2, None),
    ("fact-tk", {"rank": 32}, 2 * 768 * 32 + 144 * 32 + 32**3, None),
    ("efft1", {"rank": 32}, 159_744, 0.160),
    ("efft2", {"rank": 32}, 245_760, 0.245),
    # the sizes that NOAH found for clevr_count
    ("noah", {"bottleneck": (1, 10, 10, 10, 10, 1, 5, 10, 10, 10, 1, 1),
              "lora_rank": (1, 1, 10, 5, 10, 10, 10, 1, 5, 1, 10, 1),
              "tokens": (10, 1, 5, 10, 5, 1, 10, 5, 5, 5, 10, 1)}, 382_543, None),
    ("noah", {"tokens": 0, "lora_rank": 0}, 12 * (2 * 768 * 8 + 8 + 768), 0.157),
    ("noah", {"tokens": 0, "bottleneck": 0}, 294_912, 0.295),
    ("noah", {"tokens": 5, "bottleneck": 0, "lora_rank": 0}, 12 * 5 * 768, None),
]  # fmt: skip


@pytest.mark.parametrize("name, options, formula, printed", COUNTS, ids=[f"{c[0]}-{i}" for i, c in enumerate(COUNTS)])
def test_published_counts(name, options, formula, printed):
    with torch.device("meta"):
        model = timm().create_model("vit_base_patch16_224", num_classes=5)
    methods.apply(name, model, options)
    assert methods.count(model) == formula
    if printed is not None:
        # 0.2458 is published as 0.245: truncated, not rounded
        assert abs(formula / 1e6 - printed) < (0.05 if printed > 1 else 0.001)


def test_every_method_is_counted():
    assert {name for name, *_ in COUNTS} == set(methods.METHODS)


def prepared(name, **options):
    return methods.apply(name, vit(num_classes=4, **options), SMALL.get(name))


# the parameters that may change in addition to the head, by the end of their names
TRAINED = {
    "linear": (),
    "bitfit": ("bias",),
    "vpt-shallow": ("prompt.tokens",),
    "vpt-deep": ("prompt.tokens",),
    **{
        name: tuple(f"{name}.{part}.{kind}" for part in ("down", "up") for kind in ("weight", "bias"))
        for name in ("adapter", "adaptformer")
    },
    "ssf": ("ssf.scale", "ssf.shift"),
}


@pytest.mark.parametrize("name", methods.METHODS)
def test_learns_changes_only_its_own_and_comes_back_from_a_file(name, tmp_path):
    model = prepared(name)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    x, labels = images(8), torch.arange(8) % 4
    optimizer, losses = torch.optim.AdamW(methods.trainable_parameters(model), lr=3e-3), []
    for _ in range(12):
        methods.train_mode(model)
        loss = F.cross_entropy(model(x), labels)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0], losses

    changed = {key for key, t in model.state_dict().items() if not torch.equal(t, before[key])}
    heads = tuple(f"{key}." for key in heads_of(model))
    assert {"head.weight", "head.bias"} <= changed
    added = set(before) - set(vit(num_classes=4).state_dict())
    if name == "full":
        assert changed == {key for key, _ in model.named_parameters()}
    else:
        own = {key for key in before if key.endswith(TRAINED[name])} if name in TRAINED else added
        assert {key for key in changed if not key.startswith(heads)} == {k for k in own if not k.startswith(heads)}

    path = tmp_path / "adapter.safetensors"
    methods.save(name, SMALL.get(name, {}), model, path)
    fresh = vit(num_classes=4)
    if name != "full":
        fresh.load_state_dict({key: t for key, t in before.items() if key in fresh.state_dict()})
    again = methods.load(fresh, path)
    assert_bits(again.state_dict(), model.state_dict())
    other = copy.deepcopy(again)  # has parameters of its own
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model.eval()(x))
        for p in methods.trainable_parameters(other):
            p.add_(0.1)
        assert not torch.equal(other.eval()(x), again(x)) and torch.equal(again(x), model(x))
        for p, q in zip(model.parameters(), other.parameters()):
            q.copy_(p)
        assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("name", ["full", "linear", "bitfit"])
def test_a_file_is_whole_with_batch_norms(name, tmp_path):
    model = timm().create_model("test_resnet", num_classes=4)
    fresh, x = copy.deepcopy(model), images(8) + 1
    optimizer = torch.optim.SGD(methods.trainable_parameters(methods.apply(name, model)), lr=0.1)
    F.cross_entropy(methods.train_mode(model)(x), torch.arange(8) % 4).backward()
    optimizer.step()
    methods.save(name, {}, model, tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(methods.load(fresh, tmp_path / "a.safetensors").eval()(x), model.eval()(x))


@pytest.mark.parametrize("name", sorted(set(methods.METHODS) - {"ssf", "vpt-shallow", "vpt-deep", "noah"}))
def test_starts_where_the_backbone_is(name):
    model, x = vit(num_classes=4), images()
    with torch.no_grad():
        before, after = model(x), methods.apply(name, model, SMALL.get(name)).eval()(x)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_prompts_by_hand():
    """VPT-deep is attention over tokens that each block replaces, in any position."""
    bound = (6 / (3 * 16**2 + 192)) ** 0.5  # Xavier's, of the patch embedding
    assert 0.99 * bound < Prompt(100, 192, 16).tokens.abs().max() <= bound
    model, x = prepared("vpt-deep"), images()
    with torch.no_grad():
        found, tokens = model(x), model._pos_embed(model.patch_embed(x))
        for block in model.blocks:
            block._forward_pre_hooks.clear(), block._forward_hooks.clear()
            prompts = block.prompt.tokens.expand(2, -1, -1)
            tokens = block(torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], 1))
            tokens = torch.cat([tokens[:, :1], tokens[:, 4:]], 1)
        torch.testing.assert_close(found, model.forward_head(model.norm(tokens)), rtol=1e-5, atol=1e-6)


def test_an_adaptformer_by_hand():
    mlp, x = prepared("adaptformer").blocks[0].mlp, torch.randn(2, 5, 192)
    torch.nn.init.normal_((beside := mlp.fc2.adaptformer).up.weight)
    got = mlp(x)
    mlp.fc2._forward_hooks.clear()
    torch.testing.assert_close(got, mlp(x) + 0.1 * beside.up(F.relu(beside.down(x))))


ON_SWIN = "adapter", "adaptformer", "ssf", "bitfit", "efft1", "efft2", "lora", "fact-tt"


@pytest.mark.parametrize("make, names", [(swin, ON_SWIN), (vit_of_transformers, methods.METHODS)], ids=["swin", "hf"])
def test_other_models(make, names):
    for name in names:
        model = methods.apply(name, make(), None if make is swin else SMALL.get(name))
        F.cross_entropy(logits(model, images()), torch.arange(2)).backward()
        assert all(p.grad is not None for p in methods.trainable_parameters(model)), name


@pytest.mark.parametrize(
    "name, options, says",
    [
        ("lara", {}, "method must be .* lora, .* got 'lara'"),
        ("linear", {"rank": 3}, "rank .*linear.*none"),
        ("ssf", {"tokens": 3}, "tokens .*ssf"),
        ("vpt-deep", {"tokens": 0}, "tokens .*at least"),
        ("vpt-shallow", {"tokens": -1}, "tokens .*-1"),
        ("adapter", {"placement": "top"}, "placement .*top"),
        ("adaptformer", {"scale": float("nan")}, "scale .*nan"),
        ("noah", {"tokens": (1, 2, 3)}, "tokens .*2 of them"),
        ("efft2", {"rank": 0}, "rank .*0"),
        ("vpt-deep", None, "stages"),
    ],
)
def test_wrong_options(name, options, says):
    model = swin() if options is None else vit(num_classes=4)
    keys = set(model.state_dict())
    refuses(ValueError, says, methods.apply, name, model, options)
    assert set(model.state_dict()) == keys and all(p.requires_grad for p in model.parameters())


def test_a_file_for_another_model(tmp_path):
    path = tmp_path / "adapter.safetensors"
    methods.save("bitfit", {}, prepared("bitfit"), path)
    refuses(ValueError, "must hold", methods.load, vit(num_classes=7), path)
    path.write_bytes(path.read_bytes()[:100])
    refuses(ValueError, "truncated or corrupt", methods.load, vit(num_classes=4), path)
