"""How fast images come, and how fast the network takes them."""

import logging
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from scalablevit_pl.diagnosis.finding import Finding, gigabytes
from scalablevit_pl.profiling.timing import measure_throughput as time_loader

__all__ = ["check_loader", "check_step", "memory_remedy", "quiet", "time_loader", "time_steps"]

FIRST_BATCH = 2  # on a CPU, where a whole batch of a large network may take minutes
WARM_UP = 2  # steps in which memory is found and kernels are chosen
LONGEST = 50  # steps


@dataclass(frozen=True)
class StepSpeed:
    """What training steps on random images took.

    Attributes:
        images_per_second: Of one process.
        batch_size: Images of a step.
        device: What computed.
        memory: Most bytes that were taken of a GPU's memory.
    """

    images_per_second: float
    batch_size: int
    device: torch.device
    memory: int | None = None


def time_steps(task: Any, trainer: pl.Trainer, batch_size: int, input_size: int, seconds: float) -> StepSpeed:
    """Measure training steps on random images, on one of the trainer's devices; the network is changed by them.

    Args:
        task: Has `network` and `num_classes`.
        trainer: Gives device, precision and clipping.
        batch_size: Images of a step; on a CPU fewer, if as many would take too long.
        input_size: Side of the images in pixels.
        seconds: How long steps are made, after the first ones.
    """
    device = trainer.strategy.root_device
    if device.type == "cpu" and batch_size > FIRST_BATCH:
        first = _time(task, trainer, FIRST_BATCH, input_size, 0.0)
        batch_size = min(batch_size, int(first.images_per_second * max(seconds, 1.0) / 4))
        if batch_size <= FIRST_BATCH:
            return first
    return _time(task, trainer, batch_size, input_size, seconds)


def _time(task: Any, trainer: pl.Trainer, batch_size: int, input_size: int, seconds: float) -> StepSpeed:
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
        max_epochs=1000,  # the schedule may want more epochs than its warm-up has
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    channels = getattr(task.network, "in_chans", 3)
    with quiet():  # whose warnings, of a small batch, are no findings
        short.fit(task, _random_batches(batch_size, channels, input_size, task.num_classes, device.type == "cuda"))
    times = clock.times[WARM_UP - 1 :]
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return StepSpeed(batch_size * (len(times) - 1) / (times[-1] - times[0]), batch_size, device, memory)


class _Clock(pl.Callback):
    """Note when steps end, and stop after some seconds."""

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


def _random_batches(batch_size: int, channels: int, input_size: int, num_classes: int, pinned: bool) -> DataLoader[Any]:
    """Give one batch of noise again and again, made beforehand so that it costs no time."""
    batch = {
        "image": torch.randn(batch_size, channels, input_size, input_size),
        "label": torch.randint(num_classes, (batch_size,)),
        "index": torch.arange(batch_size),
        "path": [""] * batch_size,
    }
    return DataLoader(
        range(batch_size * LONGEST),  # type: ignore[arg-type]
        batch_size=batch_size,
        collate_fn=lambda _: batch,
        pin_memory=pinned,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep remarks of Lightning and of this package away for the time of a block."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "scalablevit_pl")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10.0 else f"{rate:.2g}"


def check_step(speed: StepSpeed, batch_size: int) -> Finding:
    """Say how fast the network trains, and whether a whole batch fits into the GPU's memory."""
    text = f"{_rate(speed.images_per_second)} images/s on {speed.device.type} in batches of {speed.batch_size}"
    text += f" (instead of {batch_size}, to save time)" if speed.batch_size < batch_size else ""
    if speed.memory is None:
        return Finding("ok", "training step", text)
    total = torch.cuda.get_device_properties(speed.device).total_memory
    text += f", {gigabytes(speed.memory)} of {gigabytes(total)} memory"
    if speed.memory < 0.9 * total:
        return Finding("ok", "training step", text)
    return Finding("warn", "training step", f"{text}, which is nearly all", memory_remedy(batch_size))


def memory_remedy(batch_size: int) -> str:
    """Return the knobs that help where a training step does not fit into memory."""
    half = max(1, batch_size // 2)
    return (
        f"set --data.batch_size {half} with --trainer.accumulate_grad_batches doubled, "
        "--model.network.grad_checkpointing true, or --trainer.precision bf16-mixed"
    )


def check_loader(rate: float, step: StepSpeed | None, workers: int, processes: int, cores: int) -> Finding:
    """Compare the pace of the data with what a training step takes.

    Args:
        rate: Images a second that the loader of one process gives while nothing else runs.
        step: What a training step takes; None if it could not be measured.
        workers: Loader processes of each training process.
        processes: Training processes on this machine.
        cores: CPU cores.
    """
    text = f"{rate:,.0f} images/s with {workers} loader process(es)"
    if step is None:
        return Finding("ok", "loader", text)
    # What was measured had the machine to itself.
    shared = min(1.0, cores / (processes * max(workers, 1)))
    ratio = rate * shared / step.images_per_second
    if shared < 1.0:
        text += f", about {rate * shared:,.0f} where {processes * workers} of them share {cores} core(s)"
    text += f": {ratio:.1f} times what the training step takes"
    if ratio >= 1.0:
        return Finding("ok", "loader", text)
    wanted = max(1, math.ceil(max(workers, 1) * step.images_per_second / rate))
    remedy = f"about --data.num_workers {wanted} would do"
    if wanted * processes > cores:
        remedy += f", which takes {wanted * processes} cores and there are {cores}: store smaller images, or use "
        remedy += "cheaper augmentation"
    return Finding("warn", "loader", f"{text}, which will wait for data", remedy)
