"""What the optimizer gets: parameter groups and the learning rate's course."""

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

logger = logging.getLogger(__name__)

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
ScheduleFactory = Callable[[Optimizer, int, int], LRScheduler]


def parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """Split the trainable parameters into those with weight decay and those without.

    Exempt are biases, all other parameters of at most one dimension, and those that `network.no_weight_decay()` names
    if there is such a method, as timm's networks have it. The decay itself is the optimizer's own.
    """
    exempt = set(network.no_weight_decay()) if hasattr(network, "no_weight_decay") else set()  # type: ignore[operator]
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            is_exempt = parameter.ndim <= 1 or name.endswith(".bias") or name in exempt
            (undecayed if is_exempt else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class WarmupCosineSchedule(LRScheduler):
    """Linear warm-up, then a cosine that began at step 0: the schedule of the paper's recipe, per optimizer step.

    With base rate lr, at step t of T with w warm-up steps: `warmup_lr + (lr - warmup_lr) t / w` for t < w, else
    `min_lr + (lr - min_lr) (1 + cos(π t / T)) / 2`.

    Args:
        optimizer: Its groups' learning rates are the base rates.
        total_steps: Optimizer steps T of the whole training.
        steps_per_epoch: Optimizer steps of an epoch.
        warmup_epochs: Length of the warm-up in epochs.
        warmup_lr: Learning rate of step 0.
        min_lr: Learning rate of step T and later.

    Raises:
        ValueError: If there are no steps, or the warm-up is negative.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        steps_per_epoch: int,
        warmup_epochs: float = 5.0,
        warmup_lr: float = 1e-6,
        min_lr: float = 1e-5,
    ) -> None:
        if total_steps < 1 or warmup_epochs < 0:
            raise ValueError(
                f"total_steps must be at least 1 and warmup_epochs not negative, got {total_steps} and {warmup_epochs}"
            )
        self.total_steps = total_steps
        self.warmup_steps = round(warmup_epochs * steps_per_epoch)
        self.warmup_lr = warmup_lr
        self.min_lr = min_lr
        super().__init__(optimizer)
        if min(self.base_lrs) < max(min_lr, warmup_lr):
            logger.warning(
                "the learning rate %.3g is below min_lr %.3g or warmup_lr %.3g, so that it rises where it should fall: "
                "these two are not scaled with the batch; lower them too",
                min(self.base_lrs),
                min_lr,
                warmup_lr,
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the step of an earlier schedule, on the course of this one: a resumed run may train longer."""
        own = ("total_steps", "warmup_steps", "warmup_lr", "min_lr", "base_lrs")
        super().load_state_dict(state_dict | {name: getattr(self, name) for name in own})
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate

    def get_lr(self) -> list[float | Tensor]:
        """Compute each group's learning rate at the current step."""
        step = self.last_epoch  # torch's name for the number of calls to step()
        if step < self.warmup_steps:
            return [self.warmup_lr + (base - self.warmup_lr) * step / self.warmup_steps for base in self.base_lrs]
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(step, self.total_steps) / self.total_steps))
        return [self.min_lr + (base - self.min_lr) * cosine for base in self.base_lrs]
