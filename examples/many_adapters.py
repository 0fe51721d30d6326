"""One batch whose images use different adapters, each with its own head: AdapterBank.

pip install -e ".[finetune]"
python examples/many_adapters.py                # two adapters of a small random ViT, seconds on a CPU
"""

import argparse
import copy
import tempfile
from pathlib import Path

import timm
import torch

from efft_kernels import EFFTConfig, LoRAConfig, inject, save_adapter
from efft_kernels.serving import AdapterBank

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="vit_tiny_patch16_224", help="a vision transformer of timm")
parser.add_argument("--image-size", type=int, default=32)
args = parser.parse_args()

torch.manual_seed(0)
model = timm.create_model(args.model, num_classes=10, img_size=args.image_size).eval()


def adapter_file(path: Path, config, classes: int) -> Path:
    """Stand-in for training: an adapter with random factors and its own number of classes."""
    trained = inject(copy.deepcopy(model), config, head=classes)
    with torch.no_grad():
        for p in trained.efft.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    save_adapter(trained, path)
    return path


with tempfile.TemporaryDirectory() as folder:
    # ranks, scales and numbers of classes may differ; in one batch the method and the adapted Linears may not
    birds = adapter_file(Path(folder, "birds.safetensors"), EFFTConfig("efft2", rank=8), classes=200)
    cars = adapter_file(Path(folder, "cars.safetensors"), EFFTConfig("efft2", rank=4, scale=1.0), classes=196)
    other = adapter_file(Path(folder, "lora.safetensors"), LoRAConfig(rank=4), classes=5)
    bank = AdapterBank(model)
    bank.add("birds", birds)
    bank.add("cars", cars)
    bank.add("lora", other)

try:
    with bank.use(["birds", "lora"]):
        pass
except ValueError as error:
    print(f"refused: {error}")

images = torch.randn(4, 3, args.image_size, args.image_size)
with torch.inference_mode(), bank.use(["birds", None, "cars", "birds"]):
    logits = model(images)  # one forward; None is the model without an adapter
print(f"logits {tuple(logits.shape)}; classes a sample does not have are -inf")
print("classes per sample:", logits.isfinite().sum(1).tolist())
print(bank)
