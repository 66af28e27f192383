"""The speed of the training step and of the data."""

import logging
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from scalablevit_pl.diagnosis.finding import Finding
from scalablevit_pl.text import gigabytes

FIRST_BATCH = 2  # on a CPU, where a whole batch of a large network may take minutes
WARM_UP = 2  # steps that allocate memory and select kernels
LONGEST = 50  # steps


@dataclass(frozen=True)
class StepSpeed:
    """Speed of training steps of one process, and the peak memory of a GPU in bytes."""

    images_per_second: float
    batch_size: int
    device: torch.device
    memory: int | None = None


def time_steps(task: Any, trainer: pl.Trainer, batch: dict[str, Any], seconds: float) -> StepSpeed:
    """Measure training steps on a repeated batch for some seconds. The network is changed."""
    device, batch_size = trainer.strategy.root_device, len(batch["image"])
    if device.type == "cpu" and batch_size > FIRST_BATCH:
        first = _time(task, trainer, batch, FIRST_BATCH, 0.0)
        batch_size = min(batch_size, int(first.images_per_second * max(seconds, 1.0) / 4))
        if batch_size <= FIRST_BATCH:
            return first
    return _time(task, trainer, batch, batch_size, seconds)


def _time(task: Any, trainer: pl.Trainer, batch: dict[str, Any], batch_size: int, seconds: float) -> StepSpeed:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clock = _Clock(seconds)
    short = pl.Trainer(
        accelerator=device.type,
        devices=[device.index or 0] if device.type == "cuda" else 1,
        precision=trainer.precision,
        gradient_clip_val=trainer.gradient_clip_val,
        gradient_clip_algorithm=trainer.gradient_clip_algorithm,
        max_epochs=1000,  # more than the warm-up of a schedule
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    with quiet():  # warnings about the small batch are not findings
        short.fit(task, _repeat({name: values[:batch_size] for name, values in batch.items()}, batch_size))
    times = clock.times[WARM_UP - 1 :]
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return StepSpeed(batch_size * (len(times) - 1) / (times[-1] - times[0]), batch_size, device, memory)


class _Clock(pl.Callback):
    """Record when steps end, and stop after some seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.times: list[float] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.times.append(time.perf_counter())
        warm = len(self.times) > WARM_UP
        if warm and self.times[-1] - self.times[WARM_UP - 1] >= self.seconds:
            trainer.should_stop = True


def _repeat(batch: dict[str, Any], batch_size: int) -> DataLoader[Any]:
    """Return a loader that repeats one batch, at no cost."""
    rows: Any = range(batch_size * LONGEST)
    pinned = torch.cuda.is_available()
    return DataLoader(rows, batch_size=batch_size, collate_fn=lambda _: dict(batch), pin_memory=pinned)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings, and the log of Lightning and of this package, inside the block."""
    with ExitStack() as stack:
        for logger in map(logging.getLogger, ("lightning.pytorch", "lightning.fabric", "scalablevit_pl")):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


def check_step(speed: StepSpeed, batch_size: int) -> Finding:
    """Report how fast the network trains, and whether a whole batch fits into the GPU's memory."""
    rate = speed.images_per_second
    text = f"{rate:,.0f}" if rate >= 10.0 else f"{rate:.2g}"
    text += f" images/s on {speed.device.type} in batches of {speed.batch_size}"
    text += f" (instead of {batch_size}, to save time)" if speed.batch_size < batch_size else ""
    if speed.memory is None:
        return Finding("ok", "training step", text)
    total = torch.cuda.get_device_properties(speed.device).total_memory
    text += f", {gigabytes(speed.memory)} of {gigabytes(total)} memory"
    if speed.memory < 0.9 * total:
        return Finding("ok", "training step", text)
    return Finding("warn", "training step", f"{text}, which is nearly all", memory_remedy(batch_size))


def memory_remedy(batch_size: int) -> str:
    """Return the options that reduce the memory of a training step."""
    half = max(1, batch_size // 2)
    return (
        f"set --data.batch_size {half} with --trainer.accumulate_grad_batches doubled, "
        "--model.network.grad_checkpointing true, or --trainer.precision bf16-mixed"
    )


def check_loader(rate: float, step: StepSpeed | None, workers: int, processes: int, cores: int) -> Finding:
    """Compare the throughput of the data with that of the training step."""
    text = f"{rate:,.0f} images/s with {workers} loader process(es)"
    if step is None:
        return Finding("ok", "loader", text)
    ratio = rate / step.images_per_second
    text += f": {ratio:.1f} times the training step's"
    if ratio >= 1.0:
        return Finding("ok", "loader", text)
    wanted = max(1, math.ceil(max(workers, 1) * step.images_per_second / rate))
    remedy = f"set --data.num_workers to about {wanted}"
    if wanted * processes > cores:
        remedy += f", which needs {wanted * processes} cores and there are {cores}: store smaller images, or use "
        remedy += "cheaper augmentation"
    return Finding("warn", "loader", f"{text}, which will wait for data", remedy)
