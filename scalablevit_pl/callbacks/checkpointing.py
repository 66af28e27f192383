"""When and how a run writes its checkpoints, so that it can resume however it ends."""

import logging
import math
import os
import shutil
import time
from collections.abc import Collection
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
from scalablevit_pl.text import one_line

logger = logging.getLogger(__name__)

STEP_VALUES = ("train/step_loss", "train/lr")


class RunCheckpoints(Checkpoint):
    """Keep the newest checkpoints of a run as `step=N.ckpt`, the newest of them also as `last.ckpt`, and `best.ckpt`.

    A checkpoint is written at the end of each epoch and at intervals of minutes or steps within it, always after an
    optimizer step. SIGTERM and SIGUSR1 stop the run at the same point. `best.ckpt` follows the task's `monitor`, that
    of the averaged weights if there are any.

    Args:
        every_minutes: Longest time between two checkpoints; null for none within an epoch.
        every_steps: Also write a checkpoint after this many optimizer steps.
        keep: Number of `step=N.ckpt` to keep. The one before the newest serves if the newest is damaged.

    Raises:
        ValueError: If a number is out of range.
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
        """Restore the best score so far."""
        self.best = state_dict["best"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Install the signal handlers before the loader processes start, which inherit them."""
        self.folder = Path(trainer.default_root_dir) / CHECKPOINTS
        self.signal.install()

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the signal handlers again, which Lightning has replaced."""
        self.signal.install()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hide a limit of steps while the loops are restored.

        With such a limit, Lightning treats each checkpoint as one from within an epoch, and resumes one from an epoch's
        end with an epoch of no batches.
        """
        self._max_steps = trainer.max_steps
        trainer.fit_loop.epoch_loop.max_steps = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start to count time and steps."""
        trainer.fit_loop.epoch_loop.max_steps = self._max_steps
        self.signal.install()
        self._seen = trainer.global_step
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if due, and stop after a signal, but not where a resumed run would skip a validation or a batch."""
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
        """Save `best.ckpt` if the task's `monitor` is the best so far."""
        task: Any = pl_module
        names = (f"val_ema/{task.monitor}", f"val/{task.monitor}")
        scores = [trainer.callback_metrics[name] for name in names if name in trainer.callback_metrics]
        if not scores or trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        score, sign = float(scores[0]), -1.0 if task.mode == "min" else 1.0
        if math.isfinite(score) and (self.best is None or sign * score > sign * self.best):
            self.best = score
            trainer.save_checkpoint(self.folder / "best.ckpt", False)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save at the end of an epoch, and stop after a signal."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        averages = [name for name in trainer.logged_metrics if name.startswith("train/") and name not in STEP_VALUES]
        _record(trainer, averages, trainer.fit_loop.epoch_loop._batches_that_stepped - 1)
        self._save(trainer)
        (stop,) = _greatest(pl_module.device, self._stop())
        if stop:
            raise PreemptedError(BY_WEIGHT[stop], trainer.global_step)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the signal handlers; after an error they stay, so that no signal interrupts a requeueing."""
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


def _record(trainer: pl.Trainer, names: Collection[str], step: int) -> None:
    """Write metrics into metrics.csv that Lightning logs only after the hook in which the checkpoint is written.

    A run that is killed in between would resume without them.
    """
    values = {name: float(value) for name, value in trainer.logged_metrics.items() if name in names}
    for log in trainer.loggers:
        if isinstance(log, MetricsLog):
            log.log_metrics(values | {"epoch": trainer.current_epoch}, step)
            log.save()


def _ends_in_validation(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Return whether the epoch's end or a validation within it follows this batch."""
    every: Any = trainer.val_check_batch
    if trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches:
        return True
    number = trainer.fit_loop.total_batch_idx if trainer.check_val_every_n_epoch is None else batch_idx
    return isinstance(every, int) and (number + 1) % every == 0


def _greatest(device: torch.device, *numbers: int) -> tuple[int, ...]:
    """Return the maximum of each number over the processes, so that all decide alike."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return numbers
    values = torch.tensor(numbers, device=device)
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return tuple(values.tolist())


def name_last(path: Path) -> None:
    """Point `last.ckpt` at this checkpoint: a hard link, or a copy where the file system has none."""
    with written_aside(path.with_name(LAST)) as aside:
        aside.unlink(missing_ok=True)
        try:
            os.link(path, aside)
        except OSError:
            shutil.copyfile(path, aside)


class WholeCheckpointIO(TorchCheckpointIO):
    """Write each checkpoint to a temporary file, sync it to disk and rename it, so that none is ever truncated."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint; an existing one stays as it is if that fails."""
        if "://" in str(path):  # remote storage is Lightning's business
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
                f"cannot write the checkpoint {str(target)!r} ({one_line(error, 200)}): free space or repair "
                "its folder, then continue with --resume auto"
            ) from error
