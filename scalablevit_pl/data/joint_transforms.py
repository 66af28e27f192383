"""Transforms of an image together with what is at its pixels."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from scalablevit_pl.preprocessing import DensePreprocessing
from scalablevit_pl.preprocessing.masks import IGNORED, Mask
from scalablevit_pl.preprocessing.records import to_pixels

Box = tuple[int, int, int, int]

CROP_TRIES = 10


@dataclass(frozen=True)
class SegmentationAugmentation:
    """Random variation of training images and their masks; the defaults are the usual recipe for ADE20K.

    An image is resized by the preprocessing times a random scale, cropped, flipped, distorted in its colors, and padded
    to the size of the crop where it is smaller.

    Attributes:
        crop_size: Side of the square crop in pixels.
        scale: Range of the random scale.
        cat_max_ratio: Largest share of one class in a crop; after ten crops with a larger one, the last is used.
        hflip: Probability of a horizontal flip.
        distortion: Probability of each of the four changes of colors.
        brightness: Largest change of the brightness, as a fraction.
        contrast: Largest change of the contrast, likewise.
        saturation: Largest change of the saturation, likewise.
        hue: Largest change of the hue, as a fraction of the color wheel.

    Raises:
        ValueError: If a value is out of its range.
    """

    crop_size: int = 512
    scale: tuple[float, float] = (0.5, 2.0)
    cat_max_ratio: float = 0.75
    hflip: float = 0.5
    distortion: float = 0.5
    brightness: float = 0.125
    contrast: float = 0.5
    saturation: float = 0.5
    hue: float = 0.1

    def __post_init__(self) -> None:
        if self.crop_size < 1:
            raise ValueError(f"crop_size must be at least 1, got {self.crop_size}")
        if not 0.0 < self.scale[0] <= self.scale[1] < math.inf:
            raise ValueError(f"scale must be two positive numbers in ascending order, got {list(self.scale)}")
        limits = {"hflip": 1.0, "distortion": 1.0, "brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.5}
        for name, limit in limits.items():
            if not 0.0 <= getattr(self, name) <= limit:
                raise ValueError(f"{name} must be from 0 to {limit:g}, got {getattr(self, name)}")
        if not 0.0 < self.cat_max_ratio <= 1.0:
            raise ValueError(f"cat_max_ratio must be above 0 and at most 1, got {self.cat_max_ratio}")


@dataclass(frozen=True)
class FixedSegmentation:
    """The evaluation transform of an image and its mask.

    Attributes:
        preprocessing: Size of the image.
        resize_mask: Whether the mask gets the size of the transformed image, as training needs it; else it keeps the
            size of the stored image.
    """

    preprocessing: DensePreprocessing
    resize_mask: bool = False

    def __call__(self, image: Image.Image, mask: Mask | None) -> dict[str, Any]:
        """Return the sample of the preprocessing, with `mask (H, W)` and `blank` if there is a mask."""
        sample: dict[str, Any] = self.preprocessing.sample(image)
        if mask is None:
            return sample
        mask.check_size(image.size)
        classes = mask.classes
        if self.resize_mask:
            height, width = sample["resized"].tolist()
            classes = classes.resize((width, height), Image.Resampling.NEAREST)
        height, width = sample["padded"].tolist() if self.resize_mask else (classes.height, classes.width)
        return sample | _mask_entries(mask, classes, (height, width))


@dataclass(frozen=True)
class RandomSegmentation:
    """The random variation of an image and its mask for training, with torch's global generator.

    Attributes:
        preprocessing: Size of an image at scale 1, and the filter of the resize.
        augmentation: What is drawn.
    """

    preprocessing: DensePreprocessing
    augmentation: SegmentationAugmentation

    def __call__(self, image: Image.Image, mask: Mask) -> dict[str, Any]:
        """Return `image (C, H, W)`, `mask (H, W)` and `blank`; H and W are the size of the crop."""
        mask.check_size(image.size)
        augmentation, side = self.augmentation, self.augmentation.crop_size
        low, high = augmentation.scale
        size = self.preprocessing.resized_size((image.height, image.width), low + (high - low) * _draw())
        box, classes = self._crop(mask.classes, size)
        image = _resize_box(image, size, box, Image.Resampling[self.preprocessing.interpolation.upper()])
        if _draw() < augmentation.hflip:
            image, classes = functional.horizontal_flip(image), functional.horizontal_flip(classes)
        pixels = to_pixels(self._distort(image))
        if image.size != (side, side):
            pixels = self.preprocessing.pad(pixels, (side, side))
        return {"image": pixels} | _mask_entries(mask, classes, (side, side))

    def _crop(self, mask: Image.Image, size: tuple[int, int]) -> tuple[Box, Image.Image]:
        """Draw a crop of an image resized to a height and width, and return it with its part of the mask."""
        height, width = (min(side, self.augmentation.crop_size) for side in size)
        for _ in range(CROP_TRIES):
            top, left = (int(_draw() * (whole - part + 1)) for whole, part in zip(size, (height, width), strict=True))
            box = (left, top, left + width, top + height)
            part = _resize_box(mask, size, box, Image.Resampling.NEAREST)
            counts = part.histogram()[:IGNORED]
            if (height, width) == size or max(counts) < self.augmentation.cat_max_ratio * sum(counts):
                break
        return box, part

    def _distort(self, image: Image.Image) -> Image.Image:
        """Change brightness, contrast, saturation and hue, each with a probability; contrast may be the last."""
        chosen = torch.rand(4).lt(self.augmentation.distortion).tolist()
        order = ["brightness", "contrast", "saturation", "hue"]
        if _draw() < 0.5:
            order = ["brightness", "saturation", "hue", "contrast"]
        for name, change in zip(order, chosen, strict=True):
            if change:
                amount = (2.0 * _draw() - 1.0) * getattr(self.augmentation, name)
                adjust = getattr(functional, f"adjust_{name}")
                image = adjust(image, amount if name == "hue" else 1.0 + amount)
        return image


def _draw() -> float:
    return torch.rand(()).item()


def _resize_box(image: Image.Image, size: tuple[int, int], box: Box, resampling: Image.Resampling) -> Image.Image:
    """Return a box of an image resized to a height and width, without resizing the rest."""
    across, down = image.width / size[1], image.height / size[0]
    left, top, right, bottom = box
    source = (left * across, top * down, min(right * across, image.width), min(bottom * down, image.height))
    return image.resize((right - left, bottom - top), resampling, source)


def _mask_entries(mask: Mask, classes: Image.Image, size: tuple[int, int]) -> dict[str, Any]:
    """Return a mask as `mask (H, W)`, padded to a height and width, and its name as `blank` if it ignores all."""
    pixels = to_pixels(classes)[0]
    if pixels.shape != size:
        pixels = torch.full(size, IGNORED, dtype=torch.uint8)
        pixels[: classes.height, : classes.width] = to_pixels(classes)[0]
    return {"mask": pixels, "blank": mask.name if mask.blank else ""}
