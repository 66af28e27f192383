"""What commands write to the terminal: log messages, and one line for an error."""

import logging
import os
import re
import sys
import warnings

from scalablevit_pl.text import visible

# Warnings of Lightning and torch that do not concern our users.
IGNORED = (
    ".*isinstance.treespec, LeafSpec.* is deprecated",  # Lightning's own use of a new torch
    "Using `DistributedSampler` with the dataloaders",  # ours counts no sample twice
    "You're resuming from a checkpoint that ended before the epoch ended",  # our sampler resumes at the same batch
    r"It is recommended to use `self.log\('(train|val|test)",  # all processes have computed the same number
    "Be aware that when using `ckpt_path`, callbacks",  # an evaluation needs none of a fit's callbacks
    "The '.*' does not have many workers",
    "predict returned None",  # for a batch of unreadable images
    r"Found \d+ module\(s\) in eval mode",  # the frozen ones
    r"The number of training batches \(\d+\) is smaller than the logging interval",  # epochs are logged in any case
)
# Beginnings of Lightning's messages that repeat ours or the command.
REPEATED = re.compile(
    "💡|-----|Initializing distributed|(GPU|TPU) available|Seed set to|Restoring states|Restored all"
    "|Loaded model weights|`Trainer.fit` stopped: `max_"
)


class Console(logging.Handler):
    """Write messages to standard error, above a progress bar; those of the first process, and errors of all."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a message is shown."""
        return record.levelno >= logging.ERROR or (is_first_process() and not REPEATED.match(record.getMessage()))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message."""
        from tqdm import tqdm  # a tenth of a second that commands without messages do not need

        tqdm.write(visible(self.format(record)), file=sys.stderr)


def show_log() -> None:
    """Write messages to standard error, and hide messages and progress bars that do not help users."""
    logging.getLogger("scalablevit_pl").setLevel(logging.INFO)
    if not any(isinstance(handler, Console) for handler in logging.getLogger().handlers):
        console = Console()
        for name in ("", "lightning.pytorch", "lightning.fabric"):  # with one at the root, these add none of their own
            logging.getLogger(name).addHandler(console)
            logging.getLogger(name).propagate = False  # to the one of `lightning`, which adds its own in any case
    for message in IGNORED:
        warnings.filterwarnings("ignore", message)
    if not is_first_process():
        warnings.simplefilter("ignore")
    os.environ.setdefault("TQDM_DELAY", "2")  # seconds: reading a small data set shows no bar
    if not (is_first_process() and sys.stderr.isatty()):
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def is_first_process() -> bool:
    """Return whether this is the only process of a run, or the one that reports for all, however it was started."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))


def fail(sentence: str) -> int:
    """Write an error to standard error and return its exit status."""
    sys.stderr.write(f"scalablevit: error: {visible(sentence)}\n")
    return 2
