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
from huggingface_hub import HfFileSystem
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from scalablevit_pl.data.images import Row, Sample, SampleReader
from scalablevit_pl.data.samplers import Draw
from scalablevit_pl.preprocessing import UnreadableImageError
from scalablevit_pl.randomness import preserved
from scalablevit_pl.text import one_line

ROWS_AT_ONCE = 64


class TrainingStream(IterableDataset[Sample]):
    """Images of parquet files, which are distributed anew over processes and their workers in each epoch.

    Each worker yields as many whole batches as every worker can fill in any epoch. Surplus rows of longer files are
    left out. The order is a function of (seed, epoch), the augmentation of (seed, epoch, row). A run that resumes
    within an epoch restarts the epoch's stream.

    Args:
        files: Addresses of the files, in order.
        features: Features that the files must declare for the columns of targets.
        reader: Turns rows into samples.
        batch_size: Samples of a batch.
        workers: Loader processes of each process; 0 for none.
        processes: Number of processes.
        rank: This process.
        buffer: Images among which the next one is drawn.
        max_unreadable: Consecutive unreadable images that are replaced by the next readable one.

    Attributes:
        rows: Number of images of the split.
        epoch: The epoch whose order is used.
    """

    def __init__(
        self,
        files: Sequence[str],
        features: datasets.Features,
        reader: SampleReader,
        *,
        batch_size: int,
        workers: int,
        processes: int = 1,
        rank: int = 0,
        buffer: int = 1000,
        max_unreadable: int = 0,
    ) -> None:
        readers = processes * max(workers, 1)
        if len(files) % readers:
            raise ValueError(
                f"the {len(files)} parquet files of split {reader.split!r} cannot be distributed evenly over "
                f"{processes} process(es) × {max(workers, 1)} worker(s): choose --data.num_workers and "
                f"--trainer.devices so that their product divides {len(files)}, or set --data.streaming false"
            )
        rows = _check_files(files, {name: features[name] for name in reader.columns[1:]})
        batches = min(rows) * (len(files) // readers) // batch_size
        if batches == 0:
            raise ValueError(
                f"{len(files) // readers} of {len(files)} parquet files, with {min(rows)} images or more each, do not "
                f"fill a batch of {batch_size} in each worker: choose a smaller --data.batch_size or --data.num_workers"
            )
        self.rows = sum(rows)
        self.files = list(files)
        self.starts = np.cumsum([0, *rows[:-1]]).tolist()
        self.reader = reader
        self.samples = batches * batch_size
        self.workers = max(workers, 1)
        self.readers = readers
        self.rank = rank
        self.buffer = buffer
        self.max_unreadable = max_unreadable
        self.epoch = 0

    def __len__(self) -> int:
        """Return the samples of an epoch on this process."""
        return self.samples * self.workers

    def __iter__(self) -> Iterator[Sample]:
        """Yield samples as `SplitImages` does for the draws of an epoch."""
        worker = get_worker_info()
        number = self.rank * self.workers + (0 if worker is None else worker.id)
        order = np.random.RandomState([self.reader.seed, self.epoch]).permutation(len(self.files))
        files = order[number :: self.readers].tolist()
        # Read again from the start if unreadable images leave too few.
        passes = (self._shuffled(files, [self.reader.seed, self.epoch, number, again]) for again in count())
        rows, unreadable = chain.from_iterable(passes), list[str]()
        for _ in range(self.samples):
            sample = None
            while sample is None:
                index, row = next(rows)
                try:
                    sample = self._sample(index, row)
                except UnreadableImageError as error:
                    unreadable.append(one_line(error, None))
                    if len(unreadable) > self.max_unreadable:
                        raise
            yield sample | ({"unreadable": "\n".join(unreadable)} if self.max_unreadable else {})
            unreadable.clear()

    def _sample(self, index: int, row: Row) -> Sample:
        # A loader process has no other use for the global generators, so that they need not be restored.
        with preserved() if get_worker_info() is None else nullcontext():
            return self.reader.read(index, row, Draw(self.epoch, index, 0))

    def _shuffled(self, files: list[int], seed: list[int]) -> Iterator[tuple[int, Row]]:
        """Yield rows and their indices, each drawn from a buffer."""
        random = np.random.RandomState(seed)
        waiting: list[tuple[int, Row]] = []
        for item in self.stored_rows(files):
            if len(waiting) < self.buffer:
                waiting.append(item)
                continue
            place = random.randint(self.buffer)
            yield waiting[place]
            waiting[place] = item
        yield from (waiting[place] for place in random.permutation(len(waiting)))

    def stored_rows(self, files: Sequence[int] | None = None) -> Iterator[tuple[int, Row]]:
        """Yield the index in the split and the stored values of each row of some files, by default of all."""
        for number in range(len(self.files)) if files is None else files:
            with _open(self.files[number]) as file:
                table = pyarrow.parquet.ParquetFile(file)
                index = self.starts[number]
                for batch in table.iter_batches(ROWS_AT_ONCE, columns=self.reader.columns):
                    for row in batch.to_pylist():
                        yield index, row
                        index += 1


def _open(address: str) -> Any:
    """Open a file on this machine or on the Hub."""
    return HfFileSystem().open(address) if address.startswith("hf://") else Path(address).open("rb")


def _check_files(files: Sequence[str], expected: dict[str, Any]) -> list[int]:
    """Return the number of rows of each file."""
    with ThreadPoolExecutor(16) as pool:
        described = list(pool.map(_describe, files))
    for file, (_, features) in zip(files, described, strict=True):
        for column, feature in expected.items():
            if features.get(column) != feature:
                raise ValueError(
                    f"{file!r} declares other values in the column {column!r} than the validation split, or none: use "
                    "files of one data set, or set --data.streaming false"
                )
    return [rows for rows, _ in described]


def _describe(address: str) -> tuple[int, datasets.Features]:
    """Read the number of rows of a parquet file and its columns."""
    with _open(address) as file:
        table = pyarrow.parquet.ParquetFile(file)
        return table.metadata.num_rows, datasets.Features.from_arrow_schema(table.schema_arrow)


class StreamLoader(DataLoader[Sample]):
    """Loads a stream in the order of the epoch, which is asked for when an iteration starts."""

    def __init__(self, stream: TrainingStream, epoch: Callable[[], int], **options: Any) -> None:
        super().__init__(stream, **options)
        self.stream = stream
        self.current_epoch = epoch

    def __iter__(self) -> Any:
        self.stream.epoch = self.current_epoch()  # before workers get their copies of the stream
        return super().__iter__()
