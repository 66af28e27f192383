"""From an encoded image to the input of a network: decoding, and evaluation transforms as plain records."""

from scalablevit_pl.preprocessing.decoding import UnreadableImageError, decode_image, open_image
from scalablevit_pl.preprocessing.records import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DensePreprocessing,
    ImagePreprocessing,
    Interpolation,
    Preprocessing,
    read_preprocessing,
    read_record,
    to_pixels,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "DensePreprocessing",
    "ImagePreprocessing",
    "Interpolation",
    "Preprocessing",
    "UnreadableImageError",
    "decode_image",
    "open_image",
    "read_preprocessing",
    "read_record",
    "to_pixels",
]
