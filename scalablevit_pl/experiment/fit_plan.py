"""A fit that is parsed and not begun: for the commands that look at what it would do."""

import warnings
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI

from scalablevit_pl.experiment.cli import ExperimentCLI

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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a name that Lightning uses, too
            return self.parser.instantiate_classes(config)

    def build_trainer(self) -> pl.Trainer:
        """Make the trainer as the configuration asks for it, without what records a run."""
        self.config_init = self._build()
        return LightningCLI.instantiate_trainer(self, logger=False)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[pl.Callback]) -> pl.Trainer:
        return LightningCLI._instantiate_trainer(self, config, callbacks)

    def _run_subcommand(self, subcommand: str) -> None:
        """Begin nothing."""
