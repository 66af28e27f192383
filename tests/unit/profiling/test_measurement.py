import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from scalablevit_pl.profiling import measurement, networks
from scalablevit_pl.profiling.measurement import Plan, Result, best_rate, matrix_calls, measure
from scalablevit_pl.profiling.networks import Setting
from scalablevit_pl.profiling.timing import Spread

CPU = torch.device("cpu")
PLAN = Plan(repeats=3, seconds=0.0, warmup=2)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measurement.SIDES, "cpu", (16, 32))


class Linear(nn.Module):
    """A linear layer on the sum of the pixels, which can raise an error after some calls."""

    num_classes = 8

    def __init__(self, error: Exception | None = None, after: int = 0) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 8)
        self.error, self.left = error, after

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        if self.error is not None and image.device.type != "meta":
            self.left -= 1
            if self.left < 0:
                raise self.error
        output: torch.Tensor = self.fc(image.sum((2, 3)))
        return output


def builder(**built: nn.Module) -> Callable[[Setting], nn.Module]:
    return lambda setting: built[setting.network]


def test_results_hold_counts_times_memory_and_the_matrix_rate() -> None:
    settings = [Setting("a", mode, batch_size=2, input_size=(4, 6)) for mode in ("inference", "train")]
    for result, passes in zip(measure(settings, CPU, PLAN, lambda setting: Linear()), (1, 3), strict=True):
        assert (result.parameters, result.multiply_adds, result.attention_multiply_adds) == (32, 24, 0)
        assert len(result.samples) == 3
        assert result.seconds == Spread.of(result.samples)
        assert result.images_per_second == pytest.approx(2 / result.seconds.median)
        assert set(result.matrix_seconds) == {16, 32}
        operations = 2 * 24 * 2 * passes / result.seconds.median
        assert result.fraction_of_matrix_rate == pytest.approx(operations / best_rate(result.matrix_seconds))
        images = 2 * 3 * 4 * 6 * 4
        assert 32 * 4 + images < result.peak_memory < 32 * 4 * passes + images + 3000
        assert (result.note, result.compile_seconds) == ("", None)


def test_matrix_rates_are_of_the_same_type(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = {torch.float32: 16, torch.bfloat16: 32}
    monkeypatch.setattr(measurement, "matrix_calls", lambda dtype, _: {sides[dtype]: lambda: None})
    results = measure(
        [Setting("a", precision=precision) for precision in ("32", "bf16")], CPU, PLAN, lambda _: Linear()
    )
    assert [{*result.matrix_seconds} for result in results] == [{16}, {32}]


def test_attention_counts_in_the_fraction() -> None:
    rate = {50: 0.25}  # a million operations per second
    spread = Spread.of([0.5])
    for attention, expected in ((0, 0.04), (10_000, 0.12)):
        result = Result(Setting("a", batch_size=2), "", 1, 5_000, attention, [0.5], spread, matrix_seconds=rate)
        assert result.fraction_of_matrix_rate == pytest.approx(expected)


def test_a_failing_case_has_a_note_and_does_not_stop_the_others() -> None:
    memory = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    built = builder(
        good=Linear(),
        large=Linear(memory),
        later=Linear(memory, after=7),
        host=Linear(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")),
        odd=Linear(ValueError("does not take\nsuch images")),
    )
    names = ["large", "host", "odd", "missing", "later", "good"]
    results = measure([Setting(name) for name in names], CPU, PLAN, built)
    assert {result.setting.network: result.note for result in results} == {
        "good": "",
        "large": "out of memory",
        "later": "out of memory",
        "host": "out of memory",
        "odd": "does not take",
        "missing": "'missing'",
    }
    for result in results:
        assert (result.images_per_second is not None) == (result.setting.network == "good")
        assert (result.fraction_of_matrix_rate is not None) == (result.setting.network == "good")


class Uncountable(Linear):
    """Cannot be traced on the meta device."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        if image.device.type == "meta":
            raise NotImplementedError("no meta kernel")
        return super().forward(image)


def test_a_network_that_cannot_be_counted_is_still_timed() -> None:
    [result] = measure([Setting("a")], CPU, PLAN, lambda setting: Uncountable())
    assert (result.multiply_adds, result.attention_multiply_adds, result.note) == (None, None, "")
    assert result.seconds is not None
    assert result.fraction_of_matrix_rate is None


def test_tf32_is_disabled_during_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> tuple[bool, bool, str]:
        convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        return convolutions, products, torch.get_float32_matmul_precision()

    seen: set[object] = set()

    class Watch(Linear):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            seen.add(state())
            return super().forward(image)

    before = state()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        measure([Setting("a")], CPU, PLAN, lambda setting: Watch())
        assert seen == {(False, False, "highest")}
        assert state() == (True, True, "high")
    finally:
        torch.set_float32_matmul_precision(before[2])
        torch.backends.cudnn.allow_tf32 = before[0]


@pytest.mark.slow  # importing torch's compiler alone takes seconds
def test_compiled_networks_report_the_time_of_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[object] = []

    def compiler(graph: Callable[..., object], inputs: object) -> Callable[..., object]:
        graphs.append(inputs)
        if len(graphs) > 10:
            raise RuntimeError("no compiler here\nand more")
        return graph

    monkeypatch.setattr(networks, "COMPILER", compiler)
    # More than the default limit of compilations of the same code.
    sides = range(2, 13)
    built = builder(**{f"n{side}": nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, side)) for side in sides})
    settings = [Setting(f"n{side}", compiled=True, input_size=(4, 4)) for side in sides]
    *good, bad = measure(settings, CPU, PLAN, built)
    assert len(graphs) == 11
    assert all(result.compile_seconds > 0.0 and not result.note for result in good)
    assert bad.note.startswith("does not compile: ")
    assert bad.note.endswith("no compiler here")
    assert bad.seconds is None


def test_cases_of_one_batch_and_size_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[set[object]] = []
    inner = measurement.time_interleaved

    def spy(calls, device, repeats, seconds, wait_each):  # type: ignore[no-untyped-def]
        groups.append({*calls, wait_each})
        return inner(calls, device, repeats, seconds, wait_each)

    monkeypatch.setattr(measurement, "time_interleaved", spy)
    settings = [Setting(name, batch_size=batch, precision="bf16") for batch in (1, 2) for name in "ab"]
    results = measure(settings[::-1], CPU, PLAN, lambda setting: Linear())
    matrices = {("bf16", 16), ("bf16", 32)}
    assert groups == [{*settings[:2], *matrices, True}, {*settings[2:], *matrices, False}]
    assert {result.setting for result in results} == {*settings}


def test_the_matrix_rate_is_that_of_the_best_product() -> None:
    assert best_rate({10: 1.0, 100: 10.0}) == 2e5
    assert best_rate({10: 0.001, 100: 10.0}) == 2e6
    calls = matrix_calls(torch.bfloat16, CPU)
    product = calls[32]()
    assert isinstance(product, torch.Tensor)
    assert (product.shape, product.dtype) == ((32, 32), torch.bfloat16)
    assert math.isfinite(product.sum().item())


def test_sides_without_memory_and_above_a_slow_one_are_omitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measurement.SIDES, "cpu", (1, 2, 3, 4))
    inner, made = measurement._product, list[int]()

    def product(side: int, *arguments: Any) -> Callable[[], object]:
        made.append(side)
        if side == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return inner(side, *arguments)

    monkeypatch.setattr(measurement, "_product", product)
    monkeypatch.setattr(measurement, "seconds_per_call", lambda *_: 0.9 if made[-1] < 3 else 1.1)
    assert [*matrix_calls(torch.float32, CPU)] == [2, 3]
    assert made == [1, 2, 3]


@pytest.mark.parametrize("left", [(), (16,)])
def test_failing_products_do_not_count_in_the_matrix_rate(
    left: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = matrix_calls(torch.float32, CPU)

    def fail() -> object:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(
        measurement, "matrix_calls", lambda *_: {side: call if side in left else fail for side, call in inner.items()}
    )
    [result] = measure([Setting("a")], CPU, PLAN, lambda setting: Linear())
    assert result.seconds is not None
    assert tuple(result.matrix_seconds) == left
    assert (result.fraction_of_matrix_rate is not None) == bool(left)
