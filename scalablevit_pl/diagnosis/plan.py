"""What a recipe comes to on the devices that are asked for: batch, learning rate, steps."""

import math
from dataclasses import dataclass
from typing import Any, Self

import lightning.pytorch as pl

from scalablevit_pl.diagnosis.finding import Finding


@dataclass
class PlannedFit:
    """What a task asks its trainer for when it builds optimizer and schedule, without any process being started.

    Attributes:
        num_training_batches: Batches of an epoch on each process.
        estimated_stepping_batches: Optimizer steps of the whole training; infinite if it has no end.
        accumulate_grad_batches: Batches of an optimizer step.
        world_size: Processes on all machines.
        train_dataloader: The loader of one process.
        precision: What is computed in.
        gradient_clip_val: At what gradients are clipped.
        precision_plugin: Lightning's part for it.
    """

    num_training_batches: int
    estimated_stepping_batches: float
    accumulate_grad_batches: int
    world_size: int
    train_dataloader: Any
    precision: str
    gradient_clip_val: float | None
    precision_plugin: Any

    @property
    def fit_loop(self) -> Self:
        """Stand in for Lightning's loop."""
        return self

    def setup_data(self) -> None:
        """Do nothing, as the loader is there."""


def plan_fit(trainer: pl.Trainer, loader: Any) -> PlannedFit:
    """Count batches and steps as Lightning does.

    Args:
        trainer: As the recipe asks for it.
        loader: The training loader of one of its processes.
    """
    batches, limit = len(loader), trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * (1.0 if limit is None else limit))
    accumulated = max(1, trainer.accumulate_grad_batches)
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs or 0
    steps = epochs * math.ceil(batches / accumulated) if batches else 0
    if trainer.max_steps >= 0:
        steps = min(steps, trainer.max_steps)
    clipping = trainer.gradient_clip_val
    counts = (batches, steps, accumulated, trainer.world_size)
    return PlannedFit(*counts, loader, str(trainer.precision), clipping, trainer.precision_plugin)


def check_plan(task: Any, planned: PlannedFit) -> Finding:
    """Say what the run will resolve, and whether the learning rate is scaled."""
    before, task.trainer = task._trainer, planned
    try:
        task.configure_optimizers()
    finally:
        task.trainer = before
    resolved = task.resolved
    per_process = resolved["global_batch"] // (planned.accumulate_grad_batches * planned.world_size)
    text = (
        f"batch of {resolved['global_batch']:,} ({per_process} × {planned.accumulate_grad_batches} accumulated × "
        f"{planned.world_size} process(es)), learning rate {resolved['lr']:.4g}, {resolved['total_steps']:,} steps, "
        f"{resolved['warmup_steps']:,} of them warm-up, {resolved['steps_per_epoch']:,} steps and "
        f"{resolved['samples_per_epoch']:,} samples an epoch"
    )
    base = resolved["base_batch_size"]
    if base in (None, resolved["global_batch"]):
        return Finding("ok", "plan", text)
    text += f"; the recipe's rate is for a batch of {base:,}, and scaled by {resolved['global_batch'] / base:.4g}"
    return Finding("warn", "plan", text, "nothing, if that is meant; else change batch size or devices")
