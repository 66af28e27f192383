"""Measurements of data loading as a table for people and as plain values for programs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch

from scalablevit_pl.data import BaseDataModule
from scalablevit_pl.profiling.report import environment, processor
from scalablevit_pl.profiling.timing import Spread, core_count
from scalablevit_pl.text import aligned

LEGEND = """\
ours: the train loader, which returns bytes; ImageFolder: torchvision's, with
timm's transform, which also normalizes and erases (ours does that on the
device, in `transfer`); ratio: of the same round. Medians (minimum-maximum).
"""


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
