"""The settings of a run: one record behind the flags of the command, its YAML file and train()."""

import math
import os
from dataclasses import asdict, dataclass, fields
from typing import Literal

Rank = int | tuple[int, int]

# settings that may differ between a run and its continuation, because the result does not depend on them, up to
# rounding and the masks that dropout and stochastic depth draw
_FREE = (
    *("data", "checkpoint", "out", "device", "accumulate", "fsdp", "workers", "memory", "save_every", "resume"),
    *("gradient_checkpointing", "compile", "cuda_graph", "trackers"),
)
_OPTIONS = (
    *("rank", "ffn_rank", "scale", "trainable_scale", "cores", "zero_init", "targets", "blocks"),
    *("factor_dropout", "activation_dropout", "tokens", "bottleneck", "placement", "lora_rank"),
    *("init", "rank_dropout", "rank_weights", "channel_scale", "rank_stabilized", "dora"),
)


@dataclass
class Settings:
    """Settings of a run; the defaults are the recipe of EFFT (arXiv 2311.06749): ViT-B/16, 224 pixels, AdamW.

    An option of a method that is None has the method's default; an option that the method does not have is an error.

    Args:
        data: a folder of images with one folder per class (perhaps inside train/, val/ and test/), a CSV file (columns
            image, label or labels, perhaps split), a folder that Hugging Face's datasets wrote by save_to_disk, a
            folder with the lists of VTAB-1K (train800.txt, val200.txt, train800val200.txt, test.txt), or from Python
            the name of a source registered with efft_kernels.finetune.data.source.
        out: the folder of the run: checkpoints during training, then adapter, metrics, curves and logs.
        model: a model of timm, or "hf:" followed by a model of transformers (a folder, or a name on its hub).
        checkpoint: the pre-trained weights: a file, "download" to let timm or transformers download theirs, or
            "random" for a control without pre-training. Not needed for a folder of transformers, which has its weights.
        method: one of the methods listed below, with their options and defaults.
        rank: rank of EFFT, FacT and LoRA; "[r1, r2]" for two different ranks.
        ffn_rank: rank of the FFN group of efft2; None for the same as ``rank``.
        scale: factor of the update of EFFT, FacT, LoRA and AdaptFormer.
        trainable_scale: train one scale per group of EFFT.
        cores: one core per block ("per_block") or one for all blocks ("shared") of EFFT.
        zero_init: the factor of EFFT that starts at zero: "v" or "u", for efft2 also a pair such as "vu".
        targets: the matrices that EFFT, FacT and LoRA adapt: attn, mlp, qkv, q, k, v, proj, gate, fc1, fc2.
        blocks: the numbers of the blocks that EFFT, FacT and LoRA adapt.
        factor_dropout: dropout on the entries of EFFT's factors.
        activation_dropout: dropout on the activations of FacT.
        init: start of the factors of EFFT, FacT and LoRA: "xavier", or "released" for that of the authors' code, to
            which released scales belong.
        rank_dropout: dropout on whole rank-1 terms of EFFT, FacT and LoRA.
        rank_weights: train a coefficient for each rank-1 term of EFFT, FacT and LoRA.
        channel_scale: train a factor for each output of the matrices that EFFT, FacT and LoRA adapt.
        rank_stabilized: divide the scale of EFFT, FacT and LoRA by the root of the rank.
        dora: train a magnitude for each output of the matrices that EFFT, FacT and LoRA adapt (DoRA).
        tokens: number of prompts of VPT and NOAH; for noah also a list with one number per block.
        bottleneck: width of Adapter, AdaptFormer and NOAH's adapter; for noah also a list with one number per block.
        placement: where Adapter adds bottlenecks: "pfeiffer", after each FFN, or "houlsby", also after each attention.
        lora_rank: rank of NOAH's LoRA; also a list with one number per block.
        epochs: passes over the training images, each in another order.
        batch_size: images per step of the optimizer, over all processes and accumulated parts together; not more than
            there are. The images of an epoch that fill no whole batch are left out of it.
        lr: learning rate after the warm-up.
        lr_ratio: learning rate of the factors that start at zero, as a multiple of lr (LoRA+).
        weight_decay: weight decay of AdamW, on all trained parameters.
        warmup_epochs: length of the linear warm-up; None for a tenth of the epochs.
        warmup_lr: learning rate at the start of the warm-up, at most lr.
        min_lr: learning rate at the end of the cosine schedule, at most lr.
        drop_path: rate of stochastic depth of the backbone while training.
        head_init: start of the classifier: "random", or "probe": a linear probe of the untouched model, trained
            for a few seconds on its features of the training images.
        label_smoothing: label smoothing of the cross-entropy.
        clip_grad: largest norm of the gradient; None for no limit.
        class_weights: "balanced" weighs each class by the inverse of its number of training images.
        ema: decay of a moving average of the trained weights, such as 0.999, which is what is measured and saved; it
            starts lower, so that early weights are forgotten. None for no average.
        patience: with select="val", stop after this many epochs without a better one. None trains all epochs.
        image_size: side of the square that images are resized to, in pixels.
        interpolation: interpolation of the resize.
        normalize: "imagenet" for ImageNet's mean and deviation as in the paper, "model" for those of the weights, or
            "none" for pixels from 0 to 1.
        augment: augmentation of training images: "none", "flip", "crop" (random crops and flips) or "rand" (RandAugment
            as well).
        select: the final weights: those after the "last" epoch, or those of the epoch that was best on "val". VTAB-1K's
            200 validation images are used for training with "last" and held out with "val". Test images are never used
            to choose.
        classes: number of classes; None to read it from the data.
        test_fraction: share of each class to hold out for testing, if the folder has no test part.
        val_fraction: share of each class to hold out for select="val", if the folder has no val part.
        seed: seed of new weights, image order, dropout and augmentation; the held-out parts do not depend on it.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "mps" or "xpu".
        mixed_precision: autocast: "no", "bf16", "fp16", or "auto": bf16 on a GPU that has it, fp16 on others, "no" on a
            CPU.
        dtype: data type of the weights: "float32" or "float64".
        accumulate: number of parts that a batch is computed in, to save memory.
        gradient_checkpointing: compute activations of the blocks again in the backward, which saves memory.
        compile: compile the model with torch.compile, which takes a minute and pays off in long runs.
        cuda_graph: replay forward and backward as one CUDA graph: on one GPU, where steps wait for the host.
        fsdp: shard the weights over the processes (FSDP2) instead of replicating them (DDP).
        workers: processes that read images; not used for images kept in memory.
        memory: GiB of memory for resized images, which are then read only once.
        save_every: steps between checkpoints; None for one after each epoch and every 100 steps.
        trackers: where metrics are logged: tensorboard, and others of accelerate such as wandb, mlflow or trackio.
        resume: continue from the last complete checkpoint in ``out``; false starts over.
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
    init: Literal["xavier", "released"] | None = None
    rank_dropout: float | None = None
    rank_weights: bool | None = None
    channel_scale: bool | None = None
    rank_stabilized: bool | None = None
    dora: bool | None = None
    tokens: int | tuple[int, ...] | None = None
    bottleneck: int | tuple[int, ...] | None = None
    placement: Literal["pfeiffer", "houlsby"] | None = None
    lora_rank: int | tuple[int, ...] | None = None
    epochs: int = 100
    batch_size: int = 64
    lr: float = 1e-3
    lr_ratio: float = 1.0
    weight_decay: float = 1e-4
    warmup_epochs: float | None = None
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    drop_path: float = 0.1
    head_init: Literal["random", "probe"] = "random"
    label_smoothing: float = 0.0
    clip_grad: float | None = None
    class_weights: Literal["balanced"] | None = None
    ema: float | None = None
    patience: int | None = None
    image_size: int = 224
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    normalize: Literal["imagenet", "model", "none"] = "imagenet"
    augment: Literal["none", "flip", "crop", "rand"] = "none"
    select: Literal["last", "val"] = "last"
    classes: int | None = None
    test_fraction: float = 0.2
    val_fraction: float = 0.2
    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = "auto"
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    dtype: Literal["float32", "float64"] = "float32"
    accumulate: int = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    cuda_graph: bool = False
    fsdp: bool = False
    workers: int = 2
    memory: float = 1.0
    save_every: int | None = None
    trackers: tuple[str, ...] = ("tensorboard",)
    resume: bool = True

    def __post_init__(self):
        for name in ("data", "out", "checkpoint"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                setattr(self, name, os.fspath(value))
        for field in fields(self):  # YAML has lists, not tuples
            if isinstance(getattr(self, field.name), list | range):
                setattr(self, field.name, tuple(getattr(self, field.name)))
        self.check()

    def check(self) -> None:
        """Raise ValueError for the first wrong setting, with its name, what it must be and what it is."""
        for name in ("data", "out", "model", "method"):
            self._need(name, isinstance(getattr(self, name), str) and bool(getattr(self, name)), "a non-empty string")
        positive, optional = ("epochs", "batch_size", "image_size", "accumulate"), ("classes", "patience", "save_every")
        for name in (*positive, *(name for name in optional if getattr(self, name) is not None)):
            self._need(name, type(getattr(self, name)) is int and getattr(self, name) >= 1, "an int of at least 1")
        self._need("classes", (self.classes or 0) <= 1_000_000, "at most 1,000,000")  # a head of gigabytes
        for name in ("workers", "seed"):
            self._need(name, type(getattr(self, name)) is int and getattr(self, name) >= 0, "an int of at least 0")
        numbers = ("lr", "weight_decay", "warmup_lr", "min_lr", "memory")
        given = [name for name in ("warmup_epochs", "clip_grad") if getattr(self, name) is not None]
        for name in (*numbers, *given):
            value = getattr(self, name)
            ok = isinstance(value, int | float) and math.isfinite(value) and value >= 0
            self._need(name, ok, "a finite number of at least 0")
        ok = isinstance(self.lr_ratio, int | float) and math.isfinite(self.lr_ratio) and self.lr_ratio > 0
        self._need("lr_ratio", ok, "a finite number above 0")
        for name in ("drop_path", "label_smoothing", "test_fraction", "val_fraction"):
            value = getattr(self, name)
            self._need(name, isinstance(value, int | float) and 0 <= value < 1, "a number in [0, 1)")
        self._need("seed", self.seed < 2**63, "less than 2 ** 63")
        ema = self.ema is None or (isinstance(self.ema, int | float) and 0 <= self.ema < 1)
        self._need("ema", ema, "a number in [0, 1), or None")
        self._need("patience", self.patience is None or self.select == "val", "None unless select is 'val'")
        known = isinstance(self.trackers, tuple) and all(isinstance(name, str) for name in self.trackers)
        self._need("trackers", known, "a list of names")
        self._need("warmup_epochs", self.warmup <= self.epochs, f"at most the {self.epochs} epochs")
        self._need("batch_size", self.batch_size % self.accumulate == 0, f"a multiple of accumulate={self.accumulate}")
        for name, fits in (("accumulate", 1), ("gradient_checkpointing", False), ("compile", False), ("fsdp", False)):
            self._need(name, not self.cuda_graph or getattr(self, name) == fits, f"{fits} with cuda_graph=True")
        for name, allowed in _choices().items():
            value = getattr(self, name)
            self._need(name, value in allowed, f"one of {', '.join(map(repr, allowed))}")

    def _need(self, name: str, ok: bool, what: str) -> None:
        if not ok:
            raise ValueError(f"{name} must be {what}, got {getattr(self, name)!r}")

    @property
    def warmup(self) -> float:
        """Epochs of warm-up."""
        return self.epochs / 10 if self.warmup_epochs is None else self.warmup_epochs

    @property
    def options(self) -> dict:
        """The options of the method that are set."""
        return {name: getattr(self, name) for name in _OPTIONS if getattr(self, name) is not None}

    def identity(self) -> dict:
        """The settings that a run and its continuation must share. Data and weights are compared by their contents."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE}


def _choices() -> dict[str, tuple]:
    """The allowed values of the settings whose type is a Literal."""
    found = {}
    for field in fields(Settings):
        alternatives = getattr(field.type, "__args__", ())
        literal = next((t for t in (field.type, *alternatives) if getattr(t, "__origin__", None) is Literal), None)
        if literal is not None:
            optional = (None,) if literal is not field.type else ()
            found[field.name] = (*literal.__args__, *optional)
    return found
