"""When a run writes its checkpoints, and how, so that whatever ends it there is a whole one to go on from."""

import logging
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from scalablevit_pl.callbacks.metrics_log import MetricsLog
from scalablevit_pl.callbacks.preemption import BY_WEIGHT, PreemptedError, StopSignal
from scalablevit_pl.run_folder import CHECKPOINTS, LAST, newest_checkpoints
from scalablevit_pl.storage import written_aside

logger = logging.getLogger(__name__)

MONITORED = ("val_ema/top1", "val/top1")  # the first that there is
STEP_VALUES = ("train/step_loss", "train/lr")
EPOCH_AVERAGES = ("train/loss", "train/top1", "train/top5")


class RunCheckpoints(Checkpoint):
    """Keep the newest checkpoints of a run as `step=N.ckpt`, the newest of all as `last.ckpt`, too, and `best.ckpt`.

    A checkpoint is written at the end of each epoch and every so many minutes or steps in between, after an optimizer
    step. SIGTERM and SIGUSR1 stop the run in the same place. `best.ckpt` is by the top-1 of validation, of the averaged
    weights where there are any.

    Args:
        every_minutes: Longest time between two of them; null for none within an epoch.
        every_steps: One after each so many optimizer steps, too.
        keep: How many `step=N.ckpt` there are at the most. The one before the newest is what is gone on from should the
            newest be damaged.

    Raises:
        ValueError: If a number is out of its range.
    """

    def __init__(self, every_minutes: float | None = 30.0, every_steps: int | None = None, keep: int = 2) -> None:
        if every_minutes is not None and not every_minutes > 0.0:
            raise ValueError(f"checkpoint.every_minutes must be above 0, or null for never, got {every_minutes}")
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"checkpoint.every_steps must be at least 1, or null for never, got {every_steps}")
        if keep < 1:
            raise ValueError(f"checkpoint.keep must be at least 1, got {keep}")
        self.every_seconds = math.inf if every_minutes is None else 60.0 * every_minutes
        self.every_steps = every_steps
        self.keep = keep
        self.best: float | None = None
        self.signal = StopSignal()

    def state_dict(self) -> dict[str, Any]:
        """Return the best score so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best score so far."""
        self.best = state_dict["best"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the folder, and take signals before the loaders' processes are started, which inherit the handlers."""
        self.folder = Path(trainer.default_root_dir) / CHECKPOINTS
        self.signal.install()

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take signals from Lightning, which has put its handlers in the place of ours."""
        self.signal.install()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hide a limit of steps while the loops are restored.

        With one, Lightning takes any checkpoint for one from within an epoch, and goes on from one of an epoch's end
        with an epoch of no batches.
        """
        self._max_steps = trainer.max_steps
        trainer.fit_loop.epoch_loop.max_steps = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count time and steps."""
        trainer.fit_loop.epoch_loop.max_steps = self._max_steps
        self.signal.install()
        self._seen = trainer.global_step
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time to, but not where a resumed run would skip a validation or the rest of an accumulation.

        Raises:
            PreemptedError: If a signal has come; the checkpoint is written.
        """
        stepped, self._seen = trainer.global_step != self._seen, trainer.global_step
        if not stepped or trainer.fast_dev_run or _ends_in_validation(trainer, batch_idx):  # type: ignore[attr-defined]
            return
        by_steps = self.every_steps is not None and trainer.global_step % self.every_steps == 0
        by_time = trainer.is_global_zero and time.monotonic() - self._saved_at >= self.every_seconds
        stop, due = _greatest(pl_module.device, self._stop(), int(by_steps or by_time))
        if stop or due:
            logged = trainer.fit_loop.epoch_loop._batches_that_stepped
            if (logged + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
                _record(trainer, STEP_VALUES, logged)
            self._save(trainer)
        if stop:
            raise PreemptedError(BY_WEIGHT[stop], trainer.global_step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save `best.ckpt` if the weights are the best so far."""
        scores = [trainer.callback_metrics[name] for name in MONITORED if name in trainer.callback_metrics]
        if not scores or trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        score = float(scores[0])
        if math.isfinite(score) and (self.best is None or score > self.best):
            self.best = score
            trainer.save_checkpoint(self.folder / "best.ckpt", False)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save at the end of an epoch.

        Raises:
            PreemptedError: If a signal has come; the checkpoint is written.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        _record(trainer, EPOCH_AVERAGES, trainer.fit_loop.epoch_loop._batches_that_stepped - 1)
        self._save(trainer)
        (stop,) = _greatest(pl_module.device, self._stop())
        if stop:
            raise PreemptedError(BY_WEIGHT[stop], trainer.global_step)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back; where the fit ends otherwise they stay ours, and cannot cut a requeueing short."""
        self.signal.restore()

    def _stop(self) -> int:
        return BY_WEIGHT.index(self.signal.received or 0)

    def _save(self, trainer: pl.Trainer) -> None:
        path = self.folder / f"step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(path, False)  # more than the weights
        self._saved_at = time.monotonic()
        if trainer.is_global_zero:
            name_last(path)
            for old in newest_checkpoints(self.folder)[self.keep :]:
                old.unlink(missing_ok=True)


def _record(trainer: pl.Trainer, names: tuple[str, ...], step: int) -> None:
    """Write into metrics.csv what Lightning logs after the hook in which the checkpoint is written.

    A run that is killed in between would go on without these numbers.
    """
    values = {name: float(value) for name, value in trainer.logged_metrics.items() if name in names}
    for log in trainer.loggers:
        if isinstance(log, MetricsLog):
            log.log_metrics(values | {"epoch": trainer.current_epoch}, step)
            log.save()


def _ends_in_validation(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Tell whether an epoch's end or a validation within it comes after this batch."""
    every: Any = trainer.val_check_batch
    if trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches:
        return True
    number = trainer.fit_loop.total_batch_idx if trainer.check_val_every_n_epoch is None else batch_idx
    return isinstance(every, int) and (number + 1) % every == 0


def _greatest(device: torch.device, *numbers: int) -> tuple[int, ...]:
    """Return the greatest of what the processes have of each number, so that all decide alike."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return numbers
    values = torch.tensor(numbers, device=device)
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return tuple(values.tolist())


def name_last(path: Path) -> None:
    """Let `last.ckpt` be this checkpoint: another name of the same file, or a copy where there are no such names."""
    with written_aside(path.with_name(LAST)) as aside:
        aside.unlink(missing_ok=True)
        try:
            os.link(path, aside)
        except OSError:
            shutil.copyfile(path, aside)


class WholeCheckpointIO(TorchCheckpointIO):
    """Write each checkpoint aside and to the disk before it takes its name, so that none is ever cut short."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            ValueError: If it cannot be written; the one that was there is left as it was.
        """
        if "://" in str(path):  # not on this machine, where Lightning knows its way
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with written_aside(target) as aside, aside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into the latter
            raise ValueError(
                f"cannot write the checkpoint {str(target)!r} ({' '.join(str(error).split())[:200]}): make room for "
                "it or mend its folder, then go on with --resume auto"
            ) from error
