"""Images as samples: the rows of a data set, or plain files."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from scalablevit_pl.data.samplers import FILLER, Draw
from scalablevit_pl.preprocessing import ImagePreprocessing, UnreadableImageError, decode_image
from scalablevit_pl.preprocessing.masks import IGNORED
from scalablevit_pl.randomness import preserved, seed_generators
from scalablevit_pl.text import one_line

Row = Mapping[str, Any]
Sample = dict[str, Any]
Transform = Callable[[Image.Image], Tensor]
JointTransform = Callable[[Image.Image, Any], Sample]


class Targets(NamedTuple):
    """How the target of an image is read from its row.

    Attributes:
        columns: Columns to read; without any, the target is None, as in prediction.
        read: From the stored values of these columns to the target. Bytes and images arrive as a `StoredImage`. Called
            in the loader processes.
    """

    columns: Sequence[str]
    read: Callable[[Row], Any]


class StoredImage(NamedTuple):
    """An image as stored: encoded bytes or the path of a file, the path that the row states, its name in errors."""

    source: bytes | str
    path: str
    name: str

    def read(self) -> bytes:
        """Return the encoded bytes."""
        return self.source if isinstance(self.source, bytes) else Path(self.source).read_bytes()


@dataclass(frozen=True)
class SampleReader:
    """Turns a stored row into a sample: decodes the image, reads the target, seeds and applies the transform.

    Attributes:
        split: Name of the split, for error messages.
        image_column: Name of the image column.
        transform: From an image and its target to a sample with `image (C, H, W)`.
        targets: How targets are read; None if there are none.
        root: The data set's folder. Files that rows name must lie in it; None allows no files.
        seed: Seed of the transform's random numbers.
        channels: Channels to decode images to.
    """

    split: str
    image_column: str
    transform: JointTransform
    targets: Targets | None = None
    root: Path | None = None
    seed: int = 0
    channels: int = 3

    @property
    def columns(self) -> list[str]:
        """The columns that a row must hold, the image column first."""
        return list(dict.fromkeys([self.image_column, *(self.targets.columns if self.targets else ())]))

    def read(self, index: int, row: Row, draw: Draw | None = None) -> Sample:
        """Return the transform's sample with `index` and `path` (empty if unknown).

        Args:
            index: Number of the row in its split.
            row: Stored values.
            draw: For training: the transform is seeded by (seed, epoch, row, repeat).
        """
        stored = self.stored_image(index, row)
        image, target = decode_image(stored.source, stored.name, self.channels), self.target(index, row)
        if draw is not None:
            seed_generators(self.seed, draw.epoch, index, draw.repeat)
        return self.transform(image, target) | {"index": index, "path": stored.path}

    def stored_image(self, index: int, row: Row) -> StoredImage:
        """Return the image of a row as it is stored."""
        return self._stored(index, row[self.image_column] or {})

    def target(self, index: int, row: Row) -> Any:
        """Return the target of a row, or None if there are no targets."""
        if self.targets is None:
            return None
        stored = {name: row[name] for name in self.targets.columns}
        for name, value in stored.items():
            if isinstance(value, bytes) or (isinstance(value, dict) and value.keys() == {"bytes", "path"}):
                stored[name] = self._stored(index, value, f"column {name!r} of ")
        return self.targets.read(stored)

    def _stored(self, index: int, value: Mapping[str, Any] | bytes, column: str = "") -> StoredImage:
        value = {"bytes": value} if isinstance(value, bytes) else value
        path, content = value.get("path") or "", value.get("bytes")
        name = f"{column}row {index} of split {self.split!r}"
        if content is not None or not path:
            return StoredImage(content or b"", path, name)
        # Links inside the folder belong to its owner and are not resolved. A path that leaves it comes from the data.
        absolute = Path(os.path.abspath(path))  # noqa: PTH100
        if self.root is None or not absolute.is_relative_to(os.path.abspath(self.root)):  # noqa: PTH100
            raise UnreadableImageError(f"{name} names {path!r} outside the data set")
        return StoredImage(path, path, path)


class SplitImages(Dataset[Sample]):
    """Decoded and transformed images of one split, or of a part of it.

    Args:
        rows: The split. Images are decoded here, not by `datasets`.
        reader: Turns rows into samples.
        indices: Rows to use; by default all.
        attempts: Images tried for a sample, the wanted one first. With 1, an unreadable image raises an error.
    """

    def __init__(
        self, rows: datasets.Dataset, reader: SampleReader, indices: Sequence[int] | None = None, attempts: int = 1
    ) -> None:
        # A row in Arrow's format costs less than one in Python's types.
        self.rows = rows.select_columns(reader.columns).with_format("arrow")
        self.reader = reader
        # An array, since reading an integer of a list writes to its memory, which loader processes would then copy.
        self.indices = range(len(rows)) if indices is None else np.asarray(indices)
        self.attempts = attempts

    @property
    def split(self) -> str:
        """Name of the split."""
        return self.reader.split

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int | Draw) -> Sample:
        """Return a sample with `index` (its row in the split) and `path`.

        If several images may be tried, `unreadable` lists the unreadable ones, one a line. In training, the next
        readable image replaces an unreadable one; in evaluation, it becomes a filler with a negative `index`.

        Args:
            item: A position, or the draw of a training epoch. A negative position gives a filler with this `index`.
        """
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[int | Draw]) -> list[Sample]:
        """Return the samples of a batch; loaders call this."""
        with preserved():
            return [self._read(item) for item in items]

    def _read(self, item: int | Draw) -> Sample:
        draw, position = (item, item.position) if isinstance(item, Draw) else (None, item)
        errors: list[UnreadableImageError] = []
        for offset in range(min(self.attempts, len(self))):
            index = int(self.indices[(max(position, 0) + offset) % len(self)])
            try:
                sample = self.reader.read(index, self.row(index), draw)
            except UnreadableImageError as error:
                errors.append(error)
            else:
                return self._marked(sample, position, errors, training=draw is not None)
        raise errors[0]

    def _marked(self, sample: Sample, position: int, errors: list[UnreadableImageError], training: bool) -> Sample:
        """Mark a filler, and list unreadable images where they are tolerated."""
        if not training and (errors or position < 0):
            sample["index"] = min(position, FILLER)
            errors = errors[:1] if position >= 0 else []  # the others are counted at their own positions
        lines = "\n".join(one_line(error, None) for error in errors)
        return sample | ({"unreadable": lines} if self.attempts > 1 else {})

    def row(self, index: int) -> Row:
        """Return the stored values of a row of the split."""
        table = self.rows[index]
        return {name: table[name][0].as_py() for name in table.column_names}

    def stored_rows(self) -> Iterator[tuple[int, Row]]:
        """Yield the index and the stored values of each row."""
        return ((int(index), self.row(int(index))) for index in self.indices)


def collate(samples: list[Sample]) -> dict[str, Any]:
    """Stack samples to a batch. Its images `(B, C, H, W)` keep the memory layout of the samples.

    Images and masks of different sizes are padded right and bottom: images with 0, masks with the ignored class.
    """
    images: list[Tensor] = [sample.pop("image") for sample in samples]
    if images[0].stride(0) == 1:
        # Copied as they lie, channels last: rearranging bytes is the slower part, and a GPU does it faster.
        stacked = _stack([image.permute(1, 2, 0) for image in images], 0).permute(0, 3, 1, 2)
    else:
        stacked = _stack(images, 0)
    masks = {"mask": _stack([sample.pop("mask") for sample in samples], IGNORED)} if "mask" in samples[0] else {}
    return {"image": stacked, **masks, **default_collate(samples)}


def _stack(tensors: list[Tensor], fill: int) -> Tensor:
    """Stack tensors, each filled up to the largest size."""
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    filled = []
    for tensor in tensors:
        if list(tensor.shape) != shape:
            content, tensor = tensor, tensor.new_full(shape, fill)
            tensor[tuple(map(slice, content.shape))] = content
        filled.append(tensor)
    stacked: Tensor = default_collate(filled)
    return stacked


class ImageFiles(Dataset[Sample]):
    """Image files as samples with `image`, `index`, `path` and `unreadable`, for prediction.

    Args:
        paths: The files.
        transform: The evaluation transform.
        strict: Raise an error for an unreadable image. Else it becomes a filler, and `unreadable` is its error.
    """

    def __init__(self, paths: Sequence[Path], transform: ImagePreprocessing, strict: bool = True) -> None:
        self.paths = paths
        self.transform = transform
        self.strict = strict

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path, unreadable, channels = str(self.paths[index]), "", self.transform.channels
        try:
            image = decode_image(path, channels=channels)
        except UnreadableImageError as error:
            if self.strict:
                raise
            index, unreadable = FILLER, one_line(error, None)
            image = decode_image(Image.new("L", (1, 1)), channels=channels)
        sample = self.transform.sample(image)
        sample["image"] = self.transform.normalize(sample["image"])
        return sample | {"index": index, "path": path, "unreadable": unreadable}
