"""Share of training time spent waiting for data: a few steps of the ImageNet recipe on photographs of its size.

python benchmarks/training.py --photos FOLDER [--recipe scalablevit_s] [--batch-size N] [--workers N] [OPTIONS OF FIT]

Photographs are cut as in benchmarks/loader.py and stored as parquet, each of them many times, and `scalablevit fit`
trains on them in a separate process. The speed it logs between the first and the last log is printed as Markdown:
images/s, the share of the time spent waiting for the loader, and the memory of a GPU. `scalablevit profile … --mode
train` measures the same step without data and without Lightning.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import torch
from photos import add_options, make_photos, store_parquet
from script import DEVICE, make_parser, markdown

from scalablevit_pl.profiling.measurement import Plan
from scalablevit_pl.profiling.report import describe, headline

CLASSES = [str(number) for number in range(1000)]
SPEED = {"images/s": "speed/images_per_second", "wait for data": "speed/data_wait", "GB": "speed/gpu_memory_gb"}


def train(options: argparse.Namespace, others: list[str], folder: Path) -> list[dict[str, str]]:
    """Train in a process and return the rows of its metrics with the speed."""
    settings = {
        "data.dataset": folder / "data",
        "data.revision": "null",
        "data.class_order": "null",
        "data.split_sizes": "null",
        "data.batch_size": options.batch_size,
        "data.num_workers": options.workers,
        "model.compile": options.compile,
        "trainer.accelerator": {"cuda": "gpu"}.get(options.device, options.device),
        "trainer.devices": 1,
        "trainer.strategy": "auto",
        "trainer.precision": options.precision,
        "trainer.max_epochs": 1,
        "trainer.limit_val_batches": 0,
        "trainer.log_every_n_steps": options.log_steps,
        "trainer.enable_progress_bar": "false",
    }
    words = ["fit", "--config", f"recipes/imagenet_{options.recipe}.yaml", "--run", "speed"]
    words += [*(f"--{name}={value}" for name, value in settings.items()), *others]
    done = subprocess.run([sys.executable, "-m", "scalablevit_pl", *words], cwd=folder, stdout=sys.stderr)
    if done.returncode:
        raise SystemExit(done.returncode)  # the command has printed the error
    with (folder / "runs" / "speed" / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get(SPEED["images/s"])]


def main() -> None:
    """Print a table."""
    parser = make_parser(__doc__, device=DEVICE, batch_size=256)
    add_options(parser, 2000)
    parser.add_argument("--recipe", default="scalablevit_s", help="of configs/recipes/imagenet_* (%(default)s)")
    parser.add_argument("--precision", default="bf16-mixed", help="as Lightning names it (%(default)s)")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--workers", type=int, default=16, help="loader processes (%(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of the training (%(default)s)")
    parser.add_argument("--log-steps", type=int, default=20, help="in one measurement (%(default)s)")
    options, others = parser.parse_known_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        contents = make_photos(options.photos, options.images, options.quality)
        copies = -(-options.steps * options.batch_size // len(contents))
        store_parquet(contents, CLASSES, folder / "data" / "train.parquet", copies)
        store_parquet(contents, CLASSES, folder / "data" / "validation.parquet")
        rows = train(options, others, folder)[1:]  # the first one includes the start of the loader processes
    if not rows:
        raise SystemExit(f"--steps {options.steps} is less than two times --log-steps {options.log_steps}: give more")
    size = statistics.mean(map(len, contents)) / 1e3
    columns = {name: [float(row[key]) for row in rows] for name, key in SPEED.items() if rows[0].get(key)}
    sys.stdout.write(
        headline(describe([], torch.device(options.device), Plan(len(rows)))).rpartition("\n")[0]
        + f"\n{options.recipe}, batch {options.batch_size}, {options.precision}{', compiled' * options.compile}, "
        f"images of {size:.0f} kB; medians of {len(rows)} times {options.log_steps} steps\n\n"
    )
    cells = (f"{statistics.median(values):.4g}" for values in columns.values())
    sys.stdout.write(markdown(["loader processes", *columns], [[str(options.workers), *cells]]))


if __name__ == "__main__":
    main()
