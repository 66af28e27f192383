"""The command `doctor`: looks at all that a fit needs before it begins, and says what to do about each finding."""

import sys
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI

from scalablevit_pl.arguments import OptionParser
from scalablevit_pl.diagnosis.data_examination import progress_bars
from scalablevit_pl.diagnosis.examination import Examination
from scalablevit_pl.diagnosis.speed import quiet
from scalablevit_pl.experiment import ExperimentCLI

PARTS = ("model", "data")


class FitPlan(ExperimentCLI):
    """A fit that is parsed as any other, and not begun; no folder is made.

    Attributes:
        built: Task (`model`) and datamodule (`data`), those of them that can be built.
        faults: Why the others cannot.
    """

    def hold_folder(self) -> None:
        """Make and lock no folder."""

    def before_instantiate_classes(self) -> None:
        """Keep the configuration in plain values."""
        self._dump_config()

    def instantiate_classes(self) -> None:
        """Build task and datamodule, each even if the other cannot be built."""
        self.built: dict[str, Any] = {}
        self.faults: dict[str, Exception] = {}
        for part in PARTS:
            try:
                self.built[part] = self._get(self._build(part), part)
            except Exception as error:
                self.faults[part] = error

    def _build(self, *parts: str) -> Any:
        """Instantiate the trainer's arguments and some of the parts."""
        config = self.config.clone()
        for part in set(PARTS) - set(parts):
            del config[self.subcommand][part]
        return self.parser.instantiate_classes(config)

    def build_trainer(self) -> pl.Trainer:
        """Make the trainer as the configuration asks for it, without what records a run."""
        self.config_init = self._build()
        return LightningCLI.instantiate_trainer(self, logger=False)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[pl.Callback]) -> pl.Trainer:
        return LightningCLI._instantiate_trainer(self, config, callbacks)

    def _run_subcommand(self, subcommand: str) -> None:
        """Begin nothing."""


def read_options(options: list[str]) -> tuple[SimpleNamespace, list[str]]:
    """Return the doctor's own options, and the others, which are those of a fit.

    Raises:
        ValueError: If a value is none, or out of its range.
    """
    parser = OptionParser("doctor")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--traceback", action="store_true")
    own, others = parser.parse_known_args(options, SimpleNamespace())
    if own.images < 1 or not 0.0 < own.seconds < 3600.0:
        raise ValueError(
            f"--images must be at least 1 and --seconds above 0 and below 3600, got {own.images} and {own.seconds}"
        )
    return own, others


def diagnose(options: SimpleNamespace) -> int:
    """Look at the fit in `sys.argv`, print what is found, and return the exit status: 1 if something fails, else 0.

    Args:
        options: As `read_options` gives them.
    """
    with progress_bars(shown=False), quiet():  # the findings say it, and what is said of the timed steps means nothing
        examination = Examination(FitPlan(), options)
        findings = list(examination.findings())
    counts = {status: sum(finding.status == status for finding in findings) for status in ("ok", "warn", "FAIL")}
    sys.stdout.write("\n" + ", ".join(f"{count} {status}" for status, count in counts.items()) + "\n")
    return 1 if counts["FAIL"] else 0
