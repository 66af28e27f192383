"""What a loader's processes do before they load anything."""

import signal
from typing import Any


def spare_worker(worker: int) -> None:  # noqa: ARG001  what torch calls it with
    """Let a loader's process outlive SIGUSR1 and the first SIGTERM, which schedulers send to all processes of a job.

    The run stops after the step that it is in, and needs its loader until then. A second SIGTERM ends the process: that
    of the run itself, when it has no more use for it.

    Args:
        worker: Number of the process.
    """
    signal.signal(signal.SIGTERM, _once)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _once(signum: int, frame: Any) -> None:  # noqa: ARG001
    signal.signal(signum, signal.SIG_DFL)
