"""Which process sees which sample."""

from collections.abc import Iterator, Sized
from typing import Any

from torch.utils.data import DistributedSampler


class EvaluationSampler(DistributedSampler[Any]):
    """Each sample exactly once over all processes, so that metrics count nothing twice.

    torch's own DistributedSampler repeats samples until all processes have equally many. This one is derived from it so
    that Lightning knows it and does not put another in its place.

    Args:
        dataset: Gives the number of samples.
        num_replicas: Number of processes.
        rank: This process.
    """

    def __init__(self, dataset: Sized, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.indices = range(rank, len(dataset), num_replicas)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
