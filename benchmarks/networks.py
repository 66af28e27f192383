"""ScalableViT-S, -B and -L against Swin-T and Twins-SVT-S: the tables of docs/benchmarks.md, in Markdown.

python benchmarks/networks.py [--device cpu|cuda] [--parts PART …] [--networks NAME …] [--repeats N] [--quick]

Parts: `inference` in float32 at 224×224; `sizes`, one image of 448×448, 512×512 and 800×1333; on a CPU `fused`,
inference with the largest batch, with and without fused layers. On a GPU also: `bf16`, inference in it; `training`,
steps in bf16, each network at its fastest batch out of 64, 128, …; and `compiled`, both of these with and without
compiling, which takes minutes for each network. All cases of the same batch and size are interleaved.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from script import DEVICE, make_parser, markdown

from scalablevit_pl.profiling.measurement import Plan, Result, measure
from scalablevit_pl.profiling.networks import Setting
from scalablevit_pl.profiling.report import describe, headline

NETWORKS = ("scalablevit_s", "scalablevit_b", "scalablevit_l", "swin_tiny_patch4_window7_224", "twins_svt_small")
QUICK_NETWORKS = ("scalablevit_nano", "resnet10t")
LARGE_SIZES = ((448, 448), (512, 512), (800, 1333))
FIRST_BATCH, LAST_BATCH = 64, 2048
CPU_PARTS, GPU_PARTS = ("inference", "sizes", "fused"), ("inference", "sizes", "bf16", "training", "compiled")
PARTS = tuple(dict.fromkeys(CPU_PARTS + GPU_PARTS))
HEADER = ("network", "parameters", "multiply-adds", "of attention", "ms", "quartiles", "images/s", "memory", "rate")
Measure = Callable[[Sequence[Setting]], list[Result]]


def search_batches(settings: Sequence[Setting], measured: Measure, last: int) -> list[Result]:
    """Double the batch of each case until memory is exhausted, and return the fastest result of each.

    Args:
        settings: The cases, at their first batch.
        measured: Measures some of them.
        last: The largest batch to try.
    """
    best: dict[Setting, Result] = {}
    batch, remaining = settings[0].batch_size, list(settings)
    while remaining and batch <= last:
        results = {
            replace(result.setting, batch_size=settings[0].batch_size): result
            for result in measured([replace(setting, batch_size=batch) for setting in remaining])
        }
        for setting, result in results.items():
            if setting not in best or rate(result) > rate(best[setting]):
                best[setting] = result
        remaining = [setting for setting in remaining if not results[setting].note]
        batch *= 2
    return [best[setting] for setting in settings]


def rate(result: Result) -> float:
    """Return images/s, or 0 for a failure."""
    return result.images_per_second or 0.0


def row(result: Result, with_batch: bool) -> tuple[str, ...]:
    """Return the row of a result."""
    setting, seconds = result.setting, result.seconds
    name = f"`{setting.network}`" + f", batch {setting.batch_size}" * with_batch + ", fused" * setting.fused
    name += f", compiled in {result.compile_seconds:.0f} s" if result.compile_seconds is not None else ""
    if seconds is None:
        return (name, result.note, *["–"] * (len(HEADER) - 2))
    counts = (result.multiply_adds, result.attention_multiply_adds)
    return (
        name,
        f"{result.parameters:,}",
        *(f"{count / 1e9:.2f} G" if count is not None else "–" for count in counts),
        f"{1e3 * seconds.median:.1f}",
        f"{1e3 * seconds.lower:.1f} to {1e3 * seconds.upper:.1f}",
        f"{rate(result):.1f}",
        f"{(result.peak_memory or 0) / 1e9:.2f} GB",
        f"{result.fraction_of_matrix_rate or 0.0:.2f}",
    )


def table(title: str, results: Sequence[Result], with_batch: bool = False) -> str:
    """Format results as a table."""
    matrix = next((result.matrix_rate / 1e12 for result in results if result.matrix_rate), 0.0)
    rows = (row(result, with_batch) for result in results)
    return f"\n{title}; matrix products {matrix:.3g} Tflop/s:\n\n{markdown(HEADER, rows)}"


def read_options() -> argparse.Namespace:
    """Parse the options and fill in the defaults of the device."""
    parser = make_parser(__doc__, device=DEVICE, repeats=10)
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="(default: those of the device)")
    parser.add_argument("--threads", type=int, help="of a CPU (default: torch's own choice)")
    parser.add_argument("--networks", nargs="+", help="instead of the five")
    parser.add_argument("--batch-sizes", nargs="+", type=int, help="of inference (default: 1 8, on a GPU 1 8 128)")
    parser.add_argument("--quick", action="store_true", help="small networks and images, to check that it works")
    options = parser.parse_args()
    gpu = options.device == "cuda"
    if gpu and "fused" in (options.parts or ()):
        parser.error("--parts fused is for a CPU")
    options.networks = options.networks or (QUICK_NETWORKS if options.quick else NETWORKS)
    options.parts = options.parts or (GPU_PARTS if gpu else PARTS if options.quick else CPU_PARTS)
    options.batch_sizes = options.batch_sizes or ((1, 8, 128) if gpu else (1, 8))
    return options


def main() -> None:
    """Print each table as soon as it is measured."""
    options = read_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    device, plan = torch.device(options.device), Plan(options.repeats, 0.01 if options.quick else 0.2)
    size, large = ((32, 32), ((48, 48), (50, 83))) if options.quick else ((224, 224), LARGE_SIZES)
    first, last = (2, 4) if options.quick else (FIRST_BATCH, LAST_BATCH)
    sys.stdout.write(headline(describe([], device, plan)) + "\n")

    def measured(settings: Sequence[Setting]) -> list[Result]:
        return measure(settings, device, plan)

    def show(results: Sequence[Result], title: str = "", with_batch: bool = False) -> None:
        sys.stdout.write(table(title or results[0].setting.title, results, with_batch))
        sys.stdout.flush()

    def all_of(setting: Setting) -> list[Setting]:
        return [replace(setting, network=network) for network in options.networks]

    plain = [Setting("", batch_size=batch_size, input_size=size) for batch_size in options.batch_sizes] * (
        "inference" in options.parts
    )
    plain += [Setting("", input_size=input_size) for input_size in large if "sizes" in options.parts]
    for setting in plain:
        show(measured(all_of(setting)))
    largest = Setting("", batch_size=max(options.batch_sizes), input_size=size)
    if "fused" in options.parts:
        show(measured([case for setting in all_of(largest) for case in (setting, replace(setting, fused=True))]))
    inference = all_of(replace(largest, precision="bf16"))
    if "bf16" in options.parts:
        show(measured(inference))
    if "training" not in options.parts:
        return
    best = search_batches(all_of(Setting("", "train", "bf16", False, first, size)), measured, last)
    show(best, "train bf16, each at its best batch", with_batch=True)
    if "compiled" in options.parts:
        # The eager cases are repeated, so that the ratio is of the same rounds.
        for setting in [*inference, *(result.setting for result in best if not result.note)]:
            pair = measured([setting, replace(setting, compiled=True)])
            show(pair, f"{setting.mode} bf16, eager and compiled", with_batch=True)


if __name__ == "__main__":
    main()
