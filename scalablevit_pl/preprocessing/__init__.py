"""From an encoded image to the input of a network: decoding, and evaluation transforms as plain records."""

from scalablevit_pl.preprocessing.decoding import UnreadableImageError, decode_image
from scalablevit_pl.preprocessing.records import DensePreprocessing, ImagePreprocessing, Preprocessing

__all__ = ["DensePreprocessing", "ImagePreprocessing", "Preprocessing", "UnreadableImageError", "decode_image"]
