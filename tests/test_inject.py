"""plan, inject and merge: which Linears are adapted, what is frozen, what is refused."""

import copy
import sys
import warnings

import numpy as np
import pytest
import torch
from models import assert_bits, check_start_and_merge, images, shake, swin, timm, vit
from refusals import refuses
from torch import nn

import efft_kernels as ek
from efft_kernels.ops import merge_

SMALL = ek.EFFTConfig(rank=4, factor_dropout=0.0)


def paths(model, config):
    return [slot.site.path for group in ek.plan(model, config).groups for slot in group.slots]


def test_a_plan_is_data_and_touches_nothing():
    model = vit()
    before = {name: type(module) for name, module in model.named_modules()}
    text = str(ek.plan(model, ek.EFFTConfig(rank=4)))
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())
    assert "blocks.1.mlp.fc2" in text and "transposed" in text
    assert text.splitlines()[-1] == "8 Linears, 5,568 trained parameters"
    with torch.device("meta"):
        assert ek.plan(timm().create_model("vit_base_patch16_224"), ek.EFFTConfig()).parameters == 104_448


@pytest.mark.parametrize(
    "targets, names",
    [
        (("attn",), ["attn.qkv", "attn.proj"]), (("mlp",), ["mlp.fc1", "mlp.fc2"]), (("qkv",), ["attn.qkv"]),
        (("proj", "fc2"), ["attn.proj", "mlp.fc2"]), (("v",), ["attn.qkv"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("config", [ek.EFFTConfig, ek.LoRAConfig])
def test_targets_and_blocks(config, targets, names):
    found = paths(vit(depth=3), config(rank=4, targets=targets, blocks=(0, 2)))
    assert sorted(found) == sorted(f"blocks.{block}.{name}" for block in (0, 2) for name in names)
    assert ek.inject(vit(), ek.LoRAConfig(rank=2, targets=("q",)))(images()).shape == (2, 10)  # a part of qkv alone


def test_swin_has_a_pair_of_groups_per_stage_with_doubling_ranks():
    with torch.device("meta"):
        model = timm().create_model("swin_base_patch4_window7_224")
    groups = {group.name: group for group in ek.plan(model, ek.EFFTConfig(rank=32)).groups}
    assert [groups[f"stage{i}_attn"].rank for i in range(4)] == [(4, 4), (8, 8), (16, 16), (32, 32)]
    assert [groups[f"stage{i}_ffn"].rank for i in range(4)] == [(2, 4), (4, 8), (8, 16), (16, 32)]
    assert [groups[f"stage{i}_attn"].K for i in range(4)] == [128, 256, 512, 1024]
    assert [groups[f"stage{i}_attn"].cores for i in range(4)] == [8, 8, 72, 8]
    equal = ek.plan(model, ek.EFFTConfig(rank=32, ffn_rank=32)).groups
    assert [group.rank for group in equal if group.name.endswith("ffn")] == [(4, 4), (8, 8), (16, 16), (32, 32)]


TIMM = {
    "vit_small_patch16_224": {},
    "vit_huge_patch14_224": {"embed_dim": 64, "num_heads": 2},
    "vit_giant_patch14_dinov2": {"embed_dim": 48, "num_heads": 2, "init_values": 0.1},  # SwiGLU, LayerScale
    "vit_base_patch14_reg4_dinov2": {"embed_dim": 64, "num_heads": 2, "init_values": 0.1},
    "vit_base_patch16_siglip_224": {"embed_dim": 64, "num_heads": 2, "global_pool": "avg"},
    "vit_small_patch16_224 qk_norm": {"qk_norm": True, "init_values": 0.1},
    "deit3_small_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "vit_base_patch16_rope_224": {"embed_dim": 64, "num_heads": 2, "init_values": 0.1},
    "vit_small_patch16_dinov3": {"init_values": 0.1},
    "eva02_base_patch14_224": {"embed_dim": 96, "num_heads": 2},  # separate q, k, v and gate
    "beit_base_patch16_224 mlp": {"embed_dim": 64, "num_heads": 2},
}


@pytest.mark.parametrize("name", TIMM)
def test_models_of_timm(name):
    targets = ("mlp",) if name.endswith(" mlp") else ("attn", "mlp")
    check_start_and_merge(vit(name.split()[0], patch_size=16, **TIMM[name]), ek.EFFTConfig(rank=4, targets=targets))


def transformer(name):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16, num_labels=5)
    small = dict(patch_size=4, embed_dim=32, depths=[2, 1], num_heads=[2, 4], window_size=4, image_size=32)
    make = {
        "vit": lambda t: t.ViTForImageClassification(t.ViTConfig(**sizes, intermediate_size=256)),
        "deit": lambda t: t.DeiTForImageClassificationWithTeacher(t.DeiTConfig(**sizes, intermediate_size=256)),
        "dinov2": lambda t: t.Dinov2ForImageClassification(t.Dinov2Config(**sizes)),
        "dinov2 swiglu": lambda t: t.Dinov2ForImageClassification(t.Dinov2Config(**sizes, use_swiglu_ffn=True)),
        "swin": lambda t: t.SwinForImageClassification(t.SwinConfig(**small, num_labels=5)),
        "swinv2": lambda t: t.Swinv2ForImageClassification(t.Swinv2Config(**small, num_labels=5)),
    }
    timm()  # declares what torchvision, which transformers imports, may lack
    return make[name](transformers).eval()


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "dinov2 swiglu", "swin", "swinv2"])
@pytest.mark.parametrize("config", [SMALL, ek.LoRAConfig(rank=4)], ids=["efft2", "lora"])
def test_models_of_transformers(name, config):
    trained = check_start_and_merge(transformer(name), config)
    assert trained - {"efft"} and all("classifier" in n for n in trained - {"efft"})


def test_transformers_checkpointing_sees_the_same_masks():
    model = shake(ek.inject(transformer("vit"), ek.EFFTConfig(rank=4, factor_dropout=0.3))).train()
    x, grads = images(), []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        grads.append(torch.autograd.grad(model(x).logits.square().sum(), list(model.efft.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


class Odd(nn.Module):
    """A model with a list of blocks made of the given modules."""

    def __init__(self, **linears):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict(linears)})])


def test_what_cannot_be_adapted_is_refused_and_left_alone():
    tied = Odd(fc1=nn.Linear(8, 32), fc2=nn.Linear(32, 8), up_proj=nn.Linear(8, 32))
    tied.blocks[0].mlp.up_proj.weight = tied.blocks[0].mlp.fc1.weight
    foreign = Odd(fc1=type("Foreign", (nn.Linear,), {})(8, 32))
    around = type("Around", (nn.Module,), {})()
    around.linear = nn.Linear(8, 32)
    widths = "group 'all' .* must all be 192 x 768, got 192 x 576 from blocks.0.mlp.fc1"
    two = vit()
    two.blocks[1].attn.proj.bfloat16()
    with torch.inference_mode():
        inference = vit()
    for model, config, error, says in [
        (nn.Sequential(nn.Linear(4, 4)), SMALL, ValueError, "Sequential has no Linears that targets="),
        (vit(), "efft2", TypeError, "config must be an EFFTConfig or another config .*, got str"),
        (vit(), ek.EFFTConfig(blocks=(1, 7)), ValueError, r"blocks must be from 0 to 1 for this model, got \[7\]"),
        (vit(mlp_ratio=3), ek.EFFTConfig("efft1"), ValueError, widths),
        (vit(mlp_ratio=2.5), ek.FacTConfig(), ValueError, "blocks.0.mlp.fc1 is 192 x 480"),
        (tied, SMALL, ValueError, "share one weight"),
        (foreign, SMALL, TypeError, "blocks.0.mlp.fc1 must be an nn.Linear, got Foreign, .*leave it out"),
        (two, SMALL, ValueError, "group 'attn' must be of one dtype and device"),
        (inference, ek.EFFTConfig(rank=4), ValueError, "inference_mode"),
        (Odd(fc1=around), SMALL, TypeError, "blocks.0.mlp.fc1 must be an nn.Linear, or .*, got Around, .*leave it out"),
    ]:
        types = [type(m) for m in model.modules()]
        refuses(error, says, ek.inject, model, config)
        assert [type(m) for m in model.modules()] == types
        assert not model._forward_pre_hooks and all(p.requires_grad for p in model.parameters())
        assert not hasattr(model, "efft")


def test_doing_it_twice_or_undoing_what_is_not_done_is_a_sentence():
    model = vit()
    refuses(ValueError, "must have adapters, but this VisionTransformer has none, inject it first", ek.merge, model)
    refuses(ValueError, "must be merged to be unmerged", ek.unmerge, model)
    ek.inject(model, SMALL)
    refuses(ValueError, "already injected with 'default'", ek.inject, model, SMALL)
    refuses(ValueError, "must be merged to be unmerged", ek.unmerge, model)
    ek.merge(model)
    refuses(ValueError, "is merged, unmerge it first", ek.merge, model)
    refuses(ValueError, "the model is merged; unmerge it first", ek.inject, model, SMALL)
    ek.unmerge(model)
    ek.merge(model, keep_weights=False)
    refuses(ValueError, "keep_weights=False", ek.unmerge, model)
    x = images()
    want = model(x)
    torch.testing.assert_close(ek.inject(copy.deepcopy(model), SMALL)(x), want)


@pytest.mark.parametrize("name", ["", "a.b", "keys", "active", 3])
def test_adapter_names_that_cannot_be_used(name):
    refuses(ValueError, "name must be a non-empty word", ek.inject, vit(), SMALL, name=name)


def test_only_factors_and_head_are_trained_and_registered_once():
    model = ek.inject(vit(), SMALL)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"head.weight", "head.bias"} | {
        f"efft.default.{group}.{factor}" for group in ("attn", "ffn") for factor in ("u", "sigma", "v")
    }
    assert {id(p) for p in ek.adapter_parameters(model)} == {id(model.get_parameter(name)) for name in trained}
    assert len(list(model.efft.parameters())) == 6 and isinstance(model.blocks[0].attn.qkv, nn.Linear)


def test_the_head_is_left_or_replaced():
    x, model = images(), ek.inject(vit(), SMALL, head="keep")
    assert not model.head.weight.requires_grad
    model = ek.inject(vit().double(), SMALL, head=7)
    assert model(x.double()).shape == (2, 7) and model.head.weight.requires_grad and model.num_classes == 7
    assert ek.inject(swin(), SMALL, head=7)(x).shape == (2, 7)
    model = ek.inject(transformer("vit"), SMALL, head=7)
    assert model(x, labels=torch.tensor([0, 6])).loss.isfinite() and model.config.num_labels == 7
    own = nn.Linear(192, 3)
    model = ek.inject(vit(), SMALL, head=own)
    assert model.head is own and model.num_classes == 3
    assert ek.inject(vit(), SMALL, head=nn.Sequential(nn.Linear(192, 5), nn.GELU(), nn.Linear(5, 4))).num_classes == 4
    assert ek.inject(vit(), SMALL, head=nn.Identity()).num_classes == 10
    for head, says in [("freeze", "head must be"), (0, "head must be"), (True, "head must be"), (None, "head must be")]:
        refuses(ValueError, says, ek.inject, vit(), SMALL, head=head)
    bare = vit(num_classes=0)
    refuses(ValueError, "no classifier Linear to replace", ek.inject, bare, SMALL, head=7)
    assert not hasattr(bare, "efft")
    distilled = vit("deit_tiny_distilled_patch16_224")
    distilled.head_dist = nn.Linear(192, 7)
    refuses(ValueError, "classifiers of equal widths", ek.inject, distilled, SMALL, head=5)


def test_batch_norms_outside_the_head_keep_their_statistics():
    model = vit()
    model.patch_embed.norm = nn.Sequential(nn.LayerNorm(192))
    model.norm = nn.Sequential(model.norm)
    model.pre = nn.BatchNorm2d(3)
    model.head = nn.Sequential(nn.BatchNorm1d(192), nn.Linear(192, 10))
    ek.inject(model, SMALL).train()
    assert not model.pre.training and model.head[0].training and model.blocks[0].training
    assert not model.pre.weight.requires_grad
    model.pre(images())
    assert model.pre.num_batches_tracked == 0 and ek.delete_adapter(model, "default").pre.training


def test_hooks_and_references_of_a_linear_survive():
    model = vit()
    linear, seen = model.blocks[0].mlp.fc1, []
    linear.register_forward_hook(lambda module, args, output: seen.append(module))
    weight = linear.weight
    ek.inject(model, SMALL)
    model(images())
    assert model.blocks[0].mlp.fc1 is linear is seen[0] and linear.weight is weight
    ek.merge(model)
    assert type(linear) is nn.Linear and linear.weight is weight and not hasattr(linear, "efft")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_into_low_precision_reports_the_loss(dtype):
    model, x = shake(ek.inject(vit().to(dtype), SMALL)), images(dtype=dtype)
    before, weights = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    lost = rf"merging into {dtype} weights lost \d+\.\d% of the update"
    with pytest.warns(UserWarning, match=lost):
        ek.merge(model)
    ek.unmerge(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuses(UserWarning, lost, ek.merge, model)
        torch.testing.assert_close(model(x), before, rtol=0.1, atol=0.1)  # it is whole if its warning is an error, too
        assert torch.equal(ek.unmerge(model)(x), before)
        ek.merge(shake(ek.inject(vit(), SMALL), 0.01))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())


def test_a_part_that_is_injected_is_not_injected_again():
    inner = ek.inject(vit(), ek.EFFTConfig(rank=4))
    with pytest.raises(ValueError, match="belongs to a part of the model that is already injected"):
        ek.inject(nn.Sequential(inner), ek.LoRAConfig(rank=2))
    assert all(p.requires_grad for p in inner.efft.parameters())


@pytest.mark.parametrize("keep", [True, False])
def test_a_merge_that_fails_midway_changes_nothing(keep, monkeypatch):
    """Weights of two dtypes take two launches, and the second may fail."""
    model = shake(ek.inject(vit(), ek.EFFTConfig(rank=4, factor_dropout=0.0)))
    model.blocks[1].mlp.double()
    before, dtypes = {key: t.clone() for key, t in model.state_dict().items()}, []

    def fails(weights, downs, ups, **options):
        dtypes.append(weights[0].dtype)
        if len(dtypes) == 2:
            raise KeyboardInterrupt
        merge_(weights, downs, ups, **options)
        assert not torch.equal(weights[0], before["blocks.0.attn.qkv.weight"])

    monkeypatch.setattr(sys.modules["efft_kernels.merge"], "merge_", fails)
    with pytest.raises(KeyboardInterrupt):
        ek.merge(model, keep_weights=keep)
    assert dtypes == [torch.float32, torch.float64]
    assert_bits(model.state_dict(), before)
    assert not hasattr(model, "_efft_merged") and model.efft.active == "default"
    monkeypatch.undo()
    ek.merge(model)


def test_unmerge_puts_each_group_where_its_linears_are_now():
    model = ek.merge(ek.inject(swin(), SMALL))
    model.layers[1].to("meta")
    groups = ek.unmerge(model).efft["default"].values()
    assert {(next(iter(g.slots))[:8], p.device.type) for g in groups for p in g.parameters()} == {
        ("layers.0", "cpu"),
        ("layers.1", "meta"),
    }


def test_unmerge_refuses_linears_that_were_replaced():
    model = ek.merge(shake(ek.inject(vit(), ek.EFFTConfig(rank=4))))
    model.blocks[0].mlp.fc1 = torch.nn.Identity()
    refuses(ValueError, "blocks.0.mlp.fc1 must be the nn.Linear that merge left there, got Identity", ek.unmerge, model)
    assert not hasattr(model, "efft")
    model.blocks[0].mlp.fc1 = nn.Linear(192, 10)
    refuses(ValueError, r"merge left there, got Linear\(in_features=192, out_features=10", ek.unmerge, model)
    model, other = (ek.inject(vit(), SMALL) for _ in range(2))
    model.blocks[0].mlp.fc1 = other.blocks[0].mlp.fc1
    refuses(ValueError, "mlp.fc1 must be the Linear that inject adapted, but a AdaptedLinear is", ek.merge, model)


def test_weights_made_under_inference_mode_are_not_merged_outside_it():
    with torch.inference_mode():
        model, x = shake(ek.inject(vit(), ek.EFFTConfig(rank=4, factor_dropout=0.0))), images()
        want = model(x)
    refuses(ValueError, "weights were created under inference_mode", ek.merge, model)
    with torch.inference_mode():
        assert torch.equal(model(x), want)
        torch.testing.assert_close(ek.merge(model)(x), want, rtol=1e-3, atol=1e-4)
        assert torch.equal(ek.unmerge(model)(x), want)


def test_an_unknown_backend_is_refused_before_anything():
    model = vit()
    refuses(ValueError, "backend must be one of", ek.inject, model, ek.EFFTConfig(rank=4), backend="fast")
    refuses(ValueError, r"backend must be one of .*, got \['cpu'\]", ek.inject, model, SMALL, backend=["cpu"])
    assert not hasattr(model, "efft")


def test_the_names_of_the_classes_come_back():
    """also within disable_adapter, where the model computes its loss with their number"""
    model = transformer("vit")
    names, x = model.config.id2label, images()
    ek.inject(model, SMALL, head=7)
    for _ in range(2):
        assert model.num_labels == model.config.num_labels == 7 and model(x, labels=torch.tensor([6, 0])).loss > 0
        with ek.disable_adapter(model):
            assert model.config.id2label == names and model(x, labels=torch.tensor([4, 0])).loss > 0
        model = copy.deepcopy(model)
    kept = ek.inject(transformer("vit"), SMALL, head="keep")
    kept.config.id2label = dict(enumerate("abcde"))
    with ek.disable_adapter(kept):
        pass
    assert kept.config.id2label[0] == "a", "of a head that is not the adapter's"
    ek.delete_adapter(model, "default")
    assert model.config.id2label == names and model.config.label2id and model.num_labels == len(names)


def test_arguments_of_the_wrong_kind_are_named():
    for call in (ek.plan, ek.inject, lambda model, config: ek.merge(model)):
        refuses(TypeError, "model must be an nn.Module, got str", call, "vit", SMALL)
    for train in (None, 3, "head"):
        refuses(TypeError, "train must be a sequence of paths", ek.inject, vit(), SMALL, train=train)
    refuses(TypeError, "plan must be a Plan", ek.cost, vit(), 3)


def test_numbers_of_numpy_are_numbers():
    model = ek.inject(vit(), SMALL, head=np.int64(3))
    assert model(images()).shape[1] == 3
    assert [type(group["lr"]) for group in ek.adapter_parameter_groups(model, np.float32(1e-3))] == [float, float]
    assert ek.EFFTLinear(8, 6, rank=(np.int64(2), 3)).sigma.shape == (1, 2, 3)
