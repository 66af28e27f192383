"""The confusion matrix against loops over the pixels, and against torchmetrics."""

import math

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

from scalablevit_pl.tasks.metrics.averages import gather_sums, restore_sums
from scalablevit_pl.tasks.metrics.confusion import ConfusionMatrix, class_scores

CLASSES, IGNORED = 6, 255
# In truth and prediction, only in the truth, only in the prediction, in neither.
BOTH, TRUE, PREDICTED = (0, 1, 2), (3,), (4,)


def draw(classes: tuple[int, ...], *shape: int, seed: int = 0) -> Tensor:
    drawn = torch.randint(len(classes), shape, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(classes, dtype=torch.uint8)[drawn]


def make_pixels() -> tuple[Tensor, Tensor]:
    truth = draw((*BOTH, *TRUE, IGNORED), 5, 11, 7)
    predicted = draw((*BOTH, *PREDICTED), 5, 11, 7, seed=1)
    return torch.where(draw((0, 1), 5, 11, 7, seed=2) == 1, truth.where(truth < 3, 0), predicted), truth


def count(predicted: Tensor, truth: Tensor) -> list[list[int]]:
    matrix = [[0] * CLASSES for _ in range(CLASSES)]
    for guess, true in zip(predicted.flatten().tolist(), truth.flatten().tolist(), strict=True):
        if true != IGNORED:
            matrix[true][guess] += 1
    return matrix


def measure(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """Loop over the classes and the pixels."""
    pairs = [
        (g, t) for g, t in zip(predicted.flatten().tolist(), truth.flatten().tolist(), strict=True) if t != IGNORED
    ]
    ious, accuracies = [], []
    for name in range(CLASSES):
        hits = sum(guess == true == name for guess, true in pairs)
        union = sum(name in pair for pair in pairs)
        true = sum(true == name for _, true in pairs)
        ious += [hits / union] if union else []
        accuracies += [hits / true] if true else []
    right = sum(guess == true for guess, true in pairs)
    means = {"miou": sum(ious) / len(ious), "macc": sum(accuracies) / len(accuracies)}
    return means | {"aacc": right / len(pairs), "pixels": len(pairs)}


def test_it_is_a_loop_over_the_pixels_whatever_the_batches() -> None:
    predicted, truth = make_pixels()
    metric = ConfusionMatrix(CLASSES)
    for guess, true in zip(predicted.split(2), truth.split(2), strict=True):
        metric.update(guess, true)
    assert metric.matrix.dtype == torch.int64
    assert metric.matrix.tolist() == count(predicted, truth)
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found == pytest.approx(measure(predicted, truth), rel=1e-12)


def test_the_iou_is_that_of_torchmetrics() -> None:
    predicted, truth = make_pixels()
    metric, other = ConfusionMatrix(CLASSES), MulticlassJaccardIndex(CLASSES, ignore_index=IGNORED)
    metric.update(predicted, truth)
    assert metric.compute()["miou"].item() == pytest.approx(other(predicted.long(), truth.long()).item(), abs=1e-6)


def test_classes_without_pixels_have_no_iou() -> None:
    metric = ConfusionMatrix(CLASSES)
    metric.update(*make_pixels())
    iou, accuracy, pixels = class_scores(metric.matrix)
    assert iou.isnan().tolist() == [False] * 5 + [True]
    assert (iou[3], iou[4]) == (0.0, 0.0)
    assert accuracy.isnan().tolist() == [False] * 4 + [True] * 2
    assert pixels.sum() == metric.compute()["pixels"] == (make_pixels()[1] != IGNORED).sum()


def test_nothing_is_counted_where_all_is_ignored() -> None:
    metric, truth = ConfusionMatrix(CLASSES), torch.full((2, 3, 3), IGNORED)
    metric.update(torch.zeros(2, 3, 3, dtype=torch.uint8), truth)
    found = metric.compute()
    assert found["pixels"] == 0
    assert all(math.isnan(found[name]) for name in ("miou", "macc", "aacc"))
    metric.update(torch.zeros(1, 1, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.uint8))
    assert metric.compute()["miou"] == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_counts_stay_whole_numbers_in_any_precision(dtype: torch.dtype) -> None:
    metric = ConfusionMatrix(2)
    metric.matrix[0, 0] = 2**53  # the next whole number has no float64
    module = nn.ModuleDict({"confusion": metric, "layer": nn.Linear(1, 1)}).to(dtype)
    metric.update(torch.zeros(3, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8))
    assert module["layer"].weight.dtype == dtype
    assert metric.matrix.tolist() == [[2**53 + 3, 0], [0, 0]]
    assert metric.compute()["miou"] == 1.0


def test_a_checkpoint_restores_the_counts_of_each_process() -> None:
    first, second = ConfusionMatrix(3), ConfusionMatrix(3)
    first.update(torch.tensor([0, 1]), torch.tensor([0, 2]))
    second.update(torch.tensor([2, 2]), torch.tensor([2, IGNORED]))
    states = gather_sums(first, lambda value: torch.stack([value, second.matrix]))
    for processes, rank, expected in (
        (2, 0, first.matrix),
        (2, 1, second.matrix),
        (1, 0, first.matrix + second.matrix),
    ):
        restored = ConfusionMatrix(3)
        restore_sums(restored, states, processes, rank)
        assert restored.matrix.dtype == torch.int64
        assert torch.equal(restored.matrix, expected)
