"""Compare decoding with Pillow's own on all of Pillow's test pictures, where they are.

Unpack Pillow's source distribution and run `PILLOW_SOURCE=pillow-13.0.0 pytest -s tests/decoding`.
"""

import io
import os
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from scalablevit_pl.preprocessing import UnreadableImageError, decode_image
from scalablevit_pl.preprocessing.decoding import FORMATS

SOURCE = os.environ.get("PILLOW_SOURCE")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def reference(path: Path, mode: str) -> np.ndarray | None:
    """Decode an image with Pillow alone; None if it cannot be decoded or its format is not read."""
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            if image.format not in (*FORMATS, "MPO"):
                return None
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):
                upright = Image.fromarray(np.clip(np.asarray(upright, np.int64) // 256, 0, 255).astype(np.uint8))
            elif upright.mode == "F":
                pixels = np.asarray(upright, np.float64)
                if not 0 <= pixels.min() <= pixels.max() <= 255 or (pixels.max() > 1 and (pixels % 1).any()):
                    return None
                scaled = pixels * 255 if pixels.max() <= 1 else pixels
                upright = Image.fromarray(scaled.round().astype(np.uint8))
            elif upright.mode == "P" and "transparency" in upright.info:
                upright = upright.convert("RGBA")
            return np.asarray(upright.convert(mode))
    except Exception:  # Pillow's decoders raise many types
        return None


@pytest.mark.skipif(not SOURCE, reason="PILLOW_SOURCE does not name an unpacked source distribution of Pillow")
@pytest.mark.parametrize("channels", MODES)
def test_every_picture_of_pillow_is_decoded_as_by_pillow(channels: int) -> None:
    counts: Counter[str] = Counter()
    differing = []
    paths = sorted(path for path in (Path(SOURCE or "") / "Tests" / "images").rglob("*") if path.is_file())
    with warnings.catch_warnings(action="ignore"):
        for path in paths:
            expected = reference(path, MODES[channels])
            try:
                decoded = np.asarray(decode_image(path, channels=channels))
            except UnreadableImageError:
                decoded = None
            same = (
                np.array_equal(decoded, expected)
                if decoded is not None and expected is not None
                else decoded is expected
            )
            counts["refused by both" if same and decoded is None else "equal" if same else "different"] += 1
            differing += [] if same else [path.name]
    print(f"{channels} channels, {len(paths)} files: {dict(counts)}")  # noqa: T201
    assert counts["equal"] > 500
    assert differing == []
