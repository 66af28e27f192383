"""Resolve a fit: its size becomes an optimizer, a schedule and a record of batch, learning rate and steps."""

import inspect
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from scalablevit_pl.optim import OptimizerFactory, Schedule, ScheduleFactory, parameter_groups

Interval = Literal["step", "epoch"]


@dataclass(frozen=True)
class FitShape:
    """Size and precision of a fit.

    Attributes:
        batches_per_epoch: Batches of an epoch on each process.
        batch_size: Samples of a batch on each process.
        total_steps: Optimizer steps of the whole training.
        accumulated: Batches of an optimizer step.
        processes: Processes on all machines.
        precision: The trainer's precision, such as `bf16-mixed`.
        gradient_clip_val: Norm or value at which gradients are clipped; None for no clipping.
        scales_loss: Whether the loss is scaled, as in float16.
    """

    batches_per_epoch: int
    batch_size: int
    total_steps: int
    accumulated: int = 1
    processes: int = 1
    precision: str = "32-true"
    gradient_clip_val: float | None = None
    scales_loss: bool = False

    @property
    def global_batch(self) -> int:
        """Samples of an optimizer step on all processes."""
        return self.batch_size * self.accumulated * self.processes

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the last group of batches may be short."""
        return math.ceil(self.batches_per_epoch / self.accumulated)


@dataclass(frozen=True)
class ResolvedFit:
    """Optimizer and schedule for the actual size of a fit, when the schedule advances, and a record in plain values."""

    optimizer: Optimizer
    schedule: Schedule
    interval: Interval
    record: dict[str, Any]


def shape_of(trainer: pl.Trainer) -> FitShape:
    """Return the size of the fit that a trainer is about to run."""
    trainer.fit_loop.setup_data()  # not yet done where only the number of steps limits the training
    batch_size = getattr(trainer.train_dataloader, "batch_size", None)
    return make_shape(trainer, trainer.num_training_batches, trainer.estimated_stepping_batches, batch_size)


def make_shape(trainer: pl.Trainer, batches: float, total_steps: float, batch_size: int | None) -> FitShape:
    """Return the size of a fit of so many batches per epoch and steps; an error if it is not known."""
    if not (0 < total_steps < math.inf and batches < math.inf) or batch_size is None:
        raise ValueError(
            f"the schedule needs a known number of steps and batch size, got {total_steps} steps, {batches} batches "
            f"per epoch and a batch size of {batch_size}: set --trainer.max_steps or --trainer.max_epochs, and train "
            "on data of known length"
        )
    return FitShape(
        batches_per_epoch=int(batches),
        batch_size=batch_size,
        total_steps=int(total_steps),
        accumulated=max(1, trainer.accumulate_grad_batches),
        processes=trainer.world_size,
        precision=str(trainer.precision),
        gradient_clip_val=trainer.gradient_clip_val,
        scales_loss=getattr(trainer.precision_plugin, "scaler", None) is not None,
    )


def resolve_fit(
    network: nn.Module,
    make_optimizer: OptimizerFactory,
    make_schedule: ScheduleFactory,
    shape: FitShape,
    base_batch_size: int | None = None,
    layer_decay: float = 1.0,
    interval: Interval | None = None,
    mode: str = "min",
    lr: float | None = None,
) -> ResolvedFit:
    """Build optimizer and schedule for the actual size of a fit; the arguments are those of `BaseTask`."""
    factor = shape.global_batch / (base_batch_size or shape.global_batch)
    optimizer = _build_optimizer(parameter_groups(network, layer_decay), make_optimizer, factor, lr)
    _check_clipping(optimizer, shape)
    peak = peak_rate(optimizer)
    schedule, own_interval = _build_schedule(optimizer, make_schedule, shape, mode)
    warmup_steps = getattr(schedule, "warmup_steps", 0)
    parameters = list(network.parameters())
    record = {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trainable_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "global_batch": shape.global_batch,
        "base_batch_size": base_batch_size,
        "accumulated_batches": shape.accumulated,
        "processes": shape.processes,
        "samples_per_epoch": shape.batches_per_epoch * shape.batch_size * shape.processes,
        "steps_per_epoch": shape.steps_per_epoch,
        "total_steps": shape.total_steps,
        "warmup_steps": warmup_steps if isinstance(warmup_steps, int) else 0,
        "lr": peak,
        "parameter_groups": [_describe(group) for group in optimizer.param_groups],
        "precision": shape.precision,
    }
    return ResolvedFit(optimizer, schedule, interval or own_interval, record)


def peak_rate(optimizer: Optimizer) -> float:
    """Return the highest learning rate of all parameter groups, which is that of the last trained layer."""
    return float(max(group["lr"] for group in optimizer.param_groups))


def _build_optimizer(
    groups: list[dict[str, Any]], make_optimizer: OptimizerFactory, factor: float, lr: float | None
) -> Optimizer:
    """Build the optimizer and scale the learning rates of its groups, or set them to `lr`, which fits the batch."""
    try:
        optimizer = make_optimizer(groups)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the optimizer rejects its settings: {error}") from error
    for group in optimizer.param_groups:
        group["lr"] = (group["lr"] * factor if lr is None else lr) * group.get("lr_scale", 1.0)
    peak = peak_rate(optimizer)
    if not 0.0 <= peak < math.inf:
        raise ValueError(f"the learning rate must be finite and not negative, got {peak}")
    return optimizer


def _build_schedule(
    optimizer: Optimizer, make_schedule: ScheduleFactory, shape: FitShape, mode: str
) -> tuple[Schedule, Interval]:
    """Build the schedule, with those numbers of steps that its signature names; one that names none is per epoch."""
    made: Any = make_schedule
    while isinstance(made, partial):  # the last argument of jsonargparse's partial is the class
        made = made.args[-1] if made.args else made.func
    known = {"total_steps": shape.total_steps, "steps_per_epoch": shape.steps_per_epoch}
    named = known.keys() & inspect.signature(made).parameters.keys()
    given = getattr(make_schedule, "keywords", {})
    arguments: dict[str, Any] = {name: known[name] for name in named if given.get(name) is None}
    if made is PlateauLRScheduler:  # its state in a checkpoint is an object, not plain values
        raise ValueError("timm's PlateauLRScheduler cannot resume: use torch.optim.lr_scheduler.ReduceLROnPlateau")
    if made is ReduceLROnPlateau:
        arguments["mode"] = mode
    if isinstance(made, type) and issubclass(made, Scheduler):  # it multiplies by lr_scale itself
        for group in optimizer.param_groups:
            group["lr"] /= group.get("lr_scale", 1.0)
    try:
        schedule = make_schedule(optimizer, **arguments)  # type: ignore[call-arg]
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"the schedule {getattr(made, '__name__', made)} rejects its settings: {error}") from error
    by_step = bool(named) or not getattr(schedule, "t_in_epochs", True)
    return schedule, "step" if by_step else "epoch"


def advance(schedule: Schedule, epochs: int, steps: int) -> None:
    """Advance a schedule that does not follow a metric after a number of epochs or of steps."""
    if isinstance(schedule, Scheduler):
        schedule.step(epochs) if schedule.t_in_epochs else schedule.step_update(steps)
    elif not isinstance(schedule, ReduceLROnPlateau):
        schedule.step()


def advance_by_metric(trainer: pl.Trainer, name: str) -> None:
    """Advance a schedule that follows a metric after a validation of a fit."""
    if trainer.state.fn == "fit" and not trainer.sanity_checking:
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau):
                config.scheduler.step(trainer.callback_metrics[name])


def _check_clipping(optimizer: Optimizer, shape: FitShape) -> None:
    # torch's own mark of optimizers that unscale gradients inside their step
    if shape.scales_loss and shape.gradient_clip_val and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"gradient_clip_val={shape.gradient_clip_val} does not work with a fused {type(optimizer).__name__} in "
            f"{shape.precision}, which unscales gradients only after they would be clipped: set "
            "--trainer.precision bf16-mixed or --model.optimizer.fused false"
        )


def _describe(group: dict[str, Any]) -> dict[str, Any]:
    scale = group.get("lr_scale", 1.0)
    return {
        "weight_decay": group.get("weight_decay", 0.0),
        "tensors": len(group["params"]),
        "parameters": sum(parameter.numel() for parameter in group["params"]),
    } | ({} if scale == 1.0 else {"lr_scale": scale})
