"""Timing of several calls in interleaved rounds, so that whatever disturbs the machine affects all of them."""

import gc
import logging
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader

logger = logging.getLogger(__name__)
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and extremes of some measurements, in their unit."""

    median: float
    lower: float
    upper: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Summarize at least one measurement; a single one is its own quartiles."""
        values = [*samples] * (2 if len(samples) == 1 else 1)
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper, min(samples), max(samples))


class Timings(NamedTuple, Generic[Key]):
    """Seconds per call, one sample for each round, or else why a call could not be measured, by key."""

    samples: dict[Key, list[float]]
    failures: dict[Key, str]


def core_count() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its queue; on a CPU there is nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(call: Callable[[], object], calls: int, device: torch.device, wait_each: bool = False) -> float:
    """Return the mean seconds of some calls; with `wait_each` after a synchronization each, which is their latency."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
        if wait_each:
            synchronize(device)
    synchronize(device)
    return (time.perf_counter() - start) / calls


def time_interleaved(
    calls: Mapping[Key, Callable[[], object]],
    device: torch.device,
    repeats: int,
    seconds: float,
    wait_each: bool = False,
) -> Timings[Key]:
    """Measure some calls in rounds; each round measures every call once, in a new order.

    Each sample follows an untimed call, because the other calls have left the caches cold. A first, discarded round
    finds out how many calls fill the least time. A call that raises is dropped from then on.
    """
    timings: Timings[Key] = Timings({key: [] for key in calls}, {})
    counts = dict.fromkeys(calls, 1)
    order = random.Random(0)  # the same in every run
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()  # so that no pause falls into a sample
    try:
        for number in range(repeats + 1):
            keys = [*timings.samples]
            order.shuffle(keys)
            for key in keys:
                try:
                    calls[key]()
                    sample = seconds_per_call(calls[key], counts[key], device, wait_each)
                except Exception as error:
                    timings.failures[key] = failure_reason(error)
                    del timings.samples[key]
                    continue
                if number == 0:
                    counts[key] = max(1, math.ceil(seconds / max(sample, 1e-9)))
                else:
                    timings.samples[key].append(sample)
    finally:
        if enabled:
            gc.enable()
    return timings


def failure_reason(error: Exception, compiling: bool = False) -> str:
    """Return in a few words why a call failed, or did not compile if the compiling one raised the error.

    The error itself is not kept, because its frames keep tensors alive.
    """
    logger.debug("a call failed", exc_info=error)
    text = str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError) or "DefaultCPUAllocator" in text:
        return "out of memory"
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    # The compiling call can also raise an error of the network itself.
    modules = [kind.__module__ for kind in type(error).__mro__]
    compiler = any(module.startswith(("torch._dynamo", "torch._inductor")) for module in modules)
    return f"does not compile: {line}" if compiling and compiler else line


def measure_throughput(loader: DataLoader[Any], seconds: float) -> float:
    """Return the images per second of a loader whose consumer only waits, until the first batch after some seconds."""
    start = time.perf_counter()
    arrivals: list[float] = []
    sizes: list[int] = []
    for batch in loader:
        arrivals.append(time.perf_counter())
        sizes.append(len(batch["image"]))
        if arrivals[-1] - start > seconds:
            break
    # All loader processes start together: the rate is that of the batches after the first one of each.
    first = max(1, loader.num_workers)
    if len(arrivals) > first:
        return sum(sizes[first:]) / (arrivals[-1] - arrivals[first - 1])
    return sum(sizes) / (arrivals[-1] - start)
