"""How many images a second a loader gives."""

import time
from typing import Any

from torch.utils.data import DataLoader


def time_loader(loader: DataLoader[Any], seconds: float) -> float:
    """Return the images a second that a loader gives to somebody who only waits for them.

    Args:
        loader: Is begun, and left after that time.
        seconds: How long it is watched; the batch that is on its way then is waited for.
    """
    start = time.perf_counter()
    arrivals: list[float] = []
    sizes: list[int] = []
    for batch in loader:
        arrivals.append(time.perf_counter())
        sizes.append(len(batch["image"]))
        if arrivals[-1] - start > seconds:
            break
    # All loader processes begin at once: what comes after the first batch of each is their pace.
    first = max(1, loader.num_workers)
    if len(arrivals) > first:
        return sum(sizes[first:]) / (arrivals[-1] - arrivals[first - 1])
    return sum(sizes) / (arrivals[-1] - start)
