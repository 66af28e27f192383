"""What an evaluation leaves behind besides its metrics: predictions as files and pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TextIO, TypeVar

import torch

Item = TypeVar("Item")


class MetricInfo(NamedTuple):
    """How a metric appears in pictures and in the card of a model.

    Attributes:
        label: Name for people, as on an axis.
        hub_type: The Hub's name of such a metric, as in a card's metadata.
        plotted: Whether `curves.png` shows it.
        training: Name of its training curve, which says how it differs from that of the validation.
    """

    label: str
    hub_type: str
    plotted: bool = False
    training: str = "training"


@dataclass(frozen=True)
class ReportData:
    """What a report needs to know about the evaluated data.

    Attributes:
        class_names: Names of the classes.
        samples: Number of samples.
        preprocessing: Transform of the images, which pictures have to undo.
        device: Where the network computes.
    """

    class_names: Sequence[str]
    samples: int
    preprocessing: Any
    device: torch.device | str = "cpu"


class Report:
    """Collect the predictions of an evaluation, batch by batch; a task's own report writes them.

    Every process has one and adds its own batches. `gather` is a collective call; the first process writes.

    Args:
        data: Classes, samples and preprocessing of the data.

    Attributes:
        folder: Name, in a run folder, of the folder for predictions that are many files; None for one table. A class
            attribute.
    """

    folder: ClassVar[str | None] = None

    def __init__(self, data: ReportData) -> None:
        self.data = data

    def begin(self, out: Path | TextIO, pictures: bool = False) -> None:
        """Prepare for a prediction, before its first batch; every process does so.

        Large predictions may be written as they come, but must look incomplete until `write_predictions`.

        Args:
            out: Where `write_predictions` will write.
            pictures: Also draw each prediction, if the report can do so.
        """

    def add(self, batch: dict[str, Any], predictions: Any) -> None:
        """Add a batch without fillers and its predictions, as the task's `predict` returns them."""

    def gather(self) -> None:
        """Merge what the processes have collected; every process has to call it."""

    def write(self, folder: Path, title: str) -> None:
        """Write tables and pictures into a run folder.

        Args:
            folder: The run folder.
            title: Run, metric and number of samples, for pictures.
        """

    def write_predictions(self, out: Path | TextIO) -> None:
        """Write the predictions alone, into a folder, to a file's path or to an open text file."""

    def discard(self) -> None:
        """Remove what was written of a prediction that ended with an error."""


def gather_by_index(items: dict[int, Item]) -> dict[int, Item]:
    """Merge the items of all processes in the order of the samples; every process has to call it."""
    everywhere = [items]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        everywhere = [{} for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(everywhere, items)
    merged = {index: item for part in everywhere for index, item in part.items()}
    return {index: merged[index] for index in sorted(merged)}
