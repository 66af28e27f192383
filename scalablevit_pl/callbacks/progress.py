"""Progress of a command: a bar in a terminal, and one line for each epoch."""

import logging
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from scalablevit_pl.callbacks.throughput import Throughput

logger = logging.getLogger(__name__)


class Bar(Tqdm):
    """A bar on standard error that is only drawn in a terminal, and erased at its end."""

    def __init__(self, shown: bool, **options: Any) -> None:
        disable = None if shown else True  # None: unless standard error is a terminal
        super().__init__(disable=disable, leave=False, position=0, delay=0, dynamic_ncols=True, **options)

    def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
        """Set the text before the bar, without a number of the only loader."""
        super().set_description((desc or "").removesuffix(" DataLoader 0"), refresh)


class Progress(TQDMProgressBar):
    """Show a bar with images per second, the wait for data and the time left, and log a line after each epoch.

    Args:
        throughput: Measures the speed of a training.
    """

    def __init__(self, throughput: Throughput) -> None:
        super().__init__()
        self.throughput = throughput
        self.complete = False
        self.epoch = ""
        self.validation: dict[str, Any] = {}

    def init_train_tqdm(self) -> Bar:
        """Build the bar of an epoch without its time: that of the run is shown."""
        return Bar(self.is_enabled, desc="Training", bar_format="{desc}{bar} {n_fmt}/{total_fmt}{postfix}")

    def init_sanity_tqdm(self) -> Bar:
        """Build the bar of all other loops over batches."""
        return Bar(self.is_enabled, smoothing=0, bar_format=self.BAR_FORMAT)

    init_validation_tqdm = init_test_tqdm = init_predict_tqdm = init_sanity_tqdm

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, int | str | float | Any]:
        """Return the text after the bar. Nothing is read from a GPU, which would have to synchronize."""
        speed = self.throughput.speed
        eta = {"eta": duration(speed["speed/eta_hours"])} if "speed/eta_hours" in speed else {}
        if not speed:
            return {}
        return {"img/s": f"{speed['speed/images_per_second']:.0f}", "wait": f"{speed['speed/data_wait']:.0%}", **eta}

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Log the epoch before, whose averages are logged after its last hook, and restart the bar."""
        self._log_epoch(trainer, *args)
        super().on_train_epoch_start(trainer, *args)
        epochs = trainer.max_epochs
        self.epoch = f"{trainer.current_epoch + 1}" + (f"/{epochs}" if epochs is not None and epochs > 0 else "")
        self.train_progress_bar.set_description(f"Epoch {self.epoch}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the validation's metrics."""
        super().on_validation_end(trainer, pl_module)
        task, metrics = cast("Any", pl_module), trainer.callback_metrics
        shown = {"val": "val/loss", **{name: f"val/{name}" for name in task.shown}, "ema": f"val_ema/{task.monitor}"}
        if not trainer.sanity_checking:
            self.validation = {short: metrics[name] for short, name in shown.items() if name in metrics}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember that the epoch is complete."""
        super().on_train_epoch_end(trainer, pl_module)
        self.complete = True

    def on_train_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Erase the bar and log the last epoch."""
        super().on_train_end(trainer, *args)
        self._log_epoch(trainer, *args)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Erase the bars, so that the message starts on a line of its own."""
        for bar in [value for value in vars(self).values() if isinstance(value, Bar)]:
            bar.close()

    def _log_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.complete:
            metrics = {"loss": trainer.callback_metrics["train/loss"], **self.validation}
            texts = {name: f"{float(value):.3f}" for name, value in metrics.items()}
            texts |= {name: str(text) for name, text in self.get_metrics(trainer, pl_module).items() if name != "wait"}
            logger.info("epoch %s: %s", self.epoch, ", ".join(f"{name} {text}" for name, text in texts.items()))
        self.complete, self.validation = False, {}


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
