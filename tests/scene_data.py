"""A small data set of images with masks, and a datamodule that evaluates them at their original size."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datamodules import encoded
from PIL import Image, ImageOps
from small_tasks import CLASSES, SCENE, make_scene

from scalablevit_pl.data import BaseDataModule
from scalablevit_pl.data.images import Targets
from scalablevit_pl.preprocessing import DensePreprocessing
from scalablevit_pl.preprocessing.records import to_pixels


class SceneDataModule(BaseDataModule):
    """The scenes of `small_tasks`, in training as squares, half of them mirrored."""

    def __init__(self, dataset: str, preprocessing: DensePreprocessing = SCENE, **kwargs: Any) -> None:
        super().__init__(dataset, preprocessing=preprocessing, **kwargs)
        self.class_names = [f"class {index}" for index in range(CLASSES)]

    def targets(self, splits: datasets.DatasetDict, split: str) -> Targets:
        return Targets(["mask"], read_mask)

    def transform(self, training: bool) -> "SceneTransform":
        return SceneTransform(self.preprocessing, training)


def read_mask(row: Mapping[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(row["mask"].read()))


@dataclass(frozen=True)
class SceneTransform:
    preprocessing: DensePreprocessing
    training: bool

    def __call__(self, image: Image.Image, mask: Image.Image | None) -> dict[str, Any]:
        if not self.training:
            sample = self.preprocessing.sample(image)
            return sample if mask is None else sample | {"mask": torch.from_numpy(np.array(mask))}
        assert mask is not None
        image, mask = image.resize((32, 32)), mask.resize((32, 32), Image.Resampling.NEAREST)
        if torch.rand(()) < 0.5:
            image, mask = ImageOps.mirror(image), ImageOps.mirror(mask)
        return {"image": to_pixels(image), "mask": torch.from_numpy(np.array(mask))}


def write_scenes(folder: Path, **splits: int) -> None:
    """Write parquet files with the first scenes, given the number of each split."""
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Value("binary")})
    for split, count in splits.items():
        scenes = [make_scene(index) for index in range(count)]
        rows = {
            "image": [image for image, _ in scenes],
            "mask": [encoded(Image.fromarray(mask.numpy())) for _, mask in scenes],
        }
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"{split}.parquet")
