"""What was measured of loading, as a table for people and as plain values for programs."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch

from scalablevit_pl import __version__
from scalablevit_pl.data import ClassificationDataModule
from scalablevit_pl.profiling.loader import Comparison, Source, Spread
from scalablevit_pl.profiling.report import processor

PACKAGES = ("torch", "torchvision", "timm", "pillow", "datasets")
LEGEND = """\
ours: the train loader, which hands over bytes; ImageFolder: torchvision's, with
timm's transform, which normalizes and erases; ratio: round by round. What ours
leaves to the device is `transfer`. Medians, least-most of the rounds.
"""


def describe(
    datamodule: ClassificationDataModule,
    source: Source,
    comparisons: Sequence[Comparison],
    stages: Mapping[str, Spread],
    options: SimpleNamespace,
) -> dict[str, Any]:
    """Return a record in plain values: what was measured, of what and on what, in images a second and seconds."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "schema": 1,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {
            "scalablevit_pl": __version__,
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in PACKAGES},
        },
        "machine": {
            "processor": processor(),
            "cores": cores,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
        "settings": {
            "dataset": datamodule.dataset,
            "streaming": datamodule.streaming,
            "batch_size": datamodule.batch_size,
            "preprocessing": datamodule.preprocessing.to_dict(),
            "augmentation": None if datamodule.augmentation is None else asdict(datamodule.augmentation),
            "images": len(source.encoded),
            "mean_bytes": sum(map(len, source.encoded)) / len(source.encoded),
            "seconds": options.seconds,
            "rounds": options.rounds,
        },
        "images_per_second": [asdict(comparison) for comparison in comparisons],
        "seconds_per_image": {stage: asdict(spread) for stage, spread in stages.items()},
    }


def report(record: Mapping[str, Any]) -> str:
    """Lay a record out in tables of at most 80 columns."""
    machine, versions, settings = record["machine"], record["versions"], record["settings"]
    lines = [
        f"{machine['cores']} core(s) of {machine['processor'][:40]}, {machine['device'][:20]}; {record['date'][:10]}",
        ", ".join(f"{name} {versions[name]}" for name in ("torch", "torchvision", "timm", "pillow")),
        f"{settings['images']:,} images of {settings['mean_bytes'] / 1e3:.1f} kB, batches of {settings['batch_size']}, "
        f"{settings['rounds']} rounds in turns",
        "",
        f"{'images/s, processes':<20}{'ours':>20}{'ImageFolder + timm':>20}{'ratio':>20}",
    ]
    for row in record["images_per_second"]:
        cells = [_cell(row[way], 1.0, digits) for way, digits in (("ours", 0), ("theirs", 0), ("ratio", 2))]
        lines.append(f"{row['workers']:<20}" + "".join(f"{cell:>20}" for cell in cells))
    lines += ["", f"{'an image takes':<20}{'ms':>20}"]
    stages = record["seconds_per_image"]
    lines += [f"{stage:<20}{_cell(spread, 1e3, 2):>20}" for stage, spread in stages.items()]
    before = sum(spread["median"] for stage, spread in stages.items() if stage != "transfer")
    lines += [f"{'all but transfer':<20}{before * 1e3:>8.2f}", "", LEGEND]
    return "\n".join(lines)


def _cell(spread: Mapping[str, float], factor: float, digits: int) -> str:
    median, least, most = (f"{spread[name] * factor:,.{digits}f}" for name in ("median", "least", "most"))
    return f"{median} ({least}-{most})"
