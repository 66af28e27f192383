"""Setup of the loader processes."""

import signal
from typing import Any


def spare_worker(worker: int) -> None:  # noqa: ARG001  torch passes it
    """Let a loader process survive SIGUSR1 and the first SIGTERM, which schedulers send to all processes of a job.

    The run stops after its current step and needs its loader until then. A second SIGTERM ends the process: the run
    sends it when it no longer needs the process.
    """
    signal.signal(signal.SIGTERM, _once)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _once(signum: int, frame: Any) -> None:  # noqa: ARG001
    signal.signal(signum, signal.SIG_DFL)
