"""From an image to the input of a network: evaluation transforms as plain records."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from statistics import fmean
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from scalablevit_pl.preprocessing.decoding import MODES

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
COLORS = {1: "grayscale", 3: "RGB", 4: "RGBA"}
# Far beyond the images of any network: a larger resize would only exhaust the memory.
LARGEST_SIDE = 16384
LARGEST_DIVISOR = 1024
# Numbers among the logits that are resized at a time: all of a photograph would take gigabytes for 150 classes.
LARGEST_LOGITS = 2**23
# Only the center of a longer image is resized for a center crop.
LARGEST_RATIO = 64


def to_pixels(image: Image.Image) -> Tensor:
    """Return the bytes `(C, H, W)` of an image in the memory layout of images, channels last."""
    return torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1)


@lru_cache(maxsize=32)
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return one number per channel as `(C, 1, 1)`; cached, since a GPU would wait for each copy."""
    with torch.inference_mode(False):  # it may be needed outside of it later
        return torch.tensor(values, device=device)[:, None, None]


# Not an `ABC`: the command line takes options for the fields of a dataclass, not for those of an abstract class.
@dataclass(frozen=True)
class ImagePreprocessing:
    """An evaluation transform as a record of plain values, which travels with the weights.

    Each kind is a frozen dataclass with `interpolation`, `mean` and `std` among its fields. The entries of `mean` and
    `std` are the channels of the images: 1 for grayscale, 3 for RGB, 4 for RGBA.

    Attributes:
        kind: Name of the transform in records.
    """

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        values: Any = self
        if values.interpolation not in get_args(Interpolation):
            raise ValueError(f"interpolation must be one of {get_args(Interpolation)}, got {values.interpolation!r}")
        mean, std = list(values.mean), list(values.std)
        if len(mean) not in MODES or len(std) != len(mean):
            raise ValueError(f"mean and std must have 1, 3 or 4 entries, one for each channel, got {mean} and {std}")
        if not all(0.0 < value < math.inf for value in std) or not all(map(math.isfinite, mean)):
            raise ValueError(f"mean must be finite and std positive, got {mean} and {std}")

    @property
    def channels(self) -> int:
        """Number of channels of the images."""
        values: Any = self
        return len(values.mean)

    def with_channels(self, channels: int) -> Self:
        """Return the record for another number of channels: each has the average mean and standard deviation.

        Images of other than 1, 3 or 4 channels have no record: this one is returned.
        """
        values: Any = self
        if channels == self.channels or channels not in MODES:
            return self
        return replace(self, **{name: (fmean(getattr(values, name)),) * channels for name in ("mean", "std")})

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform an image of any size to `(C, H, W)`, float32, normalized."""
        return self.normalize(self.pixels(image))

    def pixels(self, image: Image.Image) -> Tensor:
        """Transform an image of any size to bytes `(C, H, W)`, before normalization."""
        raise NotImplementedError

    def sample(self, image: Image.Image) -> dict[str, Tensor]:
        """Transform an image to a sample for evaluation: `image`, bytes `(C, H, W)`, and what else a task needs."""
        return {"image": self.pixels(image)}

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the transformed height and width of an image of a height and width."""
        raise NotImplementedError

    def normalize(self, pixels: Tensor) -> Tensor:
        """Normalize bytes `(…, C, H, W)` of any memory layout to contiguous float32."""
        images = torch.empty(pixels.shape, device=pixels.device)
        if pixels.ndim == 4 and pixels.device.type == "cpu":
            for image, one in zip(images, pixels, strict=True):  # one image fits into the cache
                self._normalize_into(image, one)
        else:
            self._normalize_into(images, pixels)
        return images

    def _normalize_into(self, images: Tensor, pixels: Tensor) -> None:
        mean, std = self._statistics(pixels.device)
        torch.div(pixels, 255.0, out=images).sub_(mean).div_(std)

    def denormalize(self, images: Tensor) -> Tensor:
        """Undo `normalize`: normalized images `(…, C, H, W)` to bytes."""
        mean, std = self._statistics(images.device)
        return ((images * std + mean) * 255.0).round().clamp(0, 255).to(torch.uint8)

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        values: Any = self
        return _channels(tuple(values.mean), device), _channels(tuple(values.std), device)

    def summary(self) -> dict[str, str]:
        """Describe the transform for people, as rows of a table."""
        values: Any = self
        mean, std = (", ".join(f"{value:g}" for value in each) for each in (values.mean, values.std))
        return {"mean, std": f"{mean}; {std} for pixels from 0 to 1"}

    def to_dict(self) -> dict[str, Any]:
        """Return the values in types of JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from `to_dict`.

        Raises:
            ValueError: If a value is missing, unknown or out of its range.
        """
        names = {field.name for field in fields(cls)}
        if values.keys() - {"kind"} != names or values.get("kind", cls.kind) != cls.kind:
            raise ValueError(f"a {cls.kind} preprocessing record holds {sorted(names)}, got {dict(values)}")
        try:
            return cls(**{name: tuple(values[name]) if name in ("mean", "std") else values[name] for name in names})
        except TypeError as error:
            raise ValueError(f"{dict(values)} is not a preprocessing record: {error}") from error


@dataclass(frozen=True)
class Preprocessing(ImagePreprocessing):
    """Resize the short side, crop the center, normalize: the evaluation transform of classification.

    The names and defaults are timm's: an `input_size` of 224 with a `crop_pct` of 0.875 resizes the short side to 256.

    Attributes:
        input_size: Side of the square that the network sees, in pixels.
        crop_pct: Side of the center crop as a fraction of the resized short side.
        interpolation: Filter of the resize.
        mean: Mean of each channel, for pixels from 0 to 1.
        std: Standard deviation of each channel, likewise.

    Raises:
        ValueError: If a value is out of its range.
    """

    kind: ClassVar[str] = "center_crop"

    input_size: int = 224
    crop_pct: float = 0.875
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        _check_pixels("input_size", self.input_size)
        if not 0.0 < self.crop_pct <= 1.0:
            raise ValueError(f"crop_pct must be above 0 and at most 1, got {self.crop_pct}")
        if self.input_size > LARGEST_SIDE * self.crop_pct:
            raise ValueError(
                f"input_size / crop_pct must be at most {LARGEST_SIDE} pixels, got {self.input_size} / {self.crop_pct}"
            )
        super().__post_init__()

    def pixels(self, image: Image.Image) -> Tensor:
        """Resize and crop an image of any size to bytes `(C, input_size, input_size)`, before normalization."""
        image = _cut_thin(image)
        height, width = _resized(image.height, image.width, math.floor(self.input_size / self.crop_pct))
        image = _resize(image, (width, height), self.interpolation)
        left, top = (round((side - self.input_size) / 2.0) for side in (width, height))
        return to_pixels(image.crop((left, top, left + self.input_size, top + self.input_size)))

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:  # noqa: ARG002  any size gives a square
        """Return `input_size` twice."""
        return self.input_size, self.input_size

    def summary(self) -> dict[str, str]:
        """Describe the transform for people, as rows of a table."""
        size, short = self.input_size, math.floor(self.input_size / self.crop_pct)
        what = (
            f"{COLORS[self.channels]}, short side resized to {short} ({self.interpolation}), center crop {size}×{size}"
        )
        return {"input": what} | super().summary()


@dataclass(frozen=True)
class DensePreprocessing(ImagePreprocessing):
    """Resize the short side, keep the aspect ratio, pad right and bottom: the evaluation transform of dense tasks.

    The padding has the mean color, which normalization turns into zero up to the rounding of bytes.

    Attributes:
        short_side: Short side of the resized image in pixels.
        long_side: Largest long side; an image that would exceed it is resized to it.
        divisor: Height and width are padded to a multiple of this.
        interpolation: Filter of the resize.
        mean: Mean of each channel, for pixels from 0 to 1.
        std: Standard deviation of each channel, likewise.

    Raises:
        ValueError: If a value is out of its range.
    """

    kind: ClassVar[str] = "short_side"

    short_side: int = 512
    long_side: int = 2048
    divisor: int = 32
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name in ("short_side", "long_side", "divisor"):
            _check_pixels(name, getattr(self, name))
        if not self.short_side <= self.long_side <= LARGEST_SIDE:
            raise ValueError(
                f"long_side must be from short_side to {LARGEST_SIDE}, got {self.long_side} and {self.short_side}"
            )
        if self.divisor > LARGEST_DIVISOR:
            raise ValueError(f"divisor must be at most {LARGEST_DIVISOR}, got {self.divisor}")
        super().__post_init__()

    def pixels(self, image: Image.Image) -> Tensor:
        """Resize and pad an image of any size to bytes `(C, H, W)`, before normalization."""
        height, width = self.resized_size((image.height, image.width))
        return self.pad(to_pixels(_resize(image, (width, height), self.interpolation)))

    def sample(self, image: Image.Image) -> dict[str, Tensor]:
        """Transform an image to `image`, bytes `(C, H, W)`, and three pairs of height and width, `(2,)` in int64.

        These are `size`, that of the image; `resized`, that of the image in `pixels`; and `padded`, that of `pixels`.
        """
        size = (image.height, image.width)
        sides = {"size": size, "resized": self.resized_size(size), "padded": self.output_size(size)}
        return {"image": self.pixels(image)} | {name: torch.tensor(pair) for name, pair in sides.items()}

    def pad(self, pixels: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Pad bytes `(C, H, W)` right and bottom to a size, by default to the next multiples of `divisor`."""
        height, width = pixels.shape[1:]
        color = torch.tensor(self.mean).mul(255.0).round().clamp(0, 255).to(torch.uint8)
        padded = color.repeat(*(size or self._multiples(height, width)), 1).permute(2, 0, 1)
        padded[:, :height, :width] = pixels
        return padded

    def resized_size(self, size: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
        """Return the height and width of a resized image before padding, for `scale` times the short and long side."""
        return _resized(*size, *(max(1, int(side * scale)) for side in (self.short_side, self.long_side)))

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the transformed height and width, with padding, of an image of a height and width."""
        return self._multiples(*self.resized_size(size))

    def _multiples(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // self.divisor) * self.divisor, -(-width // self.divisor) * self.divisor

    def restore(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Return maps of an image, such as logits `(C, H, W)`, as `(C, height, width)` of the original image."""
        return self._restore(maps[None], size)[0]

    def restore_classes(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the most probable classes `(height, width)`, uint8, of an original image from its logits `(K, h, w)`.

        Logits of any stride are resized to the padded image, and those of the image itself to the original.
        """
        height, width = size
        at_once = max(1, LARGEST_LOGITS // (height * width))
        best = torch.full(size, -math.inf, device=logits.device)
        classes = torch.zeros(size, dtype=torch.uint8, device=logits.device)
        for start in range(0, len(logits), at_once):
            # Resizing is several times as fast with the channels last.
            part = logits[None, start : start + at_once].float().contiguous(memory_format=torch.channels_last)
            part = functional.interpolate(part, self.output_size(size), mode="bilinear", align_corners=False)
            values, indices = self._restore(part, size)[0].max(0)
            classes = torch.where(values > best, (indices + start).to(torch.uint8), classes)
            best = torch.maximum(best, values)
        return classes

    def _restore(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        height, width = self.resized_size(size)
        maps = maps[:, :, :height, :width]
        same = (height, width) == size
        return maps if same else functional.interpolate(maps, size, mode="bilinear", align_corners=False)

    def restore_boxes(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Return boxes `(N, 4)` of an image, as x and y of two corners, in pixels of the original image."""
        scale = torch.tensor([old / new for old, new in zip(size, self.resized_size(size), strict=True)])
        restored: Tensor = boxes * scale.flip(0).repeat(2).to(boxes)
        return restored

    def summary(self) -> dict[str, str]:
        """Describe the transform for people, as rows of a table."""
        what = f"{COLORS[self.channels]}, short side resized to {self.short_side}, long side at most {self.long_side} "
        what += f"({self.interpolation}), padded to multiples of {self.divisor}"
        return {"input": what} | super().summary()

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and the values in types of JSON."""
        return {"kind": self.kind} | super().to_dict()


def _check_pixels(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a whole number of pixels, at least 1, got {value}")


def _resized(height: int, width: int, short: int, longest: int | None = None) -> tuple[int, int]:
    """Return the size with a short side, or with the longest side if that would be exceeded."""
    # The other side is rounded down, as torchvision's Resize does, so that both give the same pixels.
    small, large = sorted((height, width))
    new_small, new_large = short, short * large // small
    if longest is not None and new_large > longest:
        new_small, new_large = max(1, longest * short // new_large), longest
    return (new_small, new_large) if height <= width else (new_large, new_small)


def _cut_thin(image: Image.Image) -> Image.Image:
    """Return the center of an image that is too long to be resized as a whole, or the image itself."""
    short, long = sorted(image.size)
    length = LARGEST_RATIO * short + (long - LARGEST_RATIO * short) % 2  # the center stays where it is
    if long <= length:
        return image
    start, end = (long - length) // 2, (long + length) // 2
    return image.crop((start, 0, end, short) if image.width == long else (0, start, short, end))


def _resize(image: Image.Image, size: tuple[int, int], interpolation: Interpolation) -> Image.Image:
    return image if size == image.size else image.resize(size, Image.Resampling[interpolation.upper()])


def read_record(values: Mapping[str, Any]) -> ImagePreprocessing:
    """Rebuild a preprocessing of any kind from its record; one without a `kind` is a center crop.

    Raises:
        ValueError: If the kind is unknown, or a value is missing, unknown or out of its range.
    """
    kinds = {record.kind: record for record in (Preprocessing, DensePreprocessing)}
    kind = str(values.get("kind", Preprocessing.kind))
    if kind not in kinds:
        raise ValueError(f"the preprocessing {kind!r} is unknown: use one of {', '.join(kinds)}")
    return kinds[kind].from_dict(values)


def read_preprocessing(cfg: Mapping[str, Any], channels: int = 3) -> Preprocessing:
    """Return the preprocessing that a timm network's `pretrained_cfg` describes, for images of some channels.

    A network may take another number of channels than its description has statistics for: see `with_channels`.

    Raises:
        ValueError: If it is not a square center crop.
    """
    sides, mode = tuple(cfg["input_size"])[1:], cfg.get("crop_mode") or "center"
    if len(sides) != 2 or sides[0] != sides[1] or mode != "center":
        raise ValueError(f"only square center crops are supported, got images of {sides} pixels and crop_mode={mode!r}")
    record = Preprocessing(sides[0], cfg["crop_pct"], cfg["interpolation"], tuple(cfg["mean"]), tuple(cfg["std"]))
    return record.with_channels(channels)
