"""Small data sets of images with masks."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datamodules import encoded
from PIL import Image


def draw_pair(number: int, classes: int = 3) -> tuple[Image.Image, Image.Image]:
    """Draw an image and its mask, which is also the image's red channel; the size depends on the number."""
    state = np.random.RandomState(number)
    mask = state.randint(0, classes, (20 + 3 * (number % 4), 40 - 5 * (number % 3)), dtype=np.uint8)
    image = np.stack([mask, *state.randint(0, 255, (2, *mask.shape), dtype=np.uint8)], axis=2)
    return Image.fromarray(image), Image.fromarray(mask)


def write_pairs(folder: Path, pairs: Iterable[tuple[str, str]], classes: int = 3) -> Path:
    """Write images and masks below a folder; an empty name is not written."""
    for number, names in enumerate(pairs):
        for name, content in zip(names, draw_pair(number, classes), strict=True):
            if name:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                content.save(folder / name)
    return folder


def write_parquet(folder: Path, columns: tuple[str, str] = ("image", "mask"), **splits: int) -> Path:
    """Write parquet files with columns of images and masks, given the number of rows of each split."""
    folder.mkdir(exist_ok=True)
    features = datasets.Features({name: datasets.Image() for name in columns})
    for split, count in splits.items():
        rows: dict[str, list[Any]] = {name: [] for name in columns}
        for number in range(count):
            for name, content in zip(columns, draw_pair(number), strict=True):
                rows[name].append({"bytes": encoded(content), "path": f"{number}.png"})
        path = folder / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return folder
