"""Losses of semantic segmentation that ignore pixels: of logits `(B, K, H, W)` and classes `(B, H, W)`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PixelCrossEntropy(nn.Module):
    """Cross-entropy, the mean over the pixels that are not ignored; 0 if all are.

    Args:
        class_weights: A factor on the loss of each class. The mean is then weighted with these factors.
        ignore_index: Class of pixels that are not counted.
    """

    weight: Tensor | None

    def __init__(self, class_weights: Sequence[float] | Tensor | None = None, ignore_index: int = 255) -> None:
        super().__init__()
        weight = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float32)
        self.register_buffer("weight", weight, persistent=False)
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Compute the loss of logits `(B, K, H, W)` and classes `(B, H, W)`: a scalar."""
        total = F.cross_entropy(logits, mask, self.weight, ignore_index=self.ignore_index, reduction="sum")
        counted = mask != self.ignore_index
        if self.weight is None:
            return total / counted.sum().clamp(min=1)
        weights = torch.where(counted, self.weight[mask.where(counted, 0)], 0.0).sum()
        return total / weights.where(weights > 0, 1.0)


class DiceLoss(nn.Module):
    """One minus the Dice coefficient of probabilities, the mean over the classes of a batch (Milletari et al. 2016).

    The coefficient of a class is `(2 Σ p y + smooth) / (Σ p² + Σ y² + smooth)`, with sums over the counted pixels of
    all images, their probabilities p and their truth y. Classes without a pixel in the batch do not count, so the loss
    is 0 if all pixels are ignored.

    Args:
        smooth: Keeps the gradient of rare classes bounded.
        ignore_index: Class of pixels that are not counted.
    """

    def __init__(self, smooth: float = 1.0, ignore_index: int = 255) -> None:
        super().__init__()
        self.smooth = smooth
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Compute the loss of logits `(B, K, H, W)` and classes `(B, H, W)`: a scalar."""
        counted = (mask != self.ignore_index)[:, None]
        probabilities = logits.float().softmax(1) * counted
        truth = torch.zeros_like(probabilities).scatter_(1, mask[:, None].where(counted, 0), 1.0) * counted
        overlap, pixels = ((probabilities * truth).sum((0, 2, 3)), truth.sum((0, 2, 3)))
        sizes = probabilities.square().sum((0, 2, 3)) + pixels
        losses = 1.0 - (2.0 * overlap + self.smooth) / (sizes + self.smooth)
        occurs = pixels > 0
        return (losses * occurs).sum() / occurs.sum().clamp(min=1)


class FocalLoss(nn.Module):
    """Cross-entropy with less weight on easy pixels (Lin et al. 2017, equation 4), the mean over counted pixels.

    The loss of a pixel is `-(1 - p)^gamma log p` with the probability p of its class; 0 if all pixels are ignored.

    Args:
        gamma: Exponent; 0 gives the cross-entropy.
        ignore_index: Class of pixels that are not counted.
    """

    def __init__(self, gamma: float = 2.0, ignore_index: int = 255) -> None:
        super().__init__()
        self.gamma = gamma
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Compute the loss of logits `(B, K, H, W)` and classes `(B, H, W)`: a scalar."""
        losses = F.cross_entropy(logits.float(), mask, ignore_index=self.ignore_index, reduction="none")
        # The difference is 0 where p rounds to 1, where a power below 1 has no finite gradient.
        easy = (1.0 - (-losses).exp()).clamp(min=torch.finfo(losses.dtype).eps)
        return (easy**self.gamma * losses).sum() / (mask != self.ignore_index).sum().clamp(min=1)
