"""Fine-tune a timm model with EFFT: inject, train, save, load into a fresh model, merge.

    pip install -e ".[finetune]"
    python examples/finetune_timm.py                # a small random ViT on drawn images, seconds on a CPU

With --model vit_base_patch16_224 --image-size 224 --pretrained it trains ViT-B from timm's weights.
"""

import argparse
import copy

import timm
import torch
import torch.nn.functional as F

from efft_kernels import EFFTConfig, adapter_parameters, inject, load_adapter, merge, plan, save_adapter

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="vit_tiny_patch16_224", help="a vision transformer of timm")
parser.add_argument("--pretrained", action="store_true", help="start from timm's weights; downloads them")
parser.add_argument("--image-size", type=int, default=32)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", default="stripes.safetensors", help="the adapter file to write")
args = parser.parse_args()


def stripes(count: int, size: int):
    """(images, labels): noise with a bright horizontal stripe (class 0) or a bright vertical one (class 1)."""
    images, labels = 0.3 * torch.randn(count, 3, size, size), torch.arange(count) % 2
    for image, label in zip(images, labels):
        (image.mT if label else image)[:, size // 2 : size // 2 + 4] += 2
    return images, labels


torch.manual_seed(0)
model = timm.create_model(args.model, args.pretrained, num_classes=2, img_size=args.image_size)
fresh = copy.deepcopy(model)  # stands for the pre-trained model on another day
config = EFFTConfig("efft2", rank=8)
print(plan(model, config))  # which Linear gets what; changes nothing
inject(model, config)  # the factors and the head train, everything else is frozen
optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-3, weight_decay=1e-4)
model.train()
for step in range(args.steps):
    images, labels = stripes(16, args.image_size)
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step + 1}: loss {loss.item():.3f}")

save_adapter(model, args.out)  # the factors and the head: a small fraction of the model
load_adapter(fresh, args.out)
merge(fresh.eval())  # plain nn.Linear layers: the update is in the weights now
with torch.no_grad():
    difference = (fresh(images) - model.eval()(images)).abs().max().item()
print(f"largest difference between the trained and the merged model: {difference:.1e}")
