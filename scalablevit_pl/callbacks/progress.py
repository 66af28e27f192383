"""What a progress bar leaves on the screen."""

import sys

import lightning.pytorch as pl


class LineEnd(pl.Callback):
    """End the line of a progress bar that an error interrupts, so that the error stands on a line of its own."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write a line end where the bar is."""
        bar = trainer.progress_bar_callback
        if bar is not None and getattr(bar, "is_enabled", True):
            sys.stderr.write("\n")
