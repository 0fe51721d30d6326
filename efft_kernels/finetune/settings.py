"""Everything that a run depends on, as one record: what the command's flags, its YAML file and train() share."""

import math
import os
from dataclasses import asdict, dataclass, fields
from typing import Literal

Rank = int | tuple[int, int]

# what may differ between a run and its continuation: it changes neither what is learned nor from what
_FREE = ("data", "checkpoint", "out", "device", "accumulate", "fsdp", "workers", "memory", "save_every", "resume")
_OPTIONS = (
    *("rank", "ffn_rank", "scale", "trainable_scale", "cores", "zero_init", "targets", "blocks"),
    *("factor_dropout", "activation_dropout", "tokens", "bottleneck", "placement", "lora_rank"),
)


@dataclass
class Settings:
    """A run. The defaults are the recipe of EFFT (arXiv 2311.06749): ViT-B/16, 224 pixels, no augmentation, AdamW.

    Options of a method that are None have the method's own default; one that the method does not have is refused.

    Args:
        data: a folder of images with a folder for each class (inside train/, val/ and test/ if there are such), a
            folder with VTAB-1K's lists (train800.txt, val200.txt, train800val200.txt, test.txt), or the name of a
            source that was registered with efft_kernels.finetune.data.source.
        out: the folder that the run writes: states while it lasts, then adapter, metrics, curves and logs.
        model: a model of timm, or "hf:" and a model of transformers (a folder, or a name on its hub).
        checkpoint: the pre-trained weights: a file, "download" to let timm or transformers fetch their own, or "random"
            for a control without pre-training. A folder of transformers brings its weights along.
        method: how to adapt: one of the methods listed below, with their options and defaults.
        rank: of EFFT, FacT and LoRA; "[r1, r2]" for unequal ranks.
        ffn_rank: of the FFN group of efft2.
        scale: factor of the update of EFFT, FacT, LoRA and AdaptFormer.
        trainable_scale: train one scale per group of EFFT.
        cores: of EFFT: "per_block" or "shared".
        zero_init: the factor of EFFT that starts at zero: "v" or "u", for efft2 also a pair such as "vu".
        targets: what EFFT, FacT and LoRA adapt: attn, mlp, qkv, q, k, v, proj, gate, fc1, fc2.
        blocks: numbers of the blocks that EFFT, FacT and LoRA adapt.
        factor_dropout: of EFFT, on the entries of its factors.
        activation_dropout: of FacT.
        tokens: prompts of VPT and NOAH; for noah also one number for each block.
        bottleneck: width of Adapter, AdaptFormer and NOAH's adapter; for noah also one number for each block.
        placement: of Adapter: "pfeiffer", after each FFN, or "houlsby", after each attention as well.
        lora_rank: of NOAH's LoRA; also one number for each block.
        epochs: passes over the training images.
        batch_size: images per step of the optimizer, over all processes and accumulated parts together.
        lr: learning rate after the warm-up.
        weight_decay: of AdamW, on everything that is trained.
        warmup_epochs: of linear warm-up; None for a tenth of the epochs.
        warmup_lr: where the warm-up starts.
        min_lr: where the cosine ends.
        drop_path: stochastic depth of the backbone while training.
        label_smoothing: of the cross-entropy.
        clip_grad: largest norm of the gradient; None for no limit.
        image_size: side of the square that images are resized to, in pixels.
        interpolation: of the resize.
        normalize: "imagenet" for ImageNet's mean and deviation as in the paper, or "model" for those of the weights.
        augment: of training images: "none", "flip", "crop" (random crops and flips), "rand" (RandAugment as well).
        select: which weights count: those after the "last" epoch, or of the epoch that was best on "val". VTAB-1K's 200
            validation images are trained on for "last", held out for "val". Test images never choose anything.
        classes: number of classes; None to read it from the data.
        test_fraction: of a folder without a test part, held out of each class for testing.
        val_fraction: of a folder without a val part, held out of each class for select="val".
        seed: of the new weights, the order of images, dropout and augmentation. Not of held-out parts, which stay.
        device: "auto", "cpu" or "cuda".
        mixed_precision: "no", "bf16", "fp16", or "auto": on a GPU bf16 where it has it, else fp16; "no" on a CPU.
        dtype: of the weights: "float32" or "float64".
        accumulate: parts that a batch is computed in, to save memory.
        fsdp: shard the weights over the processes (FSDP2) instead of copying them (DDP).
        workers: processes that read images; they are not used for images that are kept in memory.
        memory: GiB of resized images to keep in memory, which then are read only once.
        save_every: steps between states to resume from.
        resume: continue from the last complete state in ``out``; false starts over.
    """

    data: str
    out: str
    model: str = "vit_base_patch16_224"
    checkpoint: str | None = None
    method: str = "efft2"
    rank: Rank | None = None
    ffn_rank: Rank | None = None
    scale: float | None = None
    trainable_scale: bool | None = None
    cores: Literal["per_block", "shared"] | None = None
    zero_init: str | None = None
    targets: tuple[str, ...] | None = None
    blocks: tuple[int, ...] | None = None
    factor_dropout: float | None = None
    activation_dropout: float | None = None
    tokens: int | tuple[int, ...] | None = None
    bottleneck: int | tuple[int, ...] | None = None
    placement: Literal["pfeiffer", "houlsby"] | None = None
    lora_rank: int | tuple[int, ...] | None = None
    epochs: int = 100
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup_epochs: float | None = None
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    drop_path: float = 0.1
    label_smoothing: float = 0.0
    clip_grad: float | None = None
    image_size: int = 224
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    normalize: Literal["imagenet", "model"] = "imagenet"
    augment: Literal["none", "flip", "crop", "rand"] = "none"
    select: Literal["last", "val"] = "last"
    classes: int | None = None
    test_fraction: float = 0.2
    val_fraction: float = 0.2
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    dtype: Literal["float32", "float64"] = "float32"
    accumulate: int = 1
    fsdp: bool = False
    workers: int = 2
    memory: float = 1.0
    save_every: int = 100
    resume: bool = True

    def __post_init__(self):
        for name in ("data", "out", "checkpoint"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                setattr(self, name, os.fspath(value))
        for field in fields(self):  # YAML brings lists
            if isinstance(getattr(self, field.name), list | range):
                setattr(self, field.name, tuple(getattr(self, field.name)))
        self.check()

    def check(self) -> None:
        """Raises ValueError, with the name of the setting, what it must be and what it is."""
        for name in ("data", "out", "model", "method"):
            self._need(name, isinstance(getattr(self, name), str) and bool(getattr(self, name)), "a non-empty string")
        positive = "epochs", "batch_size", "image_size", "accumulate", "save_every"
        for name in (*positive, *(["classes"] if self.classes is not None else [])):
            self._need(name, type(getattr(self, name)) is int and getattr(self, name) >= 1, "an int of at least 1")
        for name in ("workers", "seed"):
            self._need(name, type(getattr(self, name)) is int and getattr(self, name) >= 0, "an int of at least 0")
        numbers = ("lr", "weight_decay", "warmup_lr", "min_lr", "memory")
        given = [name for name in ("warmup_epochs", "clip_grad") if getattr(self, name) is not None]
        for name in (*numbers, *given):
            value = getattr(self, name)
            ok = isinstance(value, int | float) and math.isfinite(value) and value >= 0
            self._need(name, ok, "a finite number of at least 0")
        for name in ("drop_path", "label_smoothing", "test_fraction", "val_fraction"):
            value = getattr(self, name)
            self._need(name, isinstance(value, int | float) and 0 <= value < 1, "a number in [0, 1)")
        self._need("seed", self.seed < 2**63, "less than 2 ** 63")
        self._need("warmup_epochs", self.warmup <= self.epochs, f"at most the {self.epochs} epochs")
        self._need("batch_size", self.batch_size % self.accumulate == 0, f"a multiple of accumulate={self.accumulate}")
        for name, allowed in _choices().items():
            value = getattr(self, name)
            self._need(name, value in allowed, f"one of {', '.join(map(repr, allowed))}")

    def _need(self, name: str, ok: bool, what: str) -> None:
        if not ok:
            raise ValueError(f"{name} must be {what}, got {getattr(self, name)!r}")

    @property
    def warmup(self) -> float:
        """epochs of warm-up"""
        return self.epochs / 10 if self.warmup_epochs is None else self.warmup_epochs

    @property
    def options(self) -> dict:
        """What is set of the method's options."""
        return {name: getattr(self, name) for name in _OPTIONS if getattr(self, name) is not None}

    def identity(self) -> dict:
        """The settings that a run and its continuation must share; data and weights are compared by content."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE}


def _choices() -> dict[str, tuple]:
    found = {}
    for field in fields(Settings):
        alternatives = getattr(field.type, "__args__", ())
        literal = next((t for t in (field.type, *alternatives) if getattr(t, "__origin__", None) is Literal), None)
        if literal is not None:
            optional = (None,) if literal is not field.type else ()
            found[field.name] = (*literal.__args__, *optional)
    return found
