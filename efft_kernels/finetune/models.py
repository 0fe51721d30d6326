"""Models of timm and transformers by name, with weights from a file, downloaded by these libraries, or random."""

import difflib
import logging
import sys
from pathlib import Path

from torch import Tensor, nn

from ..extras import need, timm
from ..layouts import heads_of
from ..preparation import Preparation
from .settings import Settings

log = logging.getLogger("efft_kernels.finetune")


def make_model(
    name: str, classes: int, image_size: int = 224, checkpoint: str | None = None, drop_path: float = 0.0
) -> nn.Module:
    """Make a classifier with a new head.

    Args:
        name: of a timm model, also as "hf-hub:USER/NAME" or "local-dir:FOLDER", or "hf:" followed by a folder or a
            name of transformers.
        classes: of the head.
        image_size: side of the images in pixels.
        checkpoint: a file (.npz of the original ViT, .pth, .pt, .bin, .safetensors), "download", or "random". For
            "local-dir:" None and "download" are the weights of the folder.
        drop_path: rate of stochastic depth; ignored, with a log message, for a model of transformers without it.

    Raises:
        ValueError: an unknown model, no choice of weights, or weights that do not fit.
        FileNotFoundError: there is no such file. OSError: the weights cannot be downloaded.
    """
    kind, _, place = name.partition(":")
    # a path that is not absolute may be a name on the hub of transformers
    if not Path(place).is_dir() and (kind == "local-dir" or (kind == "hf" and Path(place).is_absolute())):
        raise FileNotFoundError(f"there is no folder {place} for model {name!r}")
    if kind == "hf":
        return _of_transformers(place, classes, image_size, checkpoint, drop_path)
    library = timm()
    known = name.partition(".")[0]
    elsewhere = name.startswith(("hf-hub:", "local-dir:"))  # timm reads the architecture from the hub or a folder
    if kind == "local-dir":
        checkpoint = checkpoint or "download"
    if not elsewhere and not library.is_model(known):
        names = library.list_models()
        # a name that was cut, or its end mistyped
        starts = [each for each in names if len(known) > 3 and each.startswith(known[:-1])]
        near = list(dict.fromkeys([*starts[:2], *difflib.get_close_matches(known, names, 3)]))[:3]
        raise ValueError(
            f"model must be a model of timm or 'hf:' and one of transformers, got {name!r}"
            + f"; near it are {', '.join(near)}" * bool(near)
        )
    if checkpoint is None:
        raise ValueError(
            "checkpoint must name the pre-trained weights: a file, 'download' to let timm fetch its own, or 'random' "
            "for a control without pre-training"
        )
    file = None if checkpoint in ("download", "random") else Path(checkpoint)
    if file and not file.is_file():
        if file.exists():
            raise ValueError(f"checkpoint must be a file of weights, got {file}, a folder or a device")
        raise FileNotFoundError(f"there is no checkpoint {file}")
    options = {"num_classes": classes, "pretrained": checkpoint == "download", "drop_path_rate": drop_path}

    def create(**more) -> nn.Module:
        try:
            return library.create_model(name, **more, **options)
        except OSError as error:
            if elsewhere or checkpoint != "download":
                raise
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise OSError(f"the weights of {name} cannot be downloaded; checkpoint may name a file: {why}") from error

    try:
        model = create(img_size=image_size)
    except (TypeError, RuntimeError) as error:
        if "img_size" not in str(error):
            raise ValueError(f"timm cannot make {name} for images of {image_size} pixels: {error}") from error
        model = create()  # a model for images of any size
    except AssertionError as error:
        raise ValueError(f"timm cannot make {name} for images of {image_size} pixels: {error}") from error
    except (OSError, ValueError, KeyError) as error:
        if not elsewhere:
            raise
        raise ValueError(f"timm cannot read model {name!r}: {str(error).strip().splitlines()[0]}") from error
    if file:
        _load(model, file)
    return model


def public_name(model: str) -> str:
    """The name of a model without the place of its folder on this machine."""
    kind, _, place = model.partition(":")
    return f"{kind}:{Path(place).resolve().name}" if kind in ("hf", "local-dir") and Path(place).exists() else model


def _load(model: nn.Module, file: Path) -> None:
    """Load all weights except the head from a file; position embeddings are interpolated to the model's grid."""
    from timm.models import load_state_dict

    if file.suffix == ".npz":
        if not hasattr(model, "load_pretrained"):
            raise ValueError(f"{file} is in the format of the original ViT, which {type(model).__name__} does not read")
        try:
            model.load_pretrained(str(file))
        except (KeyError, ValueError, AssertionError, RuntimeError, OSError) as error:
            raise ValueError(f"{file} does not fit this {type(model).__name__}: {error}") from error
        return
    try:
        state = load_state_dict(str(file))
    except Exception as error:  # unpickling raises any exception
        # timm's advice is to run the code in the file
        why = "it may hold more than tensors" if "weights_only" in str(error) else error
        raise ValueError(f"{file} is not a file of weights: {why}") from error
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    own = model.state_dict()
    try:
        state = adapt(state, model) if adapt else state
        state = state.get("state_dict", state)
    except (KeyError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{file} does not fit this {type(model).__name__}: {error}") from error
    heads = tuple(f"{key}." for key in heads_of(model))
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    # drop the classifier of the file, which is for the classes of another task
    state = {
        key: t
        for key, t in state.items()
        if not (key.startswith(heads) and (key not in own or key.rpartition(".")[0] in linears))
    }
    for key, t in state.items():
        if key in own and own[key].shape != t.shape:
            raise ValueError(f"{file} must hold {key} of shape {tuple(own[key].shape)}, got {tuple(t.shape)}")
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.startswith(heads)]
    # norms that this model does not apply, such as the one before another kind of pooling, are harmless
    unexpected = [key for key in unexpected if not key.startswith(("norm.", "fc_norm.", "pre_logits.", "mask_token"))]
    if missing or unexpected:
        wrong = f"lacks {missing[0]}" if missing else f"has {unexpected[0]}, which the model does not have"
        raise ValueError(
            f"{file} does not fit this {type(model).__name__}: it {wrong} ({len(missing + unexpected)} names)"
        )


def _of_transformers(name: str, classes: int, image_size: int, checkpoint: str | None, drop_path: float) -> nn.Module:
    timm()  # transformers imports torchvision, too
    need("transformers")
    from transformers import AutoConfig, AutoModelForImageClassification
    from transformers.image_processing_base import ImageProcessingMixin

    if checkpoint not in (None, "download", "random"):
        raise ValueError(
            f"checkpoint must be 'download', 'random' or unset for a model of transformers, got {checkpoint!r}"
        )
    local = {"local_files_only": checkpoint != "download"}
    try:
        config = AutoConfig.from_pretrained(name, num_labels=classes, **local)
        if hasattr(config, "drop_path_rate"):
            config.drop_path_rate = drop_path
        elif drop_path:
            log.info(f"{config.model_type} of transformers has no stochastic depth: drop_path={drop_path} does nothing")
        if checkpoint == "random":
            config.image_size = image_size
            model = AutoModelForImageClassification.from_config(config)
        else:
            model = AutoModelForImageClassification.from_pretrained(
                name, config=config, ignore_mismatched_sizes=True, **local
            )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model 'hf:{name}' cannot be made (checkpoint='download' lets transformers download it): {first}"
        ) from error
    try:
        own, _ = ImageProcessingMixin.get_image_processor_dict(name, **local)
        model.pretrained_cfg = {"mean": own.get("image_mean"), "std": own.get("image_std")}  # timm's name for it
    except OSError:
        pass  # the folder has no image processor
    return model


def checkpoint_blocks(model: nn.Module) -> None:
    """Let a model compute the activations of its blocks again in the backward instead of keeping them.

    Raises:
        ValueError: a model that has no switch for it.
    """
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(True)
    elif getattr(model, "supports_gradient_checkpointing", False):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        raise ValueError(f"gradient_checkpointing must be False for {type(model).__name__}, which does not offer it")


def logits(model: nn.Module, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, classes]
    """The logits of a model of either library."""
    size = getattr(getattr(getattr(model, "module", model), "config", None), "image_size", None)  # also of DDP's model
    if isinstance(size, int) and size != images.shape[-1]:
        out = model(images, interpolate_pos_encoding=True)
    else:
        out = model(images)
    return out if isinstance(out, Tensor) else out.logits


def normalisation(model: nn.Module, how: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of images in [0, 1], per channel.

    Args:
        how: "imagenet" for those of ImageNet, "model" for those that the weights were trained with, or "none" for 0 and
            1, which leaves images in [0, 1].

    Raises:
        ValueError: how="model", and the model does not state them.
    """
    if how == "imagenet":
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    if how == "none":
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    own = getattr(model, "pretrained_cfg", None) or {}
    if not (own.get("mean") and own.get("std")):
        raise ValueError(
            f"normalize must be 'imagenet' or 'none' for this {type(model).__name__}, which states no mean and "
            "deviation"
        )
    return tuple(own["mean"]), tuple(own["std"])


def preparation_of(model: nn.Module, settings: Settings) -> Preparation:
    """How a run prepares the images that it is measured on: resized to a square, without a crop."""
    mean, std = normalisation(model, settings.normalize)
    return Preparation((settings.image_size,) * 2, mean, std, settings.interpolation, crop_pct=1.0, crop_mode="squash")
