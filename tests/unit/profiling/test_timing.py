import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from scalablevit_pl.profiling import timing
from scalablevit_pl.profiling.timing import (
    Spread,
    failure_reason,
    measure_throughput,
    seconds_per_call,
    time_interleaved,
)

CPU = torch.device("cpu")


class Clock:
    """A clock that calls advance, and a device that is synchronized."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def call(self, name: str, seconds: float) -> Callable[[], None]:
        def advance() -> None:
            self.log.append(name)
            self.now += seconds

        return advance


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(timing, "synchronize", lambda device: clock.log.append("wait"))
    return clock


def test_a_spread_has_median_and_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0, 1.0, 5.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 2.0, 2.0)


def test_the_device_is_synchronized_around_calls_or_after_each(clock: Clock) -> None:
    assert seconds_per_call(clock.call("a", 2.0), 3, CPU) == pytest.approx(2.0)
    assert clock.log == ["wait", "a", "a", "a", "wait"]
    clock.log.clear()
    seconds_per_call(clock.call("a", 2.0), 2, CPU, wait_each=True)
    assert clock.log == ["wait", "a", "wait", "a", "wait", "wait"]


def test_each_round_measures_every_call_in_a_new_order(clock: Clock) -> None:
    names = "abcde"
    timings = time_interleaved({name: clock.call(name, 1.0 + index) for index, name in enumerate(names)}, CPU, 6, 0.0)
    assert {name: set(samples) for name, samples in timings.samples.items()} == {
        name: {1.0 + index} for index, name in enumerate(names)
    }
    assert all(len(samples) == 6 for samples in timings.samples.values())
    calls = [name for name in clock.log if name != "wait"]
    rounds = [calls[start : start + 10] for start in range(0, len(calls), 10)]
    assert len(rounds) == 7  # the first is discarded, and each sample follows an untimed call
    assert all(sorted(set(order)) == [*names] for order in rounds)
    assert len(set(map(tuple, rounds))) > 3


def test_short_calls_are_repeated_until_they_fill_the_least_time(clock: Clock) -> None:
    timings = time_interleaved({"short": clock.call("short", 0.25), "long": clock.call("long", 3.0)}, CPU, 2, 1.0)
    assert clock.log.count("short") == 2 + 2 * (1 + 4)
    assert clock.log.count("long") == 2 + 2 * (1 + 1)
    assert timings.samples == {"short": [0.25, 0.25], "long": [3.0, 3.0]}


def test_cold_calls_are_not_timed(clock: Clock) -> None:
    # The first call after a different one takes ten times as long.
    def call(name: str, seconds: float) -> Callable[[], None]:
        def advance() -> None:
            cold = [entry for entry in clock.log if entry != "wait"][-1:] != [name]
            clock.call(name, seconds * (10 if cold else 1))()

        return advance

    timings = time_interleaved({"a": call("a", 0.25), "b": call("b", 0.5)}, CPU, 2, 1.0)
    assert timings.samples == {"a": [0.25] * 2, "b": [0.5] * 2}
    assert clock.log.count("a") >= 2 * 4  # enough to fill the time when warm


def test_failures_keep_no_tensors() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def fail() -> None:
        tensor = torch.ones(3)
        held.append(weakref.ref(tensor))
        raise ValueError("second")

    assert time_interleaved({"bad": fail}, CPU, 1, 0.0).failures == {"bad": "second"}
    assert held[0]() is None


def test_only_errors_of_the_compiler_are_attributed_to_it() -> None:
    for module in ("torch._dynamo.exc", "torch._inductor.exc"):  # importing them takes seconds
        error = type("Failed", (RuntimeError,), {"__module__": module})
        assert failure_reason(error("no compiler"), True) == "does not compile: no compiler"
        assert failure_reason(error("no compiler")) == "no compiler"
    assert failure_reason(ValueError("no such images"), True) == "no such images"


def test_a_failing_call_is_dropped_and_the_others_continue(clock: Clock) -> None:
    tries: list[int] = []

    def fail() -> None:
        tries.append(1)
        if len(tries) == 4:
            raise RuntimeError("no more")

    timings = time_interleaved({"bad": fail, "good": clock.call("good", 1.0)}, CPU, 4, 0.0)
    assert len(tries) == 4
    assert timings.failures == {"bad": "no more"}
    assert timings.samples == {"good": [1.0] * 4}


def test_garbage_collection_is_disabled_while_timing() -> None:
    enabled: list[bool] = []
    time_interleaved({"a": lambda: enabled.append(gc.isenabled())}, CPU, 2, 0.0)
    assert enabled == [False] * 6
    assert gc.isenabled()


def test_throughput_starts_after_the_first_batch_of_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    class Batches(list[dict[str, list[int]]]):
        num_workers = 2

    # The start, and the arrivals of batches of 8, 4, 2, 6 and 7 images; the last one is never loaded.
    moments = iter([100.0, 103.0, 103.5, 104.0, 105.5, 999.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(moments))
    batches = Batches({"image": [0] * size} for size in (8, 4, 2, 6, 7))
    assert measure_throughput(batches, 5.0) == pytest.approx((2 + 6) / (105.5 - 103.5))
    moments = iter([100.0, 103.0, 104.0])
    assert measure_throughput(Batches(batches[:2]), 5.0) == pytest.approx(12 / 4.0)
