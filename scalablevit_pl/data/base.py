"""What every datamodule of images shares: splits, loaders, resuming, unreadable images, transfer to the device."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader

from scalablevit_pl.data.columns import find_image_column
from scalablevit_pl.data.images import JointTransform, Sample, SampleReader, SplitImages, Targets, collate
from scalablevit_pl.data.samplers import EvaluationSampler, TrainingSampler
from scalablevit_pl.data.source import find_revision, find_stream, load_splits, local_folder
from scalablevit_pl.data.splits import STAGE_PARTS, SplitNames, check_split_sizes, cut_rows
from scalablevit_pl.data.stream import StreamLoader, TrainingStream
from scalablevit_pl.data.worker import spare_worker
from scalablevit_pl.preprocessing import ImagePreprocessing, UnreadableImageError
from scalablevit_pl.randomness import run_seed, seeded

logger = logging.getLogger(__name__)

Batch = dict[str, Any]

LEAST = {"batch_size": 1, "num_workers": 0, "repeats": 1, "shuffle_buffer": 1, "worker_timeout": 0, "max_unreadable": 0}


class BaseDataModule(pl.LightningDataModule, ABC):
    """Batches of images with targets from any source that Hugging Face `datasets` reads.

    A batch is a dict with `image (B, C, H, W)`, `index (B,)` (negative for fillers, which are not counted), `path`, and
    the targets of the subclass. Loaders yield images as bytes, which are normalized on the device. A training batch is
    a function of the run's seed, the epoch and the batch's number, for any number of workers and interruptions.

    A subclass supplies `targets` and `transform`, and overrides what else differs: `collate`, `find_class_names`,
    `needs_training_split`, `read_folder`, `augment_batch`. The functions that the first three return run in the loader
    processes, which may have to pickle them: return functions, `functools.partial` or dataclasses, not methods of the
    datamodule. They draw from the global generators of Python, NumPy and torch, seeded for each sample.

    Args:
        dataset: A data set's id on the Hub, or a local folder of parquet files or of what `read_folder` loads.
        preprocessing: The evaluation transform and the normalization.
        revision: Commit, tag or branch on the Hub. With a commit, all nodes and later runs get the same data.
        image_column: Name of the image column; by default the only one that contains images, or else `image`.
        train_split: Split to train on.
        val_split: Split to validate on; by default `validation`, or else a part of the training split.
        test_split: Split to test and predict on.
        val_fraction: Fraction of the training split to validate on if there is no validation split.
        val_seed: Seed of that cut, which keeps the proportions of the classes.
        batch_size: Samples of a batch on each process.
        num_workers: Loader processes of each process.
        repeats: How often an image is drawn in an epoch, augmented anew each time; the epoch keeps its length.
        worker_timeout: Seconds to wait for a batch of the loader processes before the run stops; 0 waits indefinitely.
        max_unreadable: Number of different images that may be unreadable on each process. In training the next readable
            image replaces each; in evaluation they are not counted.
        split_sizes: Numbers of images that splits must have.
        streaming: Read training images from parquet files as they come, without fetching or converting them first. The
            order is less random, and a resume within an epoch restarts the epoch's stream.
        shuffle_buffer: Images of a stream among which the next one is drawn, in each worker.

    Attributes:
        commit: The data set's commit on the Hub, set by `setup`; None for a data set on this machine.
        class_names: The classes in the order of their indices, set by `setup`.
        labels: The class index of each row of a split, set by `targets` if each image has one.
        images: The images of each part (`train`, `val`, `test`, `predict`) loaded by `setup`.
        stream: The training images if they are streamed, set by `setup`.
        unreadable: One line for each image that this process could not read.
        processes: Number of processes that share the data if there is no trainer, which knows it.
    """

    def __init__(
        self,
        dataset: str,
        *,
        preprocessing: ImagePreprocessing,
        revision: str | None = None,
        image_column: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str = "test",
        val_fraction: float = 0.1,
        val_seed: int = 0,
        batch_size: int = 128,
        num_workers: int = 4,
        repeats: int = 1,
        split_sizes: dict[str, int] | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        worker_timeout: float = 600.0,
        max_unreadable: int = 0,
    ) -> None:
        super().__init__()
        self.dataset = dataset
        self.preprocessing = preprocessing
        self.revision = revision
        self.image_column = image_column
        self.train_split = train_split
        self.val_split = val_split
        self.test_split = test_split
        self.val_fraction = val_fraction
        self.val_seed = val_seed
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.repeats = repeats
        self.split_sizes = split_sizes or {}
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer
        self.worker_timeout = worker_timeout
        self.max_unreadable = max_unreadable
        self.commit: str | None = None
        self.class_names: list[str] = []
        self.labels: dict[str, np.ndarray[Any, Any]] = {}
        self.images: dict[str, SplitImages] = {}
        self.stream: TrainingStream | None = None
        self.unreadable: list[str] = []
        self.processes = 1
        self._resumed_at: tuple[int, int] | None = None
        self._stratified = True
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0.0 < val_fraction < 1.0:
            raise ValueError(f"val_fraction must be between 0 and 1, got {val_fraction}")
        if not 0 <= val_seed < 2**32:
            raise ValueError(f"val_seed must be from 0 to 2³² - 1, got {val_seed}")

    @abstractmethod
    def targets(self, splits: datasets.DatasetDict, split: str) -> Targets | None:
        """Return how the targets of a loaded split are read, if there are any; raise ValueError if they are invalid.

        Not called for prediction.
        """

    @abstractmethod
    def transform(self, training: bool) -> JointTransform:
        """Return the joint transform of an image and its target (None in prediction).

        Its result is a dict with the sample's targets and `image (C, H, W)`: bytes, or floats that are normalized.
        """

    def collate(self) -> Callable[[list[Sample]], Batch]:
        """Return the function that turns samples into a batch; by default it stacks images of one size."""
        return collate

    def find_class_names(self, splits: datasets.DatasetDict) -> list[str]:
        """Return the classes in the order of their indices; by default what `class_names` holds already."""
        return self.class_names

    def needs_training_split(self, splits: datasets.DatasetDict) -> bool:
        """Return whether the targets of the loaded splits cannot be interpreted without the training split."""
        return False

    def read_folder(self, folder: Path) -> datasets.DatasetDict:
        """Load the splits of a local folder without parquet files; by default an error."""
        raise ValueError(f"{str(folder)!r} contains no parquet files: check the path")

    def sample_weights(self) -> torch.Tensor | None:
        """Return how probable each training image is, in proportion; by default an epoch draws each image once."""
        return None

    def training_labels(self) -> torch.Tensor:
        """Return the class index of each training image `(N,)`."""
        images = self.images.get("train")
        if images is None or images.split not in self.labels:
            raise ValueError("classes can be balanced only with one label for each image, and without --data.streaming")
        return torch.from_numpy(self.labels[images.split][np.asarray(images.indices)])

    def count_classes(self, target: Any) -> Sequence[int] | None:
        """Return how much of each class a target contains, for `doctor`; by default it is unknown."""
        return None

    def augment_batch(self, batch: Batch) -> Batch:
        """Vary a normalized training batch on the device, with generators seeded by (seed, epoch, batch, rank)."""
        return batch

    def prepare_data(self) -> None:
        """Prepare the trainer's stage, or all splits without a trainer, on one process of a node."""
        self.prepare(None if self.trainer is None else self.trainer.state.fn)

    def prepare(self, stage: str | None) -> datasets.DatasetDict:
        """Download, cache and return the splits that a stage needs; for None, all."""
        self.commit = find_revision(self.dataset, self.revision)
        return self._load(stage)

    def load_class_names(self, stage: str) -> list[str]:
        """Prepare a stage and return the classes, without a check of images and targets."""
        return self.find_class_names(self.prepare(stage))

    def setup(self, stage: str) -> None:
        """Load the splits that a stage needs, find their columns and classes, and check the targets."""
        self.commit = find_revision(self.dataset, self.revision, ask=False)
        splits = self._load(stage)
        check_split_sizes({split: len(rows) for split, rows in splits.items()}, self.split_sizes)
        image_column = find_image_column(next(iter(splits.values())).features, self.image_column)
        self.class_names = self.find_class_names(splits)
        for part in self._parts(stage):
            self.images[part] = self._open(part, splits, image_column)
            logger.info("%s: %d images of split %r", part, len(self.images[part]), self.images[part].split)
        if self.streaming and stage == "fit":
            self.stream = self._open_stream(splits)
            logger.info("train: a stream of %d images of split %r", self.stream.rows, self.train_split)

    def _open(self, part: str, splits: datasets.DatasetDict, image_column: str) -> SplitImages:
        split = self._split_names.of(part, splits)
        rows, indices = splits[split], None
        targets = None if part == "predict" else self.targets(splits, split)
        if part in ("train", "val") and self._split_names.validation(splits) is None:
            indices = self._cut(part, split, len(rows))
        transform, root = self.transform(training=part == "train"), local_folder(self.dataset)
        reader = SampleReader(split, image_column, transform, targets, root, run_seed(), self.preprocessing.channels)
        # In evaluation, the images around an unreadable one may be the unreadable ones of other processes.
        allowed = {"predict": 0, "train": self.max_unreadable}.get(part, self.max_unreadable * self._share()[0])
        return SplitImages(rows, reader, indices, attempts=allowed + 1)

    def _cut(self, part: str, split: str, rows: int) -> list[int]:
        labels = self.labels.get(split) if self._stratified else None
        return cut_rows(rows, self.val_fraction, self.val_seed, part, labels)

    def _open_stream(self, splits: datasets.DatasetDict) -> TrainingStream:
        processes, rank = self._share()
        validated = self.images["val"].reader
        stream = TrainingStream(
            find_stream(self.dataset, self.commit, self.train_split),
            splits[validated.split].features,
            replace(validated, split=self.train_split, transform=self.transform(training=True)),
            batch_size=self.batch_size,
            workers=self.num_workers,
            processes=processes,
            rank=rank,
            buffer=self.shuffle_buffer,
            max_unreadable=self.max_unreadable,
        )
        check_split_sizes({self.train_split: stream.rows}, self.split_sizes)
        return stream

    def _parts(self, stage: str) -> list[str]:
        """Return the parts of a stage that are loaded completely."""
        return [part for part in STAGE_PARTS[stage] if part != "train" or not self.streaming]

    def _load(self, stage: str | None) -> datasets.DatasetDict:
        load = partial(load_splits, self.dataset, self.commit, read_folder=self.read_folder)
        if stage is None:
            return load()
        needed = partial(self._needed, stage)
        splits = load(needed)
        if not self.needs_training_split(splits):
            return splits
        return load(lambda names: {*needed(names), self.train_split})

    def _needed(self, stage: str, names: Collection[str]) -> set[str]:
        needed = {self._split_names.of(part, names) for part in self._parts(stage)}
        if self.streaming and stage == "fit" and self.train_split in needed:
            raise ValueError(
                "a validation part cannot be cut off a stream: name a split with --data.val_split, or set "
                "--data.streaming false"
            )
        return needed

    @property
    def _split_names(self) -> SplitNames:
        return SplitNames(self.train_split, self.val_split, self.test_split)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Shuffled batches of equal size; an incomplete last batch is left out."""
        if self.stream is not None:
            return StreamLoader(self.stream, lambda: self._next_batch()[0], drop_last=True, **self._loader_options())
        images, (processes, rank) = self.images["train"], self._share()
        if len(images) < self.batch_size * processes:
            possible = len(images) // processes
            remedy = f"set --data.batch_size to {possible} or less" if possible else "add images"
            raise ValueError(
                f"{len(images)} training images do not fill one batch of {self.batch_size} on {processes} process(es): "
                f"{remedy}"
            )
        start = self._next_batch()
        options = (self.batch_size, processes, rank, run_seed(), self.repeats, *start)
        sampler = TrainingSampler(len(images), *options, weights=self.sample_weights())
        # Only these loader processes are kept: between two validations idle ones would occupy memory.
        kept = self.num_workers > 0
        return DataLoader(images, sampler=sampler, drop_last=True, persistent_workers=kept, **self._loader_options())

    def val_dataloader(self) -> DataLoader[Sample]:
        """Batches of the validation images, each image once."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """Batches of the test images, each image once."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Batches of the test images without targets, each image once."""
        return self._evaluation_loader("predict")

    def _evaluation_loader(self, part: str) -> DataLoader[Sample]:
        images = self.images[part]
        return DataLoader(images, sampler=EvaluationSampler(images, *self._share()), **self._loader_options())

    def _loader_options(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "collate_fn": self.collate(),
            "worker_init_fn": spare_worker,
            "pin_memory": torch.cuda.is_available(),
            "timeout": self.worker_timeout if self.num_workers > 0 else 0.0,
        }

    def _share(self) -> tuple[int, int]:
        """Return the number of processes and the rank of this one."""
        return (self.processes, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def state_dict(self) -> dict[str, Any]:
        """Return the next training batch and how validation images were drawn, for a checkpoint."""
        epoch, batch = self._position()
        return {"epoch": epoch, "batch": batch, "stratified": self._stratified}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start at the batch that a checkpoint states, on its images; called before the loaders are made."""
        self._resumed_at = int(state_dict["epoch"]), int(state_dict["batch"])
        self._stratified = state_dict.get("stratified", False)  # earlier versions drew from all rows alike
        for part, images in self.images.items():
            if isinstance(images.indices, np.ndarray):  # a part that was cut
                images.indices = np.asarray(self._cut(part, images.split, len(images.rows)))

    def _next_batch(self) -> tuple[int, int]:
        """Return the epoch and the batch to start with."""
        # A loader is iterated before Lightning has restored its own counters.
        resumed, self._resumed_at = self._resumed_at, None
        return resumed or self._position()

    def _position(self) -> tuple[int, int]:
        """Return the epoch and the number in it of the next batch on this process."""
        if self.trainer is None:
            return 0, 0
        # Not Lightning's current_epoch: it is behind within the hooks in which checkpoints are written.
        epochs: Any = self.trainer.fit_loop.epoch_progress.current
        batch = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if epochs.processed == epochs.ready:  # between two epochs, or before the first
            return epochs.processed, 0
        last = batch >= self.trainer.num_training_batches
        return (epochs.processed + 1, 0) if last else (epochs.processed, batch)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Count and log the images of a batch that could not be read."""
        for line in "\n".join(batch.pop("unreadable", [])).splitlines():
            if line and line not in self.unreadable:
                self.unreadable.append(line)
                logger.error("unreadable image %d of at most %d: %s", len(self.unreadable), self.max_unreadable, line)
        if len(self.unreadable) > self.max_unreadable:
            raise UnreadableImageError(
                f"{len(self.unreadable)} images cannot be read and max_unreadable={self.max_unreadable}, the last one: "
                f"{self.unreadable[-1]}, or allow more with --data.max_unreadable"
            )
        return batch

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Normalize the images of a batch on the device, and augment a training batch."""
        return self.finish(batch, training=self.trainer is not None and self.trainer.training)

    def finish(self, batch: Batch, training: bool) -> Batch:
        """Normalize images that are bytes, augment a training batch, and convert to the trainer's precision."""
        if batch["image"].dtype == torch.uint8:
            batch["image"] = self.preprocessing.normalize(batch["image"])
        if training:
            with seeded(run_seed(), *self._position(), self._share()[1]):
                batch = self.augment_batch(batch)
        # Lightning converts floating-point values before it copies them, when the images are bytes.
        precision: Any = getattr(self.trainer, "precision_plugin", None)
        return batch if precision is None else precision.convert_input(batch)
