"""Which process sees which sample."""

import math
from collections.abc import Iterator, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from scalablevit_pl.randomness import derive_seed

FILLER = -1  # position of a sample that is not counted


class Draw(NamedTuple):
    """One sample of a training epoch. With the seed, it determines the sample's augmentation.

    Attributes:
        epoch: The epoch, from 0.
        position: Which image.
        repeat: How often the image was drawn before in this epoch.
    """

    epoch: int
    position: int
    repeat: int


class TrainingSampler(DistributedSampler[Any]):
    """The share of a process in an epoch, shuffled by (seed, epoch) only; an incomplete last batch is left out.

    A batch over all processes is the same set of samples for any number of processes. With `repeats` above 1, an epoch
    keeps its number of samples but draws fewer images, each of them that often and augmented anew (repeated
    augmentation, Hoffer et al. 2020, arXiv 1901.09335). Copies of an image are adjacent, so they go to different
    processes if there are enough. The base class keeps Lightning from replacing the sampler.

    Args:
        images: Number of images.
        batch_size: Samples of a batch on each process.
        processes: Number of processes.
        rank: This process.
        seed: Seed of the order.
        repeats: How often an image is drawn in an epoch.
        epoch: Epoch to start with.
        batch: Batch of that epoch to start with; earlier ones still count in the length.
        weights: How probable each image is, in proportion, if images are drawn with replacement; None for a shuffle.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        processes: int = 1,
        rank: int = 0,
        seed: int = 0,
        repeats: int = 1,
        epoch: int = 0,
        batch: int = 0,
        weights: Tensor | None = None,
    ) -> None:
        super().__init__(range(images), num_replicas=processes, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.images = images
        self.length = images // (batch_size * processes) * batch_size
        self.repeats = repeats
        self.epoch = epoch
        self.start = (epoch, batch * batch_size)
        self.weights = weights

    def __iter__(self) -> Iterator[Draw]:
        order, before = self._order()
        first = self.start[1] if self.epoch == self.start[0] else 0
        for number in range(first, self.length):
            place, repeat = divmod(number * self.num_replicas + self.rank, self.repeats)
            yield Draw(self.epoch, int(order[place]), int(before[place]) * self.repeats + repeat)

    def _order(self) -> tuple[Tensor, Tensor]:
        """Draw the images of the epoch, and count how often each was drawn before."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        if self.weights is None:
            return torch.randperm(self.images, generator=generator), torch.zeros(self.images, dtype=torch.long)
        order = torch.multinomial(self.weights, self.images, replacement=True, generator=generator)
        by_image, before = order.argsort(stable=True), torch.empty_like(order)
        before[by_image] = torch.arange(self.images) - torch.searchsorted(order[by_image], order[by_image])
        return order, before

    def __len__(self) -> int:
        return self.length


class EvaluationSampler(DistributedSampler[Any]):
    """Each sample exactly once over all processes, and equally many positions on each process.

    torch's own DistributedSampler repeats samples to make the processes' shares equal. This one adds fillers, which are
    not counted. With equally many batches, no process waits for one that has none left.

    Args:
        dataset: Gives the number of samples.
        num_replicas: Number of processes.
        rank: This process.
    """

    def __init__(self, dataset: Sized, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
        own = range(rank, len(dataset), num_replicas)
        share = math.ceil(len(dataset) / num_replicas)
        self.positions = [*own, *[FILLER] * (share - len(own))]

    def __iter__(self) -> Iterator[int]:
        return iter(self.positions)

    def __len__(self) -> int:
        return len(self.positions)
