"""Signals that stop a run between two steps, with a checkpoint."""

import logging
import os
import re
import signal
import subprocess
import threading
from typing import Any

from scalablevit_pl.text import one_line

logger = logging.getLogger(__name__)

STOP = signal.SIGTERM
# SLURM sends it some time before a job's time limit, if the job's --signal asks for it.
REQUEUE = getattr(signal, "SIGUSR1", signal.SIGTERM)  # Windows has none
BY_WEIGHT = (0, STOP, REQUEUE)  # by precedence, where processes have received different signals


class PreemptedError(Exception):
    """A signal stopped the run after its checkpoint was written.

    Args:
        signum: The signal.
        step: Number of completed optimizer steps.
    """

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.signum = signum
        self.step = step


class StopSignal:
    """Record SIGTERM and SIGUSR1 instead of ending the process.

    Lightning's own handlers write a checkpoint and communicate from within the handler, in the middle of whatever the
    process is doing.

    Attributes:
        received: The received signal, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._earlier: dict[int, Any] = {}

    def install(self) -> None:
        """Install the handlers, again if others have replaced them."""
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread handles signals
        for signum in {STOP, REQUEUE}:
            current = signal.getsignal(signum)
            if current != self._remember:
                self._earlier.setdefault(signum, current)
                signal.signal(signum, self._remember)

    def restore(self) -> None:
        """Restore the previous handlers."""
        for signum, handler in self._earlier.items():
            signal.signal(signum, handler)
        self._earlier.clear()

    def _remember(self, signum: int, frame: Any) -> None:
        if self.received != REQUEUE:  # SIGTERM follows it at the time limit
            self.received = signum


def requeue_job() -> str | None:
    """Requeue this SLURM job and return its id; return None outside of SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    if job is None or not re.fullmatch(r"[0-9_]+", job):
        return None
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        raise ValueError(
            f"the checkpoint is written, but job {job} could not be requeued ({one_line(reason)}): submit "
            "the same script again"
        ) from error
    return job
