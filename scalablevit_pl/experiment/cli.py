"""The experiment commands: Lightning's command line, with one folder per run and its records."""

import logging
import re
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from jsonargparse import ArgumentError
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from scalablevit_pl.callbacks.averaging import WeightAverage
from scalablevit_pl.callbacks.checkpoints import RunCheckpoints, WholeCheckpointIO
from scalablevit_pl.callbacks.evaluation import EvaluationReport, PredictionWriter
from scalablevit_pl.callbacks.guard import LossGuard, SharedEnd, UnreadableList
from scalablevit_pl.callbacks.initialization import SameStart, StartFromWeights
from scalablevit_pl.callbacks.metrics_log import MetricsLog
from scalablevit_pl.callbacks.progress import LineEnd, TrainingBar
from scalablevit_pl.callbacks.run_record import RunRecord
from scalablevit_pl.callbacks.throughput import Throughput
from scalablevit_pl.experiment.adoption import FROM_WEIGHTS, adopt_weights
from scalablevit_pl.explanation import explain_argument
from scalablevit_pl.run_folder import (
    CHECKPOINTS,
    check_resumable,
    claim_folder,
    locked_folder,
    resumable_checkpoints,
    run_folder,
)
from scalablevit_pl.weights.checkpoint import AVERAGED, RECORD_KEY, find_checkpoint, read_checkpoint
from scalablevit_pl.weights.source import load_weights
from scalablevit_pl.weights.stored import StoredModel

logger = logging.getLogger(__name__)

PREPROCESSING = re.compile(r"--data\.(?:init_args\.)?preprocessing\.(\w+)")


class ExperimentCLI(LightningCLI):
    """`fit`, `validate`, `test` and `predict`, each in a run folder; reads `sys.argv`.

    Args:
        command_line: The command as it was typed, for the record.
    """

    def __init__(self, command_line: str = "") -> None:
        self.command_line = command_line
        self.held = ExitStack()
        options = {"exit_on_error": False, "allow_abbrev": False}
        with self.held:  # a run folder's lock, while the command runs
            super().__init__(
                pl.LightningModule,
                pl.LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=None,  # it writes where the logger is; ours is written before anything expensive
                auto_configure_optimizers=False,  # it knows no parameter groups; the task brings its own optimizer
                seed_everything_default=0,
                parser_kwargs={**options, **{command: dict(options) for command in self.subcommands()}},
            )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the commands, each with those arguments of the trainer's method that are no options.

        `weights_only` is none of them: no option lets a checkpoint run code.
        """
        hidden = {"model", "datamodule", "weights_only"}
        return {
            "fit": hidden | {"train_dataloaders", "val_dataloaders"},
            "validate": hidden | {"dataloaders", "verbose"},
            "test": hidden | {"dataloaders", "verbose"},
            "predict": hidden | {"dataloaders", "return_predictions"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that name the run folder and the weights to start from, and the sections of callbacks."""
        parser.add_argument("--run", type=str, help="Run folder: a name below runs/, or a path.")
        parser.add_argument(
            "--weights", type=str | None, help="Start from a run, a checkpoint, a model's folder or a Hub repository."
        )
        parser.add_lightning_class_args(RunCheckpoints, "checkpoint")
        parser.add_lightning_class_args(WeightAverage, "ema")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("test", "predict"):
            choices = Literal["ema", "none"] | None
            parser.add_argument("--average", type=choices, help="Weights that answer: averaged or raw ones.")
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, then settle the run folder and the checkpoint before anything expensive is made.

        Raises:
            ValueError: If weights are needed and not given, or cannot be read.
        """
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            raise ValueError(explain_argument(str(error), self._subcommand_parsers.values())) from error
        command, config = self.config.subcommand, self.config[self.config.subcommand]
        self.folder = run_folder(config.run)
        if command == "fit":
            self.hold_folder()  # before a checkpoint is chosen, since its owner may be about to write another one
        checkpoint: dict[str, Any] | None = None
        self.restarts = False
        if config.ckpt_path == "auto":
            config.ckpt_path, checkpoint = self._newest_checkpoint(command)
            self.restarts = checkpoint is None
        elif config.ckpt_path in ("best", "last"):
            config.ckpt_path = self.folder / CHECKPOINTS / f"{config.ckpt_path}.ckpt"
        elif config.ckpt_path is None and config.weights is None and command != "fit":
            config.ckpt_path = self.folder
        self.stored: dict[str, Any] | None = None
        self.step: int | None = None
        self.trained: StoredModel | None = None
        self.average: str | None = None
        if config.ckpt_path is not None:
            names = ("last", "best") if command == "fit" else ("best", "last")
            config.ckpt_path = str(find_checkpoint(config.ckpt_path, names))
            checkpoint = checkpoint or read_checkpoint(Path(config.ckpt_path))
            self.stored, self.step = checkpoint[RECORD_KEY], checkpoint.get("global_step")
            if config.get("average") == "ema" and AVERAGED not in checkpoint:
                raise ValueError(
                    f"{config.ckpt_path!r} holds no averaged weights: take the raw ones with --average none"
                )
            logger.info("weights from %s", config.ckpt_path)
        elif config.weights is not None:
            self.trained = load_weights(config.weights, config.get("average"))
            self.average = self.trained.average
            named = {match[1] for word in sys.argv if (match := PREPROCESSING.match(word))}
            adopt_weights(config, self.trained, config.weights, command, named)
        elif config.get("model.init_args.network.init_args.name") == FROM_WEIGHTS:
            raise ValueError(
                "this recipe starts from weights: say from which with --weights FOLDER or --weights OWNER/NAME"
            )

    def hold_folder(self) -> None:
        """Lock the run folder until the command ends."""
        self.held.enter_context(locked_folder(self.folder, getattr(rank_zero_only, "rank", 0)))

    def _newest_checkpoint(self, command: str) -> tuple[Path | None, dict[str, Any] | None]:
        """Find the newest checkpoint of the run that is whole; there is none if the run has not come so far.

        Raises:
            ValueError: If there are checkpoints, and all of them are damaged; or for another command than a fit.
        """
        if command != "fit":
            raise ValueError("auto is for going on with a fit: give best, last or a file")
        paths = resumable_checkpoints(self.folder)
        for path in paths:
            try:
                checkpoint = read_checkpoint(path)
            except ValueError as error:
                logger.warning("%s: the one before it is taken", error)
                continue
            logger.info(
                "%s is the newest whole checkpoint: going on after step %s", path, checkpoint.get("global_step")
            )
            return path, checkpoint
        if paths:
            raise ValueError(
                f"none of the {len(paths)} checkpoints in {str(self.folder)!r} can be read: choose another name with "
                "--run to begin anew"
            )
        logger.info("there is no checkpoint in %s: starting from the beginning", self.folder)
        return None, None

    def before_instantiate_classes(self) -> None:
        """Make the run folder with its configuration, unless it holds another run."""
        config = self.config[self.config.subcommand]
        self._dump_config()
        record = {key: value for key, value in self.config_dump.items() if key not in ("config", "ckpt_path")}
        self.record = record | {"run": str(config.run)}
        if getattr(rank_zero_only, "rank", 0) == 0:
            if self.config.subcommand == "fit":
                if self.stored is not None:
                    check_resumable(self.stored["config"], self.record)
                # A checkpoint of another run does not make this folder's run one that is resumed.
                inside = self.stored is not None and self.folder.resolve() in Path(config.ckpt_path).resolve().parents
                claim_folder(self.folder, self.record, resume=inside or self.restarts)
            self.folder.mkdir(parents=True, exist_ok=True)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the trainer with the run folder as its home, our records and, for a fit, our loggers."""
        settings = self.config_init[self.config.subcommand].trainer
        if self.config.subcommand != "fit":
            kwargs |= {"logger": False, "enable_checkpointing": False}
        else:
            kwargs["plugins"] = self._plugins(settings.plugins)
            if settings.logger is not False:
                kwargs["logger"] = self._loggers(settings.logger)
        if settings.enable_model_summary is None:
            kwargs["enable_model_summary"] = False  # the run record says in one line what matters of it
        return super().instantiate_trainer(default_root_dir=self.folder, **kwargs)

    def _plugins(self, own: Any) -> list[Any]:
        """Return the user's plugins with our way to write checkpoints, if there is no other one among them."""
        plugins = own if isinstance(own, list) else [] if own is None else [own]
        has_one = any(isinstance(plugin, CheckpointIO) for plugin in plugins)
        return plugins if has_one else [*plugins, WholeCheckpointIO()]

    def _loggers(self, own: Logger | list[Logger] | bool | None) -> list[Logger]:
        """Return ours, of which TensorBoard's makes way for those that the user has chosen."""
        if own is None or isinstance(own, bool):
            # What an earlier part of the run has written about the steps that come again is not shown.
            past: Any = {"purge_step": self.step or 0} if self.stored is not None or self.restarts else {}
            own = TensorBoardLogger(self.folder, name="tensorboard", version="", default_hp_metric=False, **past)
        return [MetricsLog(self.folder / "metrics.csv"), *(own if isinstance(own, list) else [own])]

    def _parse_ckpt_path(self) -> None:
        """Take no settings from a checkpoint: the command line and the configuration say what is built."""

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Return the arguments of the trainer's method, which reads checkpoints as data and runs no code in them."""
        return super()._prepare_subcommand_kwargs(subcommand) | {"weights_only": True}

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[pl.Callback]) -> pl.Trainer:
        command, settings = self.config.subcommand, self.config[self.config.subcommand]
        start = SameStart(settings.ckpt_path or settings.weights, self.step)
        ours: list[pl.Callback] = [start, LineEnd(), UnreadableList(self.folder), SharedEnd()]
        average = next(callback for callback in callbacks if isinstance(callback, WeightAverage))
        average.choose(settings.get("average"))
        if self.trained is None:
            ours.append(RunRecord(self.folder, self.record, self.stored, self.command_line))
        else:
            # An evaluation has to be on the classes that the weights know; a fit may be on others.
            known = {
                "class_names": self.trained.class_names,
                "preprocessing": self.trained.preprocessing.to_dict(),
            }
            stored = None if command == "fit" else known
            ours.append(RunRecord(self.folder, self.record, stored, self.command_line))
            ours.append(StartFromWeights(self.trained, settings.weights))
            self.trained = None  # what the callback lets go of shall be free
        if command != "fit" or config["enable_checkpointing"] is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, RunCheckpoints)]
        if command == "fit":
            throughput = Throughput()
            ours += [LossGuard(self.folder), throughput]
            if config["enable_progress_bar"] is not False and not _has_bar(config["callbacks"]):
                ours.append(TrainingBar(throughput))
        elif command == "predict":
            ours.append(PredictionWriter(self.folder / "predictions.csv"))
        else:
            source = {"checkpoint": settings.ckpt_path, "global_step": self.step}
            if settings.ckpt_path is None:
                source = {"weights": settings.weights, "average": self.average}
            ours.append(EvaluationReport(self.folder, source | {"command": self.command_line}))
        return super()._instantiate_trainer(config, [*callbacks, *ours])


def _has_bar(callbacks: pl.Callback | list[pl.Callback] | None) -> bool:
    given = callbacks if isinstance(callbacks, list) else [callbacks]
    return any(isinstance(callback, ProgressBar) for callback in given)
