"""The trainer of a run, with everything that watches and records it."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from scalablevit_pl.callbacks.checkpointing import WholeCheckpointIO
from scalablevit_pl.callbacks.evaluation import EvaluationReport, PredictionWriter
from scalablevit_pl.callbacks.guard import LossGuard, SharedEnd, UnreadableList
from scalablevit_pl.callbacks.initialization import SameStart, StartFromWeights
from scalablevit_pl.callbacks.metrics_log import MetricsLog
from scalablevit_pl.callbacks.progress import Progress
from scalablevit_pl.callbacks.run_record import RunRecord
from scalablevit_pl.callbacks.throughput import Throughput
from scalablevit_pl.experiment.parsing import ParsedExperiment
from scalablevit_pl.experiment.start import StartingPoint


def make_trainer(parsed: ParsedExperiment, start: StartingPoint, built: Namespace, command_line: str) -> pl.Trainer:
    """Build the trainer of a run from what `ParsedExperiment.build` returns; a callback takes over `start.weights`."""
    settings = dict(built.trainer.items()) | {"default_root_dir": parsed.folder}
    callbacks, plugins = _listed(settings["callbacks"]), _listed(settings["plugins"])
    if settings["enable_model_summary"] is None:
        settings["enable_model_summary"] = False  # one line of the run record has what matters of it
    built.ema.reported = parsed.config.get("average") != "none"
    throughput = Throughput()
    if settings["enable_progress_bar"] is not False and not any(isinstance(own, ProgressBar) for own in callbacks):
        callbacks.append(Progress(throughput))
    callbacks += [built.ema, *_common_callbacks(parsed, start, command_line)]
    if parsed.command == "fit":
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(WholeCheckpointIO())
        settings["logger"] = loggers(parsed.folder, start, settings["logger"])
        callbacks += [LossGuard(parsed.folder), throughput]
        if settings["enable_checkpointing"] is not False:
            callbacks.append(built.checkpoint)
    else:
        settings |= {"logger": False, "enable_checkpointing": False}
        callbacks.append(_results(parsed, start, command_line))
    start.weights = None  # the callback frees it once it is used
    return pl.Trainer(**settings | {"callbacks": callbacks, "plugins": plugins})


def _common_callbacks(parsed: ParsedExperiment, start: StartingPoint, command_line: str) -> list[pl.Callback]:
    """Return what every command needs: checks, messages, the record, and the weights to start from."""
    source, folder, weights = parsed.config.ckpt_path or parsed.config.weights, parsed.folder, start.weights
    stored = start.record
    if weights is not None and parsed.command != "fit":  # a fit may use other classes than those of the weights
        stored = {"class_names": weights.class_names, "preprocessing": weights.preprocessing.to_dict()}
    callbacks: list[pl.Callback] = [SameStart(source, start.step), UnreadableList(folder), SharedEnd()]
    callbacks.append(RunRecord(folder, parsed.record(), stored, command_line, parsed.classes_option))
    return callbacks if weights is None else [*callbacks, StartFromWeights(weights, parsed.config.weights)]


def _results(parsed: ParsedExperiment, start: StartingPoint, command_line: str) -> pl.Callback:
    if parsed.command == "predict":
        return PredictionWriter(parsed.folder)
    source = {"checkpoint": parsed.config.ckpt_path, "global_step": start.step}
    if start.weights is not None:
        source = {"weights": parsed.config.weights, "average": start.weights.average}
    return EvaluationReport(parsed.folder, source | {"command": command_line})


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
    return list(values) if isinstance(values, list) else [] if values is None else [values]
