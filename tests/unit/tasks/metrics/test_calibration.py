import pytest
import torch
from small_tasks import calibration_error
from torch import Tensor
from torchmetrics.classification import MulticlassCalibrationError

from scalablevit_pl.tasks.metrics.calibration import CalibrationError


def measure(probabilities: Tensor, labels: list[int], bins: int = 15, batch: int = 3) -> float:
    metric = CalibrationError(bins)
    for part, label in zip(probabilities.split(batch), torch.tensor(labels).split(batch), strict=True):
        metric.update(part, label)
    return float(metric.compute())


@pytest.mark.parametrize("sharpness", [0.3, 2.0, 20.0])
def test_it_is_the_expected_calibration_error(sharpness: float) -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = (sharpness * torch.randn(500, 7, generator=generator)).softmax(1)
    labels = torch.randint(7, (500,), generator=generator).tolist()
    # torchmetrics counts in single precision. Only the confidence 1 lies on an edge here, where it uses another bin.
    expected = MulticlassCalibrationError(7, n_bins=15, norm="l1")(probabilities, torch.tensor(labels))
    result = measure(probabilities, labels)
    assert result == pytest.approx(calibration_error(probabilities, labels), rel=1e-12)
    assert result == pytest.approx(float(expected), abs=1e-6)


def test_a_bin_includes_its_upper_edge() -> None:
    # Exact in binary: 0.5 is the upper edge of the second of four bins, 0.75 that of the third.
    confidences = [0.5, 0.5, 0.75, 0.7, 0.625, 1.0, 1.0, 0.51]
    probabilities = torch.tensor([[value, 1.0 - value] for value in confidences], dtype=torch.float64)
    labels = [0, 0, 0, 1, 0, 0, 1, 1]
    assert measure(probabilities, labels, bins=4) == pytest.approx(calibration_error(probabilities, labels, 4), 1e-12)
    # Bins (0.25, 0.5], (0.5, 0.75] and (0.75, 1] by hand; with lower edges inside, 0.5 would be in a bin with 0.51.
    by_hand = (abs(2 - 1.0) + abs(2 - (0.75 + 0.7 + 0.625 + 0.51)) + abs(1 - 2.0)) / 8
    assert measure(probabilities, labels, bins=4) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize(("confidence", "error"), [(1.0, 0.0), (0.8, 0.2)])
def test_ece_is_one_minus_confidence_when_always_correct(confidence: float, error: float) -> None:
    probabilities = torch.tensor([[confidence, 1.0 - confidence]] * 10)
    assert measure(probabilities, [0] * 10) == pytest.approx(error, abs=1e-7)


def test_memory_does_not_grow_and_sums_are_exact_to_the_last_sample() -> None:
    metric = CalibrationError().to(torch.bfloat16)
    probabilities, label = torch.tensor([[0.75, 0.25]]).expand(1000, 2), torch.zeros(1000, dtype=torch.long)
    for _ in range(40):
        metric.update(probabilities, label)
    assert sum(getattr(metric, name).numel() for name in ("confidence", "accuracy", "samples")) == 45
    assert float(metric.compute()) == 0.25
    assert float(metric.samples.sum()) == 40_000
