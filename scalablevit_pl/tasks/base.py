"""What all tasks share: optimizer, learning rate, and the record of what was resolved."""

import difflib
import logging
import math
from collections.abc import Sequence
from typing import Any, Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from scalablevit_pl.optim import OptimizerFactory, ScheduleFactory, WarmupCosineSchedule, parameter_groups
from scalablevit_pl.randomness import derive_seed, run_seed

logger = logging.getLogger(__name__)

FEATURES = "features"


class BaseTask(pl.LightningModule):
    """A network with the way it is optimized; the loss and the metrics are the subclasses'.

    Args:
        network: The network to train.
        optimizer: Makes the optimizer from parameter groups. Its learning rate holds for `base_batch_size`.
        schedule: Makes the learning rate's course; called with the optimizer, `total_steps` and `steps_per_epoch`.
        base_batch_size: Global batch for which the learning rate is given; it is scaled in proportion to the actual
            one. None takes the rate as it is.
        freeze: Parts of the network that are not trained and stay in eval mode: one name or several, of modules as the
            state dict spells them, such as `backbone` or `backbone.stages.0`. `features` means all but the last layer.
        layer_decay: Factor by which the learning rate falls from each layer to the one below; 1 is the same for all.
        compile: Compile the network, in place, when a fit starts.
        channels_last: Keep the network's convolutions and the images in memory with the channels last.
        grad_checkpointing: Recompute activations in the backward pass, which saves memory and costs time.

    Attributes:
        frozen: The names given as `freeze`.
        resolved: Batch, learning rate, steps and parameter groups as they came out, from the start of a fit on.

    Raises:
        ValueError: If a value is out of its range, a frozen part does not exist or nothing else is left, or the network
            does not say which layers it has although their rates are to differ, or cannot recompute its activations.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerFactory = AdamW,
        schedule: ScheduleFactory = WarmupCosineSchedule,
        base_batch_size: int | None = 512,
        freeze: Sequence[str] | str = (),
        layer_decay: float = 1.0,
        compile: bool = False,  # noqa: A002  as users call it
        channels_last: bool = False,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if base_batch_size is not None and base_batch_size < 1:
            raise ValueError(f"base_batch_size must be at least 1, or null for no scaling, got {base_batch_size}")
        self.network = network
        self.optimizer_factory = optimizer
        self.schedule_factory = schedule
        self.base_batch_size = base_batch_size
        self.layer_decay = layer_decay
        self.compiled = compile
        self.channels_last = channels_last
        self.resolved: dict[str, Any] = {}
        self.frozen = [freeze] if isinstance(freeze, str) else list(freeze)
        _freeze(network, self.frozen)
        self._keep_frozen_in_eval_mode()
        parameter_groups(network, layer_decay)  # what is wrong with it shows before the data is loaded
        if grad_checkpointing:
            _checkpoint_gradients(network)
        if channels_last:
            network.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> Self:
        """Switch to training or back; frozen parts stay in eval mode."""
        super().train(mode)
        self._keep_frozen_in_eval_mode()
        return self

    def _keep_frozen_in_eval_mode(self) -> None:
        # By name, since modules may have been exchanged, as for batch norms that are synchronized over processes.
        for name in self.frozen:
            for module in _modules(self.network, name):
                module.training = False

    def arrange(self, image: Tensor) -> Tensor:
        """Lay images `(B, C, H, W)` out in memory as the network's convolutions are."""
        return image.contiguous(memory_format=torch.channels_last) if self.channels_last else image

    def on_fit_start(self) -> None:
        """Compile the network if asked for: now all weights are loaded, and in place their names stay as they are."""
        if self.compiled:
            self.network.compile(dynamic=False)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients as the trainer says, those of fused optimizers in bfloat16 as well.

        Lightning refuses these in any mixed precision, since a fused optimizer may undo the loss's scaling inside its
        step, after the clipping. Where nothing is scaled, nothing is undone.
        """
        plugin = self.trainer.precision_plugin
        if gradient_clip_val and isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val, algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_epoch_start(self) -> None:
        """Put frozen parts back to eval mode, should somebody have switched the network's mode past the task."""
        self._keep_frozen_in_eval_mode()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let what the network draws, such as paths to drop, be a function of seed, epoch, batch and process."""
        torch.manual_seed(derive_seed(run_seed(), self.current_epoch, batch_idx, self.global_rank))

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
        factor = global_batch / (self.base_batch_size or global_batch)
        optimizer = self._make_optimizer(factor)
        self._check_clipping(optimizer)
        peak = peak_rate(optimizer)
        try:
            schedule = self.schedule_factory(optimizer, total_steps=int(total_steps), steps_per_epoch=steps_per_epoch)  # type: ignore[call-arg]
        except TypeError as error:
            raise ValueError(f"the schedule must take (optimizer, total_steps, steps_per_epoch, …): {error}") from error
        parameters = list(self.network.parameters())
        self.resolved = {
            "parameters": sum(parameter.numel() for parameter in parameters),
            "trainable_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            "frozen": list(self.frozen),
            "global_batch": global_batch,
            "base_batch_size": self.base_batch_size,
            "accumulated_batches": accumulated,
            "processes": self.trainer.world_size,
            "samples_per_epoch": self.trainer.num_training_batches * batch_size * self.trainer.world_size,
            "steps_per_epoch": steps_per_epoch,
            "total_steps": int(total_steps),
            "warmup_steps": getattr(schedule, "warmup_steps", 0),
            "lr": peak,
            "parameter_groups": [_describe(group) for group in optimizer.param_groups],
            "precision": self.trainer.precision,
            "compile": self.compiled,
            "channels_last": self.channels_last,
        }
        if factor != 1.0:
            logger.info(
                "the global batch is %d and the learning rate is meant for %d: scaled in proportion, from %.3g to %.3g",
                global_batch,
                self.base_batch_size,
                peak / factor,
                peak,
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _check_clipping(self, optimizer: Optimizer) -> None:
        """Refuse to clip gradients that the optimizer unscales only afterwards.

        Raises:
            ValueError: If precision, clipping and optimizer do not go together.
        """
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        # torch's own mark of optimizers that take the scale into their step
        if scaled and self.trainer.gradient_clip_val and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise ValueError(
                f"gradient_clip_val={self.trainer.gradient_clip_val} does not go with a fused "
                f"{type(optimizer).__name__} in {self.trainer.precision}, which unscales gradients only after they "
                "would be clipped: set --trainer.precision bf16-mixed or --model.optimizer.fused false"
            )

    def _make_optimizer(self, factor: float) -> Optimizer:
        """Build the optimizer and multiply its groups' learning rates."""
        groups = parameter_groups(self.network, self.layer_decay)
        try:
            optimizer = self.optimizer_factory(groups)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the optimizer does not take its settings: {error}") from error
        for group in optimizer.param_groups:
            group["lr"] *= factor * group.get("lr_scale", 1.0)
        peak = peak_rate(optimizer)
        if not 0.0 <= peak < math.inf:
            raise ValueError(f"the learning rate must be finite and not negative, got {peak}")
        return optimizer


def peak_rate(optimizer: Optimizer) -> float:
    """Return the highest learning rate of all parameter groups: that of the last layer which is trained."""
    rate: float = max(group["lr"] for group in optimizer.param_groups)
    return rate


def _checkpoint_gradients(network: nn.Module) -> None:
    """Let the network recompute its activations.

    Raises:
        ValueError: If it cannot.
    """
    try:
        network.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError, NotImplementedError) as error:  # all three occur in timm
        raise ValueError(
            f"{type(network).__name__} cannot recompute its activations: leave grad_checkpointing off, and take a "
            "smaller --data.batch_size with more --trainer.accumulate_grad_batches to save memory"
        ) from error


def _freeze(network: nn.Module, names: Sequence[str]) -> None:
    """Exclude the named parts from training.

    Raises:
        ValueError: If a name means no part with parameters, or nothing is left to train.
    """
    for name in names:
        if name != FEATURES:
            _check_name(network, name)
        for module in _modules(network, name):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
    if names and not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError(f"freeze={list(names)} leaves nothing to train: leave a part of the network out of it")


def _check_name(network: nn.Module, name: str) -> None:
    modules = {key: module for key, module in network.named_modules(remove_duplicate=False) if key}
    valid = [key for key, module in modules.items() if any(True for _ in module.parameters())]
    if name not in valid:
        valid += [FEATURES] if hasattr(network, "get_classifier") else []
        reason = "has no parameters" if name in modules else f"is no module of {type(network).__name__}"
        near = difflib.get_close_matches(name, valid, n=1, cutoff=0.0)
        remedy = f"name another part, such as {near[0]!r}" if near else "leave it out"
        raise ValueError(f"freeze names {name!r}, which {reason}: {remedy}")


def _modules(network: nn.Module, name: str) -> list[nn.Module]:
    """List all modules of a frozen part; for `features` those around the last layer are among them."""
    if name != FEATURES:
        return list(network.get_submodule(name).modules())
    if not hasattr(network, "get_classifier"):
        raise ValueError(
            f"freeze names {FEATURES!r}, but {type(network).__name__} does not say which its last layer is "
            "(get_classifier): name the modules to freeze instead"
        )
    last: Any = network.get_classifier()  # type: ignore[operator]
    layers = last if isinstance(last, tuple) else (last,)  # some of timm's have two
    spared = {module for layer in layers for module in layer.modules()}
    return [module for module in network.modules() if module not in spared]


def _describe(group: dict[str, Any]) -> dict[str, Any]:
    """Summarize a parameter group in plain values."""
    scale = group.get("lr_scale", 1.0)
    return {
        "weight_decay": group.get("weight_decay", 0.0),
        "tensors": len(group["params"]),
        "parameters": sum(parameter.numel() for parameter in group["params"]),
    } | ({} if scale == 1.0 else {"lr_scale": scale})
