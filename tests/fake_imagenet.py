"""Make data shaped like ImageNet: 1,000 classes, images of many kinds; as parquet, as folders, or on the tests' Hub.

python tests/fake_imagenet.py OUT --train 1000 --validation 100
"""

import argparse
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
from PIL import Image
from timm.data import ImageNetInfo

if TYPE_CHECKING:
    from hub_server import HubServer

INFO = ImageNetInfo()
SYNSETS = list(INFO.label_names())
# The data set on the Hub has WordNet's lemmas, and numbers the second crane.
HUB_NAMES = ["crane2" if index == 517 else INFO.index_to_description(index) for index in range(len(SYNSETS))]
FOLDERS = {"train": "train", "validation": "val"}
ORIENTATION = 0x0112  # the EXIF tag
KINDS = ("RGB", "L", "CMYK", "rotated", "PNG", "wide")


@dataclass(frozen=True)
class FakeImage:
    """A file of a class."""

    label: int
    name: str
    content: bytes


def make_images(split: str, count: int, truncated: bool = False) -> list[FakeImage]:
    """Make the images of a split, sorted by class and name; with `truncated`, the fourth one breaks off."""
    pixels = np.random.RandomState(sorted(FOLDERS).index(split))
    images = []
    for number in range(count):
        label = number % len(SYNSETS)
        name = f"{SYNSETS[label]}_{number}.JPEG" if split == "train" else f"ILSVRC2012_val_{number + 1:08}.JPEG"
        images.append(FakeImage(label, name, encode(pixels, KINDS[number % len(KINDS)])))
    images.sort(key=lambda image: (image.label, image.name))
    if truncated:
        whole = images[3]
        images[3] = FakeImage(whole.label, whole.name, whole.content[: len(whole.content) // 2])
    return images


def encode(pixels: np.random.RandomState, kind: str) -> bytes:
    """Encode noise of a random size, whose first rows are bright, so that a rotation shows."""
    height, width = pixels.randint(12, 60, size=2)
    width = width * 4 if kind == "wide" else width
    noise = pixels.randint(0, 128, (height, width, 3), dtype=np.uint8)
    noise[: height // 3] += 127
    image = Image.fromarray(noise)
    if kind in ("L", "CMYK"):
        image = image.convert(kind)
    exif = Image.Exif()
    if kind == "rotated":
        exif[ORIENTATION] = 6
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if kind == "PNG" else "JPEG", exif=exif.tobytes())
    return buffer.getvalue()


def parquet_files(split: str, images: list[FakeImage], shards: int = 3) -> dict[str, bytes]:
    """Store a split as the Hub has it; each shard holds a part of the rows, in their order."""
    label = datasets.ClassLabel(names=HUB_NAMES)
    features = datasets.Features({"image": datasets.Image(), "label": label})
    files = {}
    for number, part in enumerate(np.array_split(np.arange(len(images)), shards)):
        rows = {
            "image": [{"bytes": images[row].content, "path": images[row].name} for row in part],
            "label": [images[row].label for row in part],
        }
        buffer = io.BytesIO()
        datasets.Dataset.from_dict(rows, features=features).to_parquet(buffer)
        files[f"data/{split}-{number:05}-of-{shards:05}.parquet"] = buffer.getvalue()
    return files


def write_parquet(folder: Path, splits: dict[str, list[FakeImage]], shards: int = 3) -> Path:
    """Write splits as a local folder of parquet."""
    (folder / "data").mkdir(parents=True)
    for split, images in splits.items():
        for name, content in parquet_files(split, images, shards).items():
            (folder / name).write_bytes(content)
    return folder


def write_folders(folder: Path, splits: dict[str, list[FakeImage]]) -> Path:
    """Write splits as `train/SYNSET/*.JPEG` and `val/SYNSET/*.JPEG`."""
    for split, images in splits.items():
        for image in images:
            path = folder / FOLDERS[split] / SYNSETS[image.label] / image.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image.content)
    return folder


def put_on_hub(hub: "HubServer", name: str, splits: dict[str, list[FakeImage]], shards: int = 3) -> str:
    """Put splits into a gated repository of data and return the commit."""
    hub.add_repo(f"datasets/{name}", gated=True)
    files = {}
    for split, images in splits.items():
        files |= parquet_files(split, images, shards)
    return hub.commit(f"datasets/{name}", files)


def main() -> None:
    """Write both kinds of folders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=len(SYNSETS), help="at least one image a class")
    parser.add_argument("--validation", type=int, default=100)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--truncated", action="store_true", help="let one training image break off")
    arguments = parser.parse_args()
    if arguments.train < len(SYNSETS):
        parser.error(f"--train {arguments.train} leaves classes without an image: give {len(SYNSETS)} or more")
    splits = {
        "train": make_images("train", arguments.train, arguments.truncated),
        "validation": make_images("validation", arguments.validation),
    }
    write_parquet(arguments.out / "parquet", splits, arguments.shards)
    write_folders(arguments.out / "folders", splits)


if __name__ == "__main__":
    main()
