"""Time of a network's step by kind of operator, with the time of matrix products of the same size as a reference.

python benchmarks/operators.py [NETWORK ...] [--mode inference|train] [--precision 32|bf16] [--device cpu|cuda]
    [--batch-size 8] [--input-size 224] [--repeats 10]

Times are those of torch's profiler (on a GPU, of the kernels): medians of steps that are interleaved with the same step
without the profiler and with the matrix products. Shares are of their sum. Batched products and softmax count as
attention, the addition of a bias as its layer, changes of type as copies. Multiply-adds are those of a forward pass,
three times as many for a training step. On a CPU the page faults of a step are also counted, in a separate process:
pages of memory that the process does not have yet, or has given back.
"""

import math
import multiprocessing
import os
import re
import resource
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from script import DEVICE, make_parser, markdown
from torch import nn
from torch.profiler import ProfilerActivity, profile

from scalablevit_pl.models.cost import count_by_operator
from scalablevit_pl.profiling.measurement import Plan, best_rate, full_float32, matrix_calls
from scalablevit_pl.profiling.networks import DTYPES, PASSES, Setting, build_network, image_shape, prepare
from scalablevit_pl.profiling.report import describe, headline
from scalablevit_pl.profiling.timing import synchronize, time_interleaved

Key = TypeVar("Key", bound=Hashable)
NETWORKS = ("scalablevit_s", "swin_tiny_patch4_window7_224")
HEADER = ("calls", "ms", "share", "multiply-adds", "ms as matrix products", "of matmul")
LONGEST = 8  # shapes and operators to list
LINEAR, OTHER = "linear layers", "other"
KINDS = {
    LINEAR: r"linear|addmm|mm|_addmm_activation",
    "attention": r".*attention.*|bmm|baddbmm|_?softmax|_softmax_backward_data",
    "convolutions": r".*conv(olution|\d|_depth).*",
    "GELU": r"gelu.*",
    "norms": r".*(layer|batch|group)_norm.*",
    "copies and additions": r"copy_|cat|fill_|index|add_?",
    "optimizer": r"_fused_adamw_.*",
}
# These only call the operator that computes, possibly after a change of type.
WRAPPERS = r"linear|scaled_dot_product_attention|softmax|(layer|batch|group)_norm|(thnn_)?conv\dd|_?convolution"


class Operator(NamedTuple):
    """A call of an operator.

    Attributes:
        name: Its name in torch, such as `aten::addmm`.
        kind: Its kind if it computes, else `OTHER`.
        shapes: Shapes of its inputs; empty for one that is not a tensor.
        seconds: Its time, including the operators it calls if it computes. On a GPU, the time of its kernels.
    """

    name: str
    kind: str
    shapes: Sequence[Sequence[int]]
    seconds: float


def kind_of(name: str) -> str:
    """Return the kind of an operator, written `aten::addmm` or `aten.addmm`."""
    package, _, bare = name.replace("::", ".").partition(".")
    return next((kind for kind, names in KINDS.items() if package == "aten" and re.fullmatch(names, bare)), OTHER)


def computes(name: str) -> bool:
    """Return whether an operator has a kind and computes, instead of calling another one that does."""
    return kind_of(name) != OTHER and not re.fullmatch(WRAPPERS, name.removeprefix("aten::"))


def profile_operators(call: Callable[[], object], device: torch.device) -> list[Operator]:
    """Run a warm call and return its operators, as torch's profiler records them.

    What an operator that computes calls is part of it, such as the copy of the bias in a linear layer.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences warnings about missing GPUs
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu, record_shapes=True) as trace:
        call()
        synchronize(device)
    operators = []
    for event in trace.events() or []:
        # The kernels of a GPU are listed a second time, besides the operators that contain their times.
        if event.device_type.name == "CPU" and not any(computes(caller.name) for caller in _callers(event)):
            own = event.self_device_time_total if gpu else event.self_cpu_time_total
            whole = event.device_time_total if gpu else event.cpu_time_total
            kind, time = (kind_of(event.name), whole) if computes(event.name) else (OTHER, own)
            operators.append(Operator(event.name, kind, event.input_shapes, time / 1e6))
    return operators


def _callers(event: Any) -> Iterator[Any]:
    while (event := event.cpu_parent) is not None:
        yield event


def summarize(steps: Sequence[Sequence[Operator]], key: Callable[[Operator], Key]) -> dict[Key, tuple[int, float]]:
    """Return calls per step and median seconds of the operators with the same key, the longest first."""
    counts: Counter[Key] = Counter()
    seconds: dict[Key, list[float]] = defaultdict(lambda: [0.0] * len(steps))
    for number, operators in enumerate(steps):
        for operator in operators:
            counts[key(operator)] += 1
            seconds[key(operator)][number] += operator.seconds
    medians = {name: (round(counts[name] / len(steps)), statistics.median(times)) for name, times in seconds.items()}
    return dict(sorted(medians.items(), key=lambda item: -item[1][1]))


def product_of(operator: Operator) -> tuple[int, int, int] | None:
    """Return rows, inner side and columns of the product of a linear layer, and None for other operators."""
    if operator.name not in ("aten::addmm", "aten::mm"):
        return None
    left, right = (shape for shape in operator.shapes[:3] if len(shape) == 2)  # a bias has one side
    return left[0], left[1], right[1]


def multiply_adds(network: nn.Module, setting: Setting) -> Counter[str]:
    """Count by kind the multiply-adds of a step with a whole batch."""
    counts: Counter[str] = Counter()
    for operator, count in count_by_operator(network.eval(), image_shape(network, setting)).items():
        counts[kind_of(operator)] += count * PASSES[setting.mode] * setting.batch_size
    return counts


def row(name: str, calls: int, seconds: float, total: float, products: int, rate: float) -> list[str]:
    """Return a row of a table; a multiply-add is two operations."""
    least = 2 * products / rate
    cells = (f"{products / 1e9:.2f} G", f"{1e3 * least:.2f}", f"{least / seconds:.2f}") if products else "–––"
    return [name, f"{calls}", f"{1e3 * seconds:.2f}", f"{seconds / total:.1%}", *cells]


def tables(steps: Sequence[Sequence[Operator]], counts: Mapping[str, int], rate: float) -> str:
    """Format the kinds of operators, and the linear layers by the shape of their product."""
    kinds = summarize(steps, lambda operator: operator.kind)
    total = sum(seconds for _, seconds in kinds.values())
    rows = [row(kind, *cost, total, counts.get(kind, 0), rate) for kind, cost in kinds.items()]
    rows.append(row("all", sum(calls for calls, _ in kinds.values()), total, total, sum(counts.values()), rate))
    names = summarize(steps, lambda operator: (operator.kind, operator.name))
    others = [f"{name} {1e3 * seconds:.2f} ms" for (kind, name), (_, seconds) in names.items() if kind == OTHER]
    shapes = [(product, *cost) for product, cost in summarize(steps, product_of).items() if product]
    layers = [
        row(" × ".join(map(str, product)), calls, seconds, total, calls * math.prod(product), rate)
        for product, calls, seconds in shapes[:LONGEST]
    ]
    return f"{markdown(('', *HEADER), rows)}\nMost of {OTHER}: {', '.join(others[:LONGEST])}\n\n" + markdown(
        (f"{LINEAR}, rows × inner × columns", *HEADER), layers
    )


def page_faults(setting: Setting, repeats: int, warmup: int = 3) -> float:
    """Return the median page faults of some steps, after `warmup` others.

    Call this in a separate process: a step reuses pages that anything before it has left.
    """
    step = prepare(build_network(setting), setting, torch.device("cpu")).step
    counts = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
    for _ in range(warmup + repeats):
        step()
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return statistics.median([after - before for before, after in pairwise(counts)][warmup:])


def in_process(function: Callable[..., float], *arguments: object) -> float:
    """Call a function in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def main() -> None:
    """Measure all networks, interleaved, and print their tables."""
    options = make_parser(
        __doc__,
        networks=NETWORKS,
        mode="inference",
        precision="32",
        device=DEVICE,
        batch_size=8,
        input_size=224,
        repeats=10,
    ).parse_args()
    device, size = torch.device(options.device), (options.input_size, options.input_size)
    matrices = matrix_calls(DTYPES[options.precision], device)
    calls: dict[Any, Callable[[], object]] = {**matrices}
    counts: dict[Setting, Counter[str]] = {}
    seen: dict[Setting, list[list[Operator]]] = {}
    with full_float32():
        for name in options.networks:
            setting = Setting(name, options.mode, options.precision, False, options.batch_size, size)
            network = build_network(setting)
            counts[setting], seen[setting] = multiply_adds(network, setting), []
            step = calls[setting] = prepare(network, setting, device).step
            calls[setting, "profiled"] = lambda step=step, steps=seen[setting]: steps.append(
                profile_operators(step, device)
            )
        timings = time_interleaved(calls, device, options.repeats, 0.0)
    if timings.failures:
        sys.exit("; ".join(timings.failures.values()))
    median = {key: statistics.median(samples) for key, samples in timings.samples.items()}
    rate = best_rate({side: median[side] for side in matrices})
    sys.stdout.write(headline(describe([], device, Plan(options.repeats, 0.0))) + "\n")
    for setting, steps in seen.items():
        least = 2 * counts[setting].total() / rate
        sys.stdout.write(
            f"\n`{setting.network}`, {setting.title}: {1e3 * median[setting]:.1f} ms, "
            f"{least / median[setting]:.2f} of matrix products of {rate / 1e9:.0f} Gflop/s"
        )
        if options.device == "cpu":
            sys.stdout.write(f", {in_process(page_faults, setting, options.repeats):,.0f} page faults")
        # A round has two, of which the first finds cold caches; the first round warms up.
        sys.stdout.write(f"\n\n{tables(steps[3::2], counts[setting], rate)}")


if __name__ == "__main__":
    main()
