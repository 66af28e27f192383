"""Predictions as a table: gathered from all processes, complete, in order, one row an image."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from scalablevit_pl.storage import written_aside

TOP = 5
Item = TypeVar("Item")


class PredictionTable:
    """Collect the most probable classes of each image.

    Args:
        class_names: Names of the classes.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = class_names
        self.top = min(TOP, len(class_names))
        self.rows: dict[int, dict[str, Any]] = {}

    def add(self, batch: dict[str, Any], probabilities: Tensor) -> None:
        """Add a batch's `index`, `path` and, where known, `label`, with its probabilities `(B, K)`.

        Samples with a negative `index` only fill the batch and are left out.
        """
        values, classes = probabilities.topk(self.top, dim=1)
        labels = batch["label"].tolist() if "label" in batch else [None] * len(values)
        for index, path, label, names, row in zip(
            batch["index"].tolist(), batch["path"], labels, classes.tolist(), values.tolist(), strict=True
        ):
            if index < 0:
                continue
            named = {"index": index, "path": path, "label": "" if label is None else self.class_names[label]}
            for rank, (name, value) in enumerate(zip(names, row, strict=True), start=1):
                named |= {f"label_{rank}": self.class_names[name], f"probability_{rank}": f"{value:.6f}"}
            self.rows[index] = named

    def gather(self) -> list[dict[str, Any]]:
        """Return the rows of all processes in the order of the images; every process has to call it."""
        return list(gather_by_index(self.rows).values())

    def write(self, rows: Iterable[dict[str, Any]], file: TextIO) -> None:
        """Write rows as CSV: index, path, label (where known), then classes and probabilities, most probable first."""
        ranked = [f"{column}_{rank}" for rank in range(1, self.top + 1) for column in ("label", "probability")]
        writer = csv.DictWriter(file, ["index", "path", "label", *ranked])
        writer.writeheader()
        writer.writerows(rows)

    def save(self, rows: Iterable[dict[str, Any]], path: Path) -> None:
        """Write rows as a CSV file, aside first."""
        with written_aside(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
            self.write(rows, file)


def gather_by_index(parts: dict[int, Item]) -> dict[int, Item]:
    """Merge what the processes have of something, in the order of the images; every process has to call it."""
    everywhere = [parts]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        everywhere = [{} for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(everywhere, parts)
    merged = {index: item for part in everywhere for index, item in part.items()}
    return {index: merged[index] for index in sorted(merged)}


class PredictionWriter(pl.Callback):
    """Write what `Trainer.predict` predicts as CSV.

    Args:
        class_names: Names of the classes; by default the datamodule's.
        out: A file's path, or an open text file.
    """

    def __init__(self, out: Path | TextIO, class_names: Sequence[str] | None = None) -> None:
        self.out = out
        self.class_names = class_names

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin an empty table."""
        self.table = PredictionTable(self.class_names or trainer.datamodule.class_names)  # type: ignore[attr-defined]

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Collect a batch's probabilities."""
        self.table.add(batch, outputs)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the table once it is complete."""
        rows = self.table.gather()
        if trainer.is_global_zero:
            if isinstance(self.out, Path):
                self.table.save(rows, self.out)
            else:
                self.table.write(rows, self.out)
