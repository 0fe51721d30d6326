"""Models for fine-tuning by name, with weights from files in the common formats."""

from unittest.mock import Mock

import numpy as np
import pytest
import torch
from models import assert_bits, images, swin, timm, vit, vit_of_transformers
from refusals import refuses
from safetensors.torch import save_file

from efft_kernels.finetune.models import logits, make_model, normalisation

SIZES = dict(embed_dim=32, num_heads=2, depth=2)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """ViT and Swin under the names of the large models, with few and narrow blocks."""
    library = timm()
    create = library.create_model

    def small_create(name, **options):
        if name.startswith("vit_base_patch16"):
            options = {**SIZES, **options}
        elif name.startswith("swin"):
            options = {**dict(window_size=2, embed_dim=32, depths=(1, 1), num_heads=(2, 4)), **options}
        return create(name, **options)

    monkeypatch.setattr(library, "create_model", small_create)


def assert_loaded(model, source):
    """All but the head."""
    backbones = [model.state_dict(), source.state_dict()]
    assert_bits(*({k: t for k, t in state.items() if not k.startswith(("head", "classifier"))} for state in backbones))


@pytest.mark.parametrize("kind", ["plain.pth", "model.pth", "state_dict.pt", "weights.safetensors"])
@pytest.mark.parametrize("name, make", [("vit_base_patch16_224", vit), ("swin_tiny_patch4_window7_224", swin)])
def test_files(kind, name, make, tmp_path):
    options = SIZES if make is vit else dict(window_size=2, embed_dim=32, depths=(1, 1))
    source, path = make(num_classes=21, **options), tmp_path / kind
    if kind.endswith("safetensors"):
        save_file({key: t.contiguous() for key, t in source.state_dict().items()}, path)
    else:
        state = source.state_dict()
        torch.save({"model": state} if kind[0] == "m" else {"state_dict": state} if kind[0] == "s" else state, path)
    model = make_model(name, 5, 32, str(path), 0.1)
    assert_loaded(model, source)
    assert logits(model, images()).shape == (2, 5)


def test_same_number_of_classes_keeps_no_head(tmp_path):
    source = vit(num_classes=5, **SIZES)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    model = make_model("vit_base_patch16_224", 5, 32, str(tmp_path / "a.pth"))
    assert not torch.equal(model.head.weight, source.head.weight)


def npz_of(model, path):
    """A file in the format of the original ViT (JAX): kernels [in, out], attention split into heads."""
    s, d, h = model.state_dict(), 32, 2
    out = {
        "embedding/kernel": s["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": s["patch_embed.proj.bias"],
        "cls": s["cls_token"],
        "Transformer/posembed_input/pos_embedding": s["pos_embed"],
        "Transformer/encoder_norm/scale": s["norm.weight"],
        "Transformer/encoder_norm/bias": s["norm.bias"],
        "head/kernel": torch.zeros(d, 21),
        "head/bias": torch.zeros(21),
    }
    for i in range(2):
        b, t = f"Transformer/encoderblock_{i}/", f"blocks.{i}."
        for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            out |= {b + f"{theirs}/scale": s[t + f"{ours}.weight"], b + f"{theirs}/bias": s[t + f"{ours}.bias"]}
        attention = b + "MultiHeadDotProductAttention_1/"
        parts = zip(("query", "key", "value"), s[t + "attn.qkv.weight"].chunk(3), s[t + "attn.qkv.bias"].chunk(3))
        for part, weight, bias in parts:
            out[attention + f"{part}/kernel"] = weight.T.reshape(d, h, d // h)
            out[attention + f"{part}/bias"] = bias.view(h, -1)
        out |= {attention + "out/kernel": s[t + "attn.proj.weight"].T.reshape(h, d // h, d)}
        out |= {attention + "out/bias": s[t + "attn.proj.bias"]}
        for n, ours in enumerate(("fc1", "fc2")):
            dense = b + f"MlpBlock_3/Dense_{n}/"
            out |= {dense + "kernel": s[t + f"mlp.{ours}.weight"].T, dense + "bias": s[t + f"mlp.{ours}.bias"]}
    np.savez(path, **{key: t.numpy() for key, t in out.items()})


def test_npz_of_the_original_vit(tmp_path):
    source = vit("vit_base_patch16_224", num_classes=21, **SIZES)
    npz_of(source, tmp_path / "ViT-B_16.npz")
    assert_loaded(make_model("vit_base_patch16_224", 5, 32, str(tmp_path / "ViT-B_16.npz")), source)
    larger = make_model("vit_base_patch16_224", 5, 64, str(tmp_path / "ViT-B_16.npz"))  # positions are interpolated
    assert logits(larger, images(size=64)).shape == (2, 5)


@pytest.mark.parametrize(
    "content, words",
    [
        (lambda: b"no weights", "not a file of weights"),
        (lambda: {"blocks.0.attn.qkv.weight": torch.zeros(3, 3)}, "must hold blocks.0.attn.qkv.weight"),
        (lambda: {k: t for k, t in vit(**SIZES).state_dict().items() if k != "norm.bias"}, "it lacks norm.bias"),
        (lambda: {**vit(**SIZES).state_dict(), "blocks.2.norm1.bias": torch.zeros(32)}, "has blocks.2.norm1.bias"),
    ],
)
def test_weights_that_do_not_fit(content, words, tmp_path):
    path, made = tmp_path / "w.pth", content()
    path.write_bytes(made) if isinstance(made, bytes) else torch.save(made, path)
    refuses(ValueError, f"w.pth .*{words}", make_model, "vit_base_patch16_224", 5, 32, str(path))
    path.rename(tmp_path / "w.npz")
    refuses(ValueError, "w.npz", make_model, "vit_base_patch16_224", 5, 32, str(tmp_path / "w.npz"))


def test_weights_are_named(monkeypatch):
    refuses(ValueError, "checkpoint must name", make_model, "vit_base_patch16_224", 5)
    says = "no checkpoint nothing.pth"
    refuses(FileNotFoundError, says, make_model, "vit_base_patch16_224", 5, checkpoint="nothing.pth")
    monkeypatch.setattr(timm().models._builder, "load_pretrained", Mock(side_effect=ConnectionError("offline\nmore")))
    says = "weights of vit_base_patch16_224 cannot be downloaded; checkpoint .*: offline$"
    refuses(OSError, says, make_model, "vit_base_patch16_224", 5, 32, "download")


def test_folder_of_transformers(tmp_path):
    source = vit_of_transformers(num_labels=21)
    source.save_pretrained(tmp_path)
    model = make_model(f"hf:{tmp_path}", 5)
    assert_loaded(model, source)
    wrapped = torch.nn.DataParallel(model)  # as DistributedDataParallel, it has no config
    for each in (model, wrapped):
        assert logits(each, images()).shape == logits(each, images(size=64)).shape == (2, 5)
    random = make_model(f"hf:{tmp_path}", 5, 64, "random")
    assert random.config.image_size == 64
    says = "normalize must be 'imagenet' or 'none' for this ViTForImageClassification"
    refuses(ValueError, says, normalisation, model, "model")
    assert normalisation(model, "none") == ((0.0,) * 3, (1.0,) * 3)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 1.0]}')
    for checkpoint in (None, "random"):
        assert normalisation(make_model(f"hf:{tmp_path}", 5, 32, checkpoint), "model")[1] == (0.25, 0.5, 1.0)


def test_stochastic_depth_of_transformers(tmp_path, caplog):
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(image_size=32, embed_dim=32, depths=[1, 1], num_heads=[2, 4], window_size=2)
    config.save_pretrained(tmp_path)
    model = make_model(f"hf:{tmp_path}", 5, 32, "random", 0.3)
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "SwinDropPath"]
    assert max(rates) == pytest.approx(0.3)
    transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    with caplog.at_level("INFO"):
        make_model(f"hf:{tmp_path}", 5, 32, "random", 0.3)
    assert "vit of transformers has no stochastic depth" in caplog.text


def test_normalisation():
    model = vit("vit_base_patch16_224", **SIZES)
    assert normalisation(model, "imagenet")[0] == (0.485, 0.456, 0.406)
    assert normalisation(model, "model")[0] == tuple(model.pretrained_cfg["mean"])


def test_a_model_of_timm_in_a_folder_and_on_the_hub(tmp_path, monkeypatch):
    source, folder = vit(num_classes=3), tmp_path / "model"
    timm().models.save_for_hf(source, folder, model_config={"num_classes": 3}, model_args={"depth": 2, "img_size": 32})
    for checkpoint in (None, "download"):
        model = make_model(f"local-dir:{folder}", 5, 32, checkpoint)
        assert model.num_classes == 5 and torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    random = make_model(f"local-dir:{folder}", 5, 32, "random")
    assert not torch.equal(random.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    refuses(FileNotFoundError, "there is no folder", make_model, f"local-dir:{tmp_path / 'none'}", 5, 32)
    (tmp_path / "empty").mkdir()
    refuses(ValueError, "timm cannot read model", make_model, f"local-dir:{tmp_path / 'empty'}", 5, 32)
    factory = timm().models._factory  # the folder stands in for the hub
    hub = Mock(return_value=factory.load_model_config_from_path(str(folder)))
    monkeypatch.setattr(factory, "load_model_config_from_hf", hub)
    model = make_model("hf-hub:someone/vit", 5, 32, "download")
    assert [call.args[0] for call in hub.call_args_list] == ["someone/vit"]
    assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    refuses(ValueError, "checkpoint must name", make_model, "hf-hub:someone/vit", 5, 32)
