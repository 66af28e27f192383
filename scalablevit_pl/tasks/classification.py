"""Image classification: loss, accuracy, predictions."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from scalablevit_pl.optim import OptimizerFactory, ScheduleFactory, WarmupCosineSchedule
from scalablevit_pl.tasks.base import BaseTask, peak_rate
from scalablevit_pl.tasks.calibration import CalibrationError
from scalablevit_pl.tasks.metric import SampleAverages

Batch = dict[str, Any]
EVALUATIONS = ("val", "test")
TOP = 5
AVERAGES = "train_averages"  # their place in a checkpoint


class ClassificationTask(BaseTask):
    """Train and evaluate an image classifier.

    Logs `{train,val,test}/{loss,top1,top5}`, averages over samples, accuracies as fractions from 0 to 1;
    `{val,test}/ece`, the calibration error, and `{val,test}/samples`, how many samples were counted. With mixed labels
    `train/top1` asks for the heaviest class. Samples of an evaluation with a negative `index` only fill a batch.

    Args:
        network: Takes images `(B, C, H, W)` to logits `(B, K)`; has an attribute `num_classes`.
        optimizer: Makes the optimizer from parameter groups. Its learning rate holds for `base_batch_size`.
        schedule: Makes the learning rate's course; called with the optimizer, `total_steps` and `steps_per_epoch`.
        base_batch_size: Global batch for which the learning rate is given; None takes the rate as it is.
        label_smoothing: Part of each training label that is spread over all classes.
        freeze: Parts of the network that are not trained and stay in eval mode: one name or several, of modules as the
            state dict spells them, such as `backbone` or `backbone.stages.0`. `features` means all but the last layer.
        layer_decay: Factor by which the learning rate falls from each layer to the one below; 1 is the same for all.
        compile: Compile the network, in place, when a fit starts.
        channels_last: Keep the network's convolutions and the images in memory with the channels last.
        grad_checkpointing: Recompute activations in the backward pass, which saves memory and costs time.

    Raises:
        ValueError: If the network does not say how many classes it has, the smoothing is out of its range, or what
            `BaseTask` refuses.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerFactory = AdamW,
        schedule: ScheduleFactory = WarmupCosineSchedule,
        base_batch_size: int | None = 512,
        label_smoothing: float = 0.1,
        freeze: Sequence[str] | str = (),
        layer_decay: float = 1.0,
        compile: bool = False,  # noqa: A002  as users call it
        channels_last: bool = False,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            network,
            optimizer,
            schedule,
            base_batch_size,
            freeze,
            layer_decay,
            compile,
            channels_last,
            grad_checkpointing,
        )
        num_classes = getattr(network, "num_classes", None)
        if not isinstance(num_classes, int) or num_classes < 2:
            raise ValueError(
                f"{type(network).__name__} has num_classes={num_classes!r}: give a classifier that knows how many "
                "(at least two) classes it has, such as scalablevit_pl.models.create_model or timm.create_model make"
            )
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.averages = _metrics(num_classes)
        self.evaluations = nn.ModuleDict({part: _evaluation_metrics(num_classes) for part in EVALUATIONS})
        # In a plain dictionary, so that they are no parts of this one: they are not trained, wrapped or saved with it.
        self.beside: dict[str, nn.Module] = {}
        self.answering: str | None = None

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits `(B, K)` from images `(B, C, H, W)`."""
        logits: Tensor = self.network(self.arrange(image))
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch with labels `(B,)` or soft labels `(B, K)`."""
        logits, label = self(batch["image"]), batch["label"]
        losses = F.cross_entropy(logits, label, label_smoothing=self.label_smoothing, reduction="none")
        loss = losses.mean()
        hard_label = label.argmax(dim=1) if label.ndim == 2 else label
        metrics = self._training_metrics()
        metrics["loss"].update(losses.detach())
        metrics["top1"].update(logits.detach(), hard_label)
        metrics["top5"].update(logits.detach(), hard_label)
        self.log("train/step_loss", loss)
        self.log("train/lr", peak_rate(self.optimizers()))  # type: ignore[arg-type]
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the epoch's averages over the samples of all processes, and begin anew."""
        for name, metric in self._training_metrics().items():
            self.log(f"train/{name}", metric.compute(), prog_bar=name in ("loss", "top1"))
            metric.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what an unfinished epoch's averages have summed up, `(processes, …)` for each sum; a collective call."""
        checkpoint[AVERAGES] = {
            name: {state: self._of_all_processes(getattr(metric, state)) for state in metric._defaults}
            for name, metric in self._training_metrics().items()
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with these sums, each process with its own, or the first with all where their number has changed."""
        for name, states in checkpoint.get(AVERAGES, {}).items():
            metric = self._training_metrics()[name]
            metric._update_count = 1  # else torchmetrics warns of an average without samples
            for state, sums in states.items():
                if len(sums) == self.trainer.world_size:
                    own = sums[self.global_rank]
                else:
                    own = sums.sum(dim=0) if self.global_rank == 0 else torch.zeros_like(sums[0])
                setattr(metric, state, own.to(self.device))

    def _of_all_processes(self, value: Tensor) -> Tensor:
        gathered: Tensor = self.all_gather(value)  # type: ignore[assignment]
        return gathered.reshape(self.trainer.world_size, *value.shape).cpu()

    def _training_metrics(self) -> dict[str, Metric]:
        return dict(self.averages.items())  # type: ignore[arg-type]

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Count a batch and return its class probabilities `(B, K)`."""
        return self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Count a batch and return its class probabilities `(B, K)`."""
        return self._evaluate("test", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return class probabilities `(B, K)`."""
        network = self.network if self.answering is None else self.beside[self.answering]
        probabilities: Tensor = network(batch["image"]).float().softmax(dim=1)
        return probabilities

    def evaluate_beside(self, name: str, network: nn.Module, answers: bool) -> None:
        """Evaluate another network, too, on the same batches.

        Args:
            name: What its metrics are called by: `val_NAME/loss` and so on.
            network: The network, in eval mode.
            answers: Whether evaluation and prediction return its probabilities, not those of the task's own network.
        """
        self.beside[name] = network
        for part in EVALUATIONS:
            self.evaluations[f"{part}_{name}"] = _evaluation_metrics(self.num_classes).to(self.device)
        if answers:
            self.answering = name

    def on_validation_epoch_start(self) -> None:
        """Begin with nothing counted."""
        self._begin("val")

    def on_test_epoch_start(self) -> None:
        """Begin with nothing counted."""
        self._begin("test")

    def on_validation_epoch_end(self) -> None:
        """Log what was counted, by all processes."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log what was counted, by all processes."""
        self._log_evaluation("test")

    def _begin(self, part: str) -> None:
        for name in self._evaluated(part):
            for metric in self._evaluation_metrics(name):
                metric.reset()

    def _evaluate(self, part: str, batch: Batch) -> Tensor:
        label = batch["label"]
        counted = batch["index"] >= 0 if "index" in batch else torch.ones_like(label, dtype=torch.bool)
        answers: dict[str, Tensor] = {}
        for name, network in self._evaluated(part).items():
            logits = network(batch["image"]).float()
            answers[name] = logits.softmax(dim=1)
            averages, calibration = self._evaluation_metrics(name)
            averages.update(logits, label, counted)
            calibration.update(answers[name], label, counted)
        return answers[part if self.answering is None else f"{part}_{self.answering}"]

    def _log_evaluation(self, part: str) -> None:
        """Log the metrics of all processes' samples; each process has to call it, also one that has none of its own."""
        for evaluated in self._evaluated(part):
            averages, calibration = self._evaluation_metrics(evaluated)
            for name, value in {**averages.compute(), "ece": calibration.compute()}.items():
                self.log(f"{evaluated}/{name}", value, sync_dist=False, prog_bar=name in ("loss", "top1"))

    def _evaluated(self, part: str) -> dict[str, nn.Module]:
        """Return the networks that are evaluated, by the first part of their metrics' names."""
        return {part: self.network} | {f"{part}_{name}": network for name, network in self.beside.items()}

    def _evaluation_metrics(self, name: str) -> tuple[SampleAverages, CalibrationError]:
        averages, calibration = self.evaluations[name].values()  # type: ignore[operator]
        return averages, calibration


def _metrics(num_classes: int) -> nn.ModuleDict:
    """Build the averages of the training; a loss that is not a number makes the average none, too."""
    dtype = torch.float32 if torch.backends.mps.is_available() else torch.float64  # which Apple's GPUs do not have

    def accuracy(top: int) -> Metric:
        # The datamodule has checked the labels once; doing it for each batch would make a GPU wait.
        return MulticlassAccuracy(num_classes, top_k=min(top, num_classes), average="micro", validate_args=False)

    metrics: dict[str, Metric] = {
        "loss": MeanMetric(nan_strategy=math.nan).set_dtype(dtype),
        "top1": accuracy(1),
        "top5": accuracy(TOP),
    }
    return nn.ModuleDict(metrics)


def _evaluation_metrics(num_classes: int) -> nn.ModuleDict:
    """Build what an evaluation counts."""
    return nn.ModuleDict({"averages": SampleAverages(min(TOP, num_classes)), "calibration": CalibrationError()})
