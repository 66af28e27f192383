"""Image classification: loss, accuracy, predictions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from scalablevit_pl.tasks.base import BaseTask, Batch, Part
from scalablevit_pl.tasks.classification_report import ClassificationReport
from scalablevit_pl.tasks.metrics.averages import SampleAverages
from scalablevit_pl.tasks.metrics.calibration import CalibrationError
from scalablevit_pl.tasks.report import MetricInfo, ReportData

TOP = 5


class ClassificationTask(BaseTask):
    """Train and evaluate an image classifier.

    Logs `{train,val,test}/{loss,top1,top5}`, averages over samples, with accuracies from 0 to 1; `{val,test}/ece`, the
    calibration error; and `{val,test}/samples`. `top5` is omitted for five classes or fewer. With mixed labels,
    `train/top1` compares with the heaviest class.

    Args:
        *args: Arguments of `BaseTask`; the network maps images `(B, C, H, W)` to logits `(B, K)` and has an attribute
            `num_classes`.
        label_smoothing: Fraction of each training label that is spread over all classes, in the default loss.
        loss: Training loss of logits `(B, K)` and labels `(B,)` or soft labels `(B, K)`: a scalar or values whose mean
            is trained; by default cross-entropy. Evaluation always measures the cross-entropy.
        class_weights: A factor on the default loss for each class.
        tta: With `flip`, evaluation and prediction use the mean of the class probabilities of an image and its mirror
            image.
        **kwargs: Arguments of `BaseTask`.

    Raises:
        ValueError: If the network does not state its number of classes, the smoothing is out of range, the loss has
            parameters or is given with class weights, or `BaseTask` rejects an argument.
    """

    monitor = "top1"
    mode = "max"
    shown = ("top1",)
    described: ClassVar[Mapping[str, MetricInfo]] = {
        "loss": MetricInfo("loss (cross-entropy)", "loss", True, "training (smoothed or mixed labels)"),
        "top1": MetricInfo("top-1 accuracy", "accuracy", True, "training (augmented images)"),
        "top5": MetricInfo("top-5 accuracy", "accuracy"),
    }
    num_classes: int

    def __init__(
        self,
        *args: Any,
        label_smoothing: float = 0.1,
        loss: nn.Module | None = None,
        class_weights: Sequence[float] | None = None,
        tta: Literal["flip"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.num_classes, int) or self.num_classes < 2:
            raise ValueError(
                f"{type(self.network).__name__} has num_classes={self.num_classes!r}: use a classifier of two or more "
                "classes, such as scalablevit_pl.models.create_model or timm.create_model build"
            )
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
        if loss is not None and (class_weights is not None or any(True for _ in loss.parameters())):
            raise ValueError(
                f"loss={type(loss).__name__} excludes class_weights and cannot have parameters, which would not be "
                "trained: give the loss its own weights, and keep parameters in the network"
            )
        weights = None if class_weights is None else torch.tensor(class_weights)
        if weights is not None and (
            len(weights) != self.num_classes or not 0 <= weights.min() <= weights.max() < math.inf
        ):
            raise ValueError(f"class_weights must be {self.num_classes} numbers that are not negative, got {weights}")
        self.tta = tta
        self.criterion = loss or nn.CrossEntropyLoss(weights, label_smoothing=label_smoothing, reduction="none")

    def compute(self, network: nn.Module, batch: Batch) -> Tensor:
        """Compute logits `(B, K)`; with `tta` in evaluation, those whose softmax is the mean of both softmaxes."""
        logits: Tensor = super().compute(network, batch)
        if self.tta is None or self.training:
            return logits
        mirrored = super().compute(network, batch | {"image": batch["image"].flip(-1)})
        return torch.logaddexp(F.log_softmax(logits.float(), dim=1), F.log_softmax(mirrored.float(), dim=1))

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Compute the training loss of logits `(B, K)`: one value for each sample `(B,)`, or a scalar."""
        try:
            losses: Tensor = self.criterion(output, batch["label"])
        except (IndexError, RuntimeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"{type(self.criterion).__name__} rejects logits {tuple(output.shape)} with labels "
                f"{tuple(batch['label'].shape)}: {error}; mixup and cutmix make labels (B, K)"
            ) from error
        return losses.flatten(1).mean(1) if losses.ndim > 1 else losses

    def metrics(self, part: Part) -> dict[str, Metric]:
        """Build accuracies for training; loss, accuracies and calibration error for evaluation."""
        tops = (1, TOP) if self.num_classes > TOP else (1,)
        if part == "train":
            return {f"top{top}": self._accuracy(top) for top in tops}
        return {"averages": SampleAverages(tops), "ece": CalibrationError()}

    def _accuracy(self, top: int) -> Metric:
        # The datamodule has checked the labels; doing so for each batch would make a GPU wait.
        return MulticlassAccuracy(self.num_classes, top_k=top, average="micro", validate_args=False)

    def update(self, metrics: Mapping[str, Any], output: Tensor, batch: Batch) -> None:
        """Update metrics with logits `(B, K)` and the labels of the batch."""
        label = batch["label"]
        if "averages" not in metrics:
            hard_label = label.argmax(dim=1) if label.ndim == 2 else label
            for name in metrics.keys() & {"top1", "top5"}:
                metrics[name].update(output, hard_label)
            return
        logits = output.float()
        metrics["averages"].update(logits, label)
        metrics["ece"].update(logits.softmax(dim=1), label)

    def predict(self, output: Tensor) -> Tensor:
        """Turn logits into class probabilities `(B, K)`."""
        return output.float().softmax(dim=1)

    def report(self, data: ReportData, predict: bool = False) -> ClassificationReport:
        """Build the table of predictions and, for a test, the confusion matrix and a picture of some images."""
        return ClassificationReport(data, predict)
