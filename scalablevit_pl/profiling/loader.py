"""Loaders of the same images, ours and torchvision's with timm's transform, and the stages of ours."""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder  # type: ignore[import-untyped]

from scalablevit_pl.data import ClassificationDataModule
from scalablevit_pl.data.images import StoredImage, collate
from scalablevit_pl.data.samplers import Draw
from scalablevit_pl.data.transforms import reference_transform
from scalablevit_pl.data.worker import spare_worker
from scalablevit_pl.preprocessing import decode_image
from scalablevit_pl.profiling.timing import Spread, measure_throughput
from scalablevit_pl.randomness import preserved, seed_generators

STAGES = ("read", "decode", "crop", "augment", "collate", "transfer")
STAGE_BATCH = 64  # images of a round


@dataclass(frozen=True)
class Comparison:
    """Images per second with a number of loader processes.

    Attributes:
        workers: Loader processes; with 0, images are loaded in the main process.
        ours: The train loader of the configuration.
        theirs: `ImageFolder` with timm's transform, on the same images.
        ratio: Ours over theirs, of the same round.
    """

    workers: int
    ours: Spread
    theirs: Spread
    ratio: Spread


class Source:
    """Some training images of a datamodule, as they are stored and as a tree of class folders.

    Args:
        datamodule: After `setup("fit")`; its training images are reduced to these, except for a stream.
        count: Number of images; at least a batch is used.
        folder: An empty folder for the tree.

    Raises:
        ValueError: If one of the images cannot be read.
    """

    def __init__(self, datamodule: ClassificationDataModule, count: int, folder: Path) -> None:
        self.datamodule = datamodule
        self.folder = folder
        count = max(count, datamodule.batch_size)
        if not datamodule.streaming:
            images = copy.copy(datamodule.images["train"])
            every = max(1, len(images) // count)
            images.indices = images.indices[: every * count : every]
            datamodule.images["train"] = images
        self.encoded: list[bytes] = []
        for number, (image, label) in enumerate(self.stored(count)):
            content = image.read()
            decode_image(content, image.name)  # names the image, which torchvision does not
            self.encoded.append(content)
            place = folder / f"{label:05}"
            place.mkdir(exist_ok=True)
            (place / f"{number:07}.jpg").write_bytes(content)  # Pillow reads any format, whatever the suffix

    def stored(self, count: int) -> Iterator[tuple[StoredImage, int]]:
        """Yield at most `count` images as they are stored, with their labels."""
        images = self.datamodule.stream or self.datamodule.images["train"]
        for index, row in islice(images.stored_rows(), count):
            yield images.reader.stored_image(index, row), images.reader.target(index, row)


class Loaders:
    """Builds loaders with the same images, batch size and augmentation.

    Args:
        source: The images.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        datamodule = source.datamodule
        augmentation = datamodule.augmentation
        transform = (
            datamodule.preprocessing
            if augmentation is None
            else reference_transform(datamodule.preprocessing, augmentation)
        )
        self.images = ImageFolder(str(source.folder), transform)

    def ours(self, workers: int) -> DataLoader[Any]:
        """Build the train loader of the configuration.

        Raises:
            ValueError: If the images do not fill a batch, or a stream's files cannot be distributed evenly.
        """
        datamodule = self.source.datamodule
        datamodule.num_workers = workers
        stream = datamodule.stream
        if stream is not None and stream.workers != max(workers, 1):
            try:
                datamodule.setup("fit")  # distributes the files
            except ValueError as error:  # this command has another option for the number
                raise ValueError(str(error).replace("--data.num_workers", "--workers")) from error
        return datamodule.train_dataloader()

    def theirs(self, workers: int) -> DataLoader[Any]:
        """Build the reference loader."""
        return DataLoader(
            self.images,
            self.source.datamodule.batch_size,
            shuffle=True,
            num_workers=workers,
            drop_last=True,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_collate_pairs,
            worker_init_fn=spare_worker,  # else SIGTERM to a whole job looks like a killed process
        )


def _collate_pairs(samples: list[tuple[torch.Tensor, int]]) -> dict[str, Any]:
    images, labels = default_collate(samples)
    return {"image": images, "label": labels}


def compare(loaders: Loaders, workers: int, rounds: int, seconds: float) -> Comparison:
    """Measure both loaders in interleaved rounds.

    Args:
        loaders: Builds them.
        workers: Loader processes.
        rounds: Number of rounds.
        seconds: Length of a measurement, at most an epoch.
    """
    ours, theirs = list[float](), list[float]()
    for number in range(rounds):
        # Ours is built first: it has the better message if no loader can be built.
        pair = [(ours, loaders.ours(workers)), (theirs, loaders.theirs(workers))]
        # The order alternates, since the first may find the machine idle.
        for rates, loader in pair if number % 2 else reversed(pair):
            with _one_thread():
                rates.append(measure_throughput(loader, seconds))
    ratios = [own / other for own, other in zip(ours, theirs, strict=True)]
    return Comparison(workers, Spread.of(ours), Spread.of(theirs), Spread.of(ratios))


@contextmanager
def _one_thread() -> Any:
    """Limit torch to one thread, as in a loader process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def time_stages(source: Source, rounds: int) -> dict[str, Spread]:
    """Measure the seconds per image of each stage of our loader, in one thread.

    `read` loads the stored bytes, `decode` decodes them, `crop` crops and resizes (the whole evaluation transform),
    `augment` seeds and augments, `collate` makes a batch of bytes, and `transfer` copies it to the GPU, if there is
    one, and normalizes, erases and mixes it there.
    """
    times: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for number in range(rounds + 1):
        with _one_thread(), preserved():
            found = _pass_stages(source, number)
        if number > 0:  # the first round warms up
            for stage, seconds in zip(STAGES, found, strict=True):
                times[stage].append(seconds)
    return {stage: Spread.of(values) for stage, values in times.items()}


def _pass_stages(source: Source, number: int) -> list[float]:
    datamodule = source.datamodule
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transform = datamodule.transform(training=True)
    steps, draw_patch = getattr(transform.pixels, "transforms", None), transform.draw_patch
    crop, augment, finish = (steps[0], steps[1:-1], steps[-1]) if steps else (transform.pixels, [], None)
    spent = dict.fromkeys(STAGES, 0.0)
    last = time.perf_counter()

    def done(stage: str) -> None:
        nonlocal last
        now = time.perf_counter()
        spent[stage] += now - last
        last = now

    samples = []
    # Image by image, as a loader does: repeating one step for many images would find warm caches.
    for position, (stored, label) in enumerate(source.stored(STAGE_BATCH)):
        content = stored.read()
        done("read")
        image: Any = decode_image(content)
        done("decode")
        seed_generators(*Draw(number, position, 0))
        done("augment")
        image = crop(image)
        done("crop")
        for step in augment:
            image = step(image)
        patch = {} if draw_patch is None else {"patch": draw_patch()}
        done("augment")
        pixels = image if finish is None else finish(image)
        samples.append({"image": pixels, "label": label, "index": 0, "path": ""} | patch)
        done("collate")
    batch = collate(samples)
    done("collate")
    datamodule.finish(datamodule.transfer_batch_to_device(batch, device, 0), training=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    done("transfer")
    return [spent[stage] / len(samples) for stage in STAGES]
