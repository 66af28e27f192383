"""Speed of a training, its wait for data, and the remaining time."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.profilers import Profiler

FETCH = "train_dataloader_next"  # end of Lightning's name for fetching a training batch


@dataclass(frozen=True)
class Reading:
    """Totals at the end of a batch: seconds of training and of waiting for data, and images."""

    trained: float = 0.0
    waited: float = 0.0
    images: int = 0


class Throughput(pl.Callback):
    """Measure steps and images per second, the wait for data, GPU memory and the remaining time.

    Time is measured in the process, from the end of one batch to the end of the next, over the steps between two logs.
    It does not synchronize with a GPU, which may lag behind by a fraction of a step. The wait for data is the time for
    which the loop asks its loader for a batch; without loader processes it includes decoding, and never the copy to the
    GPU. While a GPU still computes, the wait costs nothing: the share is the most that a faster loader could save.
    Validations, checkpoints and the ends of epochs are excluded from the speed, and included in the remaining time.

    Logged are `speed/steps_per_second`, `speed/images_per_second` (of all processes), `speed/data_wait` (a share of the
    time), `speed/gpu_memory_gb` (peak of tensors, in 10⁹ bytes) and `speed/eta_hours`. They bypass the task's metrics,
    so that neither a checkpoint nor a random number depends on them.

    Attributes:
        speed: The latest values by name.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.speed: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start to measure."""
        self.window: deque[Reading] = deque(maxlen=1 + trainer.log_every_n_steps * trainer.accumulate_grad_batches)  # type: ignore[attr-defined]
        self.now = Reading()
        self.first_step = self.step = trainer.global_step
        self.last_end: float | None = None
        self.fetched = 0.0
        self.paused = self.pauses = self.pause_per_step = 0.0
        self.interrupted = True
        trainer.profiler = FetchTimer(trainer.profiler, self)  # type: ignore[attr-defined]

    def on_fetch(self, begin: float, end: float) -> None:
        """Record a wait for data, and a pause before it."""
        self.fetched = end - begin
        self.paused = 0.0
        if self.interrupted:
            self.paused = begin - self.last_end if self.last_end is not None else 0.0
            self.pauses += self.paused
            trained = self.step - self.first_step
            self.pause_per_step = self.pauses / trained if trained else 0.0
        if self.last_end is None:
            self.last_end = begin
        self.interrupted = False

    def on_validation_start(self, *args: Any) -> None:
        """Exclude a validation, a checkpoint, or the end of an epoch with its pictures and new loader processes."""
        self.interrupted = True

    on_train_epoch_end = on_save_checkpoint = on_validation_start  # type: ignore[assignment]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the clock, and log every `log_every_n_steps` steps."""
        end, before, stepped = self.clock(), self.now, trainer.global_step > self.step
        self.now = Reading(
            before.trained + end - (self.last_end or end) - self.paused,
            before.waited + self.fetched,
            before.images + len(batch["image"]) * trainer.world_size,
        )
        self.last_end, self.step = end, trainer.global_step
        self.window.append(self.now)  # the window begins after the first step, which takes longer
        if len(self.window) > 1 and stepped:
            self.speed = self._measure(trainer, pl_module)
            if self.step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
                for log in trainer.loggers:
                    log.log_metrics(self.speed, self.step - 1)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        first, last = self.window[0], self.window[-1]
        seconds = max(last.trained - first.trained, 1e-9)
        steps_per_second = (len(self.window) - 1) / trainer.accumulate_grad_batches / seconds
        speed = {
            "speed/steps_per_second": steps_per_second,
            "speed/images_per_second": (last.images - first.images) / seconds,
            "speed/data_wait": (last.waited - first.waited) / seconds,
        }
        if pl_module.device.type == "cuda":
            speed["speed/gpu_memory_gb"] = torch.cuda.max_memory_allocated(pl_module.device) / 1e9
        left = trainer.estimated_stepping_batches - self.step
        if 0 <= left < math.inf:
            speed["speed/eta_hours"] = left * (1.0 / steps_per_second + self.pause_per_step) / 3600.0
        return speed


class FetchTimer:
    """Time a loop's requests for a batch; everything else is the configured profiler's."""

    def __init__(self, inner: Profiler, throughput: Throughput) -> None:
        self.inner = inner
        self.throughput = throughput
        self.begin = 0.0

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the configured profiler."""
        if name == "inner":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.inner, name)

    def start(self, action_name: str) -> None:
        """Start to time an action."""
        self.inner.start(action_name)
        self.begin = self.throughput.clock() if action_name.endswith(FETCH) else self.begin

    def stop(self, action_name: str) -> None:
        """Report an action."""
        if action_name.endswith(FETCH):
            self.throughput.on_fetch(self.begin, self.throughput.clock())
        self.inner.stop(action_name)
