import math

import pytest
import torch

from scalablevit_pl.tasks.metrics.averages import SUM_DTYPE, SampleAverages, SampleCount


def test_averages_are_over_samples_whatever_the_batches() -> None:
    logits = torch.randn(11, 7, generator=torch.Generator().manual_seed(0))
    label = torch.arange(11) % 7
    metric = SampleAverages((1, 5))
    for part, labels in zip(logits.split(4), label.split(4), strict=True):
        metric.update(part, labels)
    ranks = (logits > logits[range(11), label, None]).sum(dim=1)
    expected = {
        "loss": torch.nn.functional.cross_entropy(logits.double(), label).item(),
        "top1": (ranks < 1).double().mean().item(),
        "top5": (ranks < 5).double().mean().item(),
    }
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(expected, rel=1e-6)


def test_a_nan_loss_makes_the_average_nan() -> None:
    metric = SampleAverages((1,))
    metric.update(torch.tensor([[2.0, 1.0], [math.nan, 1.0]]), torch.tensor([0, 0]))
    assert metric.compute()["loss"].isnan()


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="Apple's GPUs lack float64")
def test_the_number_of_samples_grows_beyond_single_precision() -> None:
    metric = SampleCount()
    metric.update(2**24)
    metric.update(1)
    assert metric.compute().item() == 2**24 + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_keep_their_type_when_the_network_s_changes(dtype: torch.dtype) -> None:
    metric = SampleAverages((1,))
    metric.hits = metric.hits + 100.5
    torch.nn.ModuleDict({"metric": metric}).to(dtype)
    assert (metric.hits.dtype, metric.hits.tolist()) == (SUM_DTYPE, [100.5])
    metric.reset()
    assert (metric.hits.dtype, metric.hits.tolist()) == (SUM_DTYPE, [0.0])
