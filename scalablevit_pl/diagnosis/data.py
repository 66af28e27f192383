"""The content of a data set: splits, classes, and images that cannot be read."""

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

from scalablevit_pl.data.images import SplitImages
from scalablevit_pl.diagnosis.finding import Finding, listed
from scalablevit_pl.preprocessing import UnreadableImageError, decode_image

ORIENTATION = 0x0112  # EXIF's tag; 1 is upright
KINDS = {"L": "greyscale", "LA": "greyscale", "1": "black and white", "P": "palette", "RGB": ""}


def count_images(images: Mapping[str, SplitImages], commit: str | None) -> Finding:
    """Report the number of images in each part of the data."""
    counts = ", ".join(f"{part} {len(rows):,}" for part, rows in images.items())
    return Finding("ok", "splits", f"images: {counts}" + (f" (commit {commit})" if commit else ""))


def describe_classes(names: Sequence[str], order: str | None) -> Finding:
    """Report the number of classes and their order, which is a given one or that of the data set."""
    text = f"in {order}'s order" if order else "in the data set's order"
    return Finding("ok", "classes", f"{len(names):,}, {text}: {listed(list(names), 4)}")


def check_histogram(part: str, labels: Sequence[int], names: Sequence[str]) -> Finding:
    """Report how many images the classes have, and warn of classes without any.

    Args:
        part: Name of the part, such as `train`.
        labels: Class index of each of its images.
        names: The classes.
    """
    counts, what = Counter(labels), f"{part} labels"
    empty = [name for index, name in enumerate(names) if not counts[index]]
    if empty:
        remedy = "add images of them, or remove them from the classes"
        return Finding("warn", what, f"{len(empty)} of {len(names)} classes have no images: {listed(empty)}", remedy)
    fewest, most = min(counts.values()), max(counts.values())
    number = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    return Finding("ok", what, f"{number} images in each of the {len(names):,} classes")


@dataclass
class Sample:
    """Some decoded images of a part.

    Attributes:
        readable: Number of images that can be decoded.
        unreadable: An error message for each of the others.
        kinds: Number of readable images of each kind that is not upright RGB.
    """

    readable: int = 0
    unreadable: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)


def decode_sample(images: SplitImages, count: int) -> Sample:
    """Decode at most `count` images, spread evenly over a part."""
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
    """Yield at most `count` equidistant positions from 0 to `length - 1`, including both."""
    count = min(length, count)
    last = max(count - 1, 1)
    return (position * (length - 1) // last for position in range(count))


def kinds_of(source: bytes | str) -> Iterator[str]:
    """Yield the ways in which an encoded image is not upright RGB."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        kind = KINDS.get(image.mode, image.mode)
        if kind:
            yield kind
        if image.getexif().get(ORIENTATION, 1) != 1:
            yield "EXIF-rotated"


def check_sample(part: str, sample: Sample) -> Finding:
    """Report the unreadable images of a sample, and the kinds of the others."""
    tried, what = sample.readable + len(sample.unreadable), f"{part} images"
    kinds = ", ".join(f"{count} {kind}" for kind, count in sample.kinds.most_common())
    including = f", including {kinds}" if kinds else ""
    if not sample.unreadable:
        return Finding("ok", what, f"{tried:,} decoded{including}")
    reasons = [sentence.removeprefix("cannot read ").rpartition("; ")[0] for sentence in sample.unreadable]
    text = f"{len(reasons)} of {tried:,} cannot be read: {'; '.join(reasons[:5])}"
    text += f"; and {len(reasons) - 5} more" if len(reasons) > 5 else ""
    return Finding("FAIL", what, f"{text}; the others were decoded{including}", "repair or delete them")
