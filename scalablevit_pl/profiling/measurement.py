"""The measurement of several networks in several settings, in one run and in turns."""

import gc
import logging
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import nn

from scalablevit_pl.profiling.cost import count_multiply_adds
from scalablevit_pl.profiling.matrix import best_rate, matrix_calls
from scalablevit_pl.profiling.memory import peak_of_call
from scalablevit_pl.profiling.networks import DTYPES, PASSES, Build, Case, Setting, build_network, image_shape, prepare
from scalablevit_pl.profiling.timing import Spread, seconds_a_call, synchronize, time_in_turns, without_frames

logger = logging.getLogger(__name__)

CONVENTIONS = {
    "multiply_adds": "for one image, of convolutions and linear layers, without biases, norms and activations; one "
    "multiply-add is two operations",
    "attention_multiply_adds": "of batched products of matrices, all of which count as attention's (of query and key, "
    "and of attention and value), and which come on top",
    "precision": "32 is float32 without TF32, in convolutions and in products of matrices",
    "seconds": "of one call with the whole batch, random images that lie on the device; one sample a round; the rounds "
    "measure all cases of a batch and input size and the products of matrices in turns, in another order each time, "
    "each after a call that is not timed; a GPU is waited for before each look at the clock, and at batch 1 after each "
    "call",
    "inference": "weights and images in the precision's type, under torch.inference_mode",
    "train": "float32 weights, autocast in the precision's type (fp16: with a loss scaler), forward pass, cross "
    "entropy, backward pass, fused AdamW at a rate of 0, which leaves the weights as they are, gradients let go",
    "fraction_of_matrix_rate": "images/s × 2 × (multiply_adds + attention_multiply_adds) × (3 for a training step, 1 "
    "for inference) ÷ the best rate of a square matrix product of that type, measured in the same rounds; what "
    "gradient checkpointing computes again is not counted; above 1 where layers are computed by a faster library",
    "peak_memory": "bytes of weights, optimizer state and images and the most that a step allocates on top, by torch's "
    "allocator; on a CPU without what libraries take for themselves",
    "compile_seconds": "of the first step, which compiles; no part of the times; less where torch's cache on the disk "
    "is warm",
}


@dataclass(frozen=True)
class Plan:
    """How long is measured.

    Attributes:
        repeats: Rounds, each with a measurement of every case.
        seconds: Least time of a measurement.
        warmup: Steps of each case before.
    """

    repeats: int = 10
    seconds: float = 0.1
    warmup: int = 3


@dataclass(frozen=True)
class MatrixRate:
    """The pace of a matrix product.

    Attributes:
        operations_per_second: A multiply-add is two.
        side: Of the square matrices with which it was reached.
        seconds: Medians by side.
    """

    operations_per_second: float
    side: int
    seconds: Mapping[int, float]


@dataclass(frozen=True)
class Result:
    """What a case has given. Where a case failed, or what does not apply, is None.

    Attributes:
        setting: The case.
        note: Why there are no times, or empty.
        parameters: Number of weights.
        multiply_adds: For one image; see `CONVENTIONS`, here and below.
        attention_multiply_adds: For one image, on top.
        samples: Seconds of a call, one a round.
        seconds: Their spread.
        peak_memory: Bytes.
        compile_seconds: Of the first step, if it compiles.
        matrix: The pace of matrix products of the same type in the same rounds.
        error: What the note tells.
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
    matrix: MatrixRate | None = None
    error: Exception | None = field(default=None, compare=False, repr=False)

    @property
    def images_per_second(self) -> float | None:
        """Of the median."""
        return self.setting.batch_size / self.seconds.median if self.seconds else None

    @property
    def fraction_of_matrix_rate(self) -> float | None:
        """Of the pace that matrix products have on this device, the part that the network reaches."""
        if self.seconds is None or self.matrix is None or self.multiply_adds is None:
            return None
        multiply_adds = self.multiply_adds + (self.attention_multiply_adds or 0)
        operations = 2 * multiply_adds * PASSES[self.setting.mode] * self.setting.batch_size
        return operations / self.seconds.median / self.matrix.operations_per_second


def measure(
    settings: Iterable[Setting],
    device: torch.device,
    plan: Plan,
    build: Build = build_network,
    matrices: bool = True,
) -> list[Result]:
    """Measure each case; those of one batch and input size in turns.

    What cannot be built, does not take the images, does not compile or does not fit into memory has a result with a
    note.

    Args:
        settings: The cases.
        device: What computes.
        plan: How long.
        build: Gives the network of a setting, on the CPU.
        matrices: Measure products of matrices, too.
    """
    results: list[Result] = []
    key = _group
    with full_float32():
        for (batch_size, input_size), group in groupby(sorted(settings, key=key), key):
            cases = list(group)
            logger.info("%d case(s) at batch %d, %d×%d", len(cases), batch_size, *input_size)
            results += _measure_group(cases, device, plan, build, matrices)
    return results


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 as such for the time of a block.

    By default torch takes TF32 for convolutions and not for products of matrices, and what is compared would differ.
    """
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


def _group(setting: Setting) -> tuple[int, tuple[int, int]]:
    return setting.batch_size, setting.input_size


def _measure_group(
    settings: Sequence[Setting], device: torch.device, plan: Plan, build: Build, with_matrices: bool
) -> list[Result]:
    cases: dict[Setting, Case] = {}
    results: dict[Setting, Result] = {}
    with many_compiled() if any(setting.compiled for setting in settings) else nullcontext():
        for setting in settings:
            results[setting] = _prepare(setting, device, plan, build, cases)
            release(device)
        precisions = {setting.precision for setting in cases if with_matrices}
        matrices = {
            (precision, side): call
            for precision in sorted(precisions)
            for side, call in matrix_calls(DTYPES[precision], device).items()
        }
        calls = {setting: case.step for setting, case in cases.items()} | matrices
        batch_size = settings[0].batch_size
        timings = time_in_turns(calls, device, plan.repeats, plan.seconds, wait_each=batch_size == 1)
    rates: dict[str, MatrixRate] = {}
    for precision in precisions:
        sides = [key for key in matrices if key[0] == precision and key not in timings.failures]
        taken = {key[1]: Spread.of(timings.samples[key]).median for key in sides}
        if taken:  # beside large networks there may be no memory for any
            rates[precision] = MatrixRate(*best_rate(taken), taken)
    for setting in cases:
        if setting in timings.failures:
            error = timings.failures[setting]
            results[setting] = replace(results[setting], note=reason(error), error=error)
        else:
            samples = timings.samples[setting]
            results[setting] = replace(
                results[setting], samples=samples, seconds=Spread.of(samples), matrix=rates.get(setting.precision)
            )
    return list(results.values())


def many_compiled() -> AbstractContextManager[None]:
    """Return a context in which one code may be compiled for many networks, types and sizes, and forget earlier ones.

    Beyond torch's own limit of eight it would run uncompiled, with no more than a warning.
    """
    torch.compiler.reset()
    patch: AbstractContextManager[None] = torch._dynamo.config.patch(cache_size_limit=256)
    return patch


def _prepare(setting: Setting, device: torch.device, plan: Plan, build: Build, cases: dict[Setting, Case]) -> Result:
    """Count, warm up and measure the memory of a case, and keep it among the cases if it can be run."""
    result = Result(setting)
    compiling = False
    try:
        network = build(setting)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        result = Result(setting, "", parameters, *_counts(network, setting))
        case = prepare(network, setting, device)
        compiling = setting.compiled
        first = seconds_a_call(case.step, 1, device)
        compiling = False
        for _ in range(plan.warmup - 1):
            case.step()
        synchronize(device)
        peak = peak_of_call(case.step, device) + case.held
    except Exception as error:
        logger.debug("%s", traceback.format_exc())
        return replace(result, note=reason(error, compiling), error=without_frames(error))
    cases[setting] = case
    return replace(result, peak_memory=peak, compile_seconds=first if setting.compiled else None)


def _counts(network: nn.Module, setting: Setting) -> tuple[int | None, int | None]:
    """Count multiply-adds, where a network can be followed on the meta device."""
    try:
        return count_multiply_adds(network.eval(), image_shape(network, setting))
    except Exception:
        logger.debug("%s", traceback.format_exc())
        return None, None


def reason(error: Exception, compiling: bool = False) -> str:
    """Say in short why a case could not be measured.

    Args:
        error: What it raised.
        compiling: It did so in the step that compiles.
    """
    text = str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError) or "DefaultCPUAllocator" in text:
        return "out of memory"
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    # What is raised there may as well be the network's own error.
    modules = [kind.__module__ for kind in type(error).__mro__]
    compiler = any(module.startswith(("torch._dynamo", "torch._inductor")) for module in modules)
    return f"does not compile: {line}" if compiling and compiler else line


def release(device: torch.device) -> None:
    """Give memory back that nothing needs any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
