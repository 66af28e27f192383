"""From an encoded image to an image of 1, 3 or 4 channels."""

import contextlib
import importlib
import io
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

# Pillow's names of the formats that are read, and HEIF, which pillow-heif adds. The others start programs to decode an
# image (EPS, WMF), have no decoder (BUFR, GRIB, HDF5, MPEG), contain measurements or metadata (FITS, MCIDAS, SPIDER,
# IPTC), or accept files of other kinds because they have no signature (IM, IMT, PCD).
# fmt: off
FORMATS = (
    "JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "AVIF", "HEIF", "JPEG2000", "PSD", "ICO", "ICNS", "CUR", "PCX",
    "DCX", "DDS", "BLP", "FTEX", "QOI", "SGI", "SUN", "PIXAR", "MSP", "XBM", "XPM", "GBR", "FLI", "TGA", "DIB",
)
# fmt: on
Decoded = TypeVar("Decoded")
# Pillow's mode of images by their number of channels. Those of RGBX are independent: RGBA would weight by the fourth.
MODES = {1: "L", 3: "RGB", 4: "RGBX"}


class UnreadableImageError(ValueError):
    """An image that cannot be decoded; the message names the file or row."""


def decode_image(source: bytes | str | Path | Image.Image, name: str = "", channels: int = 3) -> Image.Image:
    """Decode an image to RGB, or another number of channels, upright according to its EXIF orientation.

    Training, evaluation and prediction all decode here and thus see the same pixels. Transparency is dropped as by
    `Image.convert("RGB")`, unless there are four channels; 16-bit grayscale keeps its upper eight bits. Floating-point
    pixels must lie between 0 and 1, or be whole numbers up to 255.

    Args:
        source: Encoded bytes, the path of a file, or an opened image.
        name: Name of the image in an error message; by default the path.
        channels: 1 for grayscale, 3 for RGB, 4 for RGBA.

    Raises:
        UnreadableImageError: If the image is missing, damaged, truncated or of unknown format.
    """
    name = name or (str(source) if isinstance(source, str | Path) else "an image")
    return decode(source, name, partial(convert_image, mode=MODES[channels]))


def decode(source: bytes | str | Path | Image.Image, name: str, convert: Callable[[Image.Image], Decoded]) -> Decoded:
    """Return what `convert` makes of an image that was decoded and turned upright.

    Raises:
        UnreadableImageError: If that fails; the message states the name.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd EXIF data and palettes; real damage raises an error
            if isinstance(source, Image.Image):
                return convert(ImageOps.exif_transpose(source))
            image = _open(source)
            ImageOps.exif_transpose(image, in_place=True)  # no copy: nothing else holds the image
            return convert(image)
    except Exception as error:  # Pillow's decoders raise many types
        raise UnreadableImageError(f"cannot read {name}: {error}; repair or delete it") from error


@cache
def _installed() -> tuple[str, ...]:
    """Return which of the formats can be read on this machine."""
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def _known_suffixes() -> dict[str, bool]:
    """Return the suffixes of files that Pillow knows, and whether such files are read."""
    formats = _installed()
    return {suffix: name in formats or name == "MPO" for suffix, name in Image.registered_extensions().items()}


def is_image_file(path: Path) -> bool:
    """Return whether a file is an image by its suffix, or by its first bytes if Pillow does not know the suffix."""
    known = _known_suffixes().get(path.suffix.lower())
    if known is not None:
        return known
    accepts = [accept for _, accept in map(Image.OPEN.__getitem__, _installed()) if accept is not None]
    try:
        with path.open("rb") as file:
            start = file.read(16)
        if not any(accept(start) for accept in accepts):
            return False
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=_installed()):
            return True
    except Exception:  # Pillow's decoders raise many types
        return False


def _open(source: bytes | str | Path) -> Image.Image:
    if ImageFile.LOAD_TRUNCATED_IMAGES:  # some libraries set this global, with which half an image passes for whole
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    content = source if isinstance(source, bytes) else Path(source).read_bytes()  # Pillow would read it piecemeal
    if not content:
        raise ValueError("it is empty")
    try:
        image = Image.open(io.BytesIO(content), formats=_installed())
    except UnidentifiedImageError as error:
        raise ValueError("it is not an image of a known format") from error
    image.load()
    return image


def convert_image(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to a mode of `MODES` as `decode_image` does."""
    if image.mode.startswith("I"):
        pixels = np.asarray(image, dtype=np.uint32)
        image = Image.fromarray((pixels >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        image = Image.fromarray(_float_bytes(np.asarray(image)))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == mode:
        return image  # convert would copy it
    return image.convert(mode) if mode != "RGBX" else Image.merge(mode, image.convert("RGBA").split())


def _float_bytes(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the bytes of floating-point pixels: from 0 to 1 they are scaled, whole numbers up to 255 are kept."""
    low, high = float(pixels.min()), float(pixels.max())  # NaN if there is one
    if low >= 0.0 and high <= 1.0:
        return (pixels * 255.0).round().astype(np.uint8)
    if low >= 0.0 and high <= 255.0 and np.array_equal(pixels, pixels.round()):
        return pixels.astype(np.uint8)
    raise ValueError(f"its pixels are from {low:g} to {high:g}, neither from 0 to 1 nor whole numbers up to 255")


def open_image(source: str | Path | bytes | Image.Image | NDArray[np.uint8] | Tensor, channels: int = 3) -> Image.Image:
    """Return an image of some channels from a file, encoded bytes, an opened image, or an array or tensor of bytes.

    An array is `(H, W)`, `(H, W, C)` or `(C, H, W)` with 1, 3 or 4 channels. Where both are possible, a tensor has the
    channels first and an array has them last.

    Raises:
        ValueError: If it is not one of these, or cannot be read.
    """
    if isinstance(source, str | Path | bytes | Image.Image):
        return decode_image(source, channels=channels)
    what = repr(type(source).__name__)
    if isinstance(source, np.ndarray | Tensor):
        what = f"an array {tuple(source.shape)} of {source.dtype}"
        pixels = _arrange(source)
        if pixels is not None:
            return decode_image(Image.fromarray(pixels), channels=channels)
    raise ValueError(
        f"{what} is not an image: give a path, a PIL image, or an array (H, W), (H, W, C) or (C, H, W) of uint8 with "
        "1, 3 or 4 channels (call the network itself on a preprocessed tensor)"
    )


def _arrange(source: NDArray[Any] | Tensor) -> NDArray[np.uint8] | None:
    """Return bytes as `(H, W)` or `(H, W, C)`, or None if they are not those of an image."""
    if str(source.dtype).removeprefix("torch.") != "uint8" or 0 in source.shape:
        return None
    pixels = source.cpu().numpy() if isinstance(source, Tensor) else source
    if pixels.ndim != 3:
        return pixels if pixels.ndim == 2 else None
    for axis in (0, 2) if isinstance(source, Tensor) else (2, 0):
        if pixels.shape[axis] in MODES:
            pixels = np.moveaxis(pixels, axis, 2)
            return pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
    return None
