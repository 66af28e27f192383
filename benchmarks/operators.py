"""What a network's step is made of: time by kind of operator, beside what matrix products of the device's pace take.

python benchmarks/operators.py [NETWORK ...] [--mode inference|train] [--precision 32|bf16] [--device cpu|cuda]
    [--batch-size 8] [--input-size 224] [--repeats 10]

Times are those that torch's profiler sees (on a GPU their kernels'), medians of steps that are measured in turns with
the same step unobserved and with the matrix products; shares are of their sum. Batched products and softmax count as
attention's, the addition of a bias as its layer's, changes of type as copies. Multiply-adds are those of a forward
pass, for a training step three times as many. On a CPU the page faults of a step are counted, too, in a process of its
own: pages of memory that it has not, or has given back.
"""

import argparse
import multiprocessing
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import nn

from scalablevit_pl.profiling.cost import count_by_operator
from scalablevit_pl.profiling.matrix import best_rate, matrix_calls
from scalablevit_pl.profiling.measurement import Plan, Result, full_float32
from scalablevit_pl.profiling.memory import page_faults_of_steps
from scalablevit_pl.profiling.networks import DTYPES, PASSES, Setting, build_network, image_shape, prepare
from scalablevit_pl.profiling.operators import LINEAR, REST, Operator, kind_of, observe, product_of, typical
from scalablevit_pl.profiling.report import describe, headline, way_of
from scalablevit_pl.profiling.timing import time_in_turns

NETWORKS = ("scalablevit_s", "swin_tiny_patch4_window7_224")
HEADER = " | calls | ms | share | multiply-adds | ms as matrix products | of matmul |\n|---|---|---|---|---|---|---|\n"
LONGEST = 8  # shapes and operators that are listed


def multiply_adds(network: nn.Module, setting: Setting) -> Counter[str]:
    """Count by kind the multiply-adds of a step with its whole batch."""
    counts: Counter[str] = Counter()
    for operator, count in count_by_operator(network.eval(), image_shape(network, setting)).items():
        counts[kind_of(operator)] += count * PASSES[setting.mode] * setting.batch_size
    return counts


def row(name: str, calls: int, seconds: float, total: float, products: int, pace: float) -> str:
    """Return a line of a table; a multiply-add is two operations."""
    least = 2 * products / pace
    cells = (f"{products / 1e9:.2f} G", f"{1e3 * least:.2f}", f"{least / seconds:.2f}") if products else "–––"
    return f"| {' | '.join([name, f'{calls}', f'{1e3 * seconds:.2f}', f'{seconds / total:.1%}', *cells])} |\n"


def tables(steps: Sequence[Sequence[Operator]], counts: Mapping[str, int], pace: float) -> str:
    """Lay out the kinds of operators, and the linear layers by the shape of their product."""
    kinds = typical(steps, lambda operator: operator.kind)
    total = sum(seconds for _, seconds in kinds.values())
    text = f"| {HEADER}"
    for kind, (calls, seconds) in kinds.items():
        text += row(kind, calls, seconds, total, counts.get(kind, 0), pace)
    text += row("all", sum(calls for calls, _ in kinds.values()), total, total, sum(counts.values()), pace)
    names = typical(steps, lambda operator: (operator.kind, operator.name))
    rest = [f"{name} {1e3 * seconds:.2f} ms" for (kind, name), (_, seconds) in names.items() if kind == REST]
    text += f"\nMost of {REST}: {', '.join(rest[:LONGEST])}\n\n| {LINEAR}, rows × inner × columns{HEADER}"
    shapes = [(product, *cost) for product, cost in typical(steps, product_of).items() if product]
    for (rows, inner, columns), calls, seconds in shapes[:LONGEST]:
        name = f"{rows} × {inner} × {columns}"
        text += row(name, calls, seconds, total, calls * rows * inner * columns, pace)
    return text


def page_faults(setting: Setting, repeats: int) -> float:
    """Return the median of some steps, in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return statistics.median(process.submit(page_faults_of_steps, setting, repeats).result())


def main() -> None:
    """Measure all networks in turns and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", default=NETWORKS, help="ours or timm's")
    parser.add_argument("--mode", choices=("inference", "train"), default="inference")
    parser.add_argument("--precision", choices=("32", "bf16"), default="32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--input-size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=10, help="rounds (%(default)s)")
    options = parser.parse_args()
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
            calls[setting, "observed"] = lambda step=step, steps=seen[setting]: steps.append(observe(step, device))
        timings = time_in_turns(calls, device, options.repeats, 0.0)
        for error in timings.failures.values():
            raise error
        median = {key: statistics.median(samples) for key, samples in timings.samples.items()}
        pace, _ = best_rate({side: median[side] for side in matrices})
        sys.stdout.write(headline(describe([], device, Plan(options.repeats, 0.0))) + "\n")
        for setting, steps in seen.items():
            least = 2 * counts[setting].total() / pace
            sys.stdout.write(
                f"\n`{setting.network}`, {way_of(Result(setting))}: {1e3 * median[setting]:.1f} ms, "
                f"{least / median[setting]:.2f} of matrix products of {pace / 1e9:.0f} Gflop/s"
            )
            if options.device == "cpu":
                sys.stdout.write(f", {page_faults(setting, options.repeats):,.0f} page faults")
            # A round has two, of which the first finds caches cold; the first round warms up.
            sys.stdout.write(f"\n\n{tables(steps[3::2], counts[setting], pace)}")


if __name__ == "__main__":
    main()
