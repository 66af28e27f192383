"""Counts of pixels by true and predicted class, and what segmentation measures with them."""

import torch
from torch import Tensor

from scalablevit_pl.tasks.metrics.averages import SUM_DTYPE, SampleSums


class ConfusionMatrix(SampleSums):
    """Number of pixels of each true and predicted class, as whole numbers: exact for any number of pixels.

    `compute` returns `miou`, `macc`, `aacc` and `pixels`, each from the sums over all pixels of all images. The mean
    IoU is over the classes that occur in the truth or the prediction, the mean accuracy over those in the truth.

    Args:
        num_classes: Number of classes K.
        ignored: Class in the truth of pixels that are not counted.
    """

    matrix: Tensor

    def __init__(self, num_classes: int, ignored: int = 255) -> None:
        super().__init__()
        self.num_classes, self.ignored = num_classes, ignored
        self.add_state("matrix", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, truth: Tensor) -> None:
        """Add pixels with predicted classes and true classes, two tensors of one shape."""
        cells = self.num_classes**2
        # Ignored pixels have a cell of their own: selecting the others would make a GPU wait.
        pairs = torch.where(truth == self.ignored, cells, truth.long() * self.num_classes + predicted)
        self.matrix = self.matrix + pairs.flatten().bincount(minlength=cells + 1)[:cells].view_as(self.matrix)

    def compute(self) -> dict[str, Tensor]:
        """Return mean IoU, mean accuracy, accuracy of all pixels and the number of pixels."""
        iou, accuracy, pixels = class_scores(self.matrix)
        hits, counted = self.matrix.diagonal().sum().to(SUM_DTYPE), pixels.sum().to(SUM_DTYPE)
        return {"miou": iou.nanmean(), "macc": accuracy.nanmean(), "aacc": hits / counted, "pixels": counted}


def class_scores(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return IoU, accuracy and true pixels of each class `(K,)` from a confusion matrix, whose rows are true classes.

    The IoU of a class that occurs in neither truth nor prediction is NaN, and the accuracy of one that the truth lacks.
    """
    hits, truth, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    union = truth + predicted - hits
    return hits.to(SUM_DTYPE) / union, hits.to(SUM_DTYPE) / truth, truth
