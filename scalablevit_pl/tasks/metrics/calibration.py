"""Distance between a classifier's confidence and its accuracy."""

import torch
import torch.nn.functional as F
from torch import Tensor

from scalablevit_pl.tasks.metrics.averages import SUM_DTYPE, SampleSums

BINS = 15


class CalibrationError(SampleSums):
    """Expected calibration error of the most probable class, a fraction from 0 to 1 (Guo et al. 2017, equation 3).

    Samples fall into bins of equal width by their confidence, the probability of the most probable class. The error is
    the mean over samples of the distance between their bin's mean confidence and its accuracy. Only the bins' sums are
    kept, so memory does not grow with the data.

    Args:
        bins: Number of bins; each includes its upper edge, as in the paper.
    """

    confidence: Tensor
    accuracy: Tensor
    samples: Tensor

    def __init__(self, bins: int = BINS) -> None:
        super().__init__()
        self.bins = bins
        for name in ("confidence", "accuracy", "samples"):
            self.add_sum(name, bins)

    def update(self, probabilities: Tensor, label: Tensor) -> None:
        """Add a batch of probabilities `(B, K)` and labels `(B,)`."""
        confidence, answer = probabilities.max(dim=1)
        confidence = confidence.to(SUM_DTYPE)
        inner_edges = torch.arange(1, self.bins, dtype=SUM_DTYPE, device=confidence.device) / self.bins
        members = F.one_hot(torch.bucketize(confidence, inner_edges), self.bins).to(SUM_DTYPE)
        # Products with members, since adding by index has no fixed order on a GPU.
        self.confidence = self.confidence + confidence @ members
        self.accuracy = self.accuracy + (answer == label).to(SUM_DTYPE) @ members
        self.samples = self.samples + members.sum(dim=0)

    def compute(self) -> Tensor:
        """Return the error."""
        # Each bin's share of the samples times its distance: the number of its samples cancels out.
        return (self.accuracy - self.confidence).abs().sum() / self.samples.sum()
