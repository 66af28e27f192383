"""Images as samples: the rows of a data set, or plain files."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from scalablevit_pl.data.samplers import FILLER, Draw
from scalablevit_pl.preprocessing import UnreadableImageError, decode_image
from scalablevit_pl.randomness import preserved, seed_generators

Transform = Callable[[Image.Image], Tensor]


class DatasetImages(Dataset[dict[str, Any]]):
    """Decoded and transformed images of one split.

    Args:
        rows: The split; its images are decoded here, not by `datasets`.
        image_column: Name of the image column.
        split: Name of the split, for errors.
        transform: From an RGB image to a tensor `(3, H, W)`.
        draw_patch: Called after the transform of a sample that is asked for by a `Draw`; gives its `patch`.
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
        draw_patch: Callable[[], Tensor] | None = None,
    ) -> None:
        self.rows = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        self._tables = self.rows.with_format("arrow")  # a row of which costs less than one in Python's types
        self.image_column = image_column
        self.split = split
        self.transform = transform
        self.draw_patch = draw_patch
        # Arrays, since each look at an integer of a list writes to its memory, which loader processes then copy.
        self.labels = None if labels is None else np.asarray(labels)
        self.indices = range(len(rows)) if indices is None else np.asarray(indices)
        self.max_unreadable = max_unreadable
        self.replace = replace
        self.root = None if root is None else Path(os.path.abspath(root))  # noqa: PTH100  links stay links
        self.seed = seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int | Draw) -> dict[str, Any]:
        """Return `image (3, H, W)`, `index` (the row), `path` (empty if there is none) and, where known, `label`.

        Where unreadable images are allowed, `unreadable` names those that were met, one a line. A sample of a draw has
        `patch (5,)` where there is random erasing.

        Args:
            item: A position, or a draw of a training epoch, of which the transform's random numbers are a function. A
                negative position gives a filler: the first sample, with a negative `index`.

        Raises:
            UnreadableImageError: If more images than allowed cannot be decoded; it names the file, or split and row.
        """
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[int | Draw]) -> list[dict[str, Any]]:
        """Return the samples of a batch, as `__getitem__` does; loaders ask for whole batches."""
        with preserved():
            return [self._readable(item) for item in items]

    def _readable(self, item: int | Draw) -> dict[str, Any]:
        if self.max_unreadable == 0:
            return self._sample(item)
        try:
            return self._sample(item) | {"unreadable": ""}
        except UnreadableImageError as error:
            return self._stand_in(item, error)

    def _sample(self, item: int | Draw) -> dict[str, Any]:
        if isinstance(item, Draw):
            index = int(self.indices[item.position])
            image, path = self._decode(index)
            seed_generators(self.seed, item.epoch, index, item.repeat)
            sample = {"image": self.transform(image), "index": index, "path": path}
            if self.draw_patch is not None:
                sample["patch"] = self.draw_patch()
        else:
            index = int(self.indices[max(item, 0)])
            image, path = self._decode(index)
            sample = {"image": self.transform(image), "index": index if item >= 0 else item, "path": path}
        return self._labelled(sample, index)

    def _labelled(self, sample: dict[str, Any], index: int) -> dict[str, Any]:
        return sample if self.labels is None else sample | {"label": int(self.labels[index])}

    def _decode(self, index: int) -> tuple[Image.Image, str]:
        """Return a row's image and path.

        Raises:
            UnreadableImageError: If it cannot be decoded.
        """
        source, path = self.stored(index)
        return decode_image(source, path if source == path else f"row {index} of split {self.split!r}"), path

    def stored(self, index: int) -> tuple[bytes | str, str]:
        """Return what a row stores of its image, encoded bytes or the path of a file, and the path it names or "".

        Raises:
            UnreadableImageError: If it names a file outside the data set.
        """
        stored = self._tables[index][self.image_column][0].as_py() or {}
        path, content = stored.get("path") or "", stored.get("bytes")
        if content is not None or not path:
            return content or b"", path
        # Links inside the folder are its owner's, and not resolved; a path out of it is the data's doing.
        absolute = Path(os.path.abspath(path))  # noqa: PTH100
        if self.root is None or not absolute.is_relative_to(self.root):
            raise UnreadableImageError(f"row {index} of split {self.split!r} names {path!r} outside the data set")
        return path, path

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
            return self._labelled(filler, int(self.indices[position]))
        for offset in range(1, min(self.max_unreadable + 1, len(self))):
            following = (position + offset) % len(self)
            try:
                sample = self._sample(item._replace(position=following) if isinstance(item, Draw) else following)
            except UnreadableImageError as another:
                lines.append(one_line(another))
            else:
                return sample | {"unreadable": "\n".join(lines)}
        raise error


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Put samples together to a batch; its images `(B, 3, H, W)` lie in memory as those of the samples do."""
    # Copied as they lie, channels last: laying them out anew byte by byte is the slower part, and a GPU's business.
    images: Tensor = default_collate([sample["image"].permute(1, 2, 0) for sample in samples]).permute(0, 3, 1, 2)
    others: dict[str, Any] = default_collate([_without_image(sample) for sample in samples])
    return {"image": images} | others


def _without_image(sample: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in sample.items() if key != "image"}


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
