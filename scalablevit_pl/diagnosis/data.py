"""The content of a data set: splits, classes, and images that cannot be read."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from scalablevit_pl.data.images import SplitImages
from scalablevit_pl.diagnosis.finding import Finding, listed
from scalablevit_pl.preprocessing import UnreadableImageError, decode_image


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


def check_images(part: str, images: SplitImages, count: int) -> Finding:
    """Decode at most `count` images, spread evenly over a part, and report those that cannot be read."""
    positions = list(spread(len(images), count))
    errors = []
    for position in positions:
        index = int(images.indices[position])
        try:
            source, path, _ = images.reader.stored_image(index, images.row(index))
            decode_image(source, f"row {index} of split {images.split!r}" + (f" ({path})" if path else ""))
        except UnreadableImageError as error:
            errors.append(str(error).removeprefix("cannot read ").rpartition("; ")[0])
    if not errors:
        return Finding("ok", f"{part} images", f"{len(positions):,} decoded")
    text = f"{len(errors)} of {len(positions):,} cannot be read: {listed(errors, separator='; ')}"
    return Finding("FAIL", f"{part} images", text, "repair or delete them")


def spread(length: int, count: int) -> Iterator[int]:
    """Yield at most `count` equidistant positions from 0 to `length - 1`, including both."""
    count = min(length, count)
    last = max(count - 1, 1)
    return (position * (length - 1) // last for position in range(count))
