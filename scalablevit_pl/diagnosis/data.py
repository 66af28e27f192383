"""The checks of a fit's data: access, free space, splits, classes, and images that cannot be read."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
from huggingface_hub import constants

from scalablevit_pl.data import BaseDataModule
from scalablevit_pl.data.images import SplitImages
from scalablevit_pl.data.source import local_folder, may_be_hub_id
from scalablevit_pl.diagnosis import disk, hub
from scalablevit_pl.diagnosis.finding import Finding, from_sentence
from scalablevit_pl.explanation import explain
from scalablevit_pl.preprocessing import UnreadableImageError, decode_image
from scalablevit_pl.text import listed


class DataExamination:
    """The checks of a fit's data; each uses what the earlier ones found.

    Attributes:
        known: Whether the datamodule is a `BaseDataModule`, so that its content can be examined.
        loaded: Whether the training data is available and was loaded.
    """

    def __init__(self, datamodule: Any, options: SimpleNamespace) -> None:
        self.datamodule = datamodule
        self.options = options
        self.known = isinstance(datamodule, BaseDataModule)
        self.on_hub = self.known and may_be_hub_id(datamodule.dataset)
        self.listing: hub.Listing | None = None
        self.fits = True  # on the disk
        self.loaded = False

    @property
    def examinable(self) -> bool:
        """Whether the content of the data can be examined."""
        return self.known and self.loaded

    def check_token(self) -> Iterator[Finding]:
        """Check the token for data on the Hub."""
        if self.on_hub:
            yield hub.check_token()

    def check_access(self) -> Iterator[Finding]:
        """Check that the data can be read from the Hub, if that is where it comes from."""
        if self.on_hub and not constants.HF_HUB_OFFLINE:
            finding, self.listing = hub.check_repository(self.datamodule.dataset, self.datamodule.revision)
            yield finding

    def check_disk(self) -> Iterator[Finding]:
        """Compare the free space with the size of the data."""
        copies = Path(datasets.config.HF_DATASETS_CACHE)
        folder = local_folder(self.datamodule.dataset) if self.known else None
        if folder is not None:
            size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
            needs = {copies: size} if size else {}
        elif self.listing is not None:
            size, missing = sum(self.listing.sizes.values()), hub.missing_bytes(self.datamodule.dataset, self.listing)
            needs = {Path(constants.HF_HUB_CACHE): missing, copies: size}
        else:
            return
        prepared = sum(path.stat().st_size for path in copies.rglob("*.arrow")) >= size
        for finding in disk.check_data_space(needs, prepared):
            self.fits = self.fits and finding.status != "FAIL"
            yield finding

    def check_splits(self, processes: int) -> Iterator[Finding]:
        """Load the data as a fit does, unless that would download it, and count its images."""
        if self.datamodule is None:
            return
        if not self.prepare():
            yield self.not_fetched()
            return
        self.datamodule.processes = processes
        self.datamodule.setup("fit")
        self.loaded = True
        if self.known:
            counts = ", ".join(f"{part} {len(rows):,}" for part, rows in self.datamodule.images.items())
            commit = f" (commit {self.datamodule.commit})" if self.datamodule.commit else ""
            yield Finding("ok", "splits", f"images: {counts}{commit}")
            if left_out := getattr(self.datamodule, "left_out", ""):
                yield Finding("warn", "files", f"left out: {left_out}", "convert or delete them, or do without them")
        else:
            text = f"{type(self.datamodule).__name__} is not a BaseDataModule: its content was not checked"
            yield Finding("warn", "data", text)

    def prepare(self) -> bool:
        """Prepare the data for a fit, and return whether it is available without a download that was not asked for."""
        if not self.known:
            self.datamodule.prepare_data()
        elif not self.fits:
            return False
        elif not self.on_hub or self.options.download:
            self.datamodule.prepare("fit")
        else:
            try:
                with hub.offline():
                    self.datamodule.prepare("fit")
            except (ValueError, OSError):
                return False
        return True

    def not_fetched(self) -> Finding:
        """Return why the data was not loaded."""
        if not self.fits:
            return Finding("FAIL", "data", "not checked, because it does not fit on the disk", "free space first")
        text = f"{self.datamodule.dataset} is not in the cache, so its images were not checked"
        if constants.HF_HUB_OFFLINE:
            return Finding("FAIL", "data", text, "unset HF_HUB_OFFLINE, or download it beforehand")
        if self.listing is None:
            return Finding("FAIL", "data", text, "fix the access to the Hub")
        return Finding("warn", "data", text, "download and check it with --download; a fit also downloads it")

    def check_classes(self) -> Iterator[Finding]:
        """Report the classes, and the number of images in each if the images have labels."""
        names = self.datamodule.class_names if self.examinable else ()
        if not names:
            return
        order = f"{getattr(self.datamodule, 'class_order', None) or 'the data set'}'s order"
        yield Finding("ok", "classes", f"{len(names):,}, in {order}: {listed(names, 4)}")
        for part, images in self.datamodule.images.items():
            labels = self.datamodule.labels.get(images.split)
            if labels is not None:
                yield check_histogram(part, labels[images.indices].tolist(), names)

    def check_test_split(self) -> Iterator[Finding]:
        """Load the test images, which training does not need."""
        if not self.loaded:
            return
        try:
            self.datamodule.setup("test")
        except ValueError as error:
            yield from_sentence("test data", explain(error) or str(error), "warn")
            return
        if self.known:
            images = self.datamodule.images["test"]
            yield Finding("ok", "test data", f"{len(images):,} images of split {images.split!r}")

    def check_images(self) -> Iterator[Finding]:
        """Decode a sample of each part, and count the classes in its targets."""
        if self.examinable:
            for part, images in self.datamodule.images.items():
                yield check_images(part, images, self.options.images)
                yield from check_targets(part, images, self.options.images, self.datamodule)


def check_histogram(part: str, labels: Sequence[int], names: Sequence[str]) -> Finding:
    """Report how many images the classes have, and warn of classes without any."""
    counts, what = Counter(labels), f"{part} labels"
    empty = [name for index, name in enumerate(names) if not counts[index]]
    if empty:
        remedy = "add images of them, or remove them from the classes"
        if part == "val":
            remedy = "add images of them, raise --data.val_fraction, or choose another split with --data.val_split"
        return Finding("warn", what, f"{len(empty)} of {len(names)} classes have no images: {listed(empty)}", remedy)
    fewest, most = min(counts.values()), max(counts.values())
    number = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    return Finding("ok", what, f"{number} images in each of the {len(names):,} classes")


def check_images(part: str, images: SplitImages, count: int) -> Finding:
    """Decode at most `count` images, spread evenly over a part, and report those that cannot be read."""
    positions = np.linspace(0, len(images) - 1, min(len(images), count), dtype=int)
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


def check_targets(part: str, images: SplitImages, count: int, datamodule: BaseDataModule) -> Iterator[Finding]:
    """Read the targets of at most `count` images, spread evenly over a part, and report the shares of the classes."""
    names, what = datamodule.class_names, f"{part} targets"
    positions = np.linspace(0, len(images) - 1, min(len(images), count), dtype=int)
    totals, ignored, errors = np.zeros(len(names), np.int64), 0, []
    for index in (int(images.indices[position]) for position in positions):
        try:
            counts = datamodule.count_classes(images.reader.target(index, images.row(index)))
            if counts is None:
                return
            images.reader.read(index, images.row(index))  # compares image and target
        except UnreadableImageError as error:
            errors.append(str(error))
        else:
            totals += counts
            ignored += not any(counts)
    if errors:
        wrong = from_sentence(what, errors[0])
        yield replace(wrong, text=f"{len(errors)} of {len(positions):,} are wrong, the first: {wrong.text}")
    if ignored:
        yield Finding("warn", what, f"{ignored} of {len(positions):,} ignore the whole image", "check what they ignore")
    if not totals.any():
        return
    absent = [name for name, total in zip(names, totals, strict=True) if total == 0]
    if absent:
        text = f"{len(absent)} of {len(names)} classes are in none of {len(positions):,} images: {listed(absent)}"
        yield Finding("warn", what, text, "check the classes, or examine more images with --images")
    shares = (f"{names[index]} {totals[index] / totals.sum():.1%}" for index in (-totals).argsort(kind="stable"))
    yield Finding("ok", what, f"shares of the classes: {listed(shares)}")
