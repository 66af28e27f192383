"""The command that lays the curves of several runs over each other."""

import json
import logging
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from scalablevit_pl.callbacks.metrics_log import curve, read_metrics
from scalablevit_pl.commands.arguments import OptionParser
from scalablevit_pl.plotting import RUN_COLOURS, Curve, draw_comparison
from scalablevit_pl.run_folder import RESOLVED, existing_run

logger = logging.getLogger(__name__)

CURVES = ("train/loss", "val/loss", "train/top1", "val/top1", "val_ema/top1")
HEADER = ("run", "epochs", "top1", "at", "ema", "at", "top5", "loss", "img/s")
WIDTH = 80


@dataclass(frozen=True)
class Run:
    """What a run has left of its metrics: the numbers of each step, and how many steps make an epoch."""

    name: str
    rows: Mapping[int, Mapping[str, float]]
    steps_per_epoch: int

    def curve(self, name: str) -> Curve:
        """Return a metric over the epochs."""
        return curve(self.rows, name, self.steps_per_epoch)


def plot_runs(options: list[str]) -> None:
    """Run `scalablevit plot RUN [RUN …] [--out FILE]`.

    Raises:
        ValueError: If there is no such run, it has no numbers yet, or there are too many to be told apart.
    """
    parser = OptionParser("plot")
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--out", type=Path, default=Path("comparison.png"))
    arguments = parser.read(options)
    names = list(dict.fromkeys(arguments.runs))
    if len(names) > len(RUN_COLOURS):
        raise ValueError(f"{len(names)} runs cannot be told apart in one picture: give at most {len(RUN_COLOURS)}")
    if arguments.out.suffix.lower() != ".png" or not arguments.out.resolve().parent.is_dir():
        raise ValueError(f"--out {str(arguments.out)!r} must be the name of a .png in a folder that exists")
    runs = [read_run(existing_run(name)) for name in names]
    draw_comparison([(run.name, {name: run.curve(name) for name in CURVES}) for run in runs], arguments.out)
    sys.stdout.write(table(summarize(run) for run in runs))
    logger.info("the curves are in %s", arguments.out)


def read_run(folder: Path) -> Run:
    """Read the metrics of a run.

    Raises:
        ValueError: If there are none yet, or a file is damaged.
    """
    path, resolved = folder / "metrics.csv", folder / RESOLVED
    rows = read_metrics(path) if path.is_file() else {}
    if not rows:
        raise ValueError(f"the run in {str(folder)!r} has no numbers in metrics.csv yet: plot it after its first epoch")
    try:
        steps = json.loads(resolved.read_text(encoding="utf-8"))["steps_per_epoch"]
        if not isinstance(steps, int) or steps < 1:
            raise TypeError(f"steps_per_epoch is {steps!r}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"cannot read the steps of an epoch in {str(resolved)!r} ({error!r}): leave this run out"
        ) from error
    return Run(folder.resolve().name, rows, steps)


def summarize(run: Run) -> tuple[str, ...]:
    """Return a run's line of the table: its best values with their epochs, the last training loss, its usual speed."""
    epochs = (max(run.rows) + 1) / run.steps_per_epoch
    best = {name: _best(run.curve(name)) for name in ("val/top1", "val_ema/top1", "val/top5")}
    losses, speeds = run.curve("train/loss")[1], run.curve("speed/images_per_second")[1]
    return (
        run.name,
        f"{epochs:.4g}",
        *best["val/top1"],
        *best["val_ema/top1"],
        best["val/top5"][0],
        f"{losses[-1]:.4f}" if losses else "-",
        f"{statistics.median(speeds):.0f}" if speeds else "-",
    )


def _best(values: Curve) -> tuple[str, str]:
    pairs = [(value, -epoch) for epoch, value in zip(*values, strict=True) if value == value]  # no NaN
    if not pairs:
        return "-", "-"
    value, epoch = max(pairs)  # the first of equal ones
    return f"{value:.4f}", f"{-epoch:.4g}"


def table(lines: Iterable[tuple[str, ...]]) -> str:
    """Lay out lines below the header, names to the left and numbers to the right, at most 80 columns wide."""
    rows = [HEADER, *lines]
    widths = [max(len(row[column]) for row in rows) for column in range(1, len(HEADER))]
    room = max(len(HEADER[0]), WIDTH - sum(width + 2 for width in widths))
    room = min(room, max(len(row[0]) for row in rows))
    names = [row[0] if len(row[0]) <= room else f"{row[0][: room - 1]}…" for row in rows]
    return "".join(
        f"{name:<{room}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths, strict=True)) + "\n"
        for name, row in zip(names, rows, strict=True)
    )
