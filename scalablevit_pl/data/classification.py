"""Labelled images as batches."""

import logging
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch

from scalablevit_pl.data.base import BaseDataModule, Batch
from scalablevit_pl.data.columns import declares_classes, find_class_names, find_label_column, item_type, label_indices
from scalablevit_pl.data.folders import load_image_folder
from scalablevit_pl.data.imagenet import check_imagenet
from scalablevit_pl.data.images import Row, Targets
from scalablevit_pl.data.transforms import Augmentation, BatchMix, LabelledTransform, PatchDraw, erase, train_transform
from scalablevit_pl.preprocessing import Preprocessing
from scalablevit_pl.text import nfc

logger = logging.getLogger(__name__)


class ClassificationDataModule(BaseDataModule):
    """Batches of a labelled image data set: `image (B, C, H, W)`, `label (B,)` or soft `(B, K)`, `index (B,)`, `path`.

    Where the label column holds lists, `label (B, K)` is 1 for each class of an image, else 0. With random erasing, a
    loader's batch also holds `patch (B, 5)`. Training batches are erased and mixed on the device, in timm's order;
    mixing makes labels soft.

    Args:
        dataset: A data set's id on the Hub; a local folder with parquet files, or with one folder per class, optionally
            below a folder per split; or `fashion_mnist_sample`, which ships with the package.
        label_column: Name of the label column; by default the only one of type ClassLabel or of lists of it, or else
            `label` or `labels`.
        labels: CSV file with the columns `file_name`, relative to the folder of the images, and `label`; by default
            `labels.csv` or `metadata.csv` in the folder or its split folders, or else the images are in class folders.
        preprocessing: Input size, crop and normalization: the evaluation transform; by default that of the weights
            that a command starts from, or else ImageNet's.
        augmentation: Random variation of training images; None trains on the evaluation transform.
        sampler: With `balanced`, training images are drawn with replacement, and from each class equally often.
        class_order: With `imagenet`, the classes must be ImageNet's in their order, in any spelling.
        **kwargs: Arguments of `BaseDataModule`.

    Attributes:
        left_out: The files of an image folder that are not read, by number and kind, set by `setup`.
        multi_label: Whether images have lists of labels, set by `setup`; None in prediction.
    """

    preprocessing: Preprocessing

    def __init__(
        self,
        dataset: str,
        *,
        label_column: str | None = None,
        labels: str | None = None,
        preprocessing: Preprocessing | None = None,
        augmentation: Augmentation | None = Augmentation(),  # noqa: B008  frozen, so it can be shared
        sampler: Literal["balanced"] | None = None,
        class_order: Literal["imagenet"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, preprocessing=preprocessing or Preprocessing(), **kwargs)
        if sampler is not None and self.streaming:
            raise ValueError(f"sampler={sampler!r} needs all labels, and a stream has none: set --data.streaming false")
        if augmentation is not None and augmentation.auto_augment and self.preprocessing.channels == 4:
            raise ValueError("auto_augment needs 1 or 3 channels: set --data.augmentation.auto_augment ''")
        self.label_column = label_column
        self.table = None if labels is None else Path(labels).expanduser()
        self.augmentation = augmentation
        self.sampler = sampler
        self.class_order = class_order
        self.left_out: str | None = None
        self.multi_label: bool | None = None

    def read_folder(self, folder: Path) -> datasets.DatasetDict:
        """Load images in class folders or with a table of labels, and log which files are left out."""
        splits, left_out = load_image_folder(folder, self.table)
        if left_out and left_out != self.left_out:  # a fit reads the folder more than once
            logger.warning("left out of %s: %s", folder, left_out)
        self.left_out = left_out
        return splits

    def needs_training_split(self, splits: datasets.DatasetDict) -> bool:
        """Return whether the classes are not declared and must be collected from the training split."""
        return not declares_classes(splits, self._label_column(splits))

    def find_class_names(self, splits: datasets.DatasetDict) -> list[str]:
        """Return the classes as declared, or as found in the training split."""
        if self.table is not None and self.left_out is None:
            raise ValueError(
                f"{self.dataset!r} has labels of its own: remove --data.labels, or give a folder of images"
            )
        names = find_class_names(splits, self._label_column(splits), self.train_split)
        return names if self.class_order is None else check_imagenet(names)

    def targets(self, splits: datasets.DatasetDict, split: str) -> Targets:
        """Check the labels of a split and return how they are read."""
        column = self._label_column(splits)
        names = find_class_names(splits, column, self.train_split)
        indices = label_indices(splits[split], column, names, split)
        self.multi_label = item_type(splits[split].features[column]) is not None
        if not self.multi_label:
            self.labels[split] = np.asarray(indices)
        read = _multi_hot if self.multi_label else _class_index
        return Targets([column], partial(read, column, {name: index for index, name in enumerate(names)}))

    def _label_column(self, splits: datasets.DatasetDict) -> str:
        return find_label_column(next(iter(splits.values())).features, self.label_column)

    def sample_weights(self) -> torch.Tensor | None:
        """Return the inverse size of each training image's class for a balanced sampler."""
        if self.sampler is None:
            return None
        labels = self.training_labels()
        return 1.0 / torch.bincount(labels)[labels].double()

    def transform(self, training: bool) -> LabelledTransform:
        """Return timm's training transform with the draw of a patch to erase, or the evaluation transform."""
        if not training or self.augmentation is None:
            return LabelledTransform(self.preprocessing.pixels)
        probability = self.augmentation.random_erasing
        patch = PatchDraw(probability, self.preprocessing.input_size) if probability > 0.0 else None
        return LabelledTransform(train_transform(self.preprocessing, self.augmentation), patch)

    def example_batch(self, num_classes: int, multi_label: bool = False) -> Batch:
        """Return a random batch like those of the train loader, which requires no data."""
        side = self.preprocessing.input_size
        labels = torch.randint(num_classes, (self.batch_size,))
        return {
            "image": torch.randint(256, (self.batch_size, self.preprocessing.channels, side, side), dtype=torch.uint8),
            "label": torch.eye(num_classes)[labels] if multi_label else labels,
            "index": torch.arange(self.batch_size),
            "path": [""] * self.batch_size,
        }

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Copy a batch to the device except `patch`: reading it there would block the process."""
        patches = batch.pop("patch", None)
        batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return batch if patches is None else batch | {"patch": patches}

    def augment_batch(self, batch: Batch) -> Batch:
        """Erase patches, then mix images and labels."""
        patches = batch.pop("patch", None)
        if patches is not None:
            erase(batch["image"], patches)
        if self.augmentation is not None and (self.augmentation.mixup > 0.0 or self.augmentation.cutmix > 0.0):
            mix = BatchMix(self.augmentation, len(self.class_names))
            batch["image"], batch["label"] = mix(batch["image"], batch["label"])
        return batch


def _class_index(column: str, index_of: dict[str, int], row: Row) -> int:
    label = row[column]
    return index_of[nfc(label)] if isinstance(label, str) else int(label)


def _multi_hot(column: str, index_of: dict[str, int], row: Row) -> torch.Tensor:
    indices = [_class_index(column, index_of, {column: label}) for label in row[column]]
    return torch.zeros(len(index_of)).index_fill(0, torch.tensor(indices, dtype=torch.long), 1.0)
