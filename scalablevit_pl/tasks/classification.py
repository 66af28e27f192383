"""Image classification: loss, accuracy, predictions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MultilabelF1Score

from scalablevit_pl.tasks.base import BaseTask, Batch, Part
from scalablevit_pl.tasks.classification_report import ClassificationReport
from scalablevit_pl.tasks.losses import check_loss, compute_loss
from scalablevit_pl.tasks.metrics.averages import SUM_DTYPE, MeanAveragePrecision, SampleAverages
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
        class_weights: A factor on the default loss for each class; `balanced` for N / (K · N_k) where N_k of N training
            images are of class k, as in scikit-learn: the mean over the images is 1.
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
    multi_label: ClassVar[bool] = False  # whether an image has any number of classes

    def __init__(
        self,
        *args: Any,
        label_smoothing: float = 0.1,
        loss: nn.Module | None = None,
        class_weights: Literal["balanced"] | Sequence[float] | None = None,
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
        self.uncounted = class_weights == "balanced"
        given: Any = [1.0] * self.num_classes if self.uncounted else class_weights
        check_loss(loss, given, self.num_classes)
        weights = None if given is None else torch.tensor(given)
        if tta not in (None, "flip"):
            raise ValueError(f"tta must be flip for a classifier, got {tta!r}")
        self.tta = tta
        self.network.multi_label = self.multi_label  # type: ignore[assignment]
        self.criterion = loss or nn.CrossEntropyLoss(weights, label_smoothing=label_smoothing, reduction="none")

    def setup(self, stage: str) -> None:
        """Build the metrics, and check the data."""
        super().setup(stage)
        self.check_data(getattr(self._trainer, "datamodule", None), stage)

    def check_data(self, data: Any, stage: str) -> None:
        """Check the labels of a datamodule after its `setup`, and count those of a fit for balanced class weights."""
        if getattr(data, "multi_label", None) not in (None, self.multi_label):
            number, other = ("one label", "Classification") if self.multi_label else ("a list of labels", "MultiLabel")
            name, remedy = type(self).__name__, f"set --model scalablevit_pl.tasks.{other}Task"
            raise ValueError(f"the data has {number} for each image, and {name} is not for that: {remedy}")
        if self.uncounted and stage == "fit":
            if not hasattr(data, "training_labels"):
                raise ValueError("class_weights='balanced' needs a BaseDataModule: give a number for each class")
            counts = torch.bincount(data.training_labels(), minlength=self.num_classes)
            if not counts.all():
                name = data.class_names[int(counts.argmin())]
                raise ValueError(
                    f"class_weights='balanced' but no training image of {name!r}: add some, or give numbers"
                )
            self.criterion.weight.copy_(counts.sum() / (self.num_classes * counts))  # type: ignore[operator]
            self.uncounted = False

    def compute(self, network: nn.Module, batch: Batch) -> Tensor:
        """Compute logits `(B, K)`; with `tta` in evaluation, those whose probabilities are the mean of both."""
        logits: Tensor = super().compute(network, batch)
        if self.tta is None or self.training:
            return logits
        mirrored = super().compute(network, batch | {"image": batch["image"].flip(-1)})
        both = torch.stack([logits, mirrored]).float()
        if self.multi_label:
            return F.logsigmoid(both).logsumexp(0) - F.logsigmoid(-both).logsumexp(0)
        return F.log_softmax(both, dim=2).logsumexp(0)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Compute the training loss of logits `(B, K)`: one value for each sample `(B,)`, or a scalar."""
        return compute_loss(self.criterion, output, batch["label"], "; mixup and cutmix make labels (B, K)")

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
        return output.float().sigmoid() if self.multi_label else output.float().softmax(dim=1)

    def report(self, data: ReportData, predict: bool = False) -> ClassificationReport:
        """Build the table of predictions and, for a test, the confusion matrix and a picture of some images."""
        return ClassificationReport(data, predict or self.multi_label)


class MultiLabelTask(ClassificationTask):
    """Train and evaluate a classifier of images that have any number of classes; `label (B, K)` is zeros and ones.

    Logs `{val,test}/map`, the mean average precision of the classes that have images, `{train,val,test}/f1`, the mean
    of the classes' F1 at a probability of 0.5, `{train,val,test}/loss` and `{val,test}/samples`.

    Args:
        *args: Arguments of `BaseTask`, as for `ClassificationTask`.
        loss: Training loss of logits and labels `(B, K)`, such as timm's AsymmetricLossMultiLabel; by default binary
            cross-entropy, which evaluation always measures.
        **kwargs: Arguments of `BaseTask`, or `tta`.
    """

    monitor = "map"
    shown = ("map",)
    multi_label = True
    described: ClassVar[Mapping[str, MetricInfo]] = {
        "loss": MetricInfo("loss (binary cross-entropy)", "loss", True, "training (augmented or mixed images)"),
        "map": MetricInfo("mean average precision", "mean_average_precision", True),
        "f1": MetricInfo("F1", "f1"),
    }

    def __init__(self, *args: Any, loss: nn.Module | None = None, **kwargs: Any) -> None:
        loss = loss or nn.BCEWithLogitsLoss()
        super().__init__(*args, label_smoothing=0.0, loss=loss, class_weights=None, **kwargs)

    def metrics(self, part: Part) -> dict[str, Metric]:
        """Build F1 for training; loss, mean average precision and F1 for evaluation."""
        f1 = MultilabelF1Score(self.num_classes, validate_args=False)
        if part == "train":
            return {"f1": f1}
        precision = MeanAveragePrecision(self.num_classes, average="none", validate_args=False)
        return {"loss": MeanMetric(nan_strategy=math.nan).set_dtype(SUM_DTYPE), "map": precision, "f1": f1}

    def update(self, metrics: Mapping[str, Any], output: Tensor, batch: Batch) -> None:
        """Update metrics with logits and labels `(B, K)`."""
        probabilities, label = self.predict(output), batch["label"].float()
        metrics["f1"].update(probabilities, (label >= 0.5).long())
        if "map" in metrics:
            metrics["map"].update(probabilities, label.long())
            metrics["loss"].update(F.binary_cross_entropy_with_logits(output.float(), label, reduction="none").mean(1))
