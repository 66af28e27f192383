"""Data sets as Lightning datamodules."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scalablevit_pl.data.base import BaseDataModule
    from scalablevit_pl.data.classification import ClassificationDataModule
    from scalablevit_pl.data.joint_transforms import SegmentationAugmentation
    from scalablevit_pl.data.segmentation import SegmentationDataModule
    from scalablevit_pl.data.transforms import Augmentation
    from scalablevit_pl.preprocessing import DensePreprocessing, Preprocessing

__all__ = [
    "Augmentation",
    "BaseDataModule",
    "ClassificationDataModule",
    "DensePreprocessing",
    "Preprocessing",
    "SegmentationAugmentation",
    "SegmentationDataModule",
]

# Imported on first use: reading ImageNet's class names, for example, must not import Lightning.
_HOMES = {
    "Augmentation": "data.transforms",
    "BaseDataModule": "data.base",
    "ClassificationDataModule": "data.classification",
    "DensePreprocessing": "preprocessing",
    "Preprocessing": "preprocessing",
    "SegmentationAugmentation": "data.joint_transforms",
    "SegmentationDataModule": "data.segmentation",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"scalablevit_pl.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
