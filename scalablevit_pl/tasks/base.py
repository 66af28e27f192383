"""What all tasks share: optimizer, learning rate, and the record of what was resolved."""

import math
import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import AdamW

from scalablevit_pl.optim import OptimizerFactory, ScheduleFactory, WarmupCosineSchedule, parameter_groups


class BaseTask(pl.LightningModule):
    """A network with the way it is optimized; the loss and the metrics are the subclasses'.

    Args:
        network: The network to train.
        optimizer: Makes the optimizer from parameter groups. Its learning rate holds for `base_batch_size`.
        schedule: Makes the learning rate's course; called with the optimizer, `total_steps` and `steps_per_epoch`.
        base_batch_size: Global batch for which the learning rate is given; it is scaled in proportion to the actual
            one. None takes the rate as it is.

    Attributes:
        resolved: Batch, learning rate, steps and parameter groups as they came out, from the start of a fit on.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerFactory = AdamW,
        schedule: ScheduleFactory = WarmupCosineSchedule,
        base_batch_size: int | None = 512,
    ) -> None:
        super().__init__()
        if base_batch_size is not None and base_batch_size < 1:
            raise ValueError(f"base_batch_size must be at least 1, or null for no scaling, got {base_batch_size}")
        self.network = network
        self.optimizer_factory = optimizer
        self.schedule_factory = schedule
        self.base_batch_size = base_batch_size
        self.resolved: dict[str, Any] = {}

    def on_train_start(self) -> None:
        """Give each process random numbers of its own; else all would drop the same paths and mix in the same way."""
        rank = self.global_rank
        if rank > 0:
            seed = (torch.initial_seed() + rank) % 2**32
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002  timm's mixup draws from NumPy's global stream
            random.seed(seed)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build optimizer and schedule for the actual global batch and number of steps.

        Raises:
            ValueError: If the number of steps or the batch size is unknown, or the schedule does not take them.
        """
        self.trainer.fit_loop.setup_data()  # not done yet where training is limited by steps alone
        total_steps = self.trainer.estimated_stepping_batches
        batch_size = getattr(self.trainer.train_dataloader, "batch_size", None)
        known = 0 < total_steps < math.inf and self.trainer.num_training_batches < math.inf
        if not known or batch_size is None:
            raise ValueError(
                f"the schedule needs a known number of steps and batch size, got {total_steps} steps, "
                f"{self.trainer.num_training_batches} batches an epoch and a batch size of {batch_size}: set "
                "--trainer.max_steps or --trainer.max_epochs, and train on data of known length"
            )
        accumulated = max(1, self.trainer.accumulate_grad_batches)
        steps_per_epoch = math.ceil(self.trainer.num_training_batches / accumulated)
        global_batch = batch_size * accumulated * self.trainer.world_size
        try:
            optimizer = self.optimizer_factory(parameter_groups(self.network))
        except (TypeError, ValueError) as error:
            raise ValueError(f"the optimizer does not take its settings: {error}") from error
        for group in optimizer.param_groups:
            group["lr"] *= global_batch / (self.base_batch_size or global_batch)
        peak = optimizer.param_groups[0]["lr"]
        if not 0.0 <= peak < math.inf:
            raise ValueError(f"the learning rate must be finite and not negative, got {peak}")
        try:
            schedule = self.schedule_factory(optimizer, total_steps=int(total_steps), steps_per_epoch=steps_per_epoch)  # type: ignore[call-arg]
        except TypeError as error:
            raise ValueError(f"the schedule must take (optimizer, total_steps, steps_per_epoch, …): {error}") from error
        parameters = list(self.network.parameters())
        self.resolved = {
            "parameters": sum(parameter.numel() for parameter in parameters),
            "trainable_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            "global_batch": global_batch,
            "base_batch_size": self.base_batch_size,
            "samples_per_epoch": self.trainer.num_training_batches * batch_size * self.trainer.world_size,
            "steps_per_epoch": steps_per_epoch,
            "total_steps": int(total_steps),
            "warmup_steps": getattr(schedule, "warmup_steps", 0),
            "lr": peak,
            "parameter_groups": [_describe(group) for group in optimizer.param_groups],
        }
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _describe(group: dict[str, Any]) -> dict[str, Any]:
    """Summarize a parameter group in plain values."""
    return {
        "weight_decay": group.get("weight_decay", 0.0),
        "tensors": len(group["params"]),
        "parameters": sum(parameter.numel() for parameter in group["params"]),
    }
