"""What larger images cost a network: a pixel, and a multiply-add, over those of the first size, measured in turns.

python benchmarks/sizes.py [NETWORK ...] [--sizes 448x448 512x512 800x1333] [--precision 32|bf16] [--device cpu|cuda]
    [--batch-size 1] [--repeats 10]

Inference; all sizes of all networks have their turn in each round, and ratios are medians of those of the rounds.
Multiply-adds are those of convolutions, linear layers and attention.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence

import torch

from scalablevit_pl.models.cost import count_multiply_adds
from scalablevit_pl.profiling.measurement import Plan, full_float32
from scalablevit_pl.profiling.networks import Case, Setting, build_network, image_shape, prepare
from scalablevit_pl.profiling.report import describe, headline
from scalablevit_pl.profiling.timing import time_interleaved

NETWORKS = ("scalablevit_s",)
SIZES = ("448x448", "512x512", "800x1333")


def ratio(times: Sequence[float], first: Sequence[float], work: float, first_work: float) -> float:
    """Return the time for a unit of work over that of the first size, as the median of the rounds."""
    return statistics.median(time / base for time, base in zip(times, first, strict=True)) * first_work / work


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", default=NETWORKS, help="ours or timm's")
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="HEIGHTxWIDTH", help="the first is compared with")
    parser.add_argument("--precision", choices=("32", "bf16"), default="32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10, help="rounds (%(default)s)")
    options = parser.parse_args()
    device = torch.device(options.device)
    sizes = [(int(height), int(width)) for height, _, width in (size.partition("x") for size in options.sizes)]
    cases: dict[Setting, Case] = {}
    costs: dict[Setting, int] = {}
    with full_float32():
        for name in options.networks:
            for size in sizes:
                setting = Setting(name, "inference", options.precision, False, options.batch_size, size)
                network = build_network(setting)
                costs[setting] = sum(count_multiply_adds(network.eval(), image_shape(network, setting)))
                cases[setting] = prepare(network, setting, device)
        calls = {setting: case.step for setting, case in cases.items()}
        timings = time_interleaved(calls, device, options.repeats, 0.0, wait_each=options.batch_size == 1)
    for error in timings.failures.values():
        raise error
    sys.stdout.write(headline(describe([], device, Plan(options.repeats, 0.0))) + f"; batch {options.batch_size}\n\n")
    sys.stdout.write("| | input | ms | multiply-adds | a pixel | a multiply-add |\n|---|---|---|---|---|---|\n")
    for setting, times in timings.samples.items():
        base = next(other for other in cases if other.network == setting.network)
        pixels, first_pixels = (height * width for height, width in (setting.input_size, base.input_size))
        ratios = (
            ratio(times, timings.samples[base], pixels, first_pixels),
            ratio(times, timings.samples[base], costs[setting], costs[base]),
        )
        sys.stdout.write(
            f"| `{setting.network}` | {setting.size} | {1e3 * statistics.median(times):.1f} "
            f"| {costs[setting] / 1e9:.2f} G | {' | '.join(f'{value:.2f}' for value in ratios)} |\n"
        )


if __name__ == "__main__":
    main()
