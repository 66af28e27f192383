"""From an encoded image to what a network sees: one decoding function, the evaluation transform, the record of it."""

import io
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})

# Pillow's names of what has these suffixes; others, such as PostScript, start programs to decode.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Far beyond any network's images: a resize to more would only use up the memory.
LARGEST_SIDE = 16384


class UnreadableImageError(ValueError):
    """An image that cannot be decoded; the message names the file or row."""


def decode_image(source: bytes | str | Path | Image.Image, name: str = "") -> Image.Image:
    """Decode an image as people see it: RGB, upright by its EXIF orientation.

    Training, evaluation and prediction all decode here, so that they see the same pixels. Transparency is dropped as by
    `Image.convert("RGB")`; 16-bit greyscale keeps its upper eight bits.

    Args:
        source: Encoded bytes, the path of a file, or an opened image.
        name: What to call the image in an error; by default the path.

    Raises:
        UnreadableImageError: If the image is missing, damaged, truncated or of unknown format.
    """
    name = name or (str(source) if isinstance(source, str | Path) else "an image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd EXIF and palettes: what matters raises
            if isinstance(source, Image.Image):
                return _to_rgb(ImageOps.exif_transpose(source))
            image = _open(source)
            ImageOps.exif_transpose(image, in_place=True)  # without a copy, since nobody else has the image
            return _to_rgb(image)
    except Exception as error:  # each of Pillow's decoders has its own way to give up
        raise UnreadableImageError(f"cannot read {name}: {error}; mend or remove it") from error


def _open(source: bytes | str | Path) -> Image.Image:
    if (
        ImageFile.LOAD_TRUNCATED_IMAGES
    ):  # a global of Pillow that some libraries set: half an image would pass for whole
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    content = source if isinstance(source, bytes) else Path(source).read_bytes()  # Pillow would read it bit by bit
    if not content:
        raise ValueError("it is empty")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError("it is no image of a known format") from error
    image.load()
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        pixels = np.asarray(image, dtype=np.uint32)
        return Image.fromarray((pixels >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def to_pixels(image: Image.Image) -> Tensor:
    """Return the bytes `(3, H, W)` of an RGB image, in memory as images have them: the channels last."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@lru_cache(maxsize=32)
def _channels(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """Return a number of each channel as `(3, 1, 1)`; kept, since a GPU would wait for each copy."""
    with torch.inference_mode(False):  # it may be needed outside of it later
        return torch.tensor(values, device=device)[:, None, None]


@dataclass(frozen=True)
class Preprocessing:
    """The evaluation transform: resize the short side, crop the centre, normalize. Its values travel with weights.

    The names and defaults are timm's: an `input_size` of 224 with a `crop_pct` of 0.875 resizes the short side to 256.

    Attributes:
        input_size: Side of the square that the network sees, in pixels.
        crop_pct: Side of the centre crop as a fraction of the resized short side.
        interpolation: Filter of the resize.
        mean: Mean of each RGB channel, for pixels from 0 to 1.
        std: Standard deviation of each RGB channel, likewise.

    Raises:
        ValueError: If a value is out of its range.
    """

    input_size: int = 224
    crop_pct: float = 0.875
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if type(self.input_size) is not int or self.input_size < 1:
            raise ValueError(f"input_size must be a whole number of pixels, at least 1, got {self.input_size}")
        if not 0.0 < self.crop_pct <= 1.0:
            raise ValueError(f"crop_pct must be above 0 and at most 1, got {self.crop_pct}")
        if self.input_size > LARGEST_SIDE * self.crop_pct:
            raise ValueError(
                f"input_size / crop_pct must be at most {LARGEST_SIDE} pixels, got {self.input_size} / {self.crop_pct}"
            )
        if self.interpolation not in get_args(Interpolation):
            raise ValueError(f"interpolation must be one of {get_args(Interpolation)}, got {self.interpolation!r}")
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(f"mean and std must have three entries, got {list(self.mean)} and {list(self.std)}")
        if not all(0.0 < value < math.inf for value in self.std) or not all(map(math.isfinite, self.mean)):
            raise ValueError(f"mean must be finite and std positive, got {list(self.mean)} and {list(self.std)}")

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform an RGB image of any size to `(3, input_size, input_size)`, float32, normalized."""
        return self.normalize(self.pixels(image))

    def pixels(self, image: Image.Image) -> Tensor:
        """Resize and crop an RGB image of any size to bytes `(3, input_size, input_size)`, not normalized yet."""
        width, height = image.size
        short = math.floor(self.input_size / self.crop_pct)
        # The long side is rounded down, as torchvision's Resize does, so that both give the same pixels.
        size = (short, short * height // width) if width <= height else (short * width // height, short)
        if size != image.size:
            image = image.resize(size, Image.Resampling[self.interpolation.upper()])
        left, top = (round((side - self.input_size) / 2.0) for side in size)
        return to_pixels(image.crop((left, top, left + self.input_size, top + self.input_size)))

    def normalize(self, pixels: Tensor) -> Tensor:
        """Normalize bytes `(…, 3, H, W)`, however they lie in memory, to contiguous float32."""
        images = torch.empty(pixels.shape, device=pixels.device)
        if pixels.ndim == 4 and pixels.device.type == "cpu":
            for image, one in zip(images, pixels, strict=True):  # of which each fits into the cache
                self._normalize_into(image, one)
        else:
            self._normalize_into(images, pixels)
        return images

    def _normalize_into(self, images: Tensor, pixels: Tensor) -> None:
        mean, std = (_channels(tuple(values), pixels.device) for values in (self.mean, self.std))
        torch.div(pixels, 255.0, out=images).sub_(mean).div_(std)

    def denormalize(self, images: Tensor) -> Tensor:
        """Undo `normalize`: normalized images `(…, 3, H, W)` to bytes."""
        mean, std = (_channels(tuple(values), images.device) for values in (self.mean, self.std))
        return ((images * std + mean) * 255.0).round().clamp(0, 255).to(torch.uint8)

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON can hold them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def summary(self) -> dict[str, str]:
        """Describe the transform for people, as rows of a table."""
        size, short = self.input_size, math.floor(self.input_size / self.crop_pct)
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return {
            "input": f"RGB, short side resized to {short} ({self.interpolation}), center crop {size}×{size}",
            "mean, std": f"{mean}; {std} for pixels from 0 to 1",
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from `to_dict`.

        Raises:
            ValueError: If a value is missing, unknown or out of its range.
        """
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ValueError(f"a record of a preprocessing holds {sorted(names)}, this one {sorted(values)}")
        try:
            return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
        except TypeError as error:
            raise ValueError(f"this is no record of a preprocessing: {error}") from error


def read_record(values: Mapping[str, Any]) -> Preprocessing:
    """Rebuild a preprocessing from its record."""
    return Preprocessing.from_dict(values)


def read_preprocessing(cfg: Mapping[str, Any]) -> Preprocessing:
    """Return the preprocessing that the entries of a timm network's `pretrained_cfg` describe.

    Raises:
        ValueError: If there is none of ours that does the same.
    """
    sides, mode = tuple(cfg["input_size"])[1:], cfg.get("crop_mode") or "center"
    if len(sides) != 2 or sides[0] != sides[1] or mode != "center":
        raise ValueError(f"images of {sides} pixels by a crop {mode!r}: only square crops of the centre are known")
    return Preprocessing(sides[0], cfg["crop_pct"], cfg["interpolation"], tuple(cfg["mean"]), tuple(cfg["std"]))


def open_image(source: str | Path | bytes | Image.Image | NDArray[np.uint8]) -> Image.Image:
    """Return an RGB image from a file, encoded bytes, an opened image or an array of bytes `(H, W)` or `(H, W, 3)`.

    Raises:
        ValueError: If it is none of these, or cannot be read.
    """
    if isinstance(source, str | Path | bytes | Image.Image):
        return decode_image(source)
    grey_or_rgb = isinstance(source, np.ndarray) and (
        source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (3, 4))
    )
    if not grey_or_rgb or source.dtype != np.uint8 or 0 in source.shape:
        what = (
            f"an array {source.shape} of {source.dtype}"
            if isinstance(source, np.ndarray)
            else repr(type(source).__name__)
        )
        raise ValueError(
            f"{what} is no image: give a path, a PIL image, or an array (H, W) or (H, W, 3) of uint8 "
            "(a tensor that is preprocessed already goes to the network itself)"
        )
    return decode_image(Image.fromarray(source))
