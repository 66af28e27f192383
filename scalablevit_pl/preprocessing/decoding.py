"""From an encoded image to RGB."""

import contextlib
import importlib
import io
import warnings
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

# Pillow's names of the formats that are read, and HEIF, which pillow-heif adds. The others start programs to decode an
# image (EPS, WMF), have no decoder (BUFR, GRIB, HDF5, MPEG), contain measurements or metadata (FITS, MCIDAS, SPIDER,
# IPTC), or accept files of other kinds because they have no signature (IM, IMT, PCD).
# fmt: off
FORMATS = (
    "JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "AVIF", "HEIF", "JPEG2000", "PSD", "ICO", "ICNS", "CUR", "PCX",
    "DCX", "DDS", "BLP", "FTEX", "QOI", "SGI", "SUN", "PIXAR", "MSP", "XBM", "XPM", "GBR", "FLI", "TGA", "DIB",
)
# fmt: on


class UnreadableImageError(ValueError):
    """An image that cannot be decoded; the message names the file or row."""


def decode_image(source: bytes | str | Path | Image.Image, name: str = "") -> Image.Image:
    """Decode an image to RGB, upright according to its EXIF orientation.

    Training, evaluation and prediction all decode here and thus see the same pixels. Transparency is dropped as by
    `Image.convert("RGB")`; 16-bit grayscale keeps its upper eight bits. Floating-point pixels must lie between 0 and 1,
    or be whole numbers up to 255.

    Args:
        source: Encoded bytes, the path of a file, or an opened image.
        name: Name of the image in an error message; by default the path.

    Raises:
        UnreadableImageError: If the image is missing, damaged, truncated or of unknown format.
    """
    name = name or (str(source) if isinstance(source, str | Path) else "an image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd EXIF data and palettes; real damage raises an error
            if isinstance(source, Image.Image):
                return _to_rgb(ImageOps.exif_transpose(source))
            image = _open(source)
            ImageOps.exif_transpose(image, in_place=True)  # no copy: nothing else holds the image
            return _to_rgb(image)
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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        pixels = np.asarray(image, dtype=np.uint32)
        image = Image.fromarray((pixels >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        image = Image.fromarray(_float_bytes(np.asarray(image)))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy it


def _float_bytes(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the bytes of floating-point pixels: from 0 to 1 they are scaled, whole numbers up to 255 are kept."""
    low, high = float(pixels.min()), float(pixels.max())  # NaN if there is one
    if low >= 0.0 and high <= 1.0:
        return (pixels * 255.0).round().astype(np.uint8)
    if low >= 0.0 and high <= 255.0 and np.array_equal(pixels, pixels.round()):
        return pixels.astype(np.uint8)
    raise ValueError(f"its pixels are from {low:g} to {high:g}, neither from 0 to 1 nor whole numbers up to 255")


def open_image(source: str | Path | bytes | Image.Image | NDArray[np.uint8]) -> Image.Image:
    """Return an RGB image from a file, encoded bytes, an opened image or an array of bytes `(H, W)` or `(H, W, 3)`.

    Raises:
        ValueError: If it is not one of these, or cannot be read.
    """
    if isinstance(source, str | Path | bytes | Image.Image):
        return decode_image(source)
    what = repr(type(source).__name__)
    if isinstance(source, np.ndarray):
        what = f"an array {source.shape} of {source.dtype}"
        if source.dtype == np.uint8 and source.size and source.ndim > 1 and source.shape[2:] in ((), (3,), (4,)):
            return decode_image(Image.fromarray(source))
    raise ValueError(
        f"{what} is not an image: give a path, a PIL image, or an array (H, W) or (H, W, 3) of uint8 "
        "(call the network itself on a preprocessed tensor)"
    )
