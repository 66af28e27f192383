"""Averages over the samples of an evaluation, the same on any number of processes."""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric


class SampleSums(Metric):
    """A metric whose states are sums over samples, in double precision.

    Sums of halves or singles stop growing; a network in such a precision must not take its metrics along.
    """

    full_state_update = False

    def add_sum(self, name: str, *shape: int) -> None:
        """Add a state of that shape which begins with zeros and is summed over the processes."""
        # Apple's GPUs do not have doubles.
        dtype = torch.float32 if torch.backends.mps.is_available() else torch.float64
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> Self:
        dtypes = {name: default.dtype for name, default in self._defaults.items()}  # type: ignore[union-attr]
        super()._apply(fn, *args)
        for name, dtype in dtypes.items():
            self._defaults[name] = self._defaults[name].to(dtype)  # type: ignore[union-attr]
            setattr(self, name, getattr(self, name).to(dtype))
        return self


class SampleAverages(SampleSums):
    """Mean cross-entropy, top-1 and top-k accuracy over samples, and how many samples there were.

    A loss that is not a number makes the average none, too.

    Args:
        top: How many of the heaviest classes count as an answer for the second accuracy, called `top5`.
    """

    losses: Tensor
    hits: Tensor
    samples: Tensor

    def __init__(self, top: int) -> None:
        super().__init__()
        self.top = top
        self.add_sum("losses")
        self.add_sum("hits", 2)
        self.add_sum("samples")

    def update(self, logits: Tensor, label: Tensor, counted: Tensor) -> None:
        """Add a batch of logits `(B, K)` and labels `(B,)`, of which those `counted (B,)` are meant."""
        dtype = self.samples.dtype
        # Zeros in place of what does not count, and not products with zeros: they would keep what is not a number.
        losses = F.cross_entropy(logits, label, reduction="none").to(dtype).where(counted, 0.0)
        right = (logits.topk(self.top, dim=1).indices == label[:, None]) & counted[:, None]
        self.losses = self.losses + losses.sum()
        self.hits = self.hits + torch.stack([right[:, 0].sum(), right.sum()]).to(dtype)
        self.samples = self.samples + counted.sum().to(dtype)

    def compute(self) -> dict[str, Tensor]:
        """Return `loss`, `top1`, `top5` and `samples`."""
        top1, top5 = self.hits / self.samples
        return {"loss": self.losses / self.samples, "top1": top1, "top5": top5, "samples": self.samples}
