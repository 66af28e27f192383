"""Signals that ask a run to stop: it does so between two steps, with a checkpoint."""

import logging
import os
import re
import signal
import subprocess
import threading
from typing import Any

logger = logging.getLogger(__name__)

STOP = signal.SIGTERM
# SLURM sends it, where a job's --signal says so, some time before the job's time is up.
REQUEUE = getattr(signal, "SIGUSR1", signal.SIGTERM)  # Windows has none
BY_WEIGHT = (0, STOP, REQUEUE)  # no signal, and which one wins where processes have got different ones


class PreemptedError(Exception):
    """A signal has stopped the run, and its checkpoint is written.

    Args:
        signum: The signal.
        step: Optimizer steps that are done.
    """

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.signum = signum
        self.step = step


class StopSignal:
    """Remember SIGTERM and SIGUSR1 instead of dying of them.

    Lightning's own handlers write their checkpoint and speak to the other processes from within the handler, in the
    middle of whatever the process is doing.

    Attributes:
        received: The signal, once there was one.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._earlier: dict[int, Any] = {}

    def install(self) -> None:
        """Take the handlers' place, again if others have been put there since."""
        if threading.current_thread() is not threading.main_thread():
            return  # where signals are none of ours
        for signum in {STOP, REQUEUE}:
            current = signal.getsignal(signum)
            if current != self._remember:
                self._earlier.setdefault(signum, current)
                signal.signal(signum, self._remember)

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for signum, handler in self._earlier.items():
            signal.signal(signum, handler)
        self._earlier.clear()

    def _remember(self, signum: int, frame: Any) -> None:
        if self.received != REQUEUE:  # which SIGTERM follows where the time is up
            self.received = signum


def requeue_job() -> str | None:
    """Ask SLURM to run this job again, and return its id; None outside of SLURM.

    Raises:
        ValueError: If SLURM refuses.
    """
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
            f"the checkpoint is written, but job {job} could not be requeued ({' '.join(str(reason).split())}): submit "
            "the same script again"
        ) from error
    return job
