import gc
from collections.abc import Callable

import pytest
import torch

from scalablevit_pl.profiling import timing
from scalablevit_pl.profiling.timing import Spread, seconds_a_call, time_in_turns

CPU = torch.device("cpu")


class Clock:
    """A clock that calls push forward, and a device that is waited for."""

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
    spread = Spread.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert spread == Spread(3.0, 2.0, 4.0, 1.0, 5.0)
    assert spread.relative == pytest.approx(1 / 3)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 2.0, 2.0)


def test_the_device_is_waited_for_around_calls_or_after_each(clock: Clock) -> None:
    assert seconds_a_call(clock.call("a", 2.0), 3, CPU) == pytest.approx(2.0)
    assert clock.log == ["wait", "a", "a", "a", "wait"]
    clock.log.clear()
    seconds_a_call(clock.call("a", 2.0), 2, CPU, wait_each=True)
    assert clock.log == ["wait", "a", "wait", "a", "wait", "wait"]


def test_each_round_measures_everything_in_another_order(clock: Clock) -> None:
    names = "abcde"
    timings = time_in_turns({name: clock.call(name, 1.0 + index) for index, name in enumerate(names)}, CPU, 6, 0.0)
    assert {name: set(samples) for name, samples in timings.samples.items()} == {
        name: {1.0 + index} for index, name in enumerate(names)
    }
    assert all(len(samples) == 6 for samples in timings.samples.values())
    calls = [name for name in clock.log if name != "wait"]
    rounds = [calls[start : start + 10] for start in range(0, len(calls), 10)]
    assert len(rounds) == 7  # the first is not counted, and before each sample a call is not timed
    assert all(sorted(set(order)) == [*names] for order in rounds)
    assert len(set(map(tuple, rounds))) > 3


def test_short_calls_are_repeated_until_they_fill_the_least_time(clock: Clock) -> None:
    timings = time_in_turns({"short": clock.call("short", 0.25), "long": clock.call("long", 3.0)}, CPU, 2, 1.0)
    assert clock.log.count("short") == 2 + 2 * (1 + 4)
    assert clock.log.count("long") == 2 + 2 * (1 + 1)
    assert timings.samples == {"short": [0.25, 0.25], "long": [3.0, 3.0]}


def test_what_a_cold_call_takes_counts_nowhere(clock: Clock) -> None:
    # A call after that of another takes ten times as long.
    def call(name: str, seconds: float) -> Callable[[], None]:
        def advance() -> None:
            cold = [entry for entry in clock.log if entry != "wait"][-1:] != [name]
            clock.call(name, seconds * (10 if cold else 1))()

        return advance

    timings = time_in_turns({"a": call("a", 0.25), "b": call("b", 0.5)}, CPU, 2, 1.0)
    assert timings.samples == {"a": [0.25] * 2, "b": [0.5] * 2}
    assert clock.log.count("a") >= 2 * 4  # as many as fill the time when they are warm


def test_errors_keep_no_frames() -> None:
    def fail() -> None:
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ValueError("second") from error

    failure = time_in_turns({"bad": fail}, CPU, 1, 0.0).failures["bad"]
    assert failure.__traceback__ is None
    assert failure.__cause__ is not None
    assert failure.__cause__.__traceback__ is None


def test_what_fails_is_left_out_and_the_others_go_on(clock: Clock) -> None:
    tries: list[int] = []

    def fail() -> None:
        tries.append(1)
        if len(tries) == 4:
            raise RuntimeError("no more")

    timings = time_in_turns({"bad": fail, "good": clock.call("good", 1.0)}, CPU, 4, 0.0)
    assert len(tries) == 4
    assert str(timings.failures["bad"]) == "no more"
    assert timings.samples["good"] == [1.0] * 4
    assert set(timings.failures) == {"bad"}


def test_no_garbage_is_collected_while_time_is_taken() -> None:
    enabled: list[bool] = []
    time_in_turns({"a": lambda: enabled.append(gc.isenabled())}, CPU, 2, 0.0)
    assert enabled == [False] * 6
    assert gc.isenabled()
