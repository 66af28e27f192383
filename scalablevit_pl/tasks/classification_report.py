"""Predictions of a classifier as a table, a confusion matrix and a picture of some images."""

import csv
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from scalablevit_pl.plotting import draw_confusion, draw_predictions, drawable_names
from scalablevit_pl.storage import written_aside
from scalablevit_pl.tasks.report import Report, ReportData, gather_by_index
from scalablevit_pl.text import as_cell

TOP = 5  # classes in a row of the table
SHOWN = 40  # images in the picture


class ClassificationReport(Report):
    """Write `predictions.csv` and, unless `predict` states that no image has one label, two pictures."""

    def __init__(self, data: ReportData, predict: bool) -> None:
        super().__init__(data)
        self.predict = predict
        self.top = min(TOP, len(data.class_names))
        self.rows: dict[int, dict[str, Any]] = {}
        self.images: dict[int, Tensor] = {}
        # Images spread over the split, selected before any prediction is known.
        self.shown = set(range(0, data.samples, max(1, math.ceil(data.samples / SHOWN))))

    def add(self, batch: dict[str, Any], predictions: Tensor) -> None:
        """Add a batch's `index`, `path` and, in a test, `image` and `label`, with its probabilities `(B, K)`."""
        self._add_rows(batch, predictions)
        if self.predict:
            return
        for position, index in enumerate(batch["index"].tolist()):
            if index in self.shown:
                self.images[index] = self._pixels(batch["image"][position])

    def _add_rows(self, batch: dict[str, Any], probabilities: Tensor) -> None:
        names = self.data.class_names
        values, classes = probabilities.topk(self.top, dim=1)
        labels = batch["label"].tolist() if "label" in batch else [None] * len(values)
        columns = (batch["index"].tolist(), batch["path"], labels, classes.tolist(), values.tolist())
        for index, path, label, top, probability in zip(*columns, strict=True):
            if isinstance(label, list):  # zeros and ones
                named = json.dumps(
                    [name for name, there in zip(names, label, strict=True) if there], ensure_ascii=False
                )
            else:
                named = "" if label is None else names[label]
            row = {"index": index, "path": path, "label": named}
            for rank, (name, value) in enumerate(zip(top, probability, strict=True), start=1):
                row |= {f"label_{rank}": names[name], f"probability_{rank}": f"{value:.6f}"}
            self.rows[index] = row

    def _pixels(self, image: Tensor) -> Tensor:
        pixels: Tensor = self.data.preprocessing.denormalize(image.float())
        pixels = pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels[:3]
        return pixels.permute(1, 2, 0).contiguous().cpu()

    def gather(self) -> None:
        """Merge rows and images of all processes; every process has to call it."""
        self.rows = gather_by_index(self.rows)
        if not self.predict:
            self.images = gather_by_index(self.images)

    def write(self, folder: Path, title: str) -> None:
        """Write `predictions.csv` and, where each image has one label, `predictions.png` and `confusion.png`."""
        self.write_predictions(folder)
        if self.predict:
            return
        index_of = {name: index for index, name in enumerate(self.data.class_names)}
        pairs = Counter((index_of[row["label"]], index_of[row["label_1"]]) for row in self.rows.values())
        names = drawable_names(self.data.class_names)
        draw_confusion(pairs, names, folder / "confusion.png", title)
        rows = [row for index, row in self.rows.items() if index in self.images]
        draw_predictions(
            [self.images[row["index"]].numpy() for row in rows],
            [names[index_of[row["label"]]] for row in rows],
            [names[index_of[row["label_1"]]] for row in rows],
            [float(row["probability_1"]) for row in rows],
            folder / "predictions.png",
            title,
        )

    def write_predictions(self, out: Path | TextIO) -> None:
        """Write index, path, label (if known), then classes and probabilities, the most probable first, as CSV."""
        if isinstance(out, Path):
            out = out / "predictions.csv" if out.is_dir() else out
            with written_aside(out) as aside, aside.open("w", newline="", encoding="utf-8") as file:
                self.write_predictions(file)
            return
        ranked = [f"{column}_{rank}" for rank in range(1, self.top + 1) for column in ("label", "probability")]
        writer = csv.DictWriter(out, ["index", "path", "label", *ranked])
        writer.writeheader()
        writer.writerows({key: as_cell(str(value)) for key, value in row.items()} for row in self.rows.values())
