"""Images with the class of each pixel as batches."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch

from scalablevit_pl.data.base import BaseDataModule, Batch
from scalablevit_pl.data.class_names import ClassFile, check_names, find_class_file, read_class_file
from scalablevit_pl.data.columns import find_image_column, find_mask_column, listed_classes
from scalablevit_pl.data.images import JointTransform, Row, StoredImage, Targets
from scalablevit_pl.data.joint_transforms import FixedSegmentation, RandomSegmentation, SegmentationAugmentation
from scalablevit_pl.data.mask_folders import known_classes, load_mask_folder
from scalablevit_pl.data.source import local_folder
from scalablevit_pl.preprocessing import DensePreprocessing, UnreadableImageError
from scalablevit_pl.preprocessing.masks import IGNORED, Mask, MaskFormat

logger = logging.getLogger(__name__)


class SegmentationDataModule(BaseDataModule):
    """Batches of images and masks: `image (B, C, H, W)`, `mask (B, H, W)` in uint8, `index (B,)`, `path`.

    The class 255 is ignored. A training mask has the size of the images. An evaluation batch also has `size`, `resized`
    and `padded (B, 2)` of `DensePreprocessing.sample`; its masks have the size of the stored images, padded to the
    largest of the batch, and its images are padded likewise.

    Args:
        dataset: A data set's id on the Hub; a local folder with parquet files, or with files in the layout of ADE20K,
            VOC or Cityscapes, or with `images` and `masks`; or `fashion_scenes_sample`, which is drawn on first use.
        mask_column: Name of the mask column; by default the only column of images that its name marks as masks, or the
            only one beside the image column.
        class_names: The classes in the order of their indices, or the path of a text file with one name a line, or of
            YAML or JSON with `names`; by default those of the data set.
        palette: The color of each class if masks store colors, as red, green, blue; by default that of the file with
            the class names, if it states one.
        reduce_zero_label: Ignore the value 0 in masks, and take k for the class k - 1.
        ignore_value: The value in masks that is ignored.
        preprocessing: Size and normalization of images: the evaluation transform.
        augmentation: Random variation of training images; None trains on the evaluation transform.
        **kwargs: Arguments of `BaseDataModule`.

    Attributes:
        left_out: The files of a folder that are not read, by number and kind, set by `setup`.
        blank: Names of the masks, seen so far on this process, whose pixels are all ignored.
    """

    preprocessing: DensePreprocessing

    def __init__(
        self,
        dataset: str,
        *,
        mask_column: str | None = None,
        class_names: list[str] | str | None = None,
        palette: list[tuple[int, int, int]] | None = None,
        reduce_zero_label: bool = False,
        ignore_value: int = IGNORED,
        preprocessing: DensePreprocessing | None = None,
        augmentation: SegmentationAugmentation | None = SegmentationAugmentation(),  # noqa: B008  frozen
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, preprocessing=preprocessing or DensePreprocessing(), **kwargs)
        if augmentation is not None and augmentation.distortion > 0.0 and self.preprocessing.channels == 4:
            raise ValueError("distortion needs 1 or 3 channels: set --data.augmentation.distortion 0")
        self.mask_column = mask_column
        self.given_names = class_names
        self.given_palette = palette
        self.palette: list[tuple[int, int, int]] | None = None
        self.reduce_zero_label = reduce_zero_label
        self.ignore_value = ignore_value
        self.augmentation = augmentation
        self.left_out: str | None = None
        self.blank: set[str] = set()

    def read_folder(self, folder: Path) -> datasets.DatasetDict:
        """Load images and masks from folders, and log which files are left out."""
        splits, left_out = load_mask_folder(folder)
        if left_out and left_out != self.left_out:  # a fit reads the folder more than once
            logger.warning("left out of %s: %s", folder, left_out)
        self.left_out = left_out
        return splits

    def find_class_names(self, splits: datasets.DatasetDict) -> list[str]:
        """Return the classes as given, as declared by the data set, or as a file or the layout of its folder says."""
        found = self._find_classes(splits)
        self.palette = self.given_palette or found.palette
        return found.names

    def _find_classes(self, splits: datasets.DatasetDict) -> ClassFile:
        if isinstance(self.given_names, str):
            return read_class_file(Path(self.given_names).expanduser())
        folder = local_folder(self.dataset)
        file = None if folder is None else find_class_file(folder)
        names = self.given_names or listed_classes(next(iter(splits.values())).features)
        if names is None and file is not None:
            return read_class_file(file)
        names = names or (None if folder is None else known_classes(folder))
        if names is None:
            raise ValueError(
                f"{self.dataset!r} does not name its classes: list them in --data.class_names, or name a file there "
                "that has one a line"
            )
        return ClassFile(check_names(names, "--data.class_names" if self.given_names else repr(self.dataset)))

    def targets(self, splits: datasets.DatasetDict, split: str) -> Targets:
        """Check that the images of a split have masks, and return how these are read."""
        features = splits[split].features
        column = find_mask_column(features, self.mask_column, find_image_column(features, self.image_column))
        missing = splits[split].data.column(column).is_null().to_numpy().nonzero()[0]
        if len(missing):
            raise ValueError(
                f"split {split!r} has {len(missing):,} of {len(splits[split]):,} images without a mask, the first in "
                f"row {missing[0]}: add the masks, or choose another split, for example with --data.test_split"
            )
        palette = None if self.palette is None else tuple(self.palette)
        stored = MaskFormat(len(self.class_names), palette, self.reduce_zero_label, self.ignore_value)
        return Targets([column], partial(_read_mask, column, stored))

    def transform(self, training: bool) -> JointTransform:
        """Return the random variation for training, or the evaluation transform."""
        if training and self.augmentation is not None:
            return RandomSegmentation(self.preprocessing, self.augmentation)
        return FixedSegmentation(self.preprocessing, resize_mask=training)

    def count_classes(self, target: Mask) -> list[int]:
        """Return the number of pixels of each class in a mask."""
        return target.classes.histogram()[: len(self.class_names)]

    def example_batch(self, num_classes: int) -> Batch:
        """Return a random batch like those of the train loader, which requires no data."""
        side = self.preprocessing.short_side if self.augmentation is None else self.augmentation.crop_size
        shape = (self.batch_size, self.preprocessing.channels, side, side)
        return {
            "image": torch.randint(256, shape, dtype=torch.uint8),
            "mask": torch.randint(num_classes, (self.batch_size, side, side), dtype=torch.uint8),
            "index": torch.arange(self.batch_size),
            "path": [""] * self.batch_size,
        }

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Collect the masks of a batch that ignore all pixels, and count the images that could not be read."""
        self.blank.update(name for name in batch.pop("blank", []) if name)
        return super().on_before_batch_transfer(batch, dataloader_idx)

    def teardown(self, stage: str) -> None:
        """Log how many masks ignore all pixels."""
        if self.blank:
            logger.warning("all pixels of %d masks are ignored, such as those of %s", len(self.blank), min(self.blank))
        super().teardown(stage)


def _read_mask(column: str, stored: MaskFormat, row: Row) -> Mask:
    mask: StoredImage | None = row[column]
    if mask is None:  # in a stream, which is not checked beforehand
        raise UnreadableImageError(f"a row has no mask in the column {column!r}: remove such rows")
    return stored.read(mask.source, mask.name)
