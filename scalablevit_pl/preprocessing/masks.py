"""From an encoded mask to the class of each pixel."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scalablevit_pl.preprocessing.decoding import UnreadableImageError, convert_image, decode

IGNORED = 255  # the class of pixels that no loss and no metric counts
MOST_CLASSES = 255  # indices from 0 to 254
WIDEST = 2**16  # values of a mask are below
LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF", "HEIF")  # or may be

Color = tuple[int, int, int]
Values = NDArray[Any]


class Mask(NamedTuple):
    """The class of each pixel of an image.

    Attributes:
        classes: The indices of the classes, and `IGNORED`: an image of mode `L`.
        name: The mask's name in errors.
    """

    classes: Image.Image
    name: str

    @property
    def blank(self) -> bool:
        """Whether all pixels are ignored."""
        return self.classes.getextrema() == (IGNORED, IGNORED)

    def check_size(self, size: tuple[int, int]) -> None:
        """Compare with the width and height of the image."""
        own = self.classes.size
        if own != size:
            turned = ", which is turned upright by its EXIF orientation" if own == size[::-1] else ""
            raise UnreadableImageError(
                f"{self.name} is a mask of {own[0]}×{own[1]} pixels for an image of {size[0]}×{size[1]}{turned}: store "
                "both in the same size"
            )


@dataclass(frozen=True)
class MaskFormat:
    """How masks store classes: as the values or palette indices of pixels, or as colors.

    Attributes:
        num_classes: Number of classes, at most 255.
        palette: Color of each value; None if pixels store the values.
        reduce_zero_label: Whether the value 0 is ignored and k is the class k - 1.
        ignore_value: The value that is ignored.

    Raises:
        ValueError: If the palette does not have a color for each class.
    """

    num_classes: int
    palette: tuple[Color, ...] | None = None
    reduce_zero_label: bool = False
    ignore_value: int = IGNORED

    def __post_init__(self) -> None:
        if not 0 <= self.ignore_value < WIDEST:
            raise ValueError(f"ignore_value must be from 0 to {WIDEST - 1}, got {self.ignore_value}")
        if self.palette is None:
            return
        values = set(range(self.first, self.first + self.num_classes))
        known = set(range(len(self.palette)))
        if not values <= known or known - values - {0, self.ignore_value}:
            raise ValueError(
                f"the palette has {len(self.palette)} colors for the values {self.first} to {max(values)} of "
                f"{self.num_classes} classes: give one for each"
            )
        for color in self.palette:
            if len(color) != 3 or not all(0 <= value <= 255 for value in color):
                raise ValueError(f"a color of the palette must have three values from 0 to 255, got {list(color)}")
            if self.palette.count(color) > 1:
                raise ValueError(f"the palette has the color {list(color)} twice: give each class its own")

    @property
    def first(self) -> int:
        """The value of the first class."""
        return int(self.reduce_zero_label)

    @cached_property
    def table(self) -> NDArray[np.int16]:
        """One more than the class of each value, or of each color as a number; 0 for those without a class."""
        table = np.zeros(WIDEST + 1, np.int16)  # the last stands for all larger values
        table[self.first : self.first + self.num_classes] = 1 + np.arange(self.num_classes)
        table[[self.ignore_value, *range(self.first)]] = 1 + IGNORED
        if self.palette is None:
            return table
        # Memory is only occupied where something is written.
        of_colors = np.zeros(2**24, np.int16)
        of_colors[_numbers(np.array([self.palette], np.uint8))] = table[: len(self.palette)]
        return of_colors

    def read(self, source: bytes | str | Path, name: str) -> Mask:
        """Decode a mask.

        Raises:
            UnreadableImageError: If it is damaged, or its pixels are not those of the classes.
        """
        image = decode(source, name, lambda image: image)
        if image.format in LOSSY:
            raise UnreadableImageError(
                f"{name} is a {image.format}, which may change the values of pixels: store masks as PNG"
            )
        colored = self.palette is not None
        values = _numbers(np.asarray(convert_image(image, "RGB"))) if colored else _values(image, name)
        signed = values.dtype.kind == "i"
        found = self.table.take(np.where(values < 0, WIDEST, values) if signed else values, mode="clip")
        wrong = values[found == 0]
        if wrong.size:
            raise UnreadableImageError(f"{name} has {self._describe(wrong)}")
        return Mask(Image.fromarray((found - 1).astype(np.uint8)), name)

    def _describe(self, wrong: Values) -> str:
        """Describe the most frequent one of the values or colors that have no class."""
        found, counts = np.unique(wrong, return_counts=True)
        count, value = counts.max(), int(found[counts.argmax()])
        if self.palette is not None:
            color = list(value.to_bytes(3, "big"))
            return f"{count:,} pixels of the color {color}, which is not in the palette: correct it or --data.palette"
        last = self.first + self.num_classes - 1
        remedy = "set --data.reduce_zero_label true if 0 is not a class, or " if value == last + 1 else ""
        return (
            f"{count:,} pixels of the value {value}, but the {self.num_classes} classes are the values {self.first} to "
            f"{last}: {remedy}correct the mask, --data.class_names or --data.ignore_value"
        )


def _numbers(colors: NDArray[np.uint8]) -> Values:
    """Return colors `(H, W, 3)` as numbers `(H, W)`."""
    red, green, blue = np.moveaxis(colors.astype(np.uint32), 2, 0)
    return np.asarray(red << 16 | green << 8 | blue)


def _values(image: Image.Image, name: str) -> Values:
    """Return the values `(H, W)` of pixels that are not colors."""
    pixels = np.asarray(image)
    if image.mode == "F" and np.isfinite(pixels).all() and (pixels == pixels.round()).all():
        return pixels.clip(-(2.0**31), 2.0**31).astype(np.int64)  # all beyond are equally wrong
    if image.mode in ("1", "I", "L", "P") or image.mode.startswith("I;"):
        return pixels
    if image.mode in ("LA", "PA"):
        return pixels[:, :, 0]
    if image.mode in ("RGB", "RGBA", "RGBX") and (pixels[:, :, 1:3] == pixels[:, :, :1]).all():
        return pixels[:, :, 0]
    if image.mode == "F":
        raise UnreadableImageError(f"{name} has values that are not whole numbers: store the classes as whole numbers")
    raise UnreadableImageError(f"{name} is a color image: give the color of each class with --data.palette")
