"""The size of a fit on the given devices: batch, learning rate, steps."""

import math
from typing import Any

import lightning.pytorch as pl

from scalablevit_pl.diagnosis.finding import Finding
from scalablevit_pl.tasks.fit import FitShape, make_shape


def planned_shape(trainer: pl.Trainer, loader: Any) -> FitShape:
    """Count batches and steps as Lightning does, without starting the fit."""
    batches, limit = len(loader), trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * (1.0 if limit is None else limit))
    accumulated = max(1, trainer.accumulate_grad_batches)
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs or 0
    steps = epochs * math.ceil(batches / accumulated) if batches else 0
    if trainer.max_steps >= 0:
        steps = min(steps, trainer.max_steps)
    return make_shape(trainer, batches, steps, loader.batch_size)


def check_plan(task: Any, shape: FitShape) -> Finding:
    """Report what the fit resolves to, and warn if the learning rate is scaled."""
    record = task.resolve(shape).record
    text = (
        f"batch of {shape.global_batch:,} ({shape.batch_size} × {shape.accumulated} accumulated × "
        f"{shape.processes} process(es)), learning rate {record['lr']:.4g}, {shape.total_steps:,} steps including "
        f"{record['warmup_steps']:,} of warm-up, {shape.steps_per_epoch:,} steps and "
        f"{record['samples_per_epoch']:,} samples per epoch"
    )
    base = record["base_batch_size"]
    if base in (None, shape.global_batch):
        return Finding("ok", "plan", text)
    text += f"; the recipe's learning rate, for a batch of {base:,}, is scaled by {shape.global_batch / base:.4g}"
    return Finding("warn", "plan", text, "nothing if that is intended; else change batch size or devices")
