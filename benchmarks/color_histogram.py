"""IoU of a classifier that sees only the color of a pixel. A segmentation network has to be better.

python benchmarks/color_histogram.py FOLDER [--levels 16 32]

FOLDER has `train` and `test`, each with `images` and `masks` of the same names, such as the folder of
`scalablevit_pl.data.samples.make_earth`. Each channel is divided into levels. A pixel gets the most frequent class of
its color among the training pixels, or that of the nearest color if its own does not occur.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from script import markdown

Integers = NDArray[np.int64]


def read_pixels(folder: Path) -> tuple[Integers, Integers]:
    """Return the colors `(N, 3)` and the classes `(N,)` of the pixels of all images in a folder."""
    masks = sorted((folder / "masks").iterdir())
    images = [Image.open(folder / "images" / path.name).convert("RGB") for path in masks]
    colors = np.concatenate([np.asarray(image, np.int64).reshape(-1, 3) for image in images])
    return colors, np.concatenate([np.asarray(Image.open(path), np.int64).ravel() for path in masks])


def learn(colors: Integers, classes: Integers, levels: int) -> Integers:
    """Return the class of each color `(levels, levels, levels)`."""
    count = classes.max() + 1
    numbers = np.ravel_multi_index((colors * levels // 256).T, (levels,) * 3)
    frequencies = np.bincount(numbers * count + classes, minlength=levels**3 * count).reshape(-1, count)
    found = frequencies.argmax(1)
    seen, unseen = (np.flatnonzero(frequencies.any(1) == occurs) for occurs in (True, False))
    places = np.stack(np.unravel_index(np.arange(levels**3), (levels,) * 3), 1)
    for number in unseen:
        found[number] = found[seen[((places[seen] - places[number]) ** 2).sum(1).argmin()]]
    return found.reshape((levels,) * 3)


def measure(predicted: Integers, classes: Integers) -> tuple[NDArray[np.float64], float]:
    """Return the IoU of each class, NaN if it does not occur, and the accuracy of the pixels."""
    count = max(predicted.max(), classes.max()) + 1
    confusion = np.bincount(classes * count + predicted, minlength=count**2).reshape(count, count)
    right, union = np.diag(confusion), confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    return np.where(union > 0, right / np.maximum(union, 1), np.nan), right.sum() / confusion.sum()


def main() -> None:
    """Print a table with a row for each number of levels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--levels", type=int, nargs="+", default=[16, 32], help="of each channel (%(default)s)")
    options = parser.parse_args()
    colors, classes = read_pixels(options.folder / "train")
    test_colors, test_classes = read_pixels(options.folder / "test")
    rows = []
    for levels in options.levels:
        found = learn(colors, classes, levels)
        ious, accuracy = measure(found[tuple((test_colors * levels // 256).T)], test_classes)
        rows.append([str(levels), *(f"{value:.4f}" for value in (np.nanmean(ious), accuracy, *ious))])
    header = ["levels", "mIoU", "accuracy", *(f"IoU of class {number}" for number in range(len(rows[0]) - 3))]
    sys.stdout.write(markdown(header, rows))


if __name__ == "__main__":
    main()
