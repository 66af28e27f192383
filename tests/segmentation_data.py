"""A datamodule for semantic segmentation, written as a user of the package would."""

import io
import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from scalablevit_pl.data import BaseDataModule, Preprocessing
from scalablevit_pl.data.images import JointTransform, Row, Sample, Targets
from scalablevit_pl.preprocessing import to_pixels

IGNORED = 255


class SegmentationDataModule(BaseDataModule):
    """Images with masks: `image (B, 3, H, W)` and `mask (B, H, W)`, where 255 is ignored.

    Args:
        dataset: See `BaseDataModule`.
        classes: Names of the classes.
        mask_column: Name of the column with the masks' PNG files.
        preprocessing: Side of the images, and normalization.
        **kwargs: Arguments of `BaseDataModule`.
    """

    preprocessing: Preprocessing

    def __init__(
        self,
        dataset: str,
        *,
        classes: Sequence[str],
        mask_column: str = "mask",
        preprocessing: Preprocessing | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, preprocessing=preprocessing or Preprocessing(32, 1.0), **kwargs)
        self.class_names = list(classes)
        self.mask_column = mask_column

    def targets(self, splits: datasets.DatasetDict, split: str) -> Targets:
        if self.mask_column not in splits[split].features:
            raise ValueError(f"split {split!r} has no column {self.mask_column!r}: set --data.mask_column")
        return Targets([self.mask_column], partial(read_mask, self.mask_column))

    def transform(self, training: bool) -> JointTransform:
        return partial(vary if training else fit, self.preprocessing.input_size)


def read_mask(column: str, row: Row) -> Image.Image:
    return Image.open(io.BytesIO(row[column]))


def vary(size: int, image: Image.Image, mask: Image.Image) -> Sample:
    """Crop image and mask at random, and flip both or none."""
    left, top = (random.randint(0, max(side - size, 0)) for side in image.size)
    image, mask = (each.crop((left, top, *image.size)) for each in (image, mask))
    if random.random() < 0.5:
        image, mask = ImageOps.mirror(image), ImageOps.mirror(mask)
    return fit(size, image, mask)


def fit(size: int, image: Image.Image, mask: Image.Image | None) -> Sample:
    """Cut off what is beyond a square, and pad what is missing; the padding is ignored."""
    sample = {"image": _fit(size, to_pixels(image), 0)}
    if mask is None:
        return sample
    classes = torch.from_numpy(np.array(mask)).long()
    return sample | {"mask": _fit(size, classes, IGNORED)}


def _fit(size: int, pixels: Tensor, fill: int) -> Tensor:
    pixels = pixels[..., :size, :size]
    missing = (0, size - pixels.shape[-1], 0, size - pixels.shape[-2])
    return torch.nn.functional.pad(pixels, missing, value=fill)
