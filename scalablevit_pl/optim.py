"""Parameter groups and learning-rate schedules."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from timm.models import group_parameters
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

logger = logging.getLogger(__name__)

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
Schedule = LRScheduler | Scheduler  # torch's or timm's
# One for each number of arguments that a recipe does not state: `total_steps`, and `steps_per_epoch` too.
ScheduleFactory = (
    Callable[[Optimizer], Schedule] | Callable[[Optimizer, int], Schedule] | Callable[[Optimizer, int, int], Schedule]
)


def parameter_groups(network: nn.Module, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Split the trainable parameters into groups with and without weight decay, and by layer for layer decay.

    Biases, other parameters of at most one dimension, and those that `network.no_weight_decay()` names, a method of
    timm's networks, are exempt. The decay itself is the optimizer's own.

    Args:
        network: The network.
        layer_decay: Below 1, each layer has its own groups. Their `lr_scale`, a factor on the learning rate, is 1 for
            the last layer and decays by this factor from each layer to the one below. `network.group_matcher()`, a
            method of timm's networks, defines the layers; frozen ones count.

    Raises:
        ValueError: If the factor is out of range, or the network does not define its layers.
    """
    if not 0.0 < layer_decay <= 1.0:
        raise ValueError(f"layer_decay must be above 0 and at most 1, which means no decay, got {layer_decay}")
    exempt = set(network.no_weight_decay()) if hasattr(network, "no_weight_decay") else set()  # type: ignore[operator]
    layers = _layers(network) if layer_decay < 1.0 else {}
    last = max(layers.values(), default=0)
    members: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            is_exempt = parameter.ndim <= 1 or name.endswith(".bias") or name in exempt
            members.setdefault((layers.get(name, last), is_exempt), []).append(parameter)
    groups: list[dict[str, Any]] = []
    for layer, is_exempt in sorted(members):
        group: dict[str, Any] = {"params": members[layer, is_exempt]}
        group |= {"weight_decay": 0.0} if is_exempt else {}
        group |= {"lr_scale": layer_decay ** (last - layer)} if layers else {}
        groups.append(group)
    return groups


def _layers(network: nn.Module) -> dict[str, int]:
    if not hasattr(network, "group_matcher"):
        raise ValueError(
            f"{type(network).__name__} does not define its layers (group_matcher): leave layer_decay at 1, or use a "
            "network of scalablevit_pl.models.create_model or timm.create_model"
        )
    layers: dict[str, int] = group_parameters(network, network.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    return layers


class StepSchedule(LRScheduler):
    """A schedule of optimizer steps whose training may be resumed with another length.

    A subclass sets its attributes before it calls this constructor, and names those that a resume keeps in `settings`.
    A group's `lr_scale` multiplies all rates that a subclass is given.

    Args:
        optimizer: The learning rates of its groups are the base rates, already multiplied by `lr_scale`.
        lowest: Warn of base rates below this one.
    """

    settings: ClassVar[tuple[str, ...]]

    def __init__(self, optimizer: Optimizer, lowest: Mapping[str, float]) -> None:
        self.lr_scales: list[float] = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]
        super().__init__(optimizer)
        floor = max(lowest.values())
        low = [base / scale for base, scale in self.groups if base < scale * floor]
        if low:
            logger.warning(
                "the learning rate %.3g is below %s, so it would rise instead of fall: lower these rates, which are "
                "not scaled with the batch",
                min(low),
                " or ".join(f"{name} {value:.3g}" for name, value in lowest.items()),
            )

    @property
    def groups(self) -> list[tuple[Any, float]]:
        """The base rate and the `lr_scale` of each group."""
        return list(zip(self.base_lrs, self.lr_scales, strict=True))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the step of an earlier schedule with the settings of this one: a resumed run may train longer."""
        own = (*self.settings, "base_lrs", "lr_scales")
        super().load_state_dict(state_dict | {name: getattr(self, name) for name in own})
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate


class WarmupCosineSchedule(StepSchedule):
    """Linear warm-up, then a cosine that started at step 0, per optimizer step: the schedule of the paper's recipe.

    With base rate lr, at step t of T with w warm-up steps: `warmup_lr + (lr - warmup_lr) t / w` for t < w, else
    `min_lr + (lr - min_lr) (1 + cos(π t / T)) / 2`. A group's `lr_scale` multiplies all three rates.

    Args:
        optimizer: The learning rates of its groups are the base rates, already multiplied by `lr_scale`.
        total_steps: Optimizer steps T of the whole training.
        steps_per_epoch: Optimizer steps of an epoch.
        warmup_epochs: Length of the warm-up in epochs.
        warmup_lr: Learning rate of step 0.
        min_lr: Learning rate of step T and later.

    Raises:
        ValueError: If there are no steps, or the warm-up is negative.
    """

    settings = ("total_steps", "warmup_steps", "warmup_lr", "min_lr")

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
        super().__init__(optimizer, {"min_lr": min_lr, "warmup_lr": warmup_lr})

    def get_lr(self) -> list[float | Tensor]:
        """Compute each group's learning rate at the current step."""
        step = self.last_epoch  # torch's name for the number of calls to step()
        if step < self.warmup_steps:
            starts = [(base, scale * self.warmup_lr) for base, scale in self.groups]
            return [start + (base - start) * step / self.warmup_steps for base, start in starts]
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(step, self.total_steps) / self.total_steps))
        ends = [(base, scale * self.min_lr) for base, scale in self.groups]
        return [end + (base - end) * cosine for base, end in ends]


class PolynomialSchedule(StepSchedule):
    """A polynomial decay per optimizer step with a linear warm-up: the schedule of the usual segmentation recipes.

    With base rate lr, at step t of T: `min_lr + (lr - min_lr) (1 - t / T)^power`. During w warm-up steps this rate is
    multiplied by a factor that rises linearly from `warmup_factor` at step 0 to 1 at step w. A group's `lr_scale`
    multiplies `min_lr` also.

    Args:
        optimizer: The learning rates of its groups are the base rates, already multiplied by `lr_scale`.
        total_steps: Optimizer steps T of the whole training.
        power: Exponent of the decay; 1 is a line.
        min_lr: Learning rate of step T and later.
        warmup_steps: Length of the warm-up w in optimizer steps.
        warmup_factor: Factor on the learning rate at step 0, if there is a warm-up.

    Raises:
        ValueError: If there are no steps, the warm-up or the power is negative, or the factor is not from 0 to 1.
    """

    settings = ("total_steps", "power", "min_lr", "warmup_steps", "warmup_factor")

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        power: float = 0.9,
        min_lr: float = 1e-6,
        warmup_steps: int = 0,
        warmup_factor: float = 1e-6,
    ) -> None:
        if total_steps < 1 or warmup_steps < 0:
            raise ValueError(
                f"total_steps must be at least 1 and warmup_steps not negative, got {total_steps} and {warmup_steps}"
            )
        if power < 0.0 or not 0.0 <= warmup_factor <= 1.0:
            raise ValueError(
                f"power must not be negative and warmup_factor from 0 to 1, got {power} and {warmup_factor}"
            )
        self.total_steps = total_steps
        self.power = power
        self.min_lr = min_lr
        self.warmup_steps = warmup_steps
        self.warmup_factor = warmup_factor
        super().__init__(optimizer, {"min_lr": min_lr})

    def get_lr(self) -> list[float | Tensor]:
        """Compute each group's learning rate at the current step."""
        step = self.last_epoch  # torch's name for the number of calls to step()
        left = (1.0 - min(step, self.total_steps) / self.total_steps) ** self.power
        factor = 1.0
        if step < self.warmup_steps:
            factor -= (1.0 - step / self.warmup_steps) * (1.0 - self.warmup_factor)
        ends = [(base, scale * self.min_lr) for base, scale in self.groups]
        return [factor * (end + (base - end) * left) for base, end in ends]
