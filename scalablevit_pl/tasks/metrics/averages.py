"""Sums over the samples of an evaluation, the same on any number of processes."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MultilabelAveragePrecision
from torchmetrics.utilities import dim_zero_cat

SUM_DTYPE = torch.float32 if torch.backends.mps.is_available() else torch.float64  # Apple's GPUs lack float64


class SampleSums(Metric):
    """A metric whose states are sums over samples, in double precision.

    Sums in half or single precision stop growing, so the states keep their type when the network's changes.
    """

    full_state_update = False

    def add_sum(self, name: str, *shape: int) -> None:
        """Add a state of zeros of that shape, summed over the processes."""
        self.add_state(name, torch.zeros(shape, dtype=SUM_DTYPE), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> Self:
        dtypes = {name: default.dtype for name, default in self._defaults.items()}  # type: ignore[union-attr]
        super()._apply(fn, *args)
        for name, dtype in dtypes.items():
            self._defaults[name] = self._defaults[name].to(dtype)  # type: ignore[union-attr]
            setattr(self, name, getattr(self, name).to(dtype))
        return self


class SampleCount(SampleSums):
    """Number of samples."""

    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_sum("samples")

    def update(self, count: int) -> None:
        """Add samples."""
        self.samples = self.samples + count

    def compute(self) -> Tensor:
        """Return the number of samples."""
        return self.samples


class SampleAverages(SampleSums):
    """Mean cross-entropy and top-k accuracies over samples; a NaN loss makes the mean NaN.

    Args:
        tops: For each accuracy `topK`, the number K of most probable classes that count as an answer.
    """

    losses: Tensor
    hits: Tensor
    samples: Tensor

    def __init__(self, tops: Sequence[int]) -> None:
        super().__init__()
        self.tops = tops
        self.add_sum("losses")
        self.add_sum("hits", len(tops))
        self.add_sum("samples")

    def update(self, logits: Tensor, label: Tensor) -> None:
        """Add a batch of logits `(B, K)` and labels `(B,)`."""
        losses = F.cross_entropy(logits, label, reduction="none").to(SUM_DTYPE)
        hits = logits.topk(max(self.tops), dim=1).indices == label[:, None]
        self.losses = self.losses + losses.sum()
        self.hits = self.hits + torch.stack([hits[:, :top].sum() for top in self.tops]).to(SUM_DTYPE)
        self.samples = self.samples + len(label)

    def compute(self) -> dict[str, Tensor]:
        """Return `loss` and `topK` for each K."""
        accuracies = zip(self.tops, self.hits / self.samples, strict=True)
        return {"loss": self.losses / self.samples, **{f"top{top}": value for top, value in accuracies}}


class MeanAveragePrecision(MultilabelAveragePrecision):
    """Mean of the average precisions of the classes that have samples."""

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather probabilities and labels `(B, K)` of all processes."""
        # From a process without samples, torchmetrics would gather a tensor of another shape and type.
        empty = torch.empty(0, self.num_labels, dtype=torch.long, device=self.device)
        self.preds.append(empty.float())
        self.target.append(empty)
        super().sync(*args, **kwargs)

    def compute(self) -> Tensor:  # type: ignore[override]
        """Return the mean."""
        with warnings.catch_warnings(action="ignore"):  # about classes without samples
            precisions = super().compute()
        return precisions[dim_zero_cat(self.target).any(dim=0)].mean()


class WeightedMean(SampleSums):
    """Mean of values that are added as sums; NaN without any."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_sum("total")
        self.add_sum("count")

    def update(self, total: Tensor, count: Tensor | int) -> None:
        """Add the sum of some values, and their number."""
        self.total = self.total + total
        self.count = self.count + count

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.count


def gather_sums(metric: Any, all_gather: Callable[[Tensor], Any]) -> dict[str, Tensor]:
    """Return the states of a metric of all processes, `(processes, …)` each; a collective call."""
    states = {name: getattr(metric, name) for name in metric._defaults}
    return {name: all_gather(value).reshape(-1, *value.shape).cpu() for name, value in states.items()}


def restore_sums(metric: Any, states: Mapping[str, Tensor], processes: int, rank: int) -> None:
    """Restore what `gather_sums` returned: each process its own, or the first one all if their number changed."""
    mark_updated(metric)
    for name, sums in states.items():
        of_all = (sums if rank == 0 else sums[:0]).sum(dim=0)
        setattr(metric, name, (sums[rank] if len(sums) == processes else of_all).to(metric.device))


def mark_updated(metric: Any) -> None:
    """Let torchmetrics compute a metric without samples on this process, or restored from sums, without a warning."""
    metric._update_count = max(1, metric._update_count)
