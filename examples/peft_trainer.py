"""Train EFFT through Hugging Face PEFT with transformers' Trainer, save it, and load it again.

    pip install -e ".[peft]"
    python examples/peft_trainer.py                 # a small random ViT on random images, seconds on a CPU

With --model google/vit-base-patch16-224-in21k it adapts that checkpoint.
"""

import argparse

import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from efft_kernels.peft import EFFTPeftConfig

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", help="a ViT of transformers: a folder or a name on its hub; none for a small random one")
parser.add_argument("--out", default="peft_example", help="the folder to write")
args = parser.parse_args()


def stripes(count: int, size: int):
    """(images, labels): noise with a bright horizontal stripe (class 0) or a bright vertical one (class 1)."""
    images, labels = 0.3 * torch.randn(count, 3, size, size), torch.arange(count) % 2
    for image, label in zip(images, labels):
        (image.mT if label else image)[:, size // 2 : size // 2 + 4] += 2
    return images, labels


def base() -> ViTForImageClassification:
    torch.manual_seed(0)
    if args.model:
        return ViTForImageClassification.from_pretrained(args.model, num_labels=2)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, num_labels=2))


model = get_peft_model(base(), EFFTPeftConfig(rank=8, modules_to_save=["classifier"]))
model.print_trainable_parameters()
images, labels = stripes(64, model.config.image_size)
data = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels)]
options = {"num_train_epochs": 3, "per_device_train_batch_size": 16, "learning_rate": 1e-3, "logging_steps": 4}
Trainer(model, TrainingArguments(args.out, **options, report_to="none"), train_dataset=data).train()

model.save_pretrained(args.out)  # adapter_model.safetensors and adapter_config.json, as any method of PEFT
loaded = PeftModel.from_pretrained(base(), args.out).merge_and_unload().eval()
with torch.no_grad():
    correct = (loaded(images).logits.argmax(-1) == labels).float().mean().item()
print(f"accuracy on the training images after loading and merging: {correct:.2f}")
