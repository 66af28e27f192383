"""What a data set holds: splits, classes, and whether its images can be read."""

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from scalablevit_pl.data.images import SplitImages
from scalablevit_pl.diagnosis.finding import Finding, listed
from scalablevit_pl.preprocessing import UnreadableImageError, decode_image

ORIENTATION = 0x0112  # EXIF's tag; 1 is upright


def check_counts(images: dict[str, Any], commit: str | None) -> Finding:
    """Say how many images each part of the data has."""
    counts = ", ".join(f"{part} {len(rows):,}" for part, rows in images.items())
    return Finding("ok", "splits", f"images: {counts}" + (f" (commit {commit})" if commit else ""))


def check_classes(names: Sequence[str], ordered: bool) -> Finding:
    """Say how many classes there are, and in which order."""
    order = "in the order asked for" if ordered else "in the order of the data set"
    return Finding("ok", "classes", f"{len(names):,}, {order}: {listed(list(names), 4)}")


def check_histogram(part: str, labels: Sequence[int], names: Sequence[str]) -> Finding:
    """Tell how evenly the images of a part are spread over the classes, and which classes have none.

    Args:
        part: Name of the part, such as `train`.
        labels: Class index of each of its images.
        names: The classes.
    """
    counts = Counter(labels)
    empty = [name for index, name in enumerate(names) if not counts[index]]
    what = f"{part} labels"
    if empty:
        remedy = "add images of them, or leave them out of the classes"
        return Finding("warn", what, f"{len(empty)} of {len(names)} classes have no image: {listed(empty)}", remedy)
    fewest, most = min(counts.values()), max(counts.values())
    spread = f"{fewest:,}" if fewest == most else f"from {fewest:,} to {most:,}"
    return Finding("ok", what, f"{spread} images of each of the {len(names):,} classes")


@dataclass
class Sample:
    """What some images of a part are like.

    Attributes:
        readable: Number of images that can be decoded.
        unreadable: One sentence for each that cannot.
        kinds: How many are of a kind that is no upright RGB.
    """

    readable: int = 0
    unreadable: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)


def look_at_images(images: SplitImages, count: int) -> Sample:
    """Decode some images, spread evenly over a part.

    Args:
        images: The part.
        count: How many at most.
    """
    sample = Sample()
    for position in spread(len(images), count):
        index = int(images.indices[position])
        try:
            source, path, _ = images.reader.stored_image(index, images.row(index))
            decode_image(source, f"row {index} of split {images.split!r}" + (f" ({path})" if path else ""))
        except UnreadableImageError as error:
            sample.unreadable.append(str(error))
        else:
            sample.readable += 1
            sample.kinds.update(kinds_of(source))
    return sample


def spread(length: int, count: int) -> Iterator[int]:
    """Give up to `count` positions from 0 to `length - 1` at even distances, the first and the last among them."""
    count = min(length, count)
    last = max(count - 1, 1)
    return (position * (length - 1) // last for position in range(count))


def kinds_of(source: bytes | str) -> Iterator[str]:
    """Say in which ways an encoded image is no upright RGB."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        modes = {"L": "greyscale", "LA": "greyscale", "1": "black and white", "P": "palette", "RGB": ""}
        kind = modes.get(image.mode, image.mode)
        if kind:
            yield kind
        if image.getexif().get(ORIENTATION, 1) != 1:
            yield "EXIF-rotated"


def check_images(part: str, sample: Sample) -> Finding:
    """Say which images of a sample cannot be read, and what kinds were among those that can."""
    looked_at, what = sample.readable + len(sample.unreadable), f"{part} images"
    kinds = ", ".join(f"{count} {kind}" for kind, count in sample.kinds.most_common())
    among = f", {kinds} among them" if kinds else ""
    if not sample.unreadable:
        return Finding("ok", what, f"{looked_at:,} of them decoded{among}")
    reasons = [sentence.removeprefix("cannot read ").rpartition("; ")[0] for sentence in sample.unreadable]
    text = f"{len(reasons)} of {looked_at:,} that were looked at cannot be read: {'; '.join(reasons[:5])}"
    text += f"; and {len(reasons) - 5} more" if len(reasons) > 5 else ""
    return Finding("FAIL", what, f"{text}; the others were decoded{among}", "mend or remove them")
