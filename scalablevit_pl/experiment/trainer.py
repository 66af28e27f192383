"""The trainer of a run, with everything that watches and records it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from scalablevit_pl.callbacks.checkpoints import WholeCheckpointIO
from scalablevit_pl.callbacks.evaluation import EvaluationReport, PredictionWriter
from scalablevit_pl.callbacks.guard import LossGuard, SharedEnd, UnreadableList
from scalablevit_pl.callbacks.initialization import SameStart, StartFromWeights
from scalablevit_pl.callbacks.metrics_log import MetricsLog
from scalablevit_pl.callbacks.progress import LineEnd, TrainingBar
from scalablevit_pl.callbacks.run_record import RunRecord
from scalablevit_pl.callbacks.throughput import Throughput
from scalablevit_pl.experiment.parsing import ParsedExperiment
from scalablevit_pl.experiment.start import StartingPoint


def make_trainer(parsed: ParsedExperiment, start: StartingPoint, built: Namespace, command_line: str) -> pl.Trainer:
    """Build the trainer of a run.

    Args:
        parsed: The command.
        start: What it starts from; a callback takes over its weights.
        built: Arguments and callbacks, as `ParsedExperiment.build` returns them.
        command_line: The command as it was typed, for the record.
    """
    settings = dict(built.trainer.items()) | {"default_root_dir": parsed.folder}
    if settings["enable_model_summary"] is None:
        settings["enable_model_summary"] = False  # one line of the run record has what matters of it
    built.ema.choose(parsed.config.get("average"))
    own = [built.ema, *_common_callbacks(parsed, start, command_line)]
    if parsed.command == "fit":
        settings |= {
            "plugins": _plugins(settings["plugins"]),
            "logger": loggers(parsed.folder, start, settings["logger"]),
        }
        own += _fit_callbacks(parsed, settings)
        if settings["enable_checkpointing"] is not False:
            own.append(built.checkpoint)
    else:
        settings |= {"logger": False, "enable_checkpointing": False}
        own.append(_results(parsed, start, command_line))
    start.weights = None  # the callback frees it once it is used
    return pl.Trainer(**settings | {"callbacks": [*_listed(settings["callbacks"]), *own]})


def _common_callbacks(parsed: ParsedExperiment, start: StartingPoint, command_line: str) -> list[pl.Callback]:
    """Return what every command needs: checks, messages, the record, and the weights to start from."""
    source, folder = parsed.config.ckpt_path or parsed.config.weights, parsed.folder
    callbacks: list[pl.Callback] = [SameStart(source, start.step), LineEnd(), UnreadableList(folder), SharedEnd()]
    stored = start.record
    if start.weights is not None and parsed.command != "fit":
        # An evaluation must use the classes of the weights; a fit may use others.
        names, preprocessing = start.weights.class_names, start.weights.preprocessing.to_dict()
        stored = {"class_names": names, "preprocessing": preprocessing}
    callbacks.append(RunRecord(folder, parsed.record(), stored, command_line))
    if start.weights is not None:
        callbacks.append(StartFromWeights(start.weights, parsed.config.weights))
    return callbacks


def _fit_callbacks(parsed: ParsedExperiment, settings: Mapping[str, Any]) -> list[pl.Callback]:
    throughput = Throughput()
    callbacks: list[pl.Callback] = [LossGuard(parsed.folder), throughput]
    own_bar = any(isinstance(callback, ProgressBar) for callback in _listed(settings["callbacks"]))
    if settings["enable_progress_bar"] is not False and not own_bar:
        callbacks.append(TrainingBar(throughput))
    return callbacks


def _results(parsed: ParsedExperiment, start: StartingPoint, command_line: str) -> pl.Callback:
    """Return what writes the results of an evaluation or a prediction into the run folder."""
    if parsed.command == "predict":
        return PredictionWriter(parsed.folder)
    source = {"checkpoint": parsed.config.ckpt_path, "global_step": start.step}
    if start.weights is not None:
        source = {"weights": parsed.config.weights, "average": start.weights.average}
    return EvaluationReport(parsed.folder, source | {"command": command_line})


def _plugins(own: Any) -> list[Any]:
    """Return the user's plugins, and ours for writing checkpoints unless there is one among them."""
    has_one = any(isinstance(plugin, CheckpointIO) for plugin in _listed(own))
    return _listed(own) if has_one else [*_listed(own), WholeCheckpointIO()]


def loggers(folder: Path, start: StartingPoint, own: Logger | list[Logger] | bool | None) -> list[Logger] | bool:
    """Return the loggers of a fit: metrics.csv, and TensorBoard or the user's own; False turns all of them off."""
    if own is False:
        return False
    if own is None or own is True:
        # Hide what an earlier part of the run wrote about steps that are repeated.
        again = start.record is not None or start.restarts
        past: Any = {"purge_step": start.step or 0} if again else {}
        own = TensorBoardLogger(folder, name="tensorboard", version="", default_hp_metric=False, **past)
    return [MetricsLog(folder / "metrics.csv"), *_listed(own)]


def _listed(values: Any) -> list[Any]:
    """Return a list of what may be a list, a single value or None."""
    return list(values) if isinstance(values, list) else [] if values is None else [values]
