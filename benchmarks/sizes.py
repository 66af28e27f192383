"""Cost of larger images: the time of a pixel and of a multiply-add relative to the first size, interleaved.

python benchmarks/sizes.py [NETWORK ...] [--sizes 448x448 512x512 800x1333] [--precision 32|bf16] [--device cpu|cuda]
    [--batch-size 1] [--repeats 10]

Inference. Each round measures all sizes of all networks; ratios are medians over the rounds. Multiply-adds are those
of convolutions, linear layers and attention.
"""

import statistics
import sys
from collections.abc import Sequence

import torch
from script import DEVICE, make_parser, markdown

from scalablevit_pl.models.cost import count_multiply_adds
from scalablevit_pl.profiling.measurement import Plan, full_float32
from scalablevit_pl.profiling.networks import Setting, build_network, image_shape, prepare
from scalablevit_pl.profiling.report import describe, headline
from scalablevit_pl.profiling.timing import time_interleaved

HEADER = ("", "input", "ms", "multiply-adds", "a pixel", "a multiply-add")
SIZES = ("448x448", "512x512", "800x1333")


def ratio(times: Sequence[float], first: Sequence[float], work: float, first_work: float) -> float:
    """Return the time per unit of work relative to the first size, as the median of the rounds."""
    return statistics.median(time / base for time, base in zip(times, first, strict=True)) * first_work / work


def main() -> None:
    """Measure and print a table."""
    networks = ("scalablevit_s",)
    parser = make_parser(__doc__, networks=networks, precision="32", device=DEVICE, batch_size=1, repeats=10)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="HEIGHTxWIDTH", help="the first is the reference")
    options = parser.parse_args()
    device = torch.device(options.device)
    sizes = [(int(height), int(width)) for height, _, width in (size.partition("x") for size in options.sizes)]
    calls, costs = {}, {}
    with full_float32():
        for name in options.networks:
            for size in sizes:
                setting = Setting(name, "inference", options.precision, False, options.batch_size, size)
                network = build_network(setting)
                costs[setting] = sum(count_multiply_adds(network.eval(), image_shape(network, setting)))
                calls[setting] = prepare(network, setting, device).step
        timings = time_interleaved(calls, device, options.repeats, 0.0, wait_each=options.batch_size == 1)
    if timings.failures:
        sys.exit("; ".join(timings.failures.values()))
    sys.stdout.write(headline(describe([], device, Plan(options.repeats, 0.0))) + f"; batch {options.batch_size}\n\n")
    sys.stdout.write(markdown(HEADER))
    for setting, times in timings.samples.items():
        base = next(other for other in calls if other.network == setting.network)
        first = timings.samples[base]
        pixels, first_pixels = (height * width for height, width in (setting.input_size, base.input_size))
        sys.stdout.write(
            f"| `{setting.network}` | {setting.size} | {1e3 * statistics.median(times):.1f} "
            f"| {costs[setting] / 1e9:.2f} G | {ratio(times, first, pixels, first_pixels):.2f} "
            f"| {ratio(times, first, costs[setting], costs[base]):.2f} |\n"
        )


if __name__ == "__main__":
    main()
