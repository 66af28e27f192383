"""What commands write to the terminal: log messages, and one line for an error."""

import logging
import os
import sys
import warnings

logger = logging.getLogger("scalablevit_pl")

# Warnings of Lightning and torch that do not concern our users.
IGNORED = (
    ".*isinstance.treespec, LeafSpec.* is deprecated",  # Lightning's own use of a new torch
    "Using `DistributedSampler` with the dataloaders",  # ours counts no sample twice
    "You're resuming from a checkpoint that ended before the epoch ended",  # our sampler resumes at the same batch
    r"It is recommended to use `self.log\('(val|test)",  # all processes have computed the same number
    "Be aware that when using `ckpt_path`, callbacks",  # an evaluation needs none of a fit's callbacks
    "The '.*' does not have many workers",
    "predict returned None",  # for a batch of unreadable images
    r"Found \d+ module\(s\) in eval mode",  # the frozen ones
)


def show_log() -> None:
    """Write the package's messages to standard error, and hide messages that do not help its users."""
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addFilter(lambda record: record.levelno >= logging.ERROR or is_first_process())
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
            lambda record: not record.getMessage().startswith(("💡", "TPU available"))
        )
    for message in IGNORED:
        warnings.filterwarnings("ignore", message)


def is_first_process() -> bool:
    """Return whether this is the only process of a run, or the one that reports for all, however it was started."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))


def fail(sentence: str) -> int:
    """Write an error to standard error and return its exit status."""
    sys.stderr.write(f"scalablevit: error: {sentence}\n")
    return 2
