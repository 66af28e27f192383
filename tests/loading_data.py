"""Write small data sets: labelled images, and images with masks."""

import io
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


def make_scenes(folder: Path) -> Path:
    """Write 12 images with masks of two classes, as parquet files."""
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Value("binary")})
    rows: dict[str, list[object]] = {"image": [], "mask": []}
    for number in range(12):
        mask = (np.random.RandomState(number).rand(24, 20) > 0.5).astype(np.uint8)
        image, encoded = Image.fromarray(mask * 255).convert("RGB"), io.BytesIO()
        Image.fromarray(mask).save(encoded, "PNG")
        rows["image"].append(image)
        rows["mask"].append(encoded.getvalue())
    for split in ("train", "validation", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder
