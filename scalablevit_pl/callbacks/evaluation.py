"""What validate, test and predict leave in the run folder: metrics, predictions and pictures."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import lightning.pytorch as pl

from scalablevit_pl.storage import save_json
from scalablevit_pl.tasks.base import without_fillers
from scalablevit_pl.tasks.report import ReportData
from scalablevit_pl.text import aligned

logger = logging.getLogger(__name__)


class EvaluationReport(pl.Callback):
    """Write `val.json` after a validation, `test.json` and the task's report after a test."""

    def __init__(self, folder: Path, source: Mapping[str, Any]) -> None:
        self.folder = folder
        self.source = source

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin an empty report."""
        task: Any = pl_module
        self.report = task.report(report_data(trainer, "test", pl_module))

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Add a batch to the report."""
        if outputs is not None:
            self.report.add(without_fillers(batch), outputs)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Merge what the processes have collected."""
        self.report.gather()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the files."""
        task: Any = pl_module
        metrics = self._save_metrics("test", trainer, task, {"average": task.reported or "none"})
        if trainer.is_global_zero:
            split = trainer.datamodule.images["test"].split  # type: ignore[attr-defined]
            self.report.write(self.folder, self._title(task, metrics, split))
            logger.info("results are in %s", self.folder)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the metrics of `scalablevit validate`; those of a fit are in metrics.csv."""
        if trainer.state.fn == "validate":
            self._save_metrics("val", trainer, pl_module, {})
            logger.info("results are in %s", self.folder)

    def _title(self, task: Any, metrics: Mapping[str, float], split: str) -> str:
        prefix = "test" if task.reported is None else f"test_{task.reported}"
        score = f"{task.described[task.monitor].label} {metrics[f'{prefix}/{task.monitor}']:.4f}"
        return f"{self.folder.name}: {score} on {metrics['test/samples']:,.0f} images of split {split!r}"

    def _save_metrics(self, part: str, trainer: pl.Trainer, task: Any, answers: Mapping[str, Any]) -> dict[str, float]:
        check_count(part, trainer)
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        metrics = {
            name: float(value)
            for name, value in sorted(trainer.callback_metrics.items())
            if name.startswith((f"{part}/", f"{part}_"))
        }
        circumstances = {
            **answers,
            "tta": getattr(task, "tta", None),
            **({"window": task.window, "stride": task.stride} if getattr(task, "window", None) else {}),
            **self.source,
            "dataset": datamodule.dataset,
            "revision": datamodule.commit or datamodule.revision,
            "split": datamodule.images[part].split,
            "split_samples": len(datamodule.images[part]),
            "preprocessing": datamodule.preprocessing.to_dict(),
            "processes": trainer.world_size,
        }
        if trainer.is_global_zero:
            save_json(metrics | circumstances, self.folder / f"{part}.json")
            sys.stdout.write(table(metrics))
        return metrics


def table(metrics: Mapping[str, float]) -> str:
    """Return metrics line by line, with four digits; numbers of samples and pixels are whole."""
    return aligned(
        (name, f"{value:,.0f}" if name.endswith(("/samples", "/pixels")) else f"{value:.4f}")
        for name, value in metrics.items()
    )


class PredictionWriter(pl.Callback):
    """Write the predictions of `Trainer.predict` into a folder, a file or an open text file.

    Args:
        out: Where to; a run folder if `data` is None.
        data: Describes the data if there is no datamodule.
        pictures: Also draw each prediction.

    Attributes:
        unreadable: One line for each image that could not be read and has no prediction.

    Raises:
        ValueError: If none of the images could be read; nothing is written.
    """

    def __init__(self, out: Path | TextIO, data: ReportData | None = None, pictures: bool = False) -> None:
        self.out = out
        self.data = data
        self.pictures = pictures

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin an empty report."""
        task: Any = pl_module
        self.report = task.report(self.data or report_data(trainer, "predict", pl_module), predict=True)
        self.target = self.out
        if self.data is None and isinstance(self.out, Path) and self.report.folder is not None:
            self.target = self.out / self.report.folder
        self.report.begin(self.target, self.pictures)
        self.unreadable: list[str] = []
        self.predicted = False

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Add a batch's predictions and its unreadable images."""
        self.unreadable += filter(None, batch.get("unreadable", ()))
        if outputs is not None:
            self.report.add(without_fillers(batch), outputs)
            self.predicted = True

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the predictions once they are complete."""
        if self.unreadable and not self.predicted:
            self.report.discard()
            raise ValueError(self.unreadable[0])
        self.report.gather()
        if trainer.is_global_zero:
            self.report.write_predictions(self.target)
            if isinstance(self.target, Path):
                logger.info("predictions are in %s", self.target)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove incomplete predictions."""
        if hasattr(self, "report"):
            self.report.discard()


def report_data(trainer: pl.Trainer, part: str, pl_module: pl.LightningModule) -> ReportData:
    """Describe the evaluated data for a task's report."""
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    samples = len(datamodule.images[part])
    return ReportData(datamodule.class_names, samples, datamodule.preprocessing, pl_module.device)


def check_count(part: str, trainer: pl.Trainer) -> None:
    """Compare the number of evaluated samples with the split's, unless the number of batches was limited.

    Unreadable images are not counted where some are allowed.
    """
    limit = trainer.limit_test_batches if part == "test" else trainer.limit_val_batches
    images = trainer.datamodule.images[part]  # type: ignore[attr-defined]
    counted = int(trainer.callback_metrics[f"{part}/samples"])
    allowed = trainer.datamodule.max_unreadable * trainer.world_size  # type: ignore[attr-defined]
    # 1.0 is the share of all batches, whereas 1 means a single batch.
    if isinstance(limit, float) and limit == 1.0 and not 0 <= len(images) - counted <= allowed:
        raise ValueError(
            f"{counted:,} samples were evaluated but split {images.split!r} has {len(images):,}, so the metrics are "
            "not those of the split: evaluate on one process with --trainer.devices=1"
        )
