"""Cut the Fashion-MNIST sample that ships with the package out of the original IDX files.

python -m scalablevit_pl.data.samples.make_fashion_mnist_sample --idx FOLDER --out FOLDER
"""

import argparse
import gzip
import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, disable_progress_bars
from numpy.typing import NDArray
from PIL import Image as PILImage

from scalablevit_pl.storage import written_aside

CLASS_NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
IDX_PREFIXES = {"train": "train", "test": "t10k"}


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read a gzip-compressed IDX file of unsigned bytes: labels in 1 dimension, images in 3."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: --idx must name the folder with the four original *-ubyte.gz files.")
    try:
        content = gzip.decompress(path.read_bytes())
        shape = struct.unpack_from(f">{dimensions}I", content, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (EOFError, OSError, ValueError, struct.error, zlib.error) as error:
        raise ValueError(f"{path} is not a whole IDX file ({error}): fetch it again.") from error


def first_of_each_class(labels: NDArray[np.uint8], per_class: int) -> NDArray[np.intp]:
    """Find the first `per_class` indices of each class, in ascending order."""
    fewest = np.bincount(labels, minlength=len(CLASS_NAMES)).min()
    if not 0 < per_class <= fewest:
        raise ValueError(f"a class has {fewest} images: ask for 1 to {fewest} of each class, not {per_class}.")
    chosen = [np.flatnonzero(labels == label)[:per_class] for label in range(len(CLASS_NAMES))]
    return np.sort(np.concatenate(chosen))


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode a grayscale image `(H, W)` as PNG."""
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def build_split(folder: Path, split: str, per_class: int) -> Dataset:
    """Build the split `train` or `test` of the sample in the original order; images are named by their index."""
    prefix = IDX_PREFIXES[split]
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", dimensions=3)
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", dimensions=1)
    if len(images) != len(labels):
        raise ValueError(f"{folder} holds {len(images)} {prefix} images and {len(labels)} labels: fetch both again.")
    indices = first_of_each_class(labels, per_class)
    columns = {
        "image": [{"bytes": encode_png(images[index]), "path": f"{index:05d}.png"} for index in indices],
        "label": labels[indices].tolist(),
    }
    features = Features({"image": Image(), "label": ClassLabel(names=CLASS_NAMES)})
    return Dataset.from_dict(columns, features=features)


def make_sample(idx: Path, out: Path, train_per_class: int = 1000, test_per_class: int = 200) -> None:
    """Write `train.parquet` and `test.parquet` into `out`; the same libraries give the same bytes."""
    splits = {"train": build_split(idx, "train", train_per_class), "test": build_split(idx, "test", test_per_class)}
    out.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        with written_aside(out / f"{split}.parquet") as aside:
            rows.to_parquet(aside)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script; a problem with files or folders ends it with one sentence and exit status 1."""
    parser = argparse.ArgumentParser(
        prog="python -m scalablevit_pl.data.samples.make_fashion_mnist_sample",
        description="Cut the Fashion-MNIST sample out of the original IDX files.",
    )
    parser.add_argument("--idx", type=Path, required=True, metavar="FOLDER", help="holds the four *-ubyte.gz files")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="gets train.parquet and test.parquet")
    parser.add_argument("--train-per-class", type=int, default=1000, help="images of each class (%(default)s)")
    parser.add_argument("--test-per-class", type=int, default=200, help="images of each class (%(default)s)")
    options = parser.parse_args(arguments)
    disable_progress_bars()
    try:
        make_sample(options.idx, options.out, options.train_per_class, options.test_per_class)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
