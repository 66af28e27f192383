"""Images a second and core of the train loader, against torchvision's ImageFolder with timm's transform.

python benchmarks/loader.py --photos FOLDER [--images N] [--rounds N]

Photographs of ImageNet's size, 500 × 375, are cut out of those in the folder (Debian's packages gnome-backgrounds and
mate-backgrounds have some) and stored as a parquet data set and as a tree of class folders. The recipe is that of
ImageNet: RandAugment, random erasing, flips, bicubic, 224 pixels. Loaders are measured in turns, without loader
processes by the time of the CPU, with one by the clock. A second table has what an image takes in each step of
ImageFolder and timm's transform; `scalablevit profile data` tells the same of ours. It needs no more of the package
than its datamodule, so that it runs with older commits, too.
"""

import argparse
import importlib.metadata
import io
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder

from scalablevit_pl.data import Augmentation, ClassificationDataModule

SIZE = (500, 375)
CLASSES = [f"class{number}" for number in range(10)]
BATCH = 64
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
PLAIN = Augmentation(mixup=0.0, cutmix=0.0)  # mixing is the same work for all
IMAGE_FOLDER = "ImageFolder + timm"


def make_photos(folder: Path, images: int, quality: int) -> list[bytes]:
    """Cut JPEG files out of the photographs in a folder, at random places and scales."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    photos = []
    for path in paths:
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


def store(contents: list[bytes], folder: Path) -> None:
    """Write images as `parquet/train.parquet` and below `folders/train`."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    rows = [{"bytes": content, "path": None} for content in contents]
    labels = [number % len(CLASSES) for number in range(len(rows))]
    (folder / "parquet").mkdir()
    table = datasets.Dataset.from_dict({"image": rows, "label": labels}, features=features)
    table.to_parquet(str(folder / "parquet" / "train.parquet"))
    for number, (content, label) in enumerate(zip(contents, labels, strict=True)):
        place = folder / "folders" / "train" / CLASSES[label]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:06}.jpg").write_bytes(content)


def timm_transform() -> Any:
    """Build timm's transform; posterizing to no bits, which stops it with Pillow 13, is left to one bit."""
    transform = create_transform(
        224,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
    )
    for operation in next(step for step in transform.transforms if hasattr(step, "ops")).ops:
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = lambda image, bits, **settings: auto_augment.posterize(image, max(bits, 1), **settings)
    return transform


def make_loaders(folder: Path, workers: int) -> dict[str, Callable[[], Any]]:
    """Return what makes each of the loaders anew."""
    ours = {}
    for name in ("parquet", "folders"):
        data = ClassificationDataModule(
            str(folder / name), batch_size=BATCH, num_workers=workers, val_fraction=0.01, augmentation=PLAIN
        )
        data.setup("fit")
        ours[f"ours, {name}"] = data
    loaders: dict[str, Callable[[], Any]] = {
        IMAGE_FOLDER: lambda: DataLoader(
            ImageFolder(str(folder / "folders" / "train"), timm_transform()),
            BATCH,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
        )
    }
    loaders |= {name: data.train_dataloader for name, data in ours.items()}
    if workers == 0:
        data = ours["ours, parquet"]
        loaders["ours, parquet, normalized on the CPU"] = lambda: (
            data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()
        )
    return loaders


def rate(loader: Any, workers: int) -> float:
    """Return the images a second of an epoch, without its first batches, which are made ahead."""
    clock = time.perf_counter if workers else time.process_time
    start, images, skipped = 0.0, 0, 2 * workers + 1
    for number, _ in enumerate(loader, start=1):
        if number == skipped:
            start = clock()
        images += BATCH if number > skipped else 0
    return images / (clock() - start)


def measure(folder: Path, workers: int, rounds: int) -> dict[str, list[float]]:
    """Measure all loaders in turns."""
    loaders = make_loaders(folder, workers)
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(rounds):
        for name in list(loaders)[:: 1 if number % 2 else -1]:
            rates[name].append(rate(loaders[name](), workers))
    return rates


def time_steps(folder: Path) -> dict[str, float]:
    """Return the seconds that an image takes in each step of ImageFolder and timm's transform, one after the other."""
    images, steps = ImageFolder(str(folder)), timm_transform().transforms
    spent = dict.fromkeys(["read and decode", *(type(step).__name__ for step in steps), "collate"], 0.0)
    last, batch = time.perf_counter(), []

    def done(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        spent[name] += now - last
        last = now

    for path, label in images.samples:
        image = images.loader(path)
        done("read and decode")
        for step in steps:
            image = step(image)
            done(type(step).__name__)
        batch.append((image, label))
        if len(batch) == BATCH:
            default_collate(batch)
            batch.clear()
            done("collate")
    return {name: seconds / len(images) for name, seconds in spent.items()}


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder with photographs, at any depth")
    parser.add_argument("--images", type=int, default=800, help="images of the data set (%(default)s)")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEG files (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="epochs of each loader (%(default)s)")
    options = parser.parse_args()
    if options.images < 5 * BATCH:
        parser.error(f"--images must be at least {5 * BATCH}, of which the first batches are not timed")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        datasets.config.HF_DATASETS_CACHE = Path(name) / "cache"
        contents = make_photos(options.photos, options.images, options.quality)
        store(contents, Path(name))
        results = {workers: measure(Path(name), workers, options.rounds) for workers in (0, 1)}
        passes = [time_steps(Path(name) / "folders" / "train") for _ in range(options.rounds)]
    packages = ("torch", "torchvision", "timm", "pillow", "datasets")
    lines = [
        f"{time.strftime('%Y-%m-%d')}, one core of {platform.processor() or platform.machine()}, "
        f"Python {platform.python_version()}, "
        + ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
        + f"; {len(contents)} images of {statistics.mean(map(len, contents)) / 1e3:.0f} kB, {options.rounds} rounds",
        "",
        "| loader processes | | images/s | least-most | ratio |",
        "|---|---|---|---|---|",
    ]
    for workers, rates in results.items():
        for way, values in rates.items():
            ratios = [value / base for value, base in zip(values, rates[IMAGE_FOLDER], strict=True)]
            lines.append(
                f"| {workers} | {way} | {statistics.median(values):.0f} | {min(values):.0f}-{max(values):.0f} "
                f"| {statistics.median(ratios):.2f} |"
            )
    lines += ["", "| step of timm's | µs an image |", "|---|---|"]
    lines += [f"| {step} | {1e6 * statistics.median(spent[step] for spent in passes):.0f} |" for step in passes[0]]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
