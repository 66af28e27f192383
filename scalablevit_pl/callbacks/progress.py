"""Progress bar of a training."""

import sys
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from scalablevit_pl.callbacks.throughput import Throughput


class LineEnd(pl.Callback):
    """End the line of a progress bar that an error interrupts, so that the message starts on a new line."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write a line end after the bar."""
        bar = trainer.progress_bar_callback
        if bar is not None and getattr(bar, "is_enabled", True):
            sys.stderr.write("\n")


class TrainingBar(TQDMProgressBar):
    """Show the epoch's batches, the last loss and metrics, images per second, the wait for data, and the time left.

    Args:
        throughput: Measures the speed.
    """

    def __init__(self, throughput: Throughput) -> None:
        super().__init__()
        self.throughput = throughput
        self.epoch_metrics: dict[str, str] = {}

    def init_train_tqdm(self) -> Tqdm:
        """Build the training bar without the time of an epoch: that of the run is shown."""
        bar = super().init_train_tqdm()
        bar.bar_format = "{desc}{bar} {n_fmt}/{total_fmt}{postfix}"
        return bar

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Update the validation metrics."""
        self._read_metrics(trainer, pl_module)
        super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Update the epoch's averages."""
        self._read_metrics(trainer, pl_module)
        super().on_train_epoch_end(trainer, pl_module)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, int | str | float | Any]:
        """Return the text after the bar. Nothing is read from a GPU, which would have to synchronize."""
        if trainer.state.fn != "fit":
            return dict(super().get_metrics(trainer, pl_module))
        speed = self.throughput.speed
        if not speed:
            return dict(self.epoch_metrics)
        return {
            **self.epoch_metrics,
            "img/s": f"{speed['speed/images_per_second']:.0f}",
            "wait": f"{speed['speed/data_wait']:.0%}",
            **({"eta": duration(speed["speed/eta_hours"])} if "speed/eta_hours" in speed else {}),
        }

    def _read_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.is_enabled and not trainer.sanity_checking:
            metrics, task = trainer.progress_bar_metrics, cast("Any", pl_module)
            shown = {"train/loss": "loss", **{f"val/{name}": name for name in task.shown}}
            shown |= {f"val_ema/{name}": "ema" for name in task.shown if name == task.monitor}
            self.epoch_metrics = {
                short: f"{float(metrics[name]):.{2 if short == 'loss' else 3}f}"
                for name, short in shown.items()
                if name in metrics
            }


def duration(hours: float) -> str:
    """Format a time in its two largest units: 12s, 3m05s, 2h13m, 4d07h."""
    seconds = round(hours * 3600.0)
    minutes, seconds = divmod(seconds, 60)
    whole_hours, minutes = divmod(minutes, 60)
    days, whole_hours = divmod(whole_hours, 24)
    if days:
        return f"{days}d{whole_hours:02}h"
    if whole_hours:
        return f"{whole_hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
