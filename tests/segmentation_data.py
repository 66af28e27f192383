"""A datamodule for semantic segmentation with images of any size, written as a user of the package would."""

import io
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional

from scalablevit_pl.data import BaseDataModule, DensePreprocessing
from scalablevit_pl.data.images import JointTransform, Row, Sample, Targets, collate
from scalablevit_pl.preprocessing.records import to_pixels

IGNORED = 255


class SegmentationDataModule(BaseDataModule):
    """Images with masks, random crops in training and padded images in evaluation: `mask (B, H, W)`, 255 is ignored.

    Args:
        dataset: Data set with a column of masks as PNG files.
        classes: Names of the classes.
        mask_column: Name of that column.
        crop: Largest side of a training image.
        preprocessing: Size in evaluation, and normalization.
        **kwargs: Arguments of `BaseDataModule`.
    """

    preprocessing: DensePreprocessing

    def __init__(
        self,
        dataset: str,
        *,
        classes: Sequence[str],
        mask_column: str = "mask",
        crop: int = 32,
        preprocessing: DensePreprocessing | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, preprocessing=preprocessing or DensePreprocessing(), **kwargs)
        self.class_names, self.mask_column, self.crop = list(classes), mask_column, crop

    def targets(self, splits: datasets.DatasetDict, split: str) -> Targets:
        if self.mask_column not in splits[split].features:
            raise ValueError(f"split {split!r} has no column {self.mask_column!r}: set --data.mask_column")
        return Targets([self.mask_column], partial(read_mask, self.mask_column))

    def transform(self, training: bool) -> JointTransform:
        return partial(crop_and_flip, self.crop) if training else partial(resize, self.preprocessing)

    def collate(self) -> Callable[[list[Sample]], dict[str, Any]]:
        return partial(pad_and_stack, self.preprocessing)


def read_mask(column: str, row: Row) -> Image.Image:
    return Image.open(io.BytesIO(row[column].read()))


def crop_and_flip(size: int, image: Image.Image, mask: Image.Image) -> Sample:
    left, top = (random.randint(0, max(side - size, 0)) for side in image.size)
    box = (left, top, min(left + size, image.width), min(top + size, image.height))
    image, mask = image.crop(box), mask.crop(box)
    if random.random() < 0.5:
        image, mask = ImageOps.mirror(image), ImageOps.mirror(mask)
    return {"image": to_pixels(image), "mask": torch.from_numpy(np.array(mask)).long()}


def resize(preprocessing: DensePreprocessing, image: Image.Image, mask: Image.Image | None) -> Sample:
    sample = {"image": preprocessing.pixels(image)}
    if mask is None:
        return sample
    height, width = preprocessing.resized_size((image.height, image.width))
    mask = mask.resize((width, height), Image.Resampling.NEAREST)
    return sample | {"mask": torch.from_numpy(np.array(mask)).long()}


def pad_and_stack(preprocessing: DensePreprocessing, samples: list[Sample]) -> dict[str, Any]:
    height, width = (max(sample["image"].shape[side] for sample in samples) for side in (1, 2))
    for sample in samples:
        sample["image"] = preprocessing.pad(sample["image"], (height, width))
        if "mask" in sample:
            missing = (0, width - sample["mask"].shape[1], 0, height - sample["mask"].shape[0])
            sample["mask"] = functional.pad(sample["mask"], missing, value=IGNORED)
    return collate(samples)
