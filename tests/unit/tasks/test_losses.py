"""Losses of segmentation against loops over the pixels."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from scalablevit_pl.tasks.losses import DiceLoss, FocalLoss, PixelCrossEntropy

CLASSES, IGNORED = 4, 255
LOSSES: list[Callable[[], nn.Module]] = [
    PixelCrossEntropy,
    lambda: PixelCrossEntropy([0.5, 1.0, 2.0, 0.0]),
    DiceLoss,
    FocalLoss,
    lambda: FocalLoss(gamma=0.5),
]


def make_batch(size: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    logits = 3.0 * torch.randn(2, CLASSES, size, size + 1, generator=generator)
    mask = torch.randint(CLASSES - 1, (2, size, size + 1), generator=generator)  # class 3 does not occur
    mask[torch.rand(mask.shape, generator=generator) < 0.3] = IGNORED
    return logits, mask


def counted(logits: Tensor, mask: Tensor) -> list[tuple[list[float], int]]:
    """List probabilities and class of each counted pixel."""
    rows = logits.double().softmax(1).permute(0, 2, 3, 1).reshape(-1, CLASSES).tolist()
    return [(row, true) for row, true in zip(rows, mask.flatten().tolist(), strict=True) if true != IGNORED]


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 2.0, 3.0]])
def test_cross_entropy_is_the_mean_over_counted_pixels(weights: list[float] | None) -> None:
    logits, mask = make_batch()
    factors = weights or [1.0] * CLASSES
    pixels = counted(logits, mask)
    total = sum(-factors[true] * math.log(row[true]) for row, true in pixels)
    expected = total / sum(factors[true] for _, true in pixels)
    assert PixelCrossEntropy(weights)(logits, mask).item() == pytest.approx(expected, rel=1e-5)
    other = functional.cross_entropy(logits, mask, weights and torch.tensor(weights), ignore_index=IGNORED)
    assert PixelCrossEntropy(weights)(logits, mask).item() == pytest.approx(other.item(), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_is_the_mean_over_counted_pixels(gamma: float) -> None:
    logits, mask = make_batch()
    pixels = counted(logits, mask)
    expected = sum(-((1.0 - row[true]) ** gamma) * math.log(row[true]) for row, true in pixels) / len(pixels)
    assert FocalLoss(gamma)(logits, mask).item() == pytest.approx(expected, rel=1e-5)


def test_dice_loss_is_the_mean_over_the_classes_that_occur() -> None:
    logits, mask = make_batch()
    pixels, losses = counted(logits, mask), []
    for name in range(CLASSES - 1):
        overlap = sum(row[name] for row, true in pixels if true == name)
        sizes = sum(row[name] ** 2 for row, _ in pixels) + sum(true == name for _, true in pixels)
        losses.append(1.0 - (2.0 * overlap + 1.0) / (sizes + 1.0))
    assert DiceLoss()(logits, mask).item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("make", LOSSES)
def test_ignored_pixels_do_not_change_loss_and_have_no_gradient(make: Callable[[], nn.Module]) -> None:
    logits, mask = make_batch()
    other = logits.where((mask != IGNORED)[:, None], 100.0 * torch.rand_like(logits)).requires_grad_()
    loss = make()(other, mask)
    assert loss.item() == pytest.approx(make()(logits, mask).item(), rel=1e-6)
    loss.backward()
    assert other.grad.abs().sum(1)[mask == IGNORED].max() == 0.0
    assert other.grad.abs().max() > 0.0


@pytest.mark.parametrize("make", LOSSES)
def test_a_batch_without_counted_pixels_has_loss_and_gradient_zero(make: Callable[[], nn.Module]) -> None:
    logits = make_batch()[0].requires_grad_()
    loss = make()(logits, torch.full((2, 3, 4), IGNORED))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.abs().max() == 0.0


@pytest.mark.parametrize("make", LOSSES)
def test_certain_predictions_have_a_finite_gradient(make: Callable[[], nn.Module]) -> None:
    mask = torch.tensor([[[0, 1], [2, IGNORED]]])
    logits = (1000.0 * functional.one_hot(mask.clamp(max=3), CLASSES).permute(0, 3, 1, 2)).requires_grad_()
    loss = make()(logits, mask)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert logits.grad.isfinite().all()
