"""Lightning's command line up to where something is built."""

import warnings
from contextlib import nullcontext
from typing import Any, Literal

import lightning.pytorch as pl
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from scalablevit_pl.callbacks.averaging import WeightAverage
from scalablevit_pl.callbacks.checkpointing import RunCheckpoints
from scalablevit_pl.experiment.adoption import class_arguments
from scalablevit_pl.experiment.class_paths import check_class_paths, imports_outside
from scalablevit_pl.experiment.invocation import Invocation
from scalablevit_pl.explanation import explain_argument, explain_construction
from scalablevit_pl.run_folder import run_folder

PARTS = ("model", "data")
# What the sections of a configuration build.
SECTIONS: dict[str, type] = {
    "model": pl.LightningModule,
    "data": pl.LightningDataModule,
    "trainer": pl.Trainer,
    "checkpoint": RunCheckpoints,
    "ema": WeightAverage,
}


class ParsedExperiment(LightningCLI):
    """A command that is parsed; nothing is built and no folder is made.

    Args:
        invocation: The resolved command line.

    Attributes:
        config: The configuration of the command.
        folder: The run folder.
        classes_option: The option that sets the network's number of classes.
        classes_open: Whether the configuration leaves this number to the data.
    """

    def __init__(self, invocation: Invocation) -> None:
        self.invocation = invocation
        self.command = invocation.command
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,  # it writes to the logger's folder; ours is written before anything expensive
            auto_configure_optimizers=False,  # it knows no parameter groups; the task brings its own optimizer
            seed_everything_default=0,
            parser_kwargs={"prog": f"scalablevit {self.command}", "exit_on_error": False, "allow_abbrev": False},
            args=invocation.render()[1:],
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options for the run folder, the checkpoint and the weights, and the sections of callbacks."""
        for action in parser._actions:
            if action.dest.startswith("trainer.limit_"):  # tried in this order, so that 1 stays a count of batches
                action._typehint = int | float | None  # type: ignore[attr-defined]
        parser.add_argument("--run", type=str, help="Run folder: a name below runs/, or a path.")
        parser.add_argument("--ckpt_path", type=str | None, help="Checkpoint: auto, best, last or a file.")
        parser.add_argument(
            "--weights", type=str | None, help="Start from a run, a checkpoint, a model's folder or a Hub repository."
        )
        if self.command in ("test", "predict"):
            choices = Literal["ema", "none"] | None
            parser.add_argument("--average", type=choices, help="Weights to report: averaged or raw.")
        parser.add_lightning_class_args(RunCheckpoints, "checkpoint")
        parser.add_lightning_class_args(WeightAverage, "ema")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the words of the invocation; `sys.argv` does not matter. Check what the run's own file names."""
        own = self.invocation.own
        try:
            with imports_outside(own.parent) if own else nullcontext():
                self.config = parser.parse_args(args)  # type: ignore[arg-type]
        except ArgumentError as error:
            raise ValueError(explain_argument(str(error), parser)) from error
        except UnicodeDecodeError as error:
            names = ", ".join(map(repr, self.invocation.configs))
            raise ValueError(f"cannot read the configuration, {error.reason}: save {names} as UTF-8") from error
        if own is not None:
            for name, kind in SECTIONS.items():
                check_class_paths(self.config.get(name), kind, name, own, self.invocation.rest)
        self.folder = run_folder(self.config.run)
        arguments, self.classes_option = class_arguments(self.config)
        self.classes_open = arguments.get("num_classes", 0) is None

    def set_classes(self, number: int | None) -> None:
        """Set the network's number of classes if the configuration leaves it open."""
        if self.classes_open:
            # Lightning keeps what it dumps, which takes long, when something is built.
            for config in filter(None, (self.config, vars(self).get("config_dump"))):
                class_arguments(config)[0]["num_classes"] = number and max(number, 2)  # one class is the data's error

    def instantiate_classes(self) -> None:
        """Build nothing yet: that is up to `build`."""

    def build(self, *parts: str) -> Namespace:
        """Build the trainer's arguments, the callbacks, and those of task (`model`) and datamodule (`data`) named."""
        config = self.config.clone()
        for part in set(PARTS) - set(parts):
            del config[part]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # about a name that Lightning itself uses
            try:
                built: Namespace = self.parser.instantiate_classes(config)
            except Exception as error:
                sentence = explain_construction(error)
                if sentence is None:
                    raise
                raise ValueError(sentence) from error
        return built

    def build_parts(self) -> tuple[dict[str, Any], dict[str, Exception]]:
        """Build task (`model`) and datamodule (`data`) one by one, and return those and the errors of the others."""
        built: dict[str, Any] = {}
        faults: dict[str, Exception] = {}
        for part in PARTS:
            try:
                built[part] = self.build(part)[part]
            except Exception as error:
                faults[part] = error
        return built, faults

    def build_trainer(self) -> pl.Trainer:
        """Build the trainer that the configuration describes, without anything that records a run."""
        self.config_init = self.build()
        return self.instantiate_trainer(logger=False)

    def record(self) -> dict[str, Any]:
        """Return the configuration in plain values, as `config.yaml` holds it."""
        self._dump_config()
        plain = {key: value for key, value in self.config_dump.items() if key not in ("config", "ckpt_path")}
        return plain | {"run": str(self.config.run)}
