"""Photographs of ImageNet's size, 500 × 375, cut from those in a folder."""

import argparse
import io
import random
from pathlib import Path

import datasets
from PIL import Image

SIZE = (500, 375)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def add_options(parser: argparse.ArgumentParser, images: int) -> None:
    """Add the options of `make_photos`."""
    parser.add_argument("--photos", type=Path, required=True, help="folder with photographs, at any depth")
    parser.add_argument("--images", type=int, default=images, help="different images (%(default)s)")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEG files (%(default)s)")


def make_photos(folder: Path, images: int, quality: int) -> list[bytes]:
    """Cut JPEG files from the photographs in a folder, at random places and scales."""
    photos = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
        with Image.open(path) as photo:
            if min(photo.size) >= max(SIZE):
                photo.thumbnail((3000, 3000))
                photos.append(photo.convert("RGB"))
    if not photos:
        raise SystemExit(f"{folder} holds no photographs of {max(SIZE)} pixels or more: give another --photos")
    chance = random.Random(0)
    return [_cut(chance.choice(photos), chance, quality) for _ in range(images)]


def _cut(photo: Image.Image, chance: random.Random, quality: int) -> bytes:
    scale = chance.uniform(1.0, min(photo.width / SIZE[0], photo.height / SIZE[1]))
    width, height = int(SIZE[0] * scale), int(SIZE[1] * scale)
    left, top = chance.randint(0, photo.width - width), chance.randint(0, photo.height - height)
    buffer = io.BytesIO()
    part = photo.resize(SIZE, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    part.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def store_parquet(contents: list[bytes], classes: list[str], file: Path, copies: int = 1) -> None:
    """Write images as a split of a data set, each of them some times, with their classes in turn as labels."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    rows = [{"bytes": content, "path": None} for content in contents] * copies
    labels = [number % len(classes) for number in range(len(rows))]
    file.parent.mkdir(exist_ok=True)
    datasets.Dataset.from_dict({"image": rows, "label": labels}, features=features).to_parquet(str(file))
