"""Times of several things that are measured in turns, so that what disturbs the machine disturbs all of them."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Spread:
    """What is typical of some measurements, and how far they lie apart; all in the unit of the measurements.

    Attributes:
        median: Half of them are less.
        lower: A quarter of them is less (the lower quartile).
        upper: A quarter of them is more (the upper quartile).
        minimum: The least.
        maximum: The most.
    """

    median: float
    lower: float
    upper: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Sum up one measurement or more."""
        # Of a single one, its own quartiles.
        lower, median, upper = statistics.quantiles([*samples] * (1 + (len(samples) == 1)), n=4, method="inclusive")
        return cls(median, lower, upper, min(samples), max(samples))

    @property
    def relative(self) -> float:
        """Half the distance of the quartiles as a fraction of the median."""
        return (self.upper - self.lower) / 2 / self.median


@dataclass(frozen=True)
class Timings(Generic[Key]):
    """What rounds have given.

    Attributes:
        samples: By key the seconds of a call, one number a round.
        failures: By key the error that ended its measurement.
    """

    samples: dict[Key, list[float]]
    failures: dict[Key, Exception]


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU has when a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_a_call(call: Callable[[], object], calls: int, device: torch.device, wait_each: bool = False) -> float:
    """Time some calls and return the seconds of one.

    Args:
        call: What is timed.
        calls: How many of them stand between two looks at the clock.
        device: Is waited for before each look at the clock.
        wait_each: Wait for it after each call, too, as somebody does who needs the answer.
    """
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
        if wait_each:
            synchronize(device)
    synchronize(device)
    return (time.perf_counter() - start) / calls


def time_in_turns(
    calls: Mapping[Key, Callable[[], object]],
    device: torch.device,
    repeats: int,
    seconds: float,
    wait_each: bool = False,
) -> Timings[Key]:
    """Measure some calls in rounds; each round has one measurement of each, in an order of its own.

    Before each look at the clock a call is made that is not timed, since the others have left caches cold. A first
    round is not counted: it says how many calls fill the least time. What raises an error is left out from there on,
    and the others go on.

    Args:
        calls: What is measured.
        device: What computes.
        repeats: Rounds that are counted.
        seconds: Least time of a measurement, which is filled with as many calls as it takes.
        wait_each: Wait for the device after each call, as for a latency.
    """
    timings: Timings[Key] = Timings({key: [] for key in calls}, {})
    counts = dict.fromkeys(calls, 1)
    order = random.Random(0)  # the same in every run
    with without_collection():
        for turn in range(repeats + 1):
            keys = [key for key in calls if key not in timings.failures]
            order.shuffle(keys)
            for key in keys:
                try:
                    calls[key]()
                    sample = seconds_a_call(calls[key], counts[key], device, wait_each)
                except Exception as error:
                    timings.failures[key] = without_frames(error)
                    continue
                if turn == 0:
                    counts[key] = max(1, math.ceil(seconds / max(sample, 1e-9)))
                else:
                    timings.samples[key].append(sample)
    return timings


def without_frames(error: Exception) -> Exception:
    """Take the frames that an error and its causes came through from them, since these hold tensors."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


@contextmanager
def without_collection() -> Iterator[None]:
    """Let Python collect no garbage for the time of a block, which it would do at any moment."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
