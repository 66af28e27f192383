"""Measurement of several networks in several settings, in one run and interleaved."""

import gc
import logging
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import attrgetter

import torch
from torch import nn
from torch.nn import functional as F

from scalablevit_pl.models.cost import count_multiply_adds, count_norms, peak_memory
from scalablevit_pl.profiling.networks import DTYPES, PASSES, Build, Setting, build_network, image_shape, prepare
from scalablevit_pl.profiling.timing import (
    Spread,
    Timings,
    failure_reason,
    seconds_per_call,
    synchronize,
    time_interleaved,
)

logger = logging.getLogger(__name__)
# Sides of square matrices. The best of several is taken: too low a reference would flatter the networks.
SIDES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
# If a product takes more seconds than this, no larger one is tried: some processors emulate a type slowly.
LONGEST = 1.0
Key = Setting | tuple[str, int]  # a case, or precision and side of a matrix product


@dataclass(frozen=True)
class Plan:
    """Length of a measurement: rounds, least seconds of a sample, and steps of each case before the first round."""

    repeats: int = 10
    seconds: float = 0.1
    warmup: int = 3


@dataclass(frozen=True)
class Result:
    """Measurements of a case; None where it failed or a value does not apply.

    `report.CONVENTIONS` defines the quantities.

    Attributes:
        note: Why there are no times, or empty.
        samples: Seconds per call, one sample for each round.
        seconds: Their spread.
        matrix_seconds: Median seconds of matrix products of the same type in the same rounds, by their side.
    """

    setting: Setting
    note: str = ""
    parameters: int | None = None
    multiply_adds: int | None = None
    attention_multiply_adds: int | None = None
    samples: Sequence[float] = field(default_factory=tuple)
    seconds: Spread | None = None
    peak_memory: int | None = None
    compile_seconds: float | None = None
    matrix_seconds: Mapping[int, float] = field(default_factory=dict)
    norm_multiply_adds: int | None = None

    @property
    def images_per_second(self) -> float | None:
        """Throughput at the median time."""
        return self.setting.batch_size / self.seconds.median if self.seconds else None

    @property
    def matrix_rate(self) -> float | None:
        """Operations per second of the best matrix product; None if large networks left no memory for any."""
        return best_rate(self.matrix_seconds) if self.matrix_seconds else None

    @property
    def fraction_of_matrix_rate(self) -> float | None:
        """Operations per second as a fraction of those of matrix products on the same device."""
        if self.seconds is None or self.matrix_rate is None or self.multiply_adds is None:
            return None
        multiply_adds = self.multiply_adds + (self.attention_multiply_adds or 0)
        operations = 2 * multiply_adds * PASSES[self.setting.mode] * self.setting.batch_size
        return operations / self.seconds.median / self.matrix_rate


def measure(
    settings: Iterable[Setting], device: torch.device, plan: Plan, build: Build = build_network
) -> list[Result]:
    """Measure every case; those of the same batch and input size are interleaved, with matrix products.

    A case that cannot be built, compiled or run has a result with a note.
    """
    results: list[Result] = []
    key = attrgetter("batch_size", "input_size")
    with full_float32():
        for (batch_size, input_size), group in groupby(sorted(settings, key=key), key):
            cases = list(group)
            logger.info("%d case(s) at batch %d, %d×%d", len(cases), batch_size, *input_size)
            results += _measure_group(cases, device, plan, build)
    return results


@contextmanager
def full_float32() -> Iterator[None]:
    """Disable TF32 inside the block.

    By default torch uses TF32 for convolutions but not for matrix products, which would distort the comparison.
    """
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


def _measure_group(settings: Sequence[Setting], device: torch.device, plan: Plan, build: Build) -> list[Result]:
    steps: dict[Setting, Callable[[], object]] = {}
    results = []
    compiled = any(setting.compiled for setting in settings)
    if compiled:  # torch compiles the same code at most eight times, and then runs it uncompiled with only a warning
        torch.compiler.reset()
    with torch._dynamo.config.patch(cache_size_limit=256) if compiled else nullcontext():
        for setting in settings:
            results.append(_warm_up(setting, device, plan, build, steps))
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        products: dict[Key, Callable[[], object]] = {
            (precision, side): call
            for precision in sorted({setting.precision for setting in steps})
            for side, call in matrix_calls(DTYPES[precision], device).items()
        }
        wait_each = settings[0].batch_size == 1
        timings = time_interleaved({**steps, **products}, device, plan.repeats, plan.seconds, wait_each)
    return [_with_times(result, timings) if result.setting in steps else result for result in results]


def _warm_up(
    setting: Setting, device: torch.device, plan: Plan, build: Build, steps: dict[Setting, Callable[[], object]]
) -> Result:
    """Count, warm up and measure the memory of a case, and add its step to `steps` if it runs."""
    result = Result(setting)
    compiling = False
    try:
        network = build(setting)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        layers, attention, norms = _counts(network, setting)
        result = Result(setting, "", parameters, layers, attention, norm_multiply_adds=norms)
        case = prepare(network, setting, device)
        compiling = setting.compiled
        first = seconds_per_call(case.step, 1, device)
        compiling = False
        for _ in range(plan.warmup - 1):
            case.step()
        synchronize(device)
        peak = peak_memory(case.step, device) + sum(tensor.nbytes for tensor in case.tensors())
    except Exception as error:
        return replace(result, note=failure_reason(error, compiling))
    steps[setting] = case.step
    return replace(result, peak_memory=peak, compile_seconds=first if setting.compiled else None)


def _counts(network: nn.Module, setting: Setting) -> tuple[int | None, int | None, int | None]:
    """Count multiply-adds if the network can be traced on the meta device."""
    try:
        image = image_shape(network, setting)
        return *count_multiply_adds(network.eval(), image), count_norms(network, image)
    except Exception:
        logger.debug("%s cannot be counted", setting.name, exc_info=True)
        return None, None, None


def _with_times(result: Result, timings: Timings[Key]) -> Result:
    """Add the samples of a case and the times of matrix products in its type."""
    setting, samples = result.setting, timings.samples
    if setting in timings.failures:
        return replace(result, note=timings.failures[setting])
    products = {
        key[1]: statistics.median(samples[key])
        for key in samples
        if isinstance(key, tuple) and key[0] == setting.precision
    }
    return replace(result, samples=samples[setting], seconds=Spread.of(samples[setting]), matrix_seconds=products)


def best_rate(seconds: Mapping[int, float]) -> float:
    """Return the best operations per second of products, given the seconds of each side.

    A multiply-add counts as two operations.
    """
    return max(2 * side**3 / taken for side, taken in seconds.items())


def matrix_calls(dtype: torch.dtype, device: torch.device) -> dict[int, Callable[[], object]]:
    """Return for each side N a call that multiplies two matrices `(N, N)` as a linear layer does.

    Sides that do not fit into memory are omitted, and those above the first that takes over a second.
    """
    calls: dict[int, Callable[[], object]] = {}
    for side in SIDES[device.type]:
        try:
            call = _product(side, dtype, device)
            call()
            taken = seconds_per_call(call, 1, device)
        except RuntimeError:  # out of memory, on a GPU or on a CPU
            continue
        calls[side] = call
        if taken > LONGEST:
            break
    return calls


def _product(side: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return torch.inference_mode()(lambda: F.linear(left, right))
