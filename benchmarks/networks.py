"""ScalableViT-S, -B and -L against Swin-T and Twins-SVT-S: the tables of docs/benchmarks.md, in Markdown.

python benchmarks/networks.py [--device cpu|cuda] [--parts PART …] [--networks NAME …] [--repeats N] [--quick]

Parts: `inference` in float32 at 224×224; `sizes`, one image of 448×448, 512×512 and 800×1333; on a CPU `fused`,
inference with the largest batch beside networks that were fused. On a GPU besides: `bf16`, inference in it; `training`,
steps in bf16 at the batch out of 64, 128, … that gives most images/s to each network; and `compiled`, those of both
beside their compiled ones, which takes minutes for each network. All of one batch and size are measured in turns.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

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


def search_batches(settings: Sequence[Setting], device: torch.device, plan: Plan, last: int) -> list[Result]:
    """Measure each case at batches that double, until it has no memory left, and return the best of each.

    Args:
        settings: The cases, at their first batch.
        device: What computes.
        plan: How long.
        last: The largest batch to try.
    """
    best: dict[Setting, Result] = {}
    batch, left = settings[0].batch_size, list(settings)
    while left and batch <= last:
        results = {
            replace(result.setting, batch_size=settings[0].batch_size): result
            for result in measure([replace(setting, batch_size=batch) for setting in left], device, plan)
        }
        for setting, result in results.items():
            if setting not in best or rate(result) > rate(best[setting]):
                best[setting] = result
        left = [setting for setting in left if not results[setting].note]
        batch *= 2
    return [best[setting] for setting in settings]


def rate(result: Result) -> float:
    """Return images/s, and 0 where there are none."""
    return result.images_per_second or 0.0


def row(result: Result, with_batch: bool) -> tuple[str, ...]:
    """Return a result's line of a table."""
    setting, seconds = result.setting, result.seconds
    name = f"`{setting.network}`" + (f", batch {setting.batch_size}" if with_batch else "")
    name += ", fused" if setting.fused else ""
    name += f", compiled in {result.compile_seconds:.0f} s" if result.compile_seconds is not None else ""
    if seconds is None:
        return (name, result.note, *["–"] * (len(HEADER) - 2))
    return (
        name,
        f"{result.parameters:,}",
        *(
            f"{count / 1e9:.2f} G" if count is not None else "–"
            for count in (result.multiply_adds, result.attention_multiply_adds)
        ),
        f"{1e3 * seconds.median:.1f}",
        f"{1e3 * seconds.lower:.1f} to {1e3 * seconds.upper:.1f}",
        f"{rate(result):.1f}",
        f"{(result.peak_memory or 0) / 1e9:.2f} GB",
        f"{result.fraction_of_matrix_rate or 0.0:.2f}",
    )


def markdown(title: str, results: Sequence[Result], with_batch: bool = False) -> str:
    """Lay out results as a table."""
    lines: Iterable[Sequence[str]] = [HEADER, ["---"] * len(HEADER), *(row(result, with_batch) for result in results)]
    pace = next((result.matrix.operations_per_second / 1e12 for result in results if result.matrix), 0.0)
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"\n{title}; matrix products {pace:.3g} Tflop/s:\n\n{text}"


def main() -> None:
    """Print the tables, each as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="(default: those of the device)")
    parser.add_argument("--repeats", type=int, default=10, help="rounds (%(default)s)")
    parser.add_argument("--threads", type=int, help="of a CPU (default: torch's own choice)")
    parser.add_argument("--networks", nargs="+", help="others than the five")
    parser.add_argument("--batch-sizes", nargs="+", type=int, help="of inference (default: 1 8, on a GPU 1 8 128)")
    parser.add_argument("--quick", action="store_true", help="small networks and images, to see that it works")
    options = parser.parse_args()
    if options.device == "cuda" and "fused" in (options.parts or ()):
        parser.error("--parts fused is for a CPU")
    if options.threads:
        torch.set_num_threads(options.threads)
    device, gpu = torch.device(options.device), options.device == "cuda"
    networks = options.networks or (QUICK_NETWORKS if options.quick else NETWORKS)
    parts = options.parts or (GPU_PARTS if gpu else PARTS if options.quick else CPU_PARTS)
    size, large = ((32, 32), ((48, 48), (50, 83))) if options.quick else ((224, 224), LARGE_SIZES)
    first, last = (2, 4) if options.quick else (FIRST_BATCH, LAST_BATCH)
    batch_sizes = options.batch_sizes or ((1, 8, 128) if gpu else (1, 8))
    plan = Plan(options.repeats, 0.01 if options.quick else 0.2)
    sys.stdout.write(headline(describe([], device, plan)) + "\n")

    def show(settings: Sequence[Setting], title: str = "", with_batch: bool = False) -> None:
        results = measure(settings, device, plan)
        sys.stdout.write(markdown(title or results[0].setting.title, results, with_batch))
        sys.stdout.flush()

    def all_of(setting: Setting) -> list[Setting]:
        return [replace(setting, network=network) for network in networks]

    if "inference" in parts:
        for batch_size in batch_sizes:
            show(all_of(Setting("", batch_size=batch_size, input_size=size)))
    if "sizes" in parts:
        for input_size in large:
            show(all_of(Setting("", input_size=input_size)))
    if "fused" in parts:
        plain = all_of(Setting("", batch_size=max(batch_sizes), input_size=size))
        show([case for setting in plain for case in (setting, replace(setting, fused=True))])
    inference = all_of(Setting("", "inference", "bf16", False, max(batch_sizes), size))
    if "bf16" in parts:
        show(inference)
    if "training" not in parts:
        return
    best = search_batches(all_of(Setting("", "train", "bf16", False, first, size)), device, plan, last)
    sys.stdout.write(markdown("train bf16, each at its best batch", best, with_batch=True))
    sys.stdout.flush()
    if "compiled" in parts:
        # Eager ones again beside them, so that the ratio is of the same rounds.
        trained = [result.setting for result in best if not result.note]
        for settings in (inference, trained):
            for setting in settings:
                pair = [setting, replace(setting, compiled=True)]
                show(pair, f"{setting.mode} bf16, eager and compiled", with_batch=True)


if __name__ == "__main__":
    main()
