"""Hugging Face PEFT: EFFT as one of its methods, and its LoRA adapters on the kernels of this library."""

from ..extras import torchvision_on_cpu

try:
    torchvision_on_cpu()  # transformers imports torchvision, and PEFT imports transformers
    import peft
    import transformers.pytorch_utils
except ImportError as error:
    raise ImportError(f'efft_kernels.peft needs PEFT: pip install "efft_kernels[peft]" ({error})') from error

from .config import EFFTPeftConfig
from .efft import EFFTPeftModel
from .layer import EFFTPeftLinear
from .lora import FastLoraLinear, accelerate_lora, restore_lora

__all__ = ["EFFTPeftConfig", "EFFTPeftLinear", "EFFTPeftModel", "FastLoraLinear", "accelerate_lora", "restore_lora"]
