"""What a call is made of: torch's operators, by kind."""

import os
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from scalablevit_pl.profiling.timing import synchronize

Key = TypeVar("Key", bound=Hashable)
LINEAR, REST = "linear layers", "the rest"
KINDS = {
    LINEAR: r"linear|addmm|mm|_addmm_activation",
    "attention": r".*attention.*|bmm|baddbmm|_?softmax|_softmax_backward_data",
    "convolutions": r".*conv(olution|\d|_depth).*",
    "GELU": r"gelu.*",
    "norms": r".*(layer|batch|group)_norm.*",
    "copies and additions": r"copy_|cat|fill_|index|add_?",
    "optimizer": r"_fused_adamw_.*",
}
# Those that only call what computes, and may convert to another type before.
WRAPPERS = r"linear|scaled_dot_product_attention|softmax|(layer|batch|group)_norm|(thnn_)?conv\dd|_?convolution"


class Operator(NamedTuple):
    """A call of an operator.

    Attributes:
        name: As torch has it, such as `aten::addmm`.
        kind: Of one that computes; of any other `REST`.
        shapes: Of its inputs; what is no tensor has an empty one.
        seconds: Of one that computes, with those that it calls; of one that only calls others, without them. On a GPU
            those of the kernels.
    """

    name: str
    kind: str
    shapes: Sequence[Sequence[int]]
    seconds: float


def kind_of(name: str) -> str:
    """Return the kind of an operator, written `aten::addmm` or `aten.addmm`.

    Batched products and softmax count as attention's.
    """
    package, _, bare = name.replace("::", ".").partition(".")
    return next((kind for kind, names in KINDS.items() if package == "aten" and re.fullmatch(names, bare)), REST)


def computes(name: str) -> bool:
    """Tell whether an operator is of some kind and computes, rather than to call another that does."""
    return kind_of(name) != REST and not re.fullmatch(WRAPPERS, name.removeprefix("aten::"))


def observe(call: Callable[[], object], device: torch.device) -> list[Operator]:
    """Make a call and return its operators, as torch's profiler sees them.

    What an operator that computes calls is its own, such as the copy of the bias that a linear layer begins with.

    Args:
        call: Warm.
        device: What computes.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would speak of GPUs that are not there
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu, record_shapes=True) as trace:
        call()
        synchronize(device)
    operators = []
    for event in trace.events() or []:
        # A GPU's kernels stand there once more, beside the operators that have their times.
        if event.device_type.name == "CPU" and not any(computes(caller.name) for caller in _callers(event)):
            own = event.self_device_time_total if gpu else event.self_cpu_time_total
            whole = event.device_time_total if gpu else event.cpu_time_total
            kind, time = (kind_of(event.name), whole) if computes(event.name) else (REST, own)
            operators.append(Operator(event.name, kind, event.input_shapes, time / 1e6))
    return operators


def _callers(event: Any) -> Iterator[Any]:
    while (event := event.cpu_parent) is not None:
        yield event


def typical(calls: Sequence[Sequence[Operator]], key: Callable[[Operator], Key]) -> dict[Key, tuple[int, float]]:
    """Put operators together by a key; return how often they are called and their seconds, the longest first.

    Args:
        calls: The operators of some calls of the same thing, of whose seconds the median is taken.
        key: Is given an operator.
    """
    counts: Counter[Key] = Counter()
    seconds: dict[Key, list[float]] = defaultdict(lambda: [0.0] * len(calls))
    for number, operators in enumerate(calls):
        for operator in operators:
            counts[key(operator)] += 1
            seconds[key(operator)][number] += operator.seconds
    medians = {name: (round(counts[name] / len(calls)), statistics.median(times)) for name, times in seconds.items()}
    return dict(sorted(medians.items(), key=lambda item: -item[1][1]))


def product_of(operator: Operator) -> tuple[int, int, int] | None:
    """Return rows, inner side and columns of a linear layer's product of matrices; None of any other operator."""
    if operator.name not in ("aten::addmm", "aten::mm"):
        return None
    left, right = (shape for shape in operator.shapes[:3] if len(shape) == 2)  # a bias has one side
    return left[0], left[1], right[1]
