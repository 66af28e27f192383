"""Losses of any task as arguments, and those of segmentation: of logits `(B, K, H, W)` and classes `(B, H, W)`."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def check_loss(loss: nn.Module | None, class_weights: Sequence[float] | None, num_classes: int) -> None:
    """Check a task's `loss` and `class_weights`: one of them at most, and one weight for each class."""
    if loss is not None and (class_weights is not None or any(True for _ in loss.parameters())):
        raise ValueError(
            f"loss={type(loss).__name__} excludes class_weights and cannot have parameters, which would not be "
            "trained: give the loss its own weights, and keep parameters in the network"
        )
    if class_weights is not None and (
        len(class_weights) != num_classes or not all(0.0 <= weight < math.inf for weight in class_weights)
    ):
        raise ValueError(f"class_weights must be {num_classes} numbers that are not negative, got {class_weights}")


def compute_loss(criterion: nn.Module, logits: Tensor, target: Tensor, hint: str = "") -> Tensor:
    """Compute a loss: a scalar, or one value for each sample `(B,)`.

    Raises:
        ValueError: If the loss rejects its arguments; `hint` ends the message.
    """
    try:
        losses: Tensor = criterion(logits, target)
    except (IndexError, RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{type(criterion).__name__} rejects logits {tuple(logits.shape)} with targets {tuple(target.shape)}: "
            f"{error}{hint}"
        ) from error
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


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
