"""Throughput of the train loader, against torchvision's folders with timm's transform, and the time of its stages."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder

from scalablevit_pl.data import BaseDataModule, ClassificationDataModule
from scalablevit_pl.data.images import StoredImage
from scalablevit_pl.data.transforms import reference_transform
from scalablevit_pl.data.worker import spare_worker
from scalablevit_pl.preprocessing import decode_image
from scalablevit_pl.profiling.report import environment, processor
from scalablevit_pl.profiling.timing import Spread, core_count, measure_throughput
from scalablevit_pl.randomness import seed_generators
from scalablevit_pl.text import aligned

STAGES = ("read", "decode", "crop", "augment", "collate", "transfer")
STAGE_BATCH = 64  # images of a round
Stored = tuple[StoredImage, Any]  # an image and its target
Builder = Callable[[int], DataLoader[Any]]
LEGEND = """\
ours: the train loader, which returns bytes; ImageFolder: torchvision's, with
timm's transform, which also normalizes and erases (ours does that on the
device, in `transfer`); ratio: of the same round. Medians (minimum-maximum).
"""


def take_images(datamodule: BaseDataModule, count: int) -> list[Stored]:
    """Reduce the training images to some of them, except for a stream, and return these with their targets."""
    count = max(count, datamodule.batch_size)
    if datamodule.stream is None:
        images = copy.copy(datamodule.images["train"])
        every = max(1, len(images) // count)
        images.indices = images.indices[: every * count : every]
        datamodule.images["train"] = images
    taken = list(_stored(datamodule, count))
    for image, _ in taken:
        decode_image(image.source, image.name)  # names the image, which torchvision does not
    return taken


def _stored(datamodule: BaseDataModule, count: int) -> Iterator[Stored]:
    images = datamodule.stream or datamodule.images["train"]
    for index, row in islice(images.stored_rows(), count):
        yield images.reader.stored_image(index, row), images.reader.target(index, row)


def loader_builders(datamodule: BaseDataModule, images: Sequence[Stored], folder: Path) -> dict[str, Builder]:
    """Return functions that build the loaders to compare, given the number of loader processes.

    `ours` is the train loader. `theirs` is `ImageFolder` with timm's transform on the same images, with the same batch
    size and augmentation; only a `ClassificationDataModule` of RGB images has it.
    """
    builders: dict[str, Builder] = {"ours": partial(_our_loader, datamodule)}
    if isinstance(datamodule, ClassificationDataModule) and datamodule.preprocessing.channels == 3:
        for number, (image, label) in enumerate(images):
            place = folder / f"{label:05}"
            place.mkdir(exist_ok=True)
            (place / f"{number:07}.jpg").write_bytes(image.read())  # Pillow reads any format, whatever the suffix
        preprocessing, augmentation = datamodule.preprocessing, datamodule.augmentation
        transform = preprocessing if augmentation is None else reference_transform(preprocessing, augmentation)
        builders["theirs"] = lambda workers: DataLoader(
            ImageFolder(str(folder), transform),
            datamodule.batch_size,
            shuffle=True,
            num_workers=workers,
            drop_last=True,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_collate_pairs,
            worker_init_fn=spare_worker,  # else SIGTERM to a whole job looks like a killed process
        )
    return builders


def _our_loader(datamodule: BaseDataModule, workers: int) -> DataLoader[Any]:
    datamodule.num_workers = workers
    if datamodule.stream is not None and datamodule.stream.workers != max(workers, 1):
        try:
            datamodule.setup("fit")  # distributes the files
        except ValueError as error:  # the command has another option for the number
            raise ValueError(str(error).replace("--data.num_workers", "--workers")) from error
    return datamodule.train_dataloader()


def _collate_pairs(samples: list[tuple[torch.Tensor, int]]) -> dict[str, Any]:
    images, labels = default_collate(samples)
    return {"image": images, "label": labels}


def compare(builders: Mapping[str, Builder], workers: int, rounds: int, seconds: float) -> dict[str, Spread]:
    """Measure loaders in interleaved rounds, and return their images per second and the `ratio` of the first two."""
    rates: dict[str, list[float]] = {name: [] for name in builders}
    for number in range(rounds):
        loaders = [(name, build(workers)) for name, build in builders.items()]
        # The order alternates, since the first may find the machine idle.
        for name, loader in loaders if number % 2 else reversed(loaders):
            rates[name].append(measure_throughput(loader, seconds))
    if "theirs" in rates:
        rates["ratio"] = [ours / theirs for ours, theirs in zip(rates["ours"], rates["theirs"], strict=True)]
    return {name: Spread.of(values) for name, values in rates.items()}


def time_stages(datamodule: BaseDataModule, rounds: int) -> dict[str, Spread]:
    """Measure the seconds per image of each stage of the train loader, in this process.

    `read` loads the stored bytes, `decode` decodes image and target, `crop` crops and resizes (all of a transform that
    is not timm's), `augment` seeds and augments, `collate` makes a batch of bytes, and `transfer` copies it to the GPU,
    if there is one, and normalizes and augments it there.
    """
    _time_batch(datamodule, 0)  # warms up
    spent = [_time_batch(datamodule, number) for number in range(1, rounds + 1)]
    return {stage: Spread.of([seconds[stage] for seconds in spent]) for stage in STAGES}


class _StageClock:
    """Adds the time since the last reading to a stage."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(STAGES, 0.0)
        self.last = time.perf_counter()

    def done(self, stage: str) -> None:
        now = time.perf_counter()
        self.spent[stage] += now - self.last
        self.last = now

    def timed(self, step: Callable[[Any], Any], stage: str) -> Callable[[Any], Any]:
        """Return a step of an augmentation that counts as a stage of its own."""

        def call(image: Any) -> Any:
            self.done("augment")
            image = step(image)
            self.done(stage)
            return image

        return call


def _time_batch(datamodule: BaseDataModule, number: int) -> dict[str, float]:
    """Load a batch and return the seconds per image of each stage."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = _StageClock()
    transform: Any = datamodule.transform(training=True)
    steps = getattr(getattr(transform, "pixels", None), "transforms", None)
    if steps:
        steps[0], steps[-1] = clock.timed(steps[0], "crop"), clock.timed(steps[-1], "collate")
    samples = []
    clock.last = time.perf_counter()
    # Image by image, as a loader does: repeating one step for many images would find warm caches.
    for position, (image, target) in enumerate(_stored(datamodule, STAGE_BATCH)):
        content = image.read()
        clock.done("read")
        pixels = decode_image(content, image.name, datamodule.preprocessing.channels)
        clock.done("decode")
        seed_generators(number, position, 0)
        clock.done("augment")
        samples.append(transform(pixels, target) | {"index": position, "path": ""})
        clock.done("augment" if steps else "crop")
    batch = datamodule.collate()(samples)
    clock.done("collate")
    datamodule.finish(datamodule.transfer_batch_to_device(batch, device, 0), training=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock.done("transfer")
    return {stage: seconds / len(samples) for stage, seconds in clock.spent.items()}


def describe(
    datamodule: BaseDataModule,
    sizes: Sequence[int],
    rates: Mapping[int, Mapping[str, Spread]],
    stages: Mapping[str, Spread],
    options: SimpleNamespace,
) -> dict[str, Any]:
    """Return a record of plain values: environment, settings, images per second and seconds per image."""
    augmentation: Any = getattr(datamodule, "augmentation", None)
    return environment("torchvision", "timm", "pillow", "datasets") | {
        "machine": {
            "processor": processor(),
            "cores": core_count(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
        "settings": {
            "dataset": datamodule.dataset,
            "streaming": datamodule.streaming,
            "batch_size": datamodule.batch_size,
            "preprocessing": datamodule.preprocessing.to_dict(),
            "augmentation": None if augmentation is None else asdict(augmentation),
            "images": len(sizes),
            "mean_bytes": sum(sizes) / len(sizes),
            "seconds": options.seconds,
            "rounds": options.rounds,
        },
        "images_per_second": [
            {"workers": workers} | {name: asdict(spread) for name, spread in found.items()}
            for workers, found in rates.items()
        ],
        "seconds_per_image": {stage: asdict(spread) for stage, spread in stages.items()},
    }


def report(record: Mapping[str, Any]) -> str:
    """Format a record as tables of at most 80 columns."""
    machine, versions, settings = record["machine"], record["versions"], record["settings"]
    head = [
        f"{machine['cores']} core(s) of {machine['processor'][:40]}, {machine['device'][:20]}; {record['date'][:10]}",
        ", ".join(f"{name} {versions[name]}" for name in ("torch", "torchvision", "timm", "pillow")),
        f"{settings['images']:,} images of {settings['mean_bytes'] / 1e3:.1f} kB, batches of {settings['batch_size']}, "
        f"{settings['rounds']} interleaved rounds",
    ]
    rates = [("images/s, processes", "ours", "ImageFolder + timm", "ratio")]
    for row in record["images_per_second"]:
        ours, theirs = (_cell(row.get(way), 1.0, 0) for way in ("ours", "theirs"))
        rates.append((str(row["workers"]), ours, theirs, _cell(row.get("ratio"), 1.0, 2)))
    stages = record["seconds_per_image"]
    before = sum(spread["median"] for stage, spread in stages.items() if stage != "transfer")
    times = [("stage", "ms per image"), *((stage, _cell(spread, 1e3, 2)) for stage, spread in stages.items())]
    times.append(("all but transfer", f"{before * 1e3:.2f}"))
    return "\n".join([*head, "", aligned(rates), aligned(times), LEGEND])


def _cell(spread: Mapping[str, float] | None, factor: float, digits: int) -> str:
    if spread is None:
        return "-"
    median, least, most = (f"{spread[name] * factor:,.{digits}f}" for name in ("median", "minimum", "maximum"))
    return f"{median} ({least}-{most})"
