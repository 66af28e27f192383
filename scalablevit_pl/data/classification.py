"""Labelled images as batches, from any source that Hugging Face `datasets` reads."""

import logging
from collections.abc import Collection
from functools import partial
from typing import Any, Literal

import datasets
import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from scalablevit_pl.data.columns import (
    declares_classes,
    find_class_names,
    find_image_column,
    find_label_column,
    label_indices,
)
from scalablevit_pl.data.imagenet import check_imagenet
from scalablevit_pl.data.images import DatasetImages, Transform, collate
from scalablevit_pl.data.samplers import EvaluationSampler, TrainingSampler
from scalablevit_pl.data.source import (
    check_split_sizes,
    find_revision,
    find_stream,
    load_splits,
    local_folder,
    select_split,
)
from scalablevit_pl.data.stream import StreamLoader, TrainingStream
from scalablevit_pl.data.transforms import Augmentation, BatchMix, PatchDraw, erase, train_transform
from scalablevit_pl.data.worker import spare_worker
from scalablevit_pl.preprocessing import Preprocessing, UnreadableImageError
from scalablevit_pl.randomness import run_seed, seeded

logger = logging.getLogger(__name__)

Batch = dict[str, Any]

VALIDATION_NAMES = ("validation", "val", "valid")
STAGE_PARTS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


class ClassificationDataModule(pl.LightningDataModule):
    """Batches of a labelled image data set: `image (B, 3, H, W)`, `label (B,)` or soft `(B, K)`, `index (B,)`, `path`.

    What a loader yields is not that yet: its `image` holds bytes, which go to the device as they are, and with random
    erasing there is `patch (B, 5)`. `on_after_batch_transfer` normalizes, erases and mixes on the device, in the order
    in which timm does; a task gets normalized floats.

    Args:
        dataset: A data set's id on the Hub; a local folder with parquet files, or with one folder per class, with or
            without a folder per split above them; or `fashion_mnist_sample`, which ships with the package.
        revision: Commit, tag or branch on the Hub. What a branch is, is asked once on each node: give a commit, so that
            several nodes, and later runs, have the same data.
        image_column: Name of the image column; by default the only one of type Image.
        label_column: Name of the label column; by default the only one of type ClassLabel, or else `label`.
        train_split: Split to train on.
        val_split: Split to validate on; by default `validation`, or else a part of the training split.
        test_split: Split to test and predict on.
        val_fraction: Part of the training split that is validated on where there is no validation split.
        val_seed: Seed of that cut.
        batch_size: Samples of a batch on each process.
        num_workers: Loader processes of each process.
        repeats: How often an image is drawn in an epoch, augmented anew each time (repeated augmentation); an epoch
            keeps its length and so sees fewer images.
        worker_timeout: Seconds to wait for a batch of the loader processes before the run stops; 0 waits for ever.
        max_unreadable: Different images that may be unreadable on each process. In training the next readable one takes
            the place of each; in evaluation it is not counted. A stream puts up with none.
        preprocessing: Input size, crop and normalization: the evaluation transform; by default that of the weights
            which a command starts from, or else ImageNet's.
        augmentation: Random variation of training images; None trains on the evaluation transform.
        class_order: With `imagenet`, the classes must be ImageNet's in their order, however they are spelled.
        split_sizes: Numbers of images that splits must have.
        streaming: Read training images from parquet files as they come, neither fetching nor converting them first. The
            order is less random, and a resume within an epoch begins the epoch's stream anew, so it is only
            approximate. What is validated and tested on is fetched in any case, and each image counted once.
        shuffle_buffer: Images of a stream among which the next one is drawn, in each worker.

    What a training batch holds is a function of the run's seed, the epoch and the batch's number, whatever the number
    of workers and wherever a run was interrupted.

    Attributes:
        commit: The data set's commit on the Hub, from `setup` on; None for one that lies on this machine.
        class_names: The classes in the order of their indices, from `setup` on.
        unreadable: What this process has said about images that cannot be read, a line each, in the order it met them.

    Raises:
        ValueError: If a number is out of its range.
    """

    def __init__(
        self,
        dataset: str,
        revision: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str = "test",
        val_fraction: float = 0.1,
        val_seed: int = 0,
        batch_size: int = 128,
        num_workers: int = 4,
        repeats: int = 1,
        preprocessing: Preprocessing | None = None,
        augmentation: Augmentation | None = Augmentation(),  # noqa: B008  frozen, so it can be shared
        class_order: Literal["imagenet"] | None = None,
        split_sizes: dict[str, int] | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        worker_timeout: float = 600.0,
        max_unreadable: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ValueError(f"need batch_size ≥ 1 and num_workers ≥ 0, got {batch_size} and {num_workers}")
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, which draws each image once an epoch, got {repeats}")
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer must be 1 or more, got {shuffle_buffer}")
        if max_unreadable < 0:
            raise ValueError(f"max_unreadable must be at least 0, got {max_unreadable}")
        if worker_timeout < 0.0:
            raise ValueError(f"worker_timeout must be at least 0 seconds, got {worker_timeout}")
        if not 0.0 < val_fraction < 1.0:
            raise ValueError(f"val_fraction must be between 0 and 1, got {val_fraction}")
        if not 0 <= val_seed < 2**32:
            raise ValueError(f"val_seed must be from 0 to 2³² - 1, got {val_seed}")
        self.dataset = dataset
        self.revision = revision
        self.image_column = image_column
        self.label_column = label_column
        self.train_split = train_split
        self.val_split = val_split
        self.test_split = test_split
        self.val_fraction = val_fraction
        self.val_seed = val_seed
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.repeats = repeats
        self.preprocessing = preprocessing or Preprocessing()
        self.augmentation = augmentation
        self.class_order = class_order
        self.split_sizes = split_sizes or {}
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer
        self.commit: str | None = None
        self.worker_timeout = worker_timeout
        self.max_unreadable = max_unreadable
        self.unreadable: list[str] = []
        self.class_names: list[str] = []
        self.images: dict[str, DatasetImages] = {}
        self._stream: TrainingStream | None = None
        self._mix: BatchMix | None = None
        self._resumed_at: tuple[int, int] | None = None

    def prepare_data(self) -> None:
        """Download and cache what the trainer's stage needs, or else all splits, on one process of a node."""
        self.commit = find_revision(self.dataset, self.revision)
        self._load(None if self.trainer is None else self.trainer.state.fn)

    def setup(self, stage: str) -> None:
        """Find columns, classes and the splits that the stage needs, and check their labels.

        Raises:
            ValueError: If a column or split is missing or ambiguous, a label is none of the classes, or these or the
                numbers of images are not what they must be.
        """
        self.commit = find_revision(self.dataset, self.revision, ask=False)
        splits = self._load(stage)
        check_split_sizes({split: len(rows) for split, rows in splits.items()}, self.split_sizes)
        features = next(iter(splits.values())).features
        image_column = find_image_column(features, self.image_column)
        label_column = find_label_column(features, self.label_column)
        names = find_class_names(splits, label_column, self.train_split)
        self.class_names = names if self.class_order is None else check_imagenet(names)
        root = local_folder(self.dataset)
        for part in self._parts(stage):
            split, indices = self._locate(splits, part)
            rows = select_split(splits, split)
            labels = None if part == "predict" else label_indices(rows, label_column, names, split)
            transform = self._train_transform() if part == "train" else self.preprocessing.pixels
            allowed = 0 if part == "predict" else self.max_unreadable
            self.images[part] = DatasetImages(
                rows,
                image_column,
                split,
                transform,
                labels,
                indices,
                root,
                run_seed(),
                allowed,
                replace=part == "train",
                draw_patch=self._draw_patch(),  # evaluation has no draws
            )
            what = "images of" if indices is None else "images drawn by seed from"
            logger.info("%s: %d %s split %r", part, len(self.images[part]), what, split)
        if self.streaming and stage == "fit":
            self._stream = self._open_stream(names, image_column, label_column)

    def _open_stream(self, names: list[str], image_column: str, label_column: str) -> TrainingStream:
        stream = TrainingStream(
            find_stream(self.dataset, self.commit, self.train_split),
            image_column,
            label_column,
            names,
            self.train_split,
            self._train_transform(),
            self.batch_size,
            self.num_workers,
            *self._processes(),
            self.shuffle_buffer,
            self.max_unreadable,
            self._draw_patch(),
        )
        check_split_sizes({self.train_split: stream.rows}, self.split_sizes)
        logger.info("train: a stream of %d images of split %r", stream.rows, self.train_split)
        return stream

    def _parts(self, stage: str) -> list[str]:
        """Return the parts of a stage that are loaded in whole."""
        return [part for part in STAGE_PARTS[stage] if part != "train" or not self.streaming]

    def _load(self, stage: str | None) -> datasets.DatasetDict:
        """Load the splits that a stage needs; for None, all."""
        if stage is None:
            return load_splits(self.dataset, self.commit)
        needed = partial(self._splits_of, stage)
        splits = load_splits(self.dataset, self.commit, needed)
        label_column = find_label_column(next(iter(splits.values())).features, self.label_column)
        if declares_classes(splits, label_column):
            return splits
        return load_splits(self.dataset, self.commit, lambda names: {*needed(names), self.train_split})

    def _splits_of(self, stage: str, names: Collection[str]) -> set[str]:
        """Return which of the splits a stage needs."""
        needed = {self._split_of(part, names) for part in self._parts(stage)}
        if self.streaming and stage == "fit" and self.train_split in needed:
            raise ValueError(
                "nothing can be cut off a stream to validate on: name a split with --data.val_split, or set "
                "--data.streaming false"
            )
        return needed

    def _split_of(self, part: str, names: Collection[str]) -> str:
        """Return which of the splits holds the part `train`, `val`, `test` or `predict`."""
        if part in ("test", "predict"):
            return self.test_split
        return (self._val_split(names) if part == "val" else None) or self.train_split

    def _val_split(self, names: Collection[str]) -> str | None:
        return self.val_split or next((name for name in VALIDATION_NAMES if name in names), None)

    def _locate(self, splits: datasets.DatasetDict, part: str) -> tuple[str, list[int] | None]:
        """Return the split and the rows (None: all) that make up the part `train`, `val`, `test` or `predict`."""
        if part in ("test", "predict") or self._val_split(splits) is not None:
            return self._split_of(part, splits), None
        # RandomState's stream is frozen for good, so the cut is the same with every version of NumPy.
        rows = len(select_split(splits, self.train_split))
        order = np.random.RandomState(self.val_seed).permutation(rows)
        count = max(1, round(rows * self.val_fraction))
        return self.train_split, sorted((order[:count] if part == "val" else order[count:]).tolist())

    def _train_transform(self) -> Transform:
        if self.augmentation is None:
            return self.preprocessing.pixels
        if self.augmentation.mixup > 0.0 or self.augmentation.cutmix > 0.0:
            self._mix = BatchMix(self.augmentation, len(self.class_names))
        return train_transform(self.preprocessing, self.augmentation)

    def _draw_patch(self) -> PatchDraw | None:
        if self.augmentation is None or self.augmentation.random_erasing == 0.0:
            return None
        return PatchDraw(self.augmentation.random_erasing, self.preprocessing.input_size)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches of equal size; what does not fill a batch is left out of the epoch.

        Raises:
            ValueError: If there are fewer training images than a batch over all processes takes.
        """
        if self._stream is not None:
            options = (self.batch_size, self.num_workers, lambda: self._next_batch()[0], self.worker_timeout)
            return StreamLoader(self._stream, *options)
        images, (processes, rank) = self.images["train"], self._processes()
        if len(images) < self.batch_size * processes:
            possible = len(images) // processes
            remedy = f"set --data.batch_size to {possible} or less" if possible else "add images"
            raise ValueError(
                f"{len(images)} training images do not fill one batch of {self.batch_size} on {processes} process(es): "
                f"{remedy}"
            )
        start = self._next_batch()
        sampler = TrainingSampler(len(images), self.batch_size, processes, rank, run_seed(), self.repeats, *start)
        return self._loader(images, sampler, training=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the training batch that comes next, for a checkpoint."""
        epoch, batch = self._position()
        return {"epoch": epoch, "batch": batch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin at the batch that a checkpoint says; called before the loaders are made."""
        self._resumed_at = int(state_dict["epoch"]), int(state_dict["batch"])

    def _next_batch(self) -> tuple[int, int]:
        """Return the epoch and the batch to begin with."""
        # A loader is iterated before Lightning has restored its own counters.
        resumed, self._resumed_at = self._resumed_at, None
        return resumed or self._position()

    def _position(self) -> tuple[int, int]:
        """Return the epoch and the batch in it that comes next, on this process."""
        if self.trainer is None:
            return 0, 0
        # Not Lightning's current_epoch: within the hooks in which checkpoints are written it is behind.
        epochs: Any = self.trainer.fit_loop.epoch_progress.current
        batch = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if epochs.processed == epochs.ready:  # between two epochs, or before the first
            return epochs.processed, 0
        last = batch >= self.trainer.num_training_batches
        return (epochs.processed + 1, 0) if last else (epochs.processed, batch)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Batches of the validation images, each image once."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Batches of the test images, each image once."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Batches of the test images without labels, each image once."""
        return self._evaluation_loader("predict")

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Count and name the images of a batch that could not be read.

        Raises:
            UnreadableImageError: If there have been more different ones than `max_unreadable`.
        """
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

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Copy a batch to the device, without `patch`, to read which there the process would have to wait for it."""
        patches = batch.pop("patch", None)
        batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return batch if patches is None else batch | {"patch": patches}

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Normalize the images of a batch, on the device; erase and mix those of a training batch.

        Mixing makes labels soft. Images that are floats already are taken for normalized ones.
        """
        patches = batch.pop("patch", None)
        if batch["image"].dtype == torch.uint8:
            batch["image"] = self.preprocessing.normalize(batch["image"])
        if patches is not None:
            erase(batch["image"], patches)
        if self._mix is not None and self.trainer is not None and self.trainer.training:
            with seeded(run_seed(), *self._position(), self.trainer.global_rank):
                batch["image"], batch["label"] = self._mix(batch["image"], batch["label"])
        # Lightning converts what is floating-point before it copies, when the images are bytes.
        precision: Any = getattr(self.trainer, "precision_plugin", None)
        return batch if precision is None else precision.convert_input(batch)

    def _evaluation_loader(self, part: str) -> DataLoader[Batch]:
        images = self.images[part]
        return self._loader(images, EvaluationSampler(images, *self._processes()), training=False)

    def _loader(self, images: DatasetImages, sampler: Sampler[Any], training: bool) -> DataLoader[Batch]:
        return DataLoader(
            images,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=training,
            num_workers=self.num_workers,
            collate_fn=collate,
            worker_init_fn=spare_worker,
            # Between two validations their processes would only hold memory, and starting them takes a moment.
            persistent_workers=training and self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            timeout=self.worker_timeout if self.num_workers > 0 else 0.0,
        )

    def _processes(self) -> tuple[int, int]:
        """Return the number of processes and this one's rank."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)
