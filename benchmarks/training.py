"""How long a training waits for its data: a few steps of the ImageNet recipe on photographs of ImageNet's size.

python benchmarks/training.py --photos FOLDER [--recipe scalablevit_s] [--batch-size N] [--workers N] [OPTIONS OF FIT]

Photographs are cut to JPEG files of 500 × 375 pixels as in benchmarks/loader.py and stored as parquet, each of them
many times, and `scalablevit fit` trains on them in a process of its own. What it logs of its speed between the first
log and the last is printed, in Markdown: images/s, the share of the time in which the loop waits for its loader, and
a GPU's memory. `scalablevit profile … --mode train` measures the same step without data and without Lightning.
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
from loader import make_photos

from scalablevit_pl.profiling.measurement import Plan
from scalablevit_pl.profiling.report import describe, headline

CLASSES = 1000
SPEED = {"images/s": "speed/images_per_second", "wait for data": "speed/data_wait", "GB": "speed/gpu_memory_gb"}


def store(contents: list[bytes], copies: int, folder: Path) -> None:
    """Write images as two splits of a parquet data set, the training one with each image many times."""
    names = [str(number) for number in range(CLASSES)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = [{"bytes": content, "path": None} for content in contents]
    for split, times in (("train", copies), ("validation", 1)):
        labels = [number % CLASSES for number in range(times * len(rows))]
        table = datasets.Dataset.from_dict({"image": rows * times, "label": labels}, features=features)
        table.to_parquet(str(folder / f"{split}.parquet"))


def train(options: argparse.Namespace, others: list[str], folder: Path) -> list[dict[str, str]]:
    """Train in a process and return the lines of its metrics that tell of its speed."""
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
        raise SystemExit(done.returncode)  # it has said why
    with (folder / "runs" / "speed" / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get(SPEED["images/s"])]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder with photographs, at any depth")
    parser.add_argument("--images", type=int, default=2000, help="different images (%(default)s)")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEG files (%(default)s)")
    parser.add_argument("--recipe", default="scalablevit_s", help="of configs/recipes/imagenet_* (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="bf16-mixed", help="of Lightning's (%(default)s)")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch-size", type=int, default=256, help="(%(default)s)")
    parser.add_argument("--workers", type=int, default=16, help="loader processes (%(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of the training (%(default)s)")
    parser.add_argument("--log-steps", type=int, default=20, help="that are one measurement (%(default)s)")
    options, others = parser.parse_known_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        contents = make_photos(options.photos, options.images, options.quality)
        (folder / "data").mkdir()
        store(contents, -(-options.steps * options.batch_size // len(contents)), folder / "data")
        rows = train(options, others, folder)[1:]  # behind the first log the loader's processes have been started
    if not rows:
        raise SystemExit(f"--steps {options.steps} is less than two times --log-steps {options.log_steps}: give more")
    size = statistics.mean(map(len, contents)) / 1e3
    sys.stdout.write(headline(describe([], torch.device(options.device), Plan(len(rows)))).rpartition("\n")[0])
    sys.stdout.write(
        f"\n{options.recipe}, batch {options.batch_size}, {options.precision}{', compiled' * options.compile}, "
        f"images of {size:.0f} kB; medians of {len(rows)} times {options.log_steps} steps\n\n"
    )
    columns = {name: [float(row[key]) for row in rows] for name, key in SPEED.items() if rows[0].get(key)}
    sys.stdout.write(f"| loader processes | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}\n")
    cells = (f"{statistics.median(values):.4g}" for values in columns.values())
    sys.stdout.write(f"| {options.workers} | {' | '.join(cells)} |\n")


if __name__ == "__main__":
    main()
