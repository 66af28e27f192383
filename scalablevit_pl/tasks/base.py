"""What all tasks share: optimization, evaluation on any number of processes, and resume."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torchmetrics import MeanMetric, Metric

from scalablevit_pl.optim import OptimizerFactory, ScheduleFactory, WarmupCosineSchedule, parameter_groups
from scalablevit_pl.randomness import derive_seed, run_seed
from scalablevit_pl.tasks.fit import (
    FitShape,
    Interval,
    ResolvedFit,
    advance,
    advance_by_metric,
    peak_rate,
    resolve_fit,
    shape_of,
)
from scalablevit_pl.tasks.freezing import checkpoint_gradients, frozen_modules
from scalablevit_pl.tasks.freezing import freeze as freeze_parts
from scalablevit_pl.tasks.metrics.averages import SUM_DTYPE, SampleCount, gather_sums, mark_updated, restore_sums
from scalablevit_pl.tasks.report import MetricInfo, Report, ReportData

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
Part = Literal["train", "val", "test"]
AVERAGES, FOUND_LR = "train_averages", "found_lr"  # keys of a checkpoint


class BaseTask(pl.LightningModule, ABC):
    """Train and evaluate a network; loss, metrics and predictions are the subclass's.

    A subclass implements `loss`, `metrics`, `update` and `predict`, and may override `compute` and `report`. It
    declares `monitor`, `mode`, `described` and `shown`. Logged are `train/loss`, the task's metrics as
    `{train,val,test}/NAME`, and `{val,test}/samples`, the number of evaluated samples. The hooks never see fillers,
    samples with a negative `index`.

    Args:
        network: The network to train.
        optimizer: Called with parameter groups. Its learning rate is meant for `base_batch_size`.
        schedule: Called with the optimizer, and with `total_steps` and `steps_per_epoch` if its signature has them.
        base_batch_size: Global batch for which the learning rate is given; the rate is scaled in proportion to the
            actual one. None uses the rate unscaled.
        freeze: Parts of the network that are not trained and stay in eval mode: one name or several, of modules as the
            state dict spells them, such as `backbone` or `backbone.stages.0`. `features` means all but the last layer.
        layer_decay: Factor by which the learning rate decays from each layer to the one below; 1 for no decay.
        compile: Compile the network, in place, when a fit starts.
        channels_last: Keep the network's convolutions and the images in channels-last memory format.
        grad_checkpointing: Recompute activations in the backward pass, which saves memory and costs time.
        schedule_interval: When a schedule of torch advances; by default after a step if it takes a number of steps,
            else after an epoch. ReduceLROnPlateau follows `monitor`, and timm's schedules have `t_in_epochs`.

    Attributes:
        monitor: Validation metric that selects `best.ckpt`, without `val/`; a class attribute.
        mode: Whether the highest (`max`) or the lowest (`min`) value of it is best; a class attribute.
        described: How metrics appear in pictures and cards, by name; a class attribute.
        shown: Validation metrics in the line of each epoch; a class attribute.
        lr: Learning rate for the actual batch, instead of the optimizer's; Lightning's LearningRateFinder sets it.
        num_classes: Classes of the network, or None if that does not apply.
        frozen: The names given as `freeze`.
        resolved: Batch, learning rate, steps and parameter groups of the fit, from its start on.
        networks: Further networks that are evaluated on the same batches, by name, such as averaged weights.

    Raises:
        ValueError: If a value is out of range, a frozen part does not exist or nothing else is left, or the network
            does not support layer decay or gradient checkpointing.
    """

    monitor: ClassVar[str] = "loss"
    mode: ClassVar[Literal["max", "min"]] = "min"
    described: ClassVar[Mapping[str, MetricInfo]] = {"loss": MetricInfo("loss", "loss", plotted=True)}
    shown: ClassVar[Sequence[str]] = ()

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
        schedule_interval: Interval | None = None,
    ) -> None:
        super().__init__()
        if self.monitor not in self.described or not any(metric.plotted for metric in self.described.values()):
            name = type(self).__name__
            raise ValueError(f"{name}.described needs the monitored metric {self.monitor!r}, and one that is plotted")
        if base_batch_size is not None and base_batch_size < 1:
            raise ValueError(f"base_batch_size must be at least 1, or null for no scaling, got {base_batch_size}")
        self.network = network
        self.lr: float | None = None
        self.num_classes: int | None = getattr(network, "num_classes", None)
        self.optimizer_factory = optimizer
        self.schedule_factory = schedule
        self.schedule_interval = schedule_interval
        self.base_batch_size = base_batch_size
        self.layer_decay = layer_decay
        self.compiled = compile
        self.channels_last = channels_last
        self.resolved: dict[str, Any] = {}
        self.frozen = [freeze] if isinstance(freeze, str) else list(freeze)
        freeze_parts(network, self.frozen)
        self._keep_frozen_in_eval_mode()
        parameter_groups(network, layer_decay)  # raises before the data is loaded
        if grad_checkpointing:
            checkpoint_gradients(network)
        if channels_last:
            network.to(memory_format=torch.channels_last)
        self.averages: Any = nn.ModuleDict()
        self.evaluations: Any = nn.ModuleDict()
        # A plain dictionary, so that these networks are not trained, wrapped or saved with the task.
        self.networks: dict[str, nn.Module] = {}
        self.reported: str | None = None

    # What a subclass supplies.

    def compute(self, network: nn.Module, batch: Batch) -> Any:
        """Run a network on a batch; by default on its `image (B, C, H, W)`."""
        return network(batch["image"])

    @abstractmethod
    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Compute the training loss of an output: a scalar, or one value per sample `(B,)` whose mean is trained."""

    @abstractmethod
    def metrics(self, part: Part) -> dict[str, Metric]:
        """Build the metrics of training or evaluation; in training their states must be sums.

        A metric's `compute` returns a scalar, logged under the metric's key, or a dictionary of scalars, logged under
        theirs.
        """

    @abstractmethod
    def update(self, metrics: Mapping[str, Any], output: Any, batch: Batch) -> None:
        """Update metrics that `metrics` has built with a batch and the network's output for it."""

    @abstractmethod
    def predict(self, output: Any) -> Any:
        """Turn the network's output into predictions, such as class probabilities `(B, K)`."""

    def report(self, data: ReportData, predict: bool = False) -> Report:
        """Build the report of a test, or with `predict` of a prediction on images without targets."""
        return Report(data)

    # Training.

    def forward(self, image: Tensor) -> Any:
        """Run the network on images `(B, C, H, W)`."""
        return self.network(self.arrange(image))

    def arrange(self, image: Tensor) -> Tensor:
        """Return images `(B, C, H, W)` in the memory format of the network's convolutions."""
        return image.contiguous(memory_format=torch.channels_last) if self.channels_last else image

    def train(self, mode: bool = True) -> Self:
        """Switch to training or evaluation mode; frozen parts stay in eval mode."""
        super().train(mode)
        self._keep_frozen_in_eval_mode()
        return self

    def _keep_frozen_in_eval_mode(self) -> None:
        # By name, since modules may have been replaced, as for synchronized batch norms.
        for name in self.frozen:
            for module in frozen_modules(self.network, name):
                module.training = False

    def setup(self, stage: str) -> None:
        """Build the metrics; a subclass that overrides this calls it."""
        if not self.averages:
            loss = MeanMetric(nan_strategy=math.nan).set_dtype(SUM_DTYPE)  # a NaN loss makes the average NaN
            self.averages.update({"loss": loss, **self.metrics("train")})
            self.evaluations.update({part: self._evaluation_metrics(part) for part in ("val", "test")})

    def on_fit_start(self) -> None:
        """Compile the network, in place as all weights are loaded, and use a learning rate that was searched for."""
        if self.compiled:
            self.network.compile(dynamic=False)
        if self.lr is not None:
            self.trainer.strategy.setup_optimizers(self.trainer)

    def on_train_epoch_start(self) -> None:
        """Return frozen parts to eval mode, in case the network's mode was changed directly."""
        self._keep_frozen_in_eval_mode()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed what the network draws, such as dropped paths, from run seed, epoch, batch and process."""
        torch.manual_seed(derive_seed(run_seed(), self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of a batch."""
        output = self.compute(self.network, batch | {"image": self.arrange(batch["image"])})
        losses = self.loss(output, batch)
        with torch.no_grad():
            self.averages["loss"].update(losses, 1.0 if losses.ndim else len(batch["image"]))
            self.update(dict(self.averages.items()), output, batch)
        loss = losses.mean()
        self.log("train/step_loss", loss)
        self.log("train/lr", peak_rate(self.optimizers()))  # type: ignore[arg-type]
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the epoch's averages over the samples of all processes, and reset them."""
        self._log_metrics("train", self.averages)
        for metric in self.averages.values():
            metric.reset()

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradients as the trainer is configured, also those of fused optimizers in bfloat16.

        Lightning refuses these in any mixed precision, since a fused optimizer may unscale the loss inside its step,
        after the clipping. Without a scaler there is nothing to unscale.
        """
        plugin = self.trainer.precision_plugin
        if gradient_clip_val and isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val, algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build optimizer and schedule for the actual global batch and number of steps."""
        resolved = self.resolve(shape_of(self.trainer))
        self.resolved = record = resolved.record
        base, lr, batch = record["base_batch_size"], record["lr"], record["global_batch"]
        if base not in (None, batch) and self.lr is None:
            text = "learning rate scaled from %.3g for a batch of %d to %.3g for the global batch of %d"
            logger.info(text, lr * base / batch, base, lr, batch)
        # Lightning would advance a schedule by metrics only after the epoch's checkpoint is written.
        schedule: Any = {"scheduler": resolved.schedule, "interval": resolved.interval, "reduce_on_plateau": False}
        return {"optimizer": resolved.optimizer, "lr_scheduler": schedule}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Advance the schedule after a step or an epoch."""
        advance(scheduler, self.current_epoch + 1, self.global_step)

    def resolve(self, shape: FitShape) -> ResolvedFit:
        """Build optimizer and schedule for a fit of a given size, without a trainer.

        Raises:
            ValueError: If optimizer or schedule reject their settings, or do not fit precision and clipping.
        """
        factories = (self.optimizer_factory, self.schedule_factory)
        options: Any = (self.base_batch_size, self.layer_decay, self.schedule_interval, self.mode, self.lr)
        resolved = resolve_fit(self.network, *factories, shape, *options)
        resolved.record.update(frozen=list(self.frozen), compile=self.compiled, channels_last=self.channels_last)
        return resolved

    # Resume.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the sums of the unfinished epoch's averages, `(processes, …)` each; a collective call."""
        checkpoint[FOUND_LR] = self.lr
        checkpoint[AVERAGES] = {name: gather_sums(metric, self.all_gather) for name, metric in self.averages.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore these sums: each process its own, or the first one all of them if the number of processes changed."""
        self.lr = checkpoint.get(FOUND_LR)
        # A resumed run keeps its learning rate: another search would make Lightning forget this checkpoint.
        kept = [own for own in self.trainer.callbacks if not isinstance(own, LearningRateFinder)]  # type: ignore[attr-defined]
        self.trainer.callbacks = kept  # type: ignore[attr-defined]
        for name, states in checkpoint.get(AVERAGES, {}).items():
            if name in self.averages:  # an earlier version logged top-5 accuracy of few classes
                restore_sums(self.averages[name], states, self.trainer.world_size, self.global_rank)

    # Evaluation.

    def add_network(self, name: str, network: nn.Module, reported: bool) -> None:
        """Evaluate another network on the same batches.

        Args:
            name: Part of its metrics' names: `val_NAME/loss` and so on.
            network: The network, in eval mode.
            reported: Whether evaluation and prediction return its predictions instead of those of the task's network.
        """
        self.networks[name] = network
        for part in ("val", "test"):
            self.evaluations[f"{part}_{name}"] = self._evaluation_metrics(part).to(self.device)
        if reported:
            self.reported = name

    def validation_step(self, batch: Batch, batch_idx: int) -> Any:
        """Update the metrics with a batch and return its predictions, those of fillers excluded."""
        return self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> Any:
        """Update the metrics with a batch and return its predictions, those of fillers excluded."""
        return self._evaluate("test", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Any:
        """Return the predictions for a batch, those of fillers excluded; None if there is nothing else."""
        batch = without_fillers(batch)
        network = self.network if self.reported is None else self.networks[self.reported]
        return self.predict(self.compute(network, batch)) if len(batch["image"]) else None

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics."""
        for metrics in self.evaluations.values():
            for metric in metrics.values():
                metric.reset()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """Log the metrics over the samples of all processes, and advance a schedule that depends on them."""
        self._log_evaluation("val")
        advance_by_metric(self.trainer, f"val/{self.monitor}")

    def on_test_epoch_end(self) -> None:
        """Log the metrics over the samples of all processes."""
        self._log_evaluation("test")

    def _evaluation_metrics(self, part: Part) -> nn.ModuleDict:
        return nn.ModuleDict({**self.metrics(part), "samples": SampleCount()})

    def _evaluated(self, part: Part) -> dict[str, nn.Module]:
        """Return the evaluated networks by the first part of their metrics' names."""
        return {part: self.network} | {f"{part}_{name}": network for name, network in self.networks.items()}

    def _evaluate(self, part: Part, batch: Batch) -> Any:
        batch = without_fillers(batch)
        if len(batch["image"]) == 0:
            return None
        predictions = {}
        for name, network in self._evaluated(part).items():
            output = self.compute(network, batch)
            metrics = dict(self.evaluations[name].items())
            metrics.pop("samples").update(len(batch["image"]))
            self.update(metrics, output, batch)
            predictions[name] = self.predict(output)
        return predictions[part if self.reported is None else f"{part}_{self.reported}"]

    def _log_evaluation(self, part: Part) -> None:
        for name in self._evaluated(part):
            self._log_metrics(name, self.evaluations[name])

    def _log_metrics(self, prefix: str, metrics: Any) -> None:
        """Log metrics over the samples of all processes; every process has to call it, also one without samples."""
        for key, metric in metrics.items():
            mark_updated(metric)
            value = metric.compute()
            for name, scalar in (value if isinstance(value, dict) else {key: value}).items():
                self.log(f"{prefix}/{name}", scalar, sync_dist=False, prog_bar=name in ("loss", *self.shown))


def without_fillers(batch: Batch) -> Batch:
    """Return the samples of a batch that count: those whose `index` is not negative."""
    counted = batch["index"] >= 0 if "index" in batch else None
    if counted is None or bool(counted.all()):
        return batch
    kept = counted.nonzero().flatten().tolist()
    return {
        key: values[counted] if isinstance(values, Tensor) else [values[position] for position in kept]
        for key, values in batch.items()
    }
