"""What a command starts from: a checkpoint, trained weights, or nothing."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalablevit_pl.experiment.adoption import FROM_WEIGHTS, adopt_weights, class_arguments
from scalablevit_pl.experiment.invocation import Invocation
from scalablevit_pl.experiment.parsing import ParsedExperiment
from scalablevit_pl.run_folder import CHECKPOINTS, resumable_checkpoints
from scalablevit_pl.weights.checkpoint import AVERAGED, RECORD_KEY, find_checkpoint, read_checkpoint
from scalablevit_pl.weights.source import load_weights
from scalablevit_pl.weights.stored import StoredModel

logger = logging.getLogger(__name__)

PREPROCESSING = re.compile(r"--data\.(?:init_args\.)?preprocessing\.(\w+)")


@dataclass
class StartingPoint:
    """What a command starts from.

    Attributes:
        record: Record of the run in the checkpoint, if there is one.
        step: Optimizer steps before the checkpoint.
        weights: The weights that `--weights` names.
        restarts: Whether `--resume auto` found no checkpoint, so that an interrupted run starts again.
    """

    record: dict[str, Any] | None = None
    step: int | None = None
    weights: StoredModel | None = None
    restarts: bool = False

    def continues(self, folder: Path, checkpoint: str | None) -> bool:
        """Return whether the run in a folder continues: a checkpoint of another run does not continue it."""
        return self.restarts or (checkpoint is not None and folder.resolve() in Path(checkpoint).resolve().parents)


def parse_fit(options: Sequence[str]) -> tuple[ParsedExperiment, StartingPoint]:
    """Parse a fit and find what it starts from, without running it or making its folder: its parts can be built."""
    fit = ParsedExperiment(Invocation.parse(["fit", *options]).resolve())
    return fit, find_start(fit)


def find_start(parsed: ParsedExperiment) -> StartingPoint:
    """Find and read what a command starts from, and adapt its configuration to it."""
    config = parsed.config
    automatic = config.ckpt_path == "auto"
    found = _newest_checkpoint(parsed.folder, parsed.command) if automatic else _named_checkpoint(parsed)
    config.ckpt_path = None if found is None else str(found[0])
    if found is not None:
        path, checkpoint = found
        if config.get("average") == "ema" and AVERAGED not in checkpoint:
            raise ValueError(f"{str(path)!r} has no averaged weights: use the raw ones with --average none")
        if not automatic:
            logger.info("weights from %s", path)
        record = checkpoint[RECORD_KEY]
        parsed.set_classes(class_arguments(record.get("config", {}))[0].get("num_classes"))
        return StartingPoint(record, checkpoint.get("global_step"))
    if config.weights is not None:
        weights = load_weights(config.weights, config.get("average"))
        named = {match[1] for word in parsed.invocation.rest if (match := PREPROCESSING.match(word))}
        adopt_weights(config, weights, config.weights, parsed.command, named)
        return StartingPoint(weights=weights, restarts=automatic)
    if config.get("model.init_args.network.init_args.name") == FROM_WEIGHTS:
        raise ValueError("this recipe starts from weights: name them with --weights FOLDER or --weights OWNER/NAME")
    return StartingPoint(restarts=automatic)


def _named_checkpoint(parsed: ParsedExperiment) -> tuple[Path, dict[str, Any]] | None:
    """Read the checkpoint that `--ckpt_path` names; an evaluation without weights takes one of the run."""
    place = parsed.config.ckpt_path
    if place is None and (parsed.command == "fit" or parsed.config.weights is not None):
        return None
    if place in ("best", "last"):
        place = parsed.folder / CHECKPOINTS / f"{place}.ckpt"
    path = find_checkpoint(place or parsed.folder, ("last", "best") if parsed.command == "fit" else ("best", "last"))
    return path, read_checkpoint(path)


def _newest_checkpoint(folder: Path, command: str) -> tuple[Path, dict[str, Any]] | None:
    """Read the newest intact checkpoint of the run; None if the run has not written any."""
    if command != "fit":
        raise ValueError("--ckpt_path auto resumes a fit: give best, last or a file")
    paths = resumable_checkpoints(folder)
    for path in paths:
        try:
            checkpoint = read_checkpoint(path)
        except ValueError as error:
            logger.warning("%s: using the one before it", error)
            continue
        logger.info("%s is the newest intact checkpoint: resuming after step %s", path, checkpoint.get("global_step"))
        return path, checkpoint
    if paths:
        raise ValueError(
            f"none of the {len(paths)} checkpoints in {str(folder)!r} can be read: choose another name with --run to "
            "start again"
        )
    logger.info("there is no checkpoint in %s: starting from the beginning", folder)
    return None
