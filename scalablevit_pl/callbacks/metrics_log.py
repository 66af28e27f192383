"""metrics.csv: all logged metrics of a run, in one file that survives a resume."""

import csv
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from scalablevit_pl.plotting import Curve
from scalablevit_pl.storage import written_aside


class MetricsLog(Logger):
    """Write metrics to one CSV file with a row for each step that logged something.

    Lightning's own CSVLogger deletes the file when a run is resumed in its folder. This one continues it, without the
    rows that the resumed run will repeat.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows: dict[int, dict[str, float]] = {}

    @property
    def name(self) -> str:
        """Return the run's name."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """Return an empty version: a run folder holds one run."""
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml is the record."""

    @rank_zero_only
    def continue_from(self, step: int) -> None:
        """Read the rows before `step` from the file of an earlier part of the run."""
        if self.path.is_file():
            self.rows = {row: values for row, values in read_metrics(self.path).items() if row < step}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add numbers to the row of a step."""
        self.rows.setdefault(step or 0, {}).update(metrics)

    @rank_zero_only
    def save(self) -> None:
        """Write the file atomically."""
        if not self.rows:
            return
        names = sorted({name for row in self.rows.values() for name in row} - {"epoch"})
        with written_aside(self.path) as aside, aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["step", "epoch", *names])
            writer.writeheader()
            writer.writerows({"step": step, **self.rows[step]} for step in sorted(self.rows))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Save at the end of the run, also after an error."""
        self.save()


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Read a metrics.csv and return the metrics of each step."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return {
                int(row.pop("step")): {
                    name: int(float(value)) if name == "epoch" else float(value) for name, value in row.items() if value
                }
                for row in csv.DictReader(file)
            }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"cannot read {str(path)!r} ({error}): move it away to continue without it") from error


def curve(rows: Mapping[int, Mapping[str, float]], name: str, steps_per_epoch: int) -> Curve:
    """Return one metric over the epochs."""
    points = [((step + 1) / steps_per_epoch, row[name]) for step, row in rows.items() if name in row]
    return tuple(epoch for epoch, _ in points), tuple(value for _, value in points)
