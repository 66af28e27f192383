"""Semantic segmentation: loss, mean IoU, predictions."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from scalablevit_pl.preprocessing.masks import IGNORED
from scalablevit_pl.tasks.base import BaseTask, Batch, Part
from scalablevit_pl.tasks.losses import PixelCrossEntropy, check_loss, compute_loss
from scalablevit_pl.tasks.metrics.averages import WeightedMean
from scalablevit_pl.tasks.metrics.confusion import ConfusionMatrix
from scalablevit_pl.tasks.report import MetricInfo, ReportData
from scalablevit_pl.tasks.segmentation_inference import Inference, Segmented, segment
from scalablevit_pl.tasks.segmentation_report import SegmentationReport

MAX_CLASSES = IGNORED  # a mask has a byte for each pixel


class TrainingLogits(NamedTuple):
    """Logits of a training batch at the size of its masks `(B, K, H, W)`, and those of the auxiliary head, if any."""

    main: Tensor
    auxiliary: Tensor | None


class SegmentationTask(BaseTask):
    """Train and evaluate a network for semantic segmentation.

    Logs `{train,val,test}/{loss,miou,macc,aacc,pixels}` and `{val,test}/samples`. All but the loss come from one
    confusion matrix over the pixels of all images and processes: mean IoU, mean accuracy of the classes, accuracy of
    the pixels, from 0 to 1, and the number of pixels. Pixels of class 255 are not counted. Training compares augmented
    images at the size of the network's input. Evaluation compares each image with its original mask, as the papers do:
    logits are resized to the network's input, cropped to the image in it, and resized to the original. The loss of an
    evaluation is the mean cross-entropy over all pixels.

    Args:
        *args: Arguments of `BaseTask`; the network maps images `(B, C, H, W)` to logits `(B, K, h, w)` and has an
            attribute `num_classes`.
        loss: Training loss of logits `(B, K, H, W)` and classes `(B, H, W)` with 255 for ignored pixels: a scalar or
            values whose mean is trained; by default cross-entropy, the mean over counted pixels.
        class_weights: A factor on the default loss for each class.
        auxiliary_weight: Factor on the loss of the network's auxiliary head, if it has one; in training only.
        window: Side in pixels of sliding windows in evaluation and prediction; by default the whole image is one.
        stride: Distance of two windows in pixels, by default two thirds of the window.
        tta: Evaluate and predict with the mean of the class probabilities: with `flip` of an image and its mirror
            image, with `multiscale` of both in six scales from 0.5 to 1.75.
        **kwargs: Arguments of `BaseTask`.

    Raises:
        ValueError: If the network does not state from 2 to 255 classes, a value is out of range, the loss has
            parameters or is given with class weights, or `BaseTask` rejects an argument.
    """

    monitor = "miou"
    mode = "max"
    shown = ("miou",)
    described: ClassVar[Mapping[str, MetricInfo]] = {
        "loss": MetricInfo("loss (cross-entropy)", "loss", True, "training (augmented images)"),
        "miou": MetricInfo("mean IoU", "mean_iou", True, "training (augmented images)"),
        "macc": MetricInfo("mean accuracy of the classes", "mean_accuracy"),
        "aacc": MetricInfo("accuracy of the pixels", "accuracy"),
    }
    num_classes: int

    def __init__(
        self,
        *args: Any,
        loss: nn.Module | None = None,
        class_weights: Sequence[float] | None = None,
        auxiliary_weight: float = 0.4,
        window: int | None = None,
        stride: int | None = None,
        tta: Literal["flip", "multiscale"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.num_classes, int) or not 2 <= self.num_classes <= MAX_CLASSES:
            raise ValueError(
                f"{type(self.network).__name__} has num_classes={self.num_classes!r}: use a segmenter of 2 to "
                f"{MAX_CLASSES} classes, such as scalablevit_pl.models.create_segmenter builds"
            )
        check_loss(loss, class_weights, self.num_classes)
        if not 0.0 <= auxiliary_weight < float("inf"):
            raise ValueError(f"auxiliary_weight must not be negative, got {auxiliary_weight}")
        if (window is None and stride is not None) or (window is not None and not 1 <= (stride or 1) <= window):
            raise ValueError(f"stride must be from 1 to the window, got a stride of {stride} and a window of {window}")
        if tta not in (None, "flip", "multiscale"):
            raise ValueError(f"tta must be flip or multiscale, got {tta!r}")
        self.window, self.tta, self.auxiliary_weight = window, tta, auxiliary_weight
        self.stride = (window or 1) * 2 // 3 or 1 if stride is None else stride
        self.inference = Inference(window, self.stride, tta)
        self.criterion = loss or PixelCrossEntropy(class_weights)
        self.training_forward: Any = getattr(self.network, "forward_with_auxiliary", None)

    def on_fit_start(self) -> None:
        """Compile also the forward of a network with an auxiliary head."""
        super().on_fit_start()
        if self.compiled and self.training_forward is not None:
            self.training_forward = torch.compile(self.training_forward, dynamic=False)

    def compute(self, network: nn.Module, batch: Batch) -> TrainingLogits | list[Segmented]:
        """Compute logits for training, or in evaluation the classes of each image at the size of the original."""
        if not self.training:
            return self._segment(network, batch)
        if self.training_forward is None:
            logits, auxiliary = network(batch["image"]), None
        else:
            logits, auxiliary = self.training_forward(batch["image"])
        return TrainingLogits(self._resize(logits, batch), auxiliary)

    def _resize(self, logits: Tensor, batch: Batch) -> Tensor:
        size = batch["mask"].shape[-2:]
        return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)

    def _segment(self, network: nn.Module, batch: Batch) -> list[Segmented]:
        """Run a network on groups of images of one size, without the padding of the batch."""
        size, resized, padded = (
            [(height, width) for height, width in batch[name].tolist()] for name in ("size", "resized", "padded")
        )
        segmented: dict[int, Segmented] = {}
        for height, width in dict.fromkeys(padded):
            group = [position for position, sides in enumerate(padded) if sides == (height, width)]
            images = batch["image"][group, :, :height, :width]
            all_scores = self.inference(network, images, [resized[position] for position in group])
            for position, scores in zip(group, all_scores, strict=True):
                mask = batch["mask"][position, : size[position][0], : size[position][1]] if "mask" in batch else None
                segmented[position] = segment(scores, size[position], mask)
        return [segmented[position] for position in range(len(padded))]

    def loss(self, output: TrainingLogits, batch: Batch) -> Tensor:
        """Compute the training loss: a scalar, or one value for each sample `(B,)`."""
        mask = batch["mask"].long()
        loss = compute_loss(self.criterion, output.main, mask)
        if output.auxiliary is None:
            return loss
        return loss + self.auxiliary_weight * compute_loss(self.criterion, self._resize(output.auxiliary, batch), mask)

    def metrics(self, part: Part) -> dict[str, Metric]:
        """Build the confusion matrix and, for evaluation, the mean loss."""
        metrics: dict[str, Metric] = {"confusion": ConfusionMatrix(self.num_classes, IGNORED)}
        return metrics if part == "train" else metrics | {"loss": WeightedMean()}

    def update(self, metrics: Mapping[str, Any], output: TrainingLogits | list[Segmented], batch: Batch) -> None:
        """Count the pixels of a batch."""
        if isinstance(output, TrainingLogits):
            metrics["confusion"].update(output.main.argmax(1), batch["mask"])
            return
        for result, mask in zip(output, batch["mask"], strict=True):
            height, width = result.classes.shape
            truth = mask[:height, :width]
            metrics["confusion"].update(result.classes, truth)
            metrics["loss"].update(result.loss, (truth != IGNORED).sum())

    def predict(self, output: list[Segmented]) -> list[Tensor]:
        """Return the classes `(H, W)` of each image, in uint8 and at the size of the original."""
        return [result.classes for result in output]

    def report(self, data: ReportData, predict: bool = False) -> SegmentationReport:
        """Build the masks of a prediction, or the pictures and the table of a test."""
        part = "test" if self.reported is None else f"test_{self.reported}"
        return SegmentationReport(data, None if predict else self.evaluations[part]["confusion"])
