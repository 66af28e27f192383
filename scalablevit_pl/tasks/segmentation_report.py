"""Predictions of a segmenter: masks as files, pictures of some images, and the scores of each class."""

import csv
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TextIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scalablevit_pl.plotting import class_colors, draw_bars, draw_confusion, draw_segmentations, drawable_names
from scalablevit_pl.storage import folder_written_aside, written_aside
from scalablevit_pl.tasks.metrics.confusion import ConfusionMatrix, class_scores
from scalablevit_pl.tasks.report import Report, ReportData, gather_by_index
from scalablevit_pl.text import as_cell

SHOWN = 8  # images in the picture
SIDE = 320  # long side of an image in the picture, in pixels
SHARES = "shares.csv"


class SegmentationReport(Report):
    """Write pictures and a table of the classes of a test, or the masks of a prediction.

    Masks are written as they come, into a hidden folder next to the final one, which appears once all are there.

    Args:
        data: Classes, samples and preprocessing of the data.
        confusion: Counts the pixels of the test on this process; None for a prediction.
    """

    folder: ClassVar[str | None] = "predictions"

    def __init__(self, data: ReportData, confusion: ConfusionMatrix | None = None) -> None:
        super().__init__(data)
        self.confusion = confusion
        self.part: Path | None = None
        self.pictures = False
        self.rows: dict[int, tuple[str, np.ndarray[Any, Any]]] = {}
        self.images: dict[int, tuple[Tensor, ...]] = {}
        # Images spread over the split, selected before any prediction is known.
        self.shown = set(range(0, data.samples, max(1, math.ceil(data.samples / SHOWN))))

    def begin(self, out: Path | TextIO, pictures: bool = False) -> None:
        """Make the hidden folder for the masks; every process does so.

        Raises:
            ValueError: If `out` is not a path.
        """
        if not isinstance(out, Path):
            raise ValueError("the predictions are masks, one file for each image: name a folder for them with --out")
        out = out.resolve()
        self.part = out.with_name(f".{out.name}.part")
        self.part.mkdir(parents=True, exist_ok=True)
        self.pictures = pictures

    def add(self, batch: dict[str, Any], predictions: list[Tensor]) -> None:
        """Add a batch's `index`, `path`, `image`, `resized` and, in a test, `mask`, with its classes `(H, W)`."""
        for position, (index, classes) in enumerate(zip(batch["index"].tolist(), predictions, strict=True)):
            if self.part is not None:
                self._write_mask(self.part, batch, position, classes.cpu().numpy())
            elif index in self.shown and "mask" in batch:
                height, width = classes.shape
                truth = batch["mask"][position, :height, :width]
                pixels = torch.from_numpy(self._pixels(batch, position))
                self.images[index] = tuple(_thumbnail(each).cpu() for each in (pixels, truth, classes))

    def _write_mask(self, folder: Path, batch: dict[str, Any], position: int, classes: np.ndarray[Any, Any]) -> None:
        index, names = int(batch["index"][position]), self.data.class_names
        counts = np.bincount(classes.ravel(), minlength=len(names))
        self.rows[index] = (batch["path"][position], (counts / classes.size).astype(np.float32))
        picture = Image.fromarray(classes)
        picture.putpalette(class_colors().tobytes())
        picture.save(folder / f"{index}.png", "PNG")
        if self.pictures:
            size = (classes.shape[1], classes.shape[0])
            image = Image.fromarray(self._pixels(batch, position)).resize(size, Image.Resampling.BILINEAR)
            Image.blend(image, picture.convert("RGB"), 0.5).save(
                folder / f"{index}.jpg", "JPEG", quality=90, subsampling=0
            )

    def _pixels(self, batch: dict[str, Any], position: int) -> np.ndarray[Any, Any]:
        """Return an image `(H, W, 3)` as the network saw it, without padding."""
        height, width = batch["resized"][position].tolist()
        pixels: Tensor = self.data.preprocessing.denormalize(batch["image"][position, :, :height, :width].float())
        pixels = pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels[:3]
        return pixels.permute(1, 2, 0).contiguous().cpu().numpy()

    def gather(self) -> None:
        """Merge what the processes have collected; every process has to call it."""
        self.rows, self.images = gather_by_index(self.rows), gather_by_index(self.images)
        if self.confusion is not None:
            with self.confusion.sync_context():
                self.matrix = self.confusion.matrix.cpu()

    def write(self, folder: Path, title: str) -> None:
        """Write `iou.csv`, `iou.png`, `confusion.png` and `predictions.png`."""
        names = drawable_names(self.data.class_names)
        iou, accuracy, pixels = (values.tolist() for values in class_scores(self.matrix))
        with written_aside(folder / "iou.csv") as aside, aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["class", "iou", "accuracy", "pixels"])
            for name, *scores, count in zip(self.data.class_names, iou, accuracy, pixels, strict=True):
                writer.writerow([as_cell(name), *map(_fraction, scores), count])
        draw_bars(iou, names, folder / "iou.png", title, "IoU")
        cells = {
            (true, predicted): int(self.matrix[true, predicted]) for true, predicted in self.matrix.nonzero().tolist()
        }
        draw_confusion(cells, names, folder / "confusion.png", title)
        shown = [tuple(part.numpy() for part in parts) for parts in self.images.values()]
        draw_segmentations(shown, names, folder / "predictions.png", title)

    def write_predictions(self, out: Path | TextIO) -> None:
        """Move the masks to the folder `out`, named like the images, with `shares.csv`: the share of each class.

        Images of the same name get a number. In an existing folder other files stay.
        """
        if self.part is None or not isinstance(out, Path):
            raise ValueError("masks are written as they come: call begin with a folder first")
        names = unique_names([path or f"image_{index}" for index, (path, _) in self.rows.items()])
        with folder_written_aside(out) as aside:
            for index, name in zip(self.rows, names, strict=True):
                (self.part / f"{index}.png").rename(aside / f"{name}.png")
                if self.pictures:
                    (self.part / f"{index}.jpg").rename(aside / f"{name}_overlay.jpg")
            with (aside / SHARES).open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(["index", "path", "mask", *map(as_cell, self.data.class_names)])
                for (index, (path, shares)), name in zip(self.rows.items(), names, strict=True):
                    writer.writerow([index, as_cell(path), as_cell(f"{name}.png"), *map(_fraction, shares.tolist())])
        self.discard()

    def discard(self) -> None:
        """Remove the masks of an unfinished prediction."""
        if self.part is not None:
            shutil.rmtree(self.part, ignore_errors=True)


def unique_names(paths: Sequence[str]) -> list[str]:
    """Return the name of each file without its suffix, those that occur again with a number.

    Names that differ only in capital letters are one name, as on many file systems.
    """
    stems = [Path(path).stem for path in paths]
    taken, names = set(map(str.casefold, stems)), list[str]()
    given: set[str] = set()
    for stem in stems:
        name, number = stem, 1
        while name.casefold() in (given if number == 1 else taken):
            number += 1
            name = f"{stem}_{number}"
        given.add(name.casefold())
        taken.add(name.casefold())
        names.append(name)
    return names


def _thumbnail(pixels: Tensor) -> Tensor:
    """Return every n-th pixel of `(H, W)` or `(H, W, 3)`, so that the long side fits into a picture."""
    step = max(1, math.ceil(max(pixels.shape[:2]) / SIDE))
    return pixels[::step, ::step].clone()


def _fraction(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6f}"
