"""Small vision transformers with random weights, for tests of whole models."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import efft_kernels as ek
from efft_kernels import extras


def timm():
    """timm, or skip the test module if it is not installed."""
    try:
        return extras.timm()
    except ImportError as error:
        pytest.skip(str(error), allow_module_level=True)


def vit(name: str = "vit_tiny_patch16_224", **options):
    """ViT-Ti of two blocks, 10 classes, 32 x 32 images, in eval mode."""
    return timm().create_model(name, **{"depth": 2, "img_size": 32, "num_classes": 10, **options}).eval()


def swin(**options):
    """Swin with stages of two and one blocks, widths 32 and 64, 32 x 32 images, in eval mode."""
    sizes = dict(img_size=32, window_size=4, embed_dim=32, depths=(2, 1), num_heads=(2, 4))
    fixed = dict(num_classes=10, drop_path_rate=0.0)
    return timm().create_model("swin_tiny_patch4_window7_224", **{**sizes, **fixed, **options}).eval()


def vit_of_transformers(**options):
    """ViT of transformers of two blocks, 10 classes, 32 x 32 images, in eval mode."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, patch_size=16)
    config = transformers.ViTConfig(**{**sizes, "image_size": 32, "num_labels": 10, **options})
    return transformers.ViTForImageClassification(config).eval()


def images(n: int = 2, dtype: torch.dtype = torch.float32, size: int = 32) -> torch.Tensor:
    return torch.randn(n, 3, size, size, dtype=dtype)


def shake(model, std: float = 0.05):
    """Add noise to every factor, so that no update is zero."""
    with torch.no_grad():
        for p in model.efft.parameters():
            p.add_(torch.randn_like(p) * std)
    return model


def biased(model):
    """The biases of timm's Linears start at zero, where nothing shows what becomes of them."""
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("bias"):
                p.normal_(std=0.1)
    return model


METHODS = {
    "efft1": ek.EFFTConfig("efft1", rank=4, scale=2.0, factor_dropout=0.0),
    "efft1-shared": ek.EFFTConfig("efft1", rank=4, scale=2.0, cores="shared", factor_dropout=0.0),
    "efft2": ek.EFFTConfig("efft2", rank=(4, 6), scale=2.0, factor_dropout=0.0, zero_init="vu"),
    "efft2-shared": ek.EFFTConfig("efft2", rank=4, scale=2.0, cores="shared", factor_dropout=0.0),
    "efft2-scale": ek.EFFTConfig("efft2", rank=4, scale=2.0, factor_dropout=0.0, trainable_scale=True),
    "efft2-part": ek.EFFTConfig("efft2", rank=4, scale=2.0, factor_dropout=0.0, targets=("q", "v", "fc2"), blocks=(1,)),
    "efft1-part": ek.EFFTConfig("efft1", rank=4, scale=2.0, factor_dropout=0.0, targets=("k", "proj", "fc1")),
    "fact-tt": ek.FacTConfig("tt", rank=4, scale=2.0, activation_dropout=0.0),
    "fact-tk": ek.FacTConfig("tk", rank=4, scale=2.0, activation_dropout=0.0),
    "lora": ek.LoRAConfig(rank=4, scale=2.0),
    "lora-all": ek.LoRAConfig(rank=4, scale=2.0, targets=("attn", "mlp")),
    "vera": ek.VeRAConfig(rank=8, scale=2.0, targets=("attn", "mlp")),
    "lora-xs": ek.LoRAXSConfig(rank=4, scale=2.0, targets=("q", "v", "fc1")),
    "efft2-options": ek.EFFTConfig(
        rank=(4, 6), scale=2.0, factor_dropout=0.0, targets=("q", "v", "mlp"), rank_weights=True, channel_scale=True
    ),
    "lora-options": ek.LoRAConfig(rank=4, scale=2.0, rank_weights=True, channel_scale=True, rank_stabilized=True),
    "lora-dora": ek.LoRAConfig(rank=4, scale=2.0, dora=True),
    "efft2-dora": ek.EFFTConfig(rank=(4, 6), scale=2.0, factor_dropout=0.0, targets=("k", "mlp"), dora=True),
}

LOW_RANK = [name for name in METHODS if not METHODS[name].to_dict().get("dora")]  # W itself is not scaled
PLAIN = ek.EFFTConfig(rank=4, scale=2.0, factor_dropout=0.0)
DROPPED = ek.EFFTConfig(rank=4, scale=2.0, factor_dropout=0.3)


def adapted(config=PLAIN, make=vit, **options):
    return shake(ek.inject(make(**options), config))


def others(config):
    """The same method with another rank and scale."""
    if isinstance(config, ek.LoRAXSConfig):
        return dataclasses.replace(config, rank=2, scale=3.0)
    rank = (config.rank[0] + 2, config.rank[1] + 1) if isinstance(config.rank, tuple) else config.rank + 2
    return dataclasses.replace(config, rank=rank, scale=3.0)


def check_start_and_merge(model, config, x=None, backend="reference"):
    """The update is zero at the start, then not, and the same when it is merged; returns what is trained."""
    x, logits = images() if x is None else x, lambda y: getattr(y, "logits", y)
    before = logits(model(x))
    ek.inject(model, config, backend=backend)
    torch.testing.assert_close(logits(model(x)), before, rtol=1e-5, atol=1e-6)
    after = logits(shake(model)(x))
    assert not torch.allclose(after, before, atol=1e-4)
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(logits(ek.merge(model)(x)), after, rtol=1e-3, atol=1e-4)
    return trained


def loss_of(model, x):
    return F.cross_entropy(model(x), torch.arange(len(x)))


def gradients(model, loss=None):
    """{name: gradient} of all trained parameters: of ``loss``, or, without one, what backward has left in ``.grad``."""
    names, params = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    if loss is not None:
        return dict(zip(names, torch.autograd.grad(loss, params)))
    return {n: p.grad.clone() for n, p in zip(names, params)}


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    tolerance = tolerance or dict(rtol=1e-4, atol=1e-6)
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda m: f"{name}: {m}", **tolerance)


def assert_bits(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
