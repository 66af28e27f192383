"""Data sets as Lightning datamodules."""

from scalablevit_pl.data.classification import ClassificationDataModule
from scalablevit_pl.data.transforms import Augmentation
from scalablevit_pl.preprocessing import Preprocessing

__all__ = ["Augmentation", "ClassificationDataModule", "Preprocessing"]
