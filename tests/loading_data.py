"""Write a small labelled data set, as class folders or as parquet files."""

from pathlib import Path

import datasets
import numpy as np
from PIL import Image


def make_images(folder: Path, streamed: bool = False) -> Path:
    """Write 24 images of two classes and return the folder of the data set."""
    pixels, rows = np.random.RandomState(0), []
    for number in range(24):
        path = folder / ("train" if not streamed else "files") / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.randint(0, 255, (20, 24, 3), dtype=np.uint8)).save(path)
        rows.append({"bytes": path.read_bytes(), "path": None})
    if not streamed:
        return folder
    names = datasets.ClassLabel(names=["class0", "class1"])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    table = datasets.Dataset.from_dict({"image": rows, "label": [number % 2 for number in range(24)]}, features)
    (folder / "parquet").mkdir()
    for split in ("train", "validation"):
        table.to_parquet(str(folder / "parquet" / f"{split}.parquet"))
    return folder / "parquet"
