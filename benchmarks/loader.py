"""Throughput of the train loader on one core, against torchvision's ImageFolder with timm's transform.

python benchmarks/loader.py --photos FOLDER [--images N] [--rounds N]

Photographs of ImageNet's size, 500 × 375, are cut from those in the folder (for example of Debian's packages
gnome-backgrounds and mate-backgrounds) and stored as a parquet data set and as a tree of class folders. The recipe is
ImageNet's: RandAugment, random erasing, flips, bicubic, 224 pixels. Loaders are interleaved, without loader processes
by CPU time, with one by wall time. A second table has the time of each step of ImageFolder and timm's transform;
`scalablevit profile data` measures those of this package. The script needs only the datamodule of the package, so it
also runs with older commits.
"""

import argparse
import importlib.metadata
import platform
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
from photos import add_options, make_photos, store_parquet
from script import markdown
from timm.data import auto_augment, create_transform
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder

from scalablevit_pl.data import Augmentation, ClassificationDataModule

CLASSES = [f"class{number}" for number in range(10)]
BATCH = 64
PLAIN = Augmentation(mixup=0.0, cutmix=0.0)  # mixing is the same for all
IMAGE_FOLDER = "ImageFolder + timm"
PACKAGES = ("torch", "torchvision", "timm", "pillow", "datasets")


def store_folders(contents: list[bytes], folder: Path) -> None:
    """Write images as a tree of class folders."""
    for number, content in enumerate(contents):
        place = folder / CLASSES[number % len(CLASSES)]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:06}.jpg").write_bytes(content)


def timm_transform() -> Any:
    """Build timm's transform; posterizing keeps at least one bit, since none is an error with Pillow 13."""
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
    """Return a function for each loader that builds it."""
    ours = {}
    for name in ("parquet", "folders"):
        ours[name] = ClassificationDataModule(
            str(folder / name), batch_size=BATCH, num_workers=workers, val_fraction=0.01, augmentation=PLAIN
        )
        ours[name].setup("fit")
    images = ImageFolder(str(folder / "folders" / "train"), timm_transform())
    loaders: dict[str, Callable[[], Any]] = {
        IMAGE_FOLDER: lambda: DataLoader(images, BATCH, shuffle=True, drop_last=True, num_workers=workers)
    }
    loaders |= {f"ours, {name}": data.train_dataloader for name, data in ours.items()}
    if workers == 0:
        data = ours["parquet"]
        loaders["ours, parquet, normalized on the CPU"] = lambda: (
            data.finish(batch, training=True) for batch in data.train_dataloader()
        )
    return loaders


def rate(loader: Any, workers: int) -> float:
    """Return the images per second of an epoch, without its first batches, which are loaded ahead."""
    clock = time.perf_counter if workers else time.process_time
    start, images, skipped = 0.0, 0, 2 * workers + 1
    for number, _ in enumerate(loader, start=1):
        if number == skipped:
            start = clock()
        images += BATCH if number > skipped else 0
    return images / (clock() - start)


def measure(folder: Path, workers: int, rounds: int) -> dict[str, list[float]]:
    """Measure all loaders, interleaved."""
    loaders = make_loaders(folder, workers)
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(rounds):
        for name in list(loaders)[:: 1 if number % 2 else -1]:
            rates[name].append(rate(loaders[name](), workers))
    return rates


def time_steps(folder: Path) -> dict[str, float]:
    """Return the seconds per image of each step of ImageFolder and timm's transform."""
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


def rows(workers: int, rates: dict[str, list[float]]) -> list[list[str]]:
    """Return the rows of the first table."""
    found = []
    for way, values in rates.items():
        ratio = statistics.median(value / base for value, base in zip(values, rates[IMAGE_FOLDER], strict=True))
        extremes = f"{min(values):.0f}-{max(values):.0f}"
        found.append([str(workers), way, f"{statistics.median(values):.0f}", extremes, f"{ratio:.2f}"])
    return found


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, 800)
    parser.add_argument("--rounds", type=int, default=7, help="epochs of each loader (%(default)s)")
    options = parser.parse_args()
    if options.images < 5 * BATCH:
        parser.error(f"--images must be at least {5 * BATCH}, of which the first batches are not timed")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        contents = make_photos(options.photos, options.images, options.quality)
        store_parquet(contents, CLASSES, folder / "parquet" / "train.parquet")
        store_folders(contents, folder / "folders" / "train")
        table = [row for workers in (0, 1) for row in rows(workers, measure(folder, workers, options.rounds))]
        passes = [time_steps(folder / "folders" / "train") for _ in range(options.rounds)]
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
    steps = [[step, f"{1e6 * statistics.median(spent[step] for spent in passes):.0f}"] for step in passes[0]]
    sys.stdout.write(
        f"{time.strftime('%Y-%m-%d')}, one core of {platform.processor() or platform.machine()}, "
        f"Python {platform.python_version()}, {versions}; {len(contents)} images of "
        f"{statistics.mean(map(len, contents)) / 1e3:.0f} kB, {options.rounds} rounds\n\n"
        + markdown(("loader processes", "", "images/s", "minimum-maximum", "ratio"), table)
        + "\n"
        + markdown(("step of timm's", "µs per image"), steps)
    )


if __name__ == "__main__":
    main()
