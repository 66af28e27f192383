"""Setup of the loader processes."""

import os
import signal
import threading


def spare_worker(worker: int) -> None:  # noqa: ARG001  torch passes it
    """Let a loader process survive SIGUSR1 and SIGTERM, which schedulers send to all processes of a job.

    The run stops after its current step and needs its loader until then. Only the process that started the loader
    process ends it: Python sends its children one SIGTERM when it exits, and waits for them.
    """
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS and Windows have none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent sends SIGTERM; with status 0, as torch reports others as crashes."""
    parent = os.getppid()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
