"""`plot`: compare the curves of several runs in one picture and a table."""

import json
import logging
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalablevit_pl.callbacks.metrics_log import curve, read_metrics
from scalablevit_pl.callbacks.run_record import metric_record
from scalablevit_pl.commands.arguments import OptionParser, check_output
from scalablevit_pl.plotting import PARTS, RUN_COLOURS, Curve, draw_comparison
from scalablevit_pl.run_folder import RESOLVED, existing_run
from scalablevit_pl.tasks.classification import ClassificationTask
from scalablevit_pl.text import aligned, visible

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run's logged numbers by step, and the metrics of its task as `metric_record` describes them."""

    name: str
    rows: Mapping[int, Mapping[str, float]]
    steps_per_epoch: int
    metrics: Mapping[str, Any]

    @property
    def labels(self) -> dict[str, str]:
        """Labels of the plotted metrics by name."""
        return {name: str(info["label"]) for name, info in self.metrics["described"].items() if info["plotted"]}

    def curve(self, name: str) -> Curve:
        """Return a metric over the epochs."""
        return curve(self.rows, name, self.steps_per_epoch)


def plot_runs(options: list[str]) -> None:
    """Run `scalablevit plot RUN [RUN …] [--out FILE]`."""
    parser = OptionParser("plot")
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--out", type=Path, default=Path("comparison.png"))
    arguments = parser.read(options)
    names = list(dict.fromkeys(arguments.runs))
    if len(names) > len(RUN_COLOURS):
        raise ValueError(f"one picture cannot distinguish {len(names)} runs: give at most {len(RUN_COLOURS)}")
    check_output("--out", arguments.out, ".png")
    runs = [read_run(existing_run(name)) for name in names]
    labels = {name: label for run in runs for name, label in run.labels.items()}
    curves = [
        (run.name, {f"{part}/{name}": run.curve(f"{part}/{name}") for name in labels for part in PARTS}) for run in runs
    ]
    training = [info["training"] for run in runs for info in run.metrics["described"].values() if "training" in info]
    draw_comparison(curves, labels, arguments.out, *training[:1])
    for monitor in dict.fromkeys(run.metrics["monitor"] for run in runs):
        group = [run for run in runs if run.metrics["monitor"] == monitor]
        sys.stdout.write(visible(aligned([header(group[0]), *map(summarize, group)])))
    logger.info("the curves are in %s", arguments.out)


def read_run(folder: Path) -> Run:
    """Read the metrics of a run."""
    path, resolved = folder / "metrics.csv", folder / RESOLVED
    rows = read_metrics(path) if path.is_file() else {}
    if not rows:
        raise ValueError(f"the run in {str(folder)!r} has no metrics in metrics.csv yet: plot it after its first epoch")
    try:
        record = json.loads(resolved.read_text(encoding="utf-8"))
        steps = record["steps_per_epoch"]
        if not isinstance(steps, int) or steps < 1:
            raise TypeError(f"steps_per_epoch is {steps!r}")
        metrics = record.get("metrics") or metric_record(ClassificationTask)  # runs of version 0.1 were classifiers
    except (AttributeError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"cannot read the steps per epoch in {str(resolved)!r} ({error!r}): omit this run") from error
    return Run(folder.resolve().name, rows, steps, metrics)


def header(run: Run) -> tuple[str, ...]:
    """Return the table's header for runs with the same monitored metric."""
    return ("run", "epochs", run.metrics["monitor"], "at", "ema", "at", *_others(run), "loss", "img/s")


def _others(run: Run) -> list[str]:
    return [name for name in run.metrics["described"] if name not in (run.metrics["monitor"], "loss")]


def summarize(run: Run) -> tuple[str, ...]:
    """Return a run's line of the table: its best values with their epochs, the last training loss, its median speed."""
    monitor, lowest = run.metrics["monitor"], run.metrics["mode"] == "min"
    epochs = (max(run.rows) + 1) / run.steps_per_epoch
    losses, speeds = run.curve("train/loss")[1], run.curve("speed/images_per_second")[1]
    return (
        run.name,
        f"{epochs:.4g}",
        *_best(run.curve(f"val/{monitor}"), lowest),
        *_best(run.curve(f"val_ema/{monitor}"), lowest),
        *(_best(run.curve(f"val/{name}"), lowest)[0] for name in _others(run)),
        f"{losses[-1]:.4f}" if losses else "-",
        f"{statistics.median(speeds):.0f}" if speeds else "-",
    )


def _best(values: Curve, lowest: bool) -> tuple[str, str]:
    """Return the best value and its epoch, the first of equal ones; NaN is ignored."""
    sign = -1.0 if lowest else 1.0
    pairs = [(sign * value, -epoch) for epoch, value in zip(*values, strict=True) if value == value]
    if not pairs:
        return "-", "-"
    value, epoch = max(pairs)
    return f"{sign * value:.4f}", f"{-epoch:.4g}"
