"""What a test leaves in its run folder: numbers, predictions and pictures."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from scalablevit_pl.callbacks.prediction import PredictionTable, gather_by_index
from scalablevit_pl.plotting import draw_confusion, draw_predictions
from scalablevit_pl.storage import save_json

SHOWN = 40
logger = logging.getLogger(__name__)


class EvaluationReport(pl.Callback):
    """Write `test.json`, `predictions.csv`, `predictions.png` and `confusion.png` after a test, `val.json` likewise.

    Args:
        folder: The run folder.
        source: Where the weights come from and what the command was, for the record.
    """

    def __init__(self, folder: Path, source: Mapping[str, Any]) -> None:
        self.folder = folder
        self.source = source

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with nothing counted."""
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.class_names: list[str] = datamodule.class_names
        self.preprocessing = datamodule.preprocessing
        self.table = PredictionTable(self.class_names)
        self.answering = "test_ema" if average_of(pl_module) == "ema" else "test"
        self.confusion = MulticlassConfusionMatrix(len(self.class_names)).to(pl_module.device)
        # A few images from all over the split, chosen before anything is known about their predictions.
        samples = len(datamodule.images["test"])
        self.shown = set(range(0, samples, max(1, math.ceil(samples / SHOWN))))
        self.images: dict[int, Tensor] = {}

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Count a batch and keep the images that will be shown."""
        self.table.add(batch, outputs)
        counted = batch["index"] >= 0
        self.confusion.update(outputs[counted], batch["label"][counted])
        for position, index in enumerate(batch["index"].tolist()):
            if index in self.shown:
                self.images[index] = self._pixels(batch["image"][position])

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the processes' counts together, where all of them take part."""
        self.counts = self.confusion.compute().cpu().numpy()
        self.rows = self.table.gather()
        self.images = gather_by_index(self.images)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the files.

        Raises:
            ValueError: If not each sample of the split was counted once.
        """
        check_count("test", trainer)
        if not trainer.is_global_zero:
            return
        metrics = self._save_metrics("test", trainer, {"average": average_of(pl_module)})
        self.table.save(self.rows, self.folder / "predictions.csv")
        split = trainer.datamodule.images["test"].split  # type: ignore[attr-defined]
        count = f"{metrics['test/samples']:,.0f} images of split {split!r}"
        title = f"{self.folder.name}: top-1 {metrics[f'{self.answering}/top1']:.4f} on {count}"
        draw_confusion(self.counts, self.class_names, self.folder / "confusion.png", title)
        rows = [row for row in self.rows if row["index"] in self.images]
        draw_predictions(
            [self.images[row["index"]].numpy() for row in rows],
            [row["label"] for row in rows],
            [row["label_1"] for row in rows],
            [float(row["probability_1"]) for row in rows],
            self.folder / "predictions.png",
            title,
        )
        logger.info("results are in %s", self.folder)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the numbers of `scalablevit validate`; those of a fit are in metrics.csv.

        Raises:
            ValueError: If not each sample of the split was counted once.
        """
        if trainer.state.fn != "validate":
            return
        check_count("val", trainer)
        if trainer.is_global_zero:
            self._save_metrics("val", trainer, {})

    def _pixels(self, image: Tensor) -> Tensor:
        pixels: Tensor = self.preprocessing.denormalize(image.float())
        return pixels.permute(1, 2, 0).contiguous().cpu()

    def _save_metrics(self, part: str, trainer: pl.Trainer, answers: Mapping[str, Any]) -> dict[str, float]:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        metrics = {
            name: float(value)
            for name, value in sorted(trainer.callback_metrics.items())
            if name.startswith((f"{part}/", f"{part}_ema/"))
        }
        circumstances = {
            **answers,
            **self.source,
            "dataset": datamodule.dataset,
            "revision": datamodule.commit or datamodule.revision,
            "split": datamodule.images[part].split,
            "split_samples": len(datamodule.images[part]),
            "preprocessing": datamodule.preprocessing.to_dict(),
            "processes": trainer.world_size,
        }
        save_json(metrics | circumstances, self.folder / f"{part}.json")
        return metrics


def average_of(pl_module: pl.LightningModule) -> str:
    """Return which weights answer in a test: `ema`, averaged ones beside the network's, or `none`."""
    return getattr(pl_module, "answering", None) or "none"


def check_count(part: str, trainer: pl.Trainer) -> None:
    """Compare how many samples an evaluation has counted with how many its split has, unless batches were limited.

    Unreadable images are not counted, where any are allowed.

    Raises:
        ValueError: If they differ.
    """
    limit = trainer.limit_test_batches if part == "test" else trainer.limit_val_batches
    images = trainer.datamodule.images[part]  # type: ignore[attr-defined]
    counted = int(trainer.callback_metrics[f"{part}/samples"])
    allowed = trainer.datamodule.max_unreadable * trainer.world_size  # type: ignore[attr-defined]
    # A share of all is 1.0, whereas 1 means a single batch.
    if isinstance(limit, float) and limit == 1.0 and not 0 <= len(images) - counted <= allowed:
        raise ValueError(
            f"{counted:,} samples of split {images.split!r} were counted, and it has {len(images):,}: these are not "
            "the numbers of the split, so evaluate anew on one process with --trainer.devices=1"
        )
