"""Training images read from parquet files as they come, without fetching or converting them first."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import chain, count
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import torch
from huggingface_hub import HfFileSystem
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from scalablevit_pl.data.images import Transform, collate, one_line
from scalablevit_pl.data.worker import spare_worker
from scalablevit_pl.preprocessing import UnreadableImageError, decode_image
from scalablevit_pl.randomness import preserved, run_seed, seed_generators

ROWS_AT_ONCE = 64


class TrainingStream(IterableDataset[dict[str, Any]]):
    """Images of parquet files, which are shared out over processes and their workers anew in each epoch.

    Each worker gives as many whole batches as every worker can fill in any epoch, so that all processes make equally
    many; the rows that a longer file has beyond that are left out of the epoch. The order is a function of seed and
    epoch, the augmentation of seed, epoch and row. An interrupted epoch is not gone on with: a resumed run begins the
    epoch's stream from its start.

    Args:
        files: Addresses of the files, in their order.
        image_column: Name of the image column.
        label_column: Name of the column with class indices.
        names: The classes, which all files have to declare.
        split: Name of the split, for errors.
        transform: From an RGB image to a tensor `(3, H, W)`.
        batch_size: Samples of a batch.
        workers: Loader processes of each process; 0 for none.
        processes: Number of processes.
        rank: This process.
        buffer: Images among which the next one is drawn.
        max_unreadable: Images in a row that may be unreadable, in whose place the next readable one is taken; with 0
            the first one raises.
        draw_patch: Called after the transform of a sample; gives its `patch`.

    Attributes:
        rows: Number of images of the split.
        epoch: Which order is meant.

    Raises:
        ValueError: If the files cannot be shared out evenly, hold too few rows or declare other classes.
    """

    def __init__(
        self,
        files: Sequence[str],
        image_column: str,
        label_column: str,
        names: Sequence[str],
        split: str,
        transform: Transform,
        batch_size: int,
        workers: int,
        processes: int = 1,
        rank: int = 0,
        buffer: int = 1000,
        max_unreadable: int = 0,
        draw_patch: Callable[[], Tensor] | None = None,
    ) -> None:
        readers = processes * max(workers, 1)
        if len(files) % readers:
            raise ValueError(
                f"the {len(files)} parquet files of split {split!r} cannot be shared out evenly over {processes} "
                f"process(es) × {max(workers, 1)} worker(s): choose --data.num_workers and --trainer.devices so that "
                f"their product divides {len(files)}, or set --data.streaming false"
            )
        with ThreadPoolExecutor(16) as pool:
            described = list(pool.map(_describe, files))
        rows = [number for number, _ in described]
        for file, (_, features) in zip(files, described, strict=True):
            label = features.get(label_column)
            if not isinstance(label, datasets.ClassLabel) or label.names != list(names):
                raise ValueError(
                    f"{file!r} declares other classes in the column {label_column!r} than the split that is validated "
                    "on, or none: use files of one data set, or set --data.streaming false"
                )
        batches = min(rows) * (len(files) // readers) // batch_size
        if batches == 0:
            raise ValueError(
                f"{len(files) // readers} of {len(files)} parquet files, with {min(rows)} images or more each, do not "
                f"fill a batch of {batch_size} in each worker: choose a smaller --data.batch_size or --data.num_workers"
            )
        self.rows = sum(rows)
        self.files = list(files)
        self.starts = np.cumsum([0, *rows[:-1]]).tolist()
        self.image_column = image_column
        self.label_column = label_column
        self.split = split
        self.transform = transform
        self.samples = batches * batch_size
        self.workers = max(workers, 1)
        self.readers = readers
        self.rank = rank
        self.buffer = buffer
        self.max_unreadable = max_unreadable
        self.draw_patch = draw_patch
        self.seed = run_seed()
        self.epoch = 0

    def __len__(self) -> int:
        """Return the samples of an epoch on this process."""
        return self.samples * self.workers

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield `image (3, H, W)`, `index` (the row of the split), `path`, `label` and, with random erasing, `patch`.

        Where unreadable images are allowed, `unreadable` names those that were met on the way to it, one a line.

        Raises:
            UnreadableImageError: If more images than allowed cannot be decoded; it names split and row.
        """
        worker = get_worker_info()
        reader = self.rank * self.workers + (0 if worker is None else worker.id)
        order = np.random.RandomState([self.seed, self.epoch]).permutation(len(self.files))
        numbers = order[reader :: self.readers].tolist()
        # Once more from the beginning where unreadable images leave too few.
        passes = (self._mixed(numbers, [self.seed, self.epoch, reader, again]) for again in count())
        rows, unreadable = chain.from_iterable(passes), list[str]()
        for _ in range(self.samples):
            sample = None
            while sample is None:
                index, row = next(rows)
                try:
                    sample = self._sample(index, row)
                except UnreadableImageError as error:
                    unreadable.append(one_line(error))
                    if len(unreadable) > self.max_unreadable:
                        raise
            yield sample | ({"unreadable": "\n".join(unreadable)} if self.max_unreadable else {})
            unreadable.clear()

    def _sample(self, index: int, row: dict[str, Any]) -> dict[str, Any]:
        stored = row[self.image_column] or {}
        stored = stored if isinstance(stored, dict) else {"bytes": stored}
        image = decode_image(stored.get("bytes") or b"", f"row {index} of split {self.split!r}")
        with preserved() if get_worker_info() is None else nullcontext():  # in a loader process nobody else draws
            seed_generators(self.seed, self.epoch, index, 0)
            drawn = {"image": self.transform(image)} | ({} if self.draw_patch is None else {"patch": self.draw_patch()})
        return drawn | {"index": index, "path": stored.get("path") or "", "label": row[self.label_column]}

    def _mixed(self, numbers: list[int], seed: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield rows and their indices, each drawn from a buffer."""
        random = np.random.RandomState(seed)
        waiting: list[tuple[int, dict[str, Any]]] = []
        for item in self._rows(numbers):
            if len(waiting) < self.buffer:
                waiting.append(item)
                continue
            place = random.randint(self.buffer)
            yield waiting[place]
            waiting[place] = item
        yield from (waiting[place] for place in random.permutation(len(waiting)))

    def _rows(self, numbers: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        for number in numbers:
            with _open(self.files[number]) as file:
                table = pyarrow.parquet.ParquetFile(file)
                index = self.starts[number]
                for batch in table.iter_batches(ROWS_AT_ONCE, columns=[self.image_column, self.label_column]):
                    for row in batch.to_pylist():
                        yield index, row
                        index += 1


def _open(address: str) -> Any:
    """Open a file that lies here, or on the Hub."""
    return HfFileSystem().open(address) if address.startswith("hf://") else Path(address).open("rb")


def _describe(address: str) -> tuple[int, datasets.Features]:
    """Read the number of rows of a parquet file and its columns."""
    with _open(address) as file:
        table = pyarrow.parquet.ParquetFile(file)
        return table.metadata.num_rows, datasets.Features.from_arrow_schema(table.schema_arrow)


class StreamLoader(DataLoader[dict[str, Any]]):
    """Loads a stream in the order of the epoch in which it is begun.

    Args:
        stream: The samples.
        batch_size: Samples of a batch.
        workers: Loader processes.
        epoch: Says which epoch it is.
        timeout: Seconds to wait for a batch of the loader processes.
    """

    def __init__(
        self, stream: TrainingStream, batch_size: int, workers: int, epoch: Callable[[], int], timeout: float = 0.0
    ) -> None:
        super().__init__(
            stream,
            batch_size=batch_size,
            num_workers=workers,
            drop_last=True,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=spare_worker,
            timeout=timeout if workers > 0 else 0.0,
        )
        self.stream = stream
        self.current_epoch = epoch

    def __iter__(self) -> Any:
        self.stream.epoch = self.current_epoch()  # before workers get their copies of the stream
        return super().__iter__()
