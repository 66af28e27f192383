"""Images as samples: the rows of a data set, or plain files."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from scalablevit_pl.data.samplers import FILLER, Draw
from scalablevit_pl.preprocessing import UnreadableImageError, decode_image
from scalablevit_pl.randomness import seeded

Transform = Callable[[Image.Image], Tensor]


class DatasetImages(Dataset[dict[str, Any]]):
    """Decoded and transformed images of one split.

    Args:
        rows: The split; its images are decoded here, not by `datasets`.
        image_column: Name of the image column.
        split: Name of the split, for errors.
        transform: From an RGB image to a tensor.
        labels: Class index of each row of the split; without them samples have no `label`.
        indices: The rows that are meant; all by default.
        root: The data set's folder; files that rows name have to lie in it.
        seed: Seed of the transform's random numbers, for samples that are asked for by a `Draw`.
        max_unreadable: Different images that may be unreadable; with 0 the first one raises.
        replace: Whether an unreadable image is replaced by the next readable one, as in training. Else a filler stands
            in its place, which nothing counts.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        image_column: str,
        split: str,
        transform: Transform,
        labels: Sequence[int] | None = None,
        indices: Sequence[int] | None = None,
        root: Path | None = None,
        seed: int = 0,
        max_unreadable: int = 0,
        replace: bool = False,
    ) -> None:
        self.rows = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        self.image_column = image_column
        self.split = split
        self.transform = transform
        self.labels = labels
        self.indices = range(len(rows)) if indices is None else indices
        self.max_unreadable = max_unreadable
        self.replace = replace
        self.root = None if root is None else Path(os.path.abspath(root))  # noqa: PTH100  links stay links
        self.seed = seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int | Draw) -> dict[str, Any]:
        """Return `image (3, H, W)`, `index` (the row), `path` (empty if there is none) and, where known, `label`.

        Where unreadable images are allowed, `unreadable` names those that were met, one a line.

        Args:
            item: A position, or a draw of a training epoch, of which the transform's random numbers are a function. A
                negative position gives a filler: the first sample, with a negative `index`.

        Raises:
            UnreadableImageError: If more images than allowed cannot be decoded; it names the file, or split and row.
        """
        if self.max_unreadable == 0:
            return self._sample(item)
        try:
            return self._sample(item) | {"unreadable": ""}
        except UnreadableImageError as error:
            return self._stand_in(item, error)

    def _sample(self, item: int | Draw) -> dict[str, Any]:
        if isinstance(item, Draw):
            index = number = self.indices[item.position]
            image, path = self._decode(index)
            with seeded(self.seed, item.epoch, index, item.repeat):
                pixels = self.transform(image)
        else:
            index = self.indices[max(item, 0)]
            number = index if item >= 0 else item
            image, path = self._decode(index)
            pixels = self.transform(image)
        return self._labelled({"image": pixels, "index": number, "path": path}, index)

    def _labelled(self, sample: dict[str, Any], index: int) -> dict[str, Any]:
        return sample if self.labels is None else sample | {"label": self.labels[index]}

    def _decode(self, index: int) -> tuple[Image.Image, str]:
        """Return a row's image and path.

        Raises:
            UnreadableImageError: If it cannot be decoded.
        """
        stored = self.rows[index][self.image_column] or {}
        path, content = stored.get("path") or "", stored.get("bytes")
        if content is not None or not path:
            return decode_image(content or b"", f"row {index} of split {self.split!r}"), path
        # Links inside the folder are its owner's, and not resolved; a path out of it is the data's doing.
        absolute = Path(os.path.abspath(path))  # noqa: PTH100
        if self.root is None or not absolute.is_relative_to(self.root):
            raise UnreadableImageError(f"row {index} of split {self.split!r} names {path!r} outside the data set")
        return decode_image(path), path

    def _stand_in(self, item: int | Draw, error: UnreadableImageError) -> dict[str, Any]:
        """Return what is taken in the place of an unreadable image.

        Raises:
            UnreadableImageError: If more images in a row are unreadable than may be.
        """
        lines = [one_line(error)]
        position = item.position if isinstance(item, Draw) else max(item, 0)
        if not self.replace:
            zeros = torch.zeros_like(self.transform(Image.new("RGB", (1, 1))))
            filler = {"image": zeros, "index": FILLER, "path": "", "unreadable": lines[0]}
            return self._labelled(filler, self.indices[position])
        for offset in range(1, min(self.max_unreadable + 1, len(self))):
            following = (position + offset) % len(self)
            try:
                sample = self._sample(item._replace(position=following) if isinstance(item, Draw) else following)
            except UnreadableImageError as another:
                lines.append(one_line(another))
            else:
                return sample | {"unreadable": "\n".join(lines)}
        raise error


def one_line(error: UnreadableImageError) -> str:
    """Return an error's sentence without line ends."""
    return " ".join(str(error).split())


class ImageFiles(Dataset[dict[str, Any]]):
    """Image files without labels, for prediction.

    Args:
        paths: The files.
        transform: From an RGB image to a tensor.
    """

    def __init__(self, paths: Sequence[Path], transform: Transform) -> None:
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `image (3, H, W)`, `index` and `path`.

        Raises:
            UnreadableImageError: If the image cannot be decoded; it names the file.
        """
        path = self.paths[index]
        return {"image": self.transform(decode_image(path)), "index": index, "path": str(path)}
