"""The checks of a fit's data: where they lie, whether they fit on the disk, what they hold."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import datasets
from huggingface_hub import constants

from scalablevit_pl.data import BaseDataModule
from scalablevit_pl.data.source import local_folder, may_be_hub_id
from scalablevit_pl.data.splits import SPLIT_FOLDERS
from scalablevit_pl.diagnosis import data, disk, hub
from scalablevit_pl.diagnosis.finding import Finding, found
from scalablevit_pl.explanation import explain


class DataExamination:
    """The checks of a fit's data, each of which needs what those before it found.

    Args:
        datamodule: Of the fit; None if it could not be built.
        options: As `read_options` gives them.

    Attributes:
        loaded: Whether the training data are there and were loaded.
    """

    def __init__(self, datamodule: Any, options: SimpleNamespace) -> None:
        self.datamodule = datamodule
        self.options = options
        self.ours = isinstance(datamodule, BaseDataModule)
        self.listing: hub.Listing | None = None
        self.space = True  # on the disk, for the data
        self.loaded = False

    def look_at_hub(self) -> Iterator[Finding]:
        """Tell whether the Hub gives the data, if they come from there."""
        if not self.from_hub():
            return
        token = hub.check_token()
        yield token
        if token.what == "Hub":  # offline
            return
        access, self.listing = hub.check_repository(self.datamodule.dataset, self.datamodule.revision)
        yield from access

    def from_hub(self) -> bool:
        """Tell whether the data lie on the Hub."""
        return self.ours and may_be_hub_id(self.datamodule.dataset)

    def look_at_data_disk(self) -> Iterator[Finding]:
        """Compare the space on the disk with what the data will take."""
        if not self.ours:
            return
        downloads, copies = hub.cache_folders()
        folder = local_folder(self.datamodule.dataset)
        if folder is not None:
            size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
            needs = {copies: size} if size else {}
        elif self.listing is not None:
            names = [self.datamodule.train_split, self.datamodule.val_split or "validation", self.datamodule.test_split]
            splits = {name: SPLIT_FOLDERS.get(name, (name,)) for name in names}
            sizes = hub.files_of_splits(self.listing.sizes, splits)
            size = sum(sizes.values())
            missing = hub.missing_bytes(self.datamodule.dataset, self.listing.commit, sizes)
            needs = {downloads: missing, copies: size}
        else:
            return
        prepared = sum(path.stat().st_size for path in copies.rglob("*.arrow")) >= size
        for finding in disk.check_data_space(needs, prepared):
            self.space = self.space and finding.status != "FAIL"
            yield finding

    def look_at_data(self, trainer: Any) -> Iterator[Finding]:
        """Load the data as a fit does, unless that would download them, and count them.

        Args:
            trainer: Says how many processes share the data.
        """
        if self.datamodule is None:
            return
        if not self.available():
            yield self.not_fetched()
            return
        self.datamodule.trainer = trainer
        self.datamodule.setup("fit")
        self.loaded = True
        if self.ours:
            yield data.check_counts(self.datamodule.images, self.datamodule.commit)
        else:
            text = f"{type(self.datamodule).__name__} is none of this package's: not looked into"
            yield Finding("warn", "data", text)

    def available(self) -> bool:
        """Bring the data into the cache, or tell that they are not there and are not to be downloaded."""
        if not self.from_hub() or (self.options.download and self.space):
            if not self.space:
                return False
            with progress_bars(shown=self.options.download):
                self.prepare()
            return True
        try:
            with hub.offline():
                self.prepare()
        except (ValueError, OSError):
            return False
        return True

    def prepare(self) -> None:
        """Prepare what a fit needs of the data."""
        if self.ours:
            self.datamodule.prepare("fit")
        else:
            self.datamodule.prepare_data()

    def not_fetched(self) -> Finding:
        """Say why the data were not looked into."""
        if not self.space:
            return Finding("FAIL", "data", "not looked into, since they do not fit on the disk", "make space first")
        text = f"{self.datamodule.dataset} is not in the cache, and its images were not looked at"
        if constants.HF_HUB_OFFLINE:
            return Finding("FAIL", "data", text, "unset HF_HUB_OFFLINE, or bring them into the cache beforehand")
        if self.listing is None:
            return Finding("FAIL", "data", text, "mend what keeps the Hub from giving them")
        remedy = "fetch them and look with --download; a fit fetches them, too"
        return Finding("warn", "data", text, remedy)

    def look_at_test_data(self) -> Iterator[Finding]:
        """Load the test images, which training does not need."""
        if not self.loaded:
            return
        try:
            self.datamodule.setup("test")
        except ValueError as error:
            yield found("test data", explain(error) or str(error), "warn")
            return
        if self.ours:
            images = self.datamodule.images["test"]
            yield Finding("ok", "test data", f"{len(images):,} images of split {images.split!r}")

    def look_at_images(self) -> Iterator[Finding]:
        """Decode a sample of each part."""
        if self.loaded and self.ours:
            for part, images in self.datamodule.images.items():
                yield data.check_images(part, data.look_at_images(images, self.options.images))


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Let `datasets` show how it gets on, or not, for the time of a block."""
    before = not datasets.are_progress_bars_disabled()
    switches = {True: datasets.enable_progress_bars, False: datasets.disable_progress_bars}
    switches[shown]()
    try:
        yield
    finally:
        switches[before]()
