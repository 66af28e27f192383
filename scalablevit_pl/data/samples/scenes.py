"""Scenes of overlapping garments with exact masks, instances and boxes, drawn from the Fashion-MNIST sample.

A scene is a function of (seed, split, index). Only integers decide about pixels: sums of products are exact in float32,
so every machine draws the same bytes.
"""

import io
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray
from PIL import Image

from scalablevit_pl.data.samples.make_fashion_mnist_sample import CLASS_NAMES

CLASSES = ["background", *CLASS_NAMES]
SPLITS = ("train", "test")
FOLDER = Path(__file__).parent / "fashion_mnist_sample"
VERSION = 3  # of what is drawn: part of the key of the cached scenes
SMALLEST = 32
PALE = 16  # the highest value of a garment's image that still is its surroundings
LEAST_VISIBLE = 0.25  # of a garment
ONE = 64  # weights of an interpolation are multiples of 1 / ONE

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


class Scene(NamedTuple):
    """A picture of garments and what is in it.

    Attributes:
        image: `(side, side, 3)`, bytes.
        mask: `(side, side)`: the index in `CLASSES` of each pixel.
        instances: `(side, side)`: 0 for the background, n + 1 for the visible pixels of garment n.
        boxes: `(N, 4)`: the visible pixels of each garment lie in `[x0, x1)` and `[y0, y1)`, stored as x0, y0, x1, y1.
        labels: `(N,)`: the index in `CLASS_NAMES` of each garment, the front one first.
    """

    image: Bytes
    mask: Bytes
    instances: Bytes
    boxes: NDArray[np.int64]
    labels: NDArray[np.int64]


def draw_scene(split: str, index: int, seed: int = 0, side: int = 96) -> Scene:
    """Draw 2 to 5 garments of `side / 3` to `2 * side / 3` pixels in front of a smooth random texture.

    Garments are drawn from the front to the back. One of which at most a quarter would be visible is left out.

    Args:
        split: `train` or `test`: the split of the Fashion-MNIST sample that the garments come from.
        index: Number of the scene, from 0.
        seed: Seed of all scenes.
        side: Height and width in pixels, at least 32.
    """
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r} of scenes: choose train or test")
    if side < SMALLEST:
        raise ValueError(f"side must be at least {SMALLEST}, got {side}")
    garments, classes = load_garments(split)
    # RandomState's stream is the same with every version of NumPy.
    random = np.random.RandomState(np.random.PCG64((seed, SPLITS.index(split), index)))
    values, instances, labels, boxes = _texture(random, side), np.zeros((side, side), np.uint8), [], []
    count = random.randint(2, 6)
    sizes = random.randint(side // 3, 2 * side // 3 + 1, count)
    corners = (random.random_sample((count, 2)) * (side - sizes + 1)[:, None]).astype(int)
    for number, size, (top, left) in zip(random.randint(len(garments), size=count), sizes, corners, strict=True):
        window = np.s_[top : top + size, left : left + size]
        garment = _resized(garments[number], size)
        opaque = garment > PALE
        visible = opaque & (instances[window] == 0)
        if np.count_nonzero(visible) <= LEAST_VISIBLE * np.count_nonzero(opaque):
            continue
        np.copyto(values[window], garment, where=visible)
        labels.append(classes[number])
        instances[window][visible] = len(labels)
        boxes.append(_box(visible, left, top))
    mask = np.array([0, *(label + 1 for label in labels)], np.uint8)[instances]
    image = _colored(random, values, instances, len(labels) + 1)
    return Scene(image, mask, instances, np.array(boxes), np.array(labels))


def _texture(random: np.random.RandomState, side: int) -> Bytes:
    """Return values `(side, side)` that vary smoothly, at a large and a small scale."""
    coarse, fine = (_resized(random.randint(0, 256, (cells, cells)), side) for cells in (4, 12))
    return (coarse // 2 + fine // 2).astype(np.uint8)


def _resized(image: NDArray[Any], side: int) -> Bytes:
    """Resize a square image by linear interpolation."""
    weights = _weights(len(image), side)
    return (weights @ image.astype(np.float32) @ weights.T / ONE**2).astype(np.uint8)


@cache
def _weights(source: int, target: int) -> Floats:
    """Return the integer weights `(target, source)` of a linear interpolation; those of each row add up to `ONE`."""
    positions = ((2 * np.arange(target) + 1) * source * ONE // (2 * target) - ONE // 2).clip(0, (source - 1) * ONE)
    distances = np.abs(positions[:, None] - ONE * np.arange(source))
    return (ONE - distances).clip(0).astype(np.float32)


def _colored(random: np.random.RandomState, values: Bytes, instances: Bytes, parts: int) -> Bytes:
    """Color the background between two random colors and each garment by one, darker at lower values, and add noise."""
    high = random.randint(48, 240, (parts, 1, 4))
    low = high // 4
    low[0] = random.randint(0, 240, 4)
    steps = np.arange(256)[:, None]
    colors = ((low * (255 - steps) + high * steps) // 255).astype(np.uint8).view(np.uint32).reshape(parts, 256)
    # Four bytes, of which three are used, are one number: several times as fast.
    noise = np.frombuffer(random.bytes(4 * values.size), np.uint32) & 0x0F0F0F0F
    pixels: NDArray[np.uint32] = colors[instances, values] + noise.reshape(values.shape)
    return pixels.view(np.uint8).reshape(*values.shape, 4)[..., :3]


def _box(visible: NDArray[np.bool_], left: int, top: int) -> tuple[int, int, int, int]:
    columns, rows = (np.flatnonzero(visible.any(axis)) for axis in (0, 1))
    return left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1


def load_scenes(train: int = 4000, test: int = 500, side: int = 96, seed: int = 0) -> datasets.DatasetDict:
    """Return scenes as data sets. They are drawn once; later calls read them from the cache of `datasets`.

    The columns `image`, `mask` and `instances` are PNG files. `objects` has the `boxes` and `labels` of the garments,
    and `classes` the values in the mask, named by `CLASSES`.

    Args:
        train: Number of training scenes.
        test: Number of test scenes.
        side: Height and width in pixels.
        seed: Seed of all scenes.
    """
    objects = {
        "boxes": datasets.List(datasets.List(datasets.Value("int64"), length=4)),
        "labels": datasets.List(datasets.ClassLabel(names=CLASS_NAMES)),
    }
    images = {name: datasets.Image() for name in ("image", "mask", "instances")}
    classes = datasets.List(datasets.ClassLabel(names=CLASSES))
    features = datasets.Features({**images, "objects": objects, "classes": classes})
    splits = datasets.DatasetDict()
    for split, count in (("train", train), ("test", test)):
        options = {"split": split, "count": count, "side": side, "seed": seed, "version": VERSION}
        name = datasets.NamedSplit(split)
        splits[split] = datasets.Dataset.from_generator(_draw_rows, features, gen_kwargs=options, split=name)
    return splits


def _draw_rows(split: str, count: int, side: int, seed: int, version: int) -> Iterator[dict[str, Any]]:  # noqa: ARG001
    """Yield scenes as rows. `version` is only a part of the key under which they are cached."""
    for index in range(count):
        scene = draw_scene(split, index, seed, side)
        name = f"{split}/{index:05d}.png"
        images = {"image": scene.image, "mask": scene.mask, "instances": scene.instances}
        yield {
            **{column: {"bytes": _encoded(pixels), "path": name} for column, pixels in images.items()},
            "objects": {"boxes": scene.boxes, "labels": scene.labels},
            "classes": np.unique(scene.mask),
        }


def _encoded(pixels: Bytes) -> bytes:
    buffer = io.BytesIO()
    noisy = pixels.ndim == 3  # compresses little, at three times the time
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=0 if noisy else 1)
    return buffer.getvalue()


@cache
def load_garments(split: str) -> tuple[Bytes, NDArray[np.int64]]:
    """Return the images `(N, 28, 28)` and the classes `(N,)` of a split of the Fashion-MNIST sample."""
    table = pyarrow.parquet.read_table(FOLDER / f"{split}.parquet")
    files = table.column("image").combine_chunks().field("bytes")
    images = np.stack([np.asarray(Image.open(io.BytesIO(content.as_py()))) for content in files])
    return images, table.column("label").to_numpy()
