"""Models beyond the plain ViT: what is adapted, called, trained and said to be left out."""

import warnings

import pytest
import torch
from models import PLAIN, check_start_and_merge, images, shake, timm, vit
from refusals import refuses
from torch import nn

import efft_kernels as ek


class Wrapped(nn.Module):
    """As a Lightning module has its model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)

    def __getattr__(self, name):  # as PEFT's wrapper
        return self._modules[name] if name in self._modules else getattr(self.model, name)


class Own(nn.Module):
    """A network of one's own with a classifier of any name, and a module that is no classifier."""

    def __init__(self):
        super().__init__()
        self.backbone = vit(num_classes=0)
        self.cls = nn.Linear(192, 5)
        self.decode = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.cls(self.backbone(x)), self.decode.bias


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("efft.")}


def test_heads_are_found_within_wrappers_and_beside_a_model():
    model = ek.inject(Wrapped(vit()), PLAIN)
    assert trained(model) == {"model.head.weight", "model.head.bias"}
    assert model.model.head.weight in set(ek.adapter_parameters(model))
    model = ek.inject(Wrapped(Wrapped(vit())), PLAIN, head=7)
    assert model(images()).shape == (2, 7) and model.model.model.num_classes == 7
    with pytest.warns(UserWarning, match=r"Own: decode stay frozen, which train=\('decode',\) would train"):
        model = ek.inject(Own(), PLAIN)
    assert trained(model) == {"cls.weight", "cls.bias"}


class Encoder(nn.Module):
    """A transformer written by hand: the Linear that embeds patches stands before its blocks."""

    def __init__(self, *more):
        super().__init__()
        self.embed = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 32))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
        self.out, self.more = nn.Linear(32, 10), nn.ModuleList(more)


def test_what_embeds_patches_is_no_head():
    with pytest.warns(UserWarning, match=r"train=\('embed',\) would train"):
        assert trained(ek.inject(Encoder(), PLAIN)) == {"out.weight", "out.bias"}
    model = ek.inject(Encoder(), PLAIN, head=5)
    assert model.embed[1].out_features == 32 and model.out.out_features == 5
    with pytest.raises(ValueError, match="equal widths, got {'out': 10, 'more.0': 7}"):
        ek.inject(Encoder(nn.Linear(32, 7)), PLAIN, head=5)


def test_a_missing_head_is_said_and_a_plain_model_says_nothing():
    with pytest.warns(UserWarning, match="has no classifier that was found and trained"):
        ek.inject(vit(num_classes=0), PLAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ek.inject(vit(), PLAIN)
        ek.inject(vit(num_classes=0), PLAIN, head="keep")
        bare = vit(num_classes=0)
        with pytest.raises(UserWarning):
            ek.inject(bare, PLAIN)
    assert not hasattr(bare, "efft")


def test_train_names_modules_that_are_trained_saved_and_loaded(tmp_path):
    model = Own()
    weights = {key: t.clone() for key, t in model.state_dict().items()}
    shake(ek.inject(model, PLAIN, train=("decode",)))
    assert trained(model) == {"cls.weight", "cls.bias", "decode.weight", "decode.bias"}
    assert {model.decode.weight, model.decode.bias} <= set(ek.adapter_parameters(model))
    assert model(images())[1] is model.decode.bias and not model.decode.bias._backward_hooks
    with torch.no_grad():
        model.decode.weight.normal_()
    with ek.disable_adapter(model):
        assert torch.equal(model.decode.weight, weights["decode.weight"])
    ek.save_adapter(model, tmp_path / "a.safetensors")
    other = Own()
    other.load_state_dict(weights)
    ek.load_adapter(other, tmp_path / "a.safetensors", head="keep")
    assert torch.equal(other.decode.weight, model.decode.weight) and trained(other) == {"decode.weight", "decode.bias"}
    differs = ek.inject(Own(), PLAIN, head="keep", train=("decode",))
    file = tmp_path / "a.safetensors"
    refuses(ValueError, "holds decode that differs from", ek.load_adapter, differs, file, name="b", head="keep")
    ek.delete_adapter(other, "default")
    del other.decode
    refuses(ValueError, "holds modules that this Own lacks", ek.load_adapter, other, file)
    path = "backbone.blocks.0.attn.qkv"
    for train, error, says in [
        ("decode", TypeError, "train must be a sequence of paths"),
        (("decoder",), ValueError, "train must name modules of this Own, such as 'backbone', .* got 'decoder'"),
        (("backbone.head",), ValueError, "backbone.head has none"),
        (("backbone",), ValueError, "blocks.0.attn.qkv is in 'backbone'"),
        ((f"{path}.parametrizations",), ValueError, f"{path} is in '{path}.para"),
    ]:
        nn.utils.parametrizations.weight_norm((own := Own()).get_submodule(path))
        refuses(error, says, ek.inject, own, PLAIN, train=train)


SWITCHED = {
    "beit_base_patch16_224": dict(embed_dim=64, num_heads=2, depth=2, img_size=32),
    "eva02_tiny_patch14_224": dict(embed_dim=64, num_heads=2, depth=2, img_size=28),
    "swinv2_tiny_window8_256": dict(embed_dim=32, depths=(2, 1), num_heads=(2, 4), window_size=4, img_size=32),
}


@pytest.mark.parametrize("name", SWITCHED)
def test_attention_with_separate_biases_calls_its_linear(name):
    model = timm().create_model(name, num_classes=10, **SWITCHED[name]).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith(("q_bias", "v_bias", "head.weight", "head.fc.weight")):
                p.normal_()
            elif key.endswith(("norm1.weight", "norm2.weight")):
                p.fill_(1.0)  # Swin V2 starts with zeros there
    x = images(size=SWITCHED[name]["img_size"])
    before = model(x)
    ek.inject(model, ek.EFFTConfig(rank=4, factor_dropout=0.0, targets=("qkv",)))
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a Linear that is not called would be said
        after = shake(model, 0.3)(x)
    assert (after - before).abs().max() > 1e-4
    after.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.efft.parameters())
    switch = [m for m in model.modules() if hasattr(m, "qkv_bias_separate")]
    assert switch and all(m.qkv_bias_separate for m in switch)
    torch.testing.assert_close(ek.merge(model)(x), after, rtol=1e-3, atol=1e-4)
    assert not any(m.qkv_bias_separate for m in switch)


def test_the_fast_path_of_an_encoder_layer_skips_no_adapter():
    x = torch.randn(2, 7, 32)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    layer.linear1 = ek.EFFTLinear.from_linear(layer.linear1, rank=4, scale=5.0)
    with torch.no_grad():
        layer.linear1.v.normal_()
        want = layer.train()(x)
        torch.testing.assert_close(layer.eval()(x), want)


@pytest.mark.parametrize("method", [PLAIN, ek.EFFTConfig("efft1", rank=4, factor_dropout=0.0), ek.LoRAConfig(rank=4)])
def test_stages_whose_linears_differ_in_shape_are_grouped_by_shape(method):
    hiera = dict(img_size=(64, 64), embed_dim=16, num_heads=1, stages=(1, 1), q_pool=1)
    model = timm().create_model("hiera_tiny_224", num_classes=10, **hiera).eval()
    nn.init.normal_(model.head.fc.weight)
    with pytest.warns(UserWarning, match=r"not adapted \(blocks.\*.proj\)"):
        check_start_and_merge(model, method, images(1, size=64), backend=None)


def test_what_options_leave_out_is_listed_without_a_warning():
    model = vit()
    found = {item.path: item for item in ek.plan(model, ek.EFFTConfig(rank=4, targets=("mlp",), blocks=(1,))).left_out}
    assert found["blocks.1.attn.qkv"].why == "targets=('mlp',) does not name it"
    assert found["blocks.0.mlp.fc1"].why == "blocks=(1,) does not name it"
    assert not any(item.unexpected for item in found.values()) and "head" not in found


@pytest.mark.parametrize("name", ["SiglipVision", "Aimv2Vision"])
def test_how_an_encoder_pools_is_no_classifier(name):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32)
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes, patch_size=8))
    refuses(ValueError, "has no classifier Linear to replace", ek.inject, model, PLAIN, head=10)
    with pytest.warns(UserWarning, match="it has no classifier that was found and trained"):
        ek.inject(model, PLAIN)
    assert not trained(model) and model(images()).pooler_output.shape == (2, 32)


class Block(nn.Module):
    """A decoder block with two attentions and names that are not known."""

    def __init__(self):
        super().__init__()
        for attention in ("self_attention", "cross_attention"):
            names = ("to_query", "to_key", "to_value", "out_proj")
            self.add_module(attention, nn.ModuleDict({name: nn.Linear(32, 32) for name in names}))
        self.lin1, self.lin2, self.odd = nn.Linear(32, 128), nn.Linear(128, 32), nn.Linear(32, 20)


def test_names_by_structure_and_matrices_of_two_attentions_have_cores_of_their_own():
    model = nn.Module()
    model.decoder = nn.ModuleList([Block(), Block()])
    plan = ek.plan(model, ek.EFFTConfig(rank=4))
    groups = {group.name: group for group in plan.groups}
    assert groups["attn"].cores == 16 and groups["ffn"].cores == 4
    used = [core for slot in groups["attn"].slots for core in slot.cores]
    assert sorted(used) == list(range(16))
    assert [(item.path, item.unexpected) for item in plan.left_out] == [
        ("decoder.0.odd", True),
        ("decoder.1.odd", True),
    ]


def attention(N, qkv="qkv", proj="proj"):
    return nn.ModuleDict({"attn": nn.ModuleDict({qkv: nn.Linear(64, N), proj: nn.Linear(64, 64)})})


def test_an_attention_of_unknown_names_in_an_entry_of_its_own_is_said():
    model, ff = nn.Module(), lambda: nn.ModuleDict({"fc1": nn.Linear(64, 128), "fc2": nn.Linear(128, 64)})
    unknown = lambda: nn.Sequential(nn.LayerNorm(64), attention(64, "alpha", "beta"))
    model.layers = nn.ModuleList(nn.ModuleList([unknown(), nn.Sequential(nn.LayerNorm(64), ff())]) for _ in range(2))
    with pytest.warns(UserWarning, match=r"4 layers .* \(layers.\*.\*.\*.attn.alpha, layers.\*.\*.\*.attn.beta\)"):
        ek.inject(model, PLAIN, head="keep")
    model.layers = nn.ModuleList([unknown(), attention(64, "gamma", "delta")])
    refuses(ValueError, r"blocks, but layers.\*.\*.attn.alpha, .* \(its role .* is not known\);", ek.plan, model, PLAIN)
    model.layers = nn.ModuleList([attention(192), ff(), attention(192), ff()])
    assert not any(each.unexpected for each in ek.plan(model, ek.EFFTConfig(rank=4, blocks=(1,))).left_out)


def test_parts_of_unequal_width_are_refused_and_keys_with_values_alone_are_not():
    model = nn.Module()
    for N in (96, 128, 200):  # queries of 64; 96 divides by 3, 128 is twice the inputs
        model.blocks = nn.ModuleList([attention(N)])
        with pytest.raises(ValueError, match=f"blocks.0.attn.qkv must hold q, k and v of equal width, got {N} outputs"):
            ek.plan(model, ek.EFFTConfig(rank=4, targets=("q",)))
    size = dict(img_size=32, window_size=(4, 2), window_ratio=None, depths=(2, 2), num_heads=(2, 2), embed_dim=32)
    model = type(timm().create_model("gcvit_xxtiny"))(num_classes=10, **size).eval()
    sites = [slot.site for group in ek.plan(model, PLAIN).groups for slot in group.slots]
    assert [site.out_features for site in sites if site.parts == ("k", "v")] == [64, 128]
    check_start_and_merge(model, PLAIN, backend=None)
