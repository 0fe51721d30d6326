"""export_lora: folders that PEFT loads, with the outputs of the adapter."""

import copy
import json

import pytest
import torch
from models import METHODS, images, shake, timm, vit
from refusals import refuses
from safetensors.torch import load_file

import efft_kernels as ek

timm()  # PEFT imports torchvision, which timm() prepares
peft = pytest.importorskip("peft")


def check_export(base, model, x, folder):
    """PEFT computes what the model does."""
    ek.export_lora(model, folder)
    with torch.no_grad():
        got = peft.PeftModel.from_pretrained(base, str(folder)).eval()(x)
        torch.testing.assert_close(got, model(x), rtol=1e-10, atol=1e-10)


def adapted(config, **options):
    base = vit(**options).double()
    model = ek.inject(copy.deepcopy(base), config, head=5, train=("patch_embed", "patch_embed.proj"))
    return base, shake(model)


@pytest.mark.parametrize("method", METHODS)
def test_peft_computes_the_same(method, tmp_path):
    base, model = adapted(METHODS[method])
    with torch.no_grad():
        for p in (*model.head.parameters(), *model.patch_embed.parameters()):
            p.normal_()
    base.reset_classifier(5)
    check_export(base.double(), model, images(dtype=torch.float64), tmp_path)


def test_the_folder_is_a_plain_lora(tmp_path):
    _, model = adapted(ek.LoRAConfig(rank=2, targets=("q", "v", "fc2")))
    ek.export_lora(model, tmp_path, base_model="vit_tiny")
    config, tensors = peft.LoraConfig.from_pretrained(str(tmp_path)), load_file(tmp_path / "adapter_model.safetensors")
    assert config.base_model_name_or_path == "vit_tiny" and config.modules_to_save == ["head", "patch_embed"]
    up = tensors["base_model.model.blocks.0.attn.qkv.lora_B.weight"]
    assert up[:192].any() and not up[192:384].any() and up[384:].any()
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == {
        f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "mlp.fc2")
    }
    assert {len(t) for key, t in tensors.items() if "lora_A" in key} == {2, 4}


def test_paths_that_end_alike(tmp_path):
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.teacher = vit(num_classes=0).blocks, vit(num_classes=0)

        def forward(self, x):
            return self.blocks[0](x) + self.teacher.blocks[0](x)

    base = Two().double().eval()
    config = ek.LoRAConfig(rank=2, targets=("q", "v", "fc2"), blocks=(0,))
    model = shake(ek.inject(copy.deepcopy(base), config, head="keep"))
    check_export(base, model, torch.randn(2, 4, 192, dtype=torch.float64), tmp_path)


@pytest.mark.parametrize("config", [ek.EFFTConfig(rank=2, targets=("qkv",)), ek.LoRAConfig(rank=2)])
def test_an_attention_of_torch_is_one_module_for_peft(config, tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            make = lambda: torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(16, 2, batch_first=True)})
            self.blocks = torch.nn.ModuleList(make() for _ in range(2)).double().eval()

        def forward(self, x):
            for block in self.blocks:
                x = x + block["attn"](x, x, x)[0]
            return x

    model = shake(ek.inject(Model(), config, head="keep"))
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    check_export(Model(), model.eval(), x, tmp_path)
    assert not torch.allclose(model(x), Model()(x))


def test_refusals(tmp_path):
    blocks = lambda block: torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([block])})
    attention = lambda **options: torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(16, 2, **options)})
    layer = lambda **options: torch.nn.TransformerEncoderLayer(16, 2, 32, **options)
    beit = lambda: vit("beit_base_patch16_224", embed_dim=16, num_heads=2)
    for model, targets in (beit(), ("proj", "mlp")), (blocks(layer()), ("q", "mlp")):  # these are called
        ek.export_lora(ek.inject(model, ek.LoRAConfig(rank=2, targets=targets), head="keep"), tmp_path / "called")
    for model, targets, said in (
        (blocks(attention(kdim=8)), ("q", "v"), "attn.q_proj is a part of .* whose update PEFT does not take"),
        (blocks(attention()), ("attn",), "attn.out_proj is a part of .* whose update PEFT adds twice"),
        (beit(), ("k",), "blocks.0.attn.qkv has a weight that its model reads without calling it"),
        (blocks(layer(batch_first=True)), ("fc2",), "blocks.0.linear2 has a weight that its model reads"),
        (blocks(layer(batch_first=True)), ("q",), "blocks.0.self_attn.in_proj has a weight that its model reads"),
    ):
        ek.inject(model, ek.LoRAConfig(rank=2, targets=targets), head="keep")
        refuses(ValueError, said, ek.export_lora, model, tmp_path / "lora")
    model = vit()
    model.more = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="more must not be a ModuleList"):
        ek.export_lora(ek.inject(model, ek.LoRAConfig(rank=2), train=("more",)), tmp_path / "lora")
    _, model = adapted(ek.LoRAConfig(rank=2))
    refuses(ValueError, "name must be one of", ek.export_lora, model, tmp_path / "lora", name="other")
    model.blocks[0].attn.qkv = torch.nn.Linear(192, 576)
    refuses(ValueError, "must be the Linear that inject adapted", ek.export_lora, model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
