"""Run `fit`, `validate`, `test` or `predict` in a run folder."""

from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from scalablevit_pl.experiment.invocation import Invocation
from scalablevit_pl.experiment.parsing import PARTS, ParsedExperiment
from scalablevit_pl.experiment.start import StartingPoint, find_start
from scalablevit_pl.experiment.trainer import make_trainer
from scalablevit_pl.run_folder import check_resumable, claim_folder, locked_folder, removed_if_unused


def run_experiment(invocation: Invocation, command_line: str = "") -> pl.Trainer:
    """Find what a resolved command starts from, take the run folder, build all parts, run them, return the trainer.

    `command_line` is the command as it was typed, for the record.
    """
    parsed = ParsedExperiment(invocation)
    with ExitStack() as held:
        if invocation.automatic:
            held.enter_context(removed_if_unused(parsed.folder))
        if parsed.command == "fit":  # first, because whoever holds the folder may be about to write a checkpoint
            held.enter_context(locked_folder(parsed.folder, _rank()))
        start = find_start(parsed)
        if parsed.classes_open and start.record is None:
            take_classes(parsed)
        if _rank() == 0:
            prepare_folder(parsed, start)
        built = parsed.build(*PARTS)
        trainer = make_trainer(parsed, start, built, command_line)
        run: Any = getattr(trainer, parsed.command)
        # Checkpoints are read as data: no code in them runs.
        options = {"datamodule": built.data, "ckpt_path": parsed.config.ckpt_path, "weights_only": True}
        if parsed.command in ("validate", "test"):
            options["verbose"] = False  # the report writes the table
        run(built.model, **options)
    return trainer


def take_classes(parsed: ParsedExperiment) -> None:
    """Set the network's number of classes to that of the data; every process does so, before the network is built."""
    datamodule = parsed.build("data").data
    if hasattr(datamodule, "load_class_names"):
        parsed.set_classes(len(datamodule.load_class_names(parsed.command)) or None)


def prepare_folder(parsed: ParsedExperiment, start: StartingPoint) -> None:
    """Make the run folder; a fit writes its configuration, unless the folder holds another run."""
    if parsed.command == "fit":
        if start.record is not None:
            check_resumable(start.record["config"], parsed.record())
        claim_folder(parsed.folder, parsed.record(), resume=start.continues(parsed.folder, parsed.config.ckpt_path))
    parsed.folder.mkdir(parents=True, exist_ok=True)


def _rank() -> int:
    return getattr(rank_zero_only, "rank", None) or 0
