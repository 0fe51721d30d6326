"""How images are prepared for a model: what an adapter file states, and what predictions repeat."""

import contextlib
import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, lru_cache, partial

import torch
from torch import Tensor, nn

from .extras import timm

log = logging.getLogger("efft_kernels")

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
CROPS = ("center", "squash", "border")
_MOST = 4096  # pixels of a side: a file of a stranger must not ask for all memory
Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Preparation:
    """How an image becomes the input of a model, in the terms of timm.

    Args:
        size: (height, width) in pixels.
        mean, std: of each channel of pixels in [0, 1]; (pixel - mean) / std is the input.
        interpolation: of the resize: nearest, bilinear, bicubic, lanczos, box or hamming.
        crop_pct: the share of the resized image that the crop keeps, in (0, 1].
        crop_mode: "squash" resizes to size / crop_pct without keeping proportions, "center" resizes the shorter side,
            "border" the longer side and fills the rest.

    Raises:
        TypeError, ValueError: a value of another kind or out of range; the message names it.
    """

    size: tuple[int, int] = (224, 224)
    mean: Channels = (0.485, 0.456, 0.406)
    std: Channels = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "squash"

    def __post_init__(self):
        for name, count in (("size", 2), ("mean", 3), ("std", 3)):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or len(value) != count:
                raise TypeError(f"{name} must be {count} numbers, got {value!r}")
            object.__setattr__(self, name, tuple(value if name == "size" else map(_finite, value)))
        for side in self.size:
            if type(side) is not int or not 1 <= side <= _MOST:
                raise ValueError(f"size must be (height, width), each from 1 to {_MOST}, got {self.size}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        object.__setattr__(self, "crop_pct", _finite(self.crop_pct))
        if not 0.1 <= self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be from 0.1 to 1, got {self.crop_pct}")
        for name, allowed in (("interpolation", INTERPOLATIONS), ("crop_mode", CROPS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    @classmethod
    def of_model(cls, model: nn.Module) -> "Preparation":
        """As timm evaluates this model of its own, by its ``pretrained_cfg``."""
        from_timm = timm().data.resolve_model_data_config(model)
        kept = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
        return cls(tuple(from_timm["input_size"][-2:]), **{name: from_timm[name] for name in kept})

    @classmethod
    def from_json(cls, text: str) -> "Preparation":
        """Read what :meth:`to_json` gives.

        Raises:
            TypeError, ValueError: it is something else.
        """
        try:
            return cls(**json.loads(text))
        except RecursionError as error:
            raise ValueError("nested too deeply") from error

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def transform(self, dtype: torch.dtype = torch.float32) -> Callable[..., Tensor]:
        """A function from a PIL image in RGB to a tensor [3, height, width] of this floating-point dtype."""
        return _transform(self, dtype)

    def __str__(self) -> str:
        crop = f"{self.crop_mode} {self.crop_pct:g}"
        return f"{self.size[0]} x {self.size[1]}, {self.interpolation}, {crop}, mean {self.mean}, std {self.std}"


def _finite(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"mean, std and crop_pct must be finite numbers, got {value!r}")
    return float(value)


@lru_cache(64)
def _transform(preparation: Preparation, dtype: torch.dtype) -> Callable[..., Tensor]:
    timm()
    from timm.data import create_transform

    resize = create_transform(
        (3, *preparation.size),
        interpolation=preparation.interpolation,
        crop_pct=preparation.crop_pct,
        crop_mode=preparation.crop_mode,
        use_prefetcher=True,  # the pixels as uint8
    )
    mean, std = (torch.tensor(t, dtype=dtype).view(3, 1, 1) * 255 for t in (preparation.mean, preparation.std))
    return partial(_prepared, resize, mean, std)


def _prepared(resize, mean: Tensor, std: Tensor, image) -> Tensor:  # of the module, so that processes can be given it
    return (torch.as_tensor(resize(image)).to(mean.dtype) - mean) / std


def to_rgb(image):
    """Load a PIL image and convert it to RGB: rotated as EXIF says, transparent parts on white, 16-bit grey scaled to 8
    bits, which convert() alone would clip at 255.

    Raises:
        ValueError: its pixels have 32 bits. Pillow raises errors of any type for a damaged file.
    """
    from PIL import Image, ImageOps

    image.load()
    sixteen = image.format in ("PNG", "PPM")  # whose mode I is 16 bits; that of PGM is scaled to its largest value
    with contextlib.suppress(Exception):  # malformed EXIF does not make the pixels unusable
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and sixteen):
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels have 32 bits of unknown range (mode {image.mode}); save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            _say_white()
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@cache
def _say_white() -> None:
    log.info("transparent parts of images are shown on white")
