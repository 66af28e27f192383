"""Commands and functions in processes forked from one that has imported what every command imports.

Importing it takes far longer than most tests. Processes that a command starts itself start Python anew.
"""

import gc
import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

PRELOADED = [
    "scalablevit_pl.experiment.run",
    "scalablevit_pl.tasks",
    "scalablevit_pl.data.classification",
    # Imported on first use by Lightning's logger and by pictures.
    "torch.utils.tensorboard",
    "matplotlib.backends.backend_agg",
]
LONGEST = 600  # seconds, for a machine that is busy with other things


class ForkedCommand:
    """A running command, with the methods of `subprocess.Popen` that tests use.

    Args:
        context: Where processes are forked.
        words: The command and its options.
        cwd: Its working folder.
        streams: Folder for its output.
        variables: Changes to its environment.
    """

    def __init__(
        self, context: ForkServerContext, words: Sequence[str], cwd: Path, streams: Path, variables: Mapping[str, str]
    ) -> None:
        self.words = words
        self.streams = [streams / "stdout", streams / "stderr"]
        self.process = context.Process(target=run_command, args=(words, cwd, *self.streams, dict(variables)))
        self.process.start()

    def kill(self) -> None:
        self.process.kill()

    def send_signal(self, signum: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signum)

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Return the exit status and the output of the command when it has ended."""
        self.process.join(LONGEST)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.words, LONGEST)
        stdout, stderr = (stream.read_text(encoding="utf-8") for stream in self.streams)
        return subprocess.CompletedProcess(self.words, self.process.exitcode, stdout, stderr)


def run_command(words: Sequence[str], cwd: Path, stdout: Path, stderr: Path, variables: Mapping[str, str]) -> None:
    """Run `python -m scalablevit_pl`."""
    # Loaders fork their processes, as they do there: with this process's method, each would import everything.
    multiprocessing.set_start_method(None, force=True)
    for stream, path in ((sys.stdout, stdout), (sys.stderr, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background may have been told to ignore it
    begin_process(variables)
    sys.argv = ["scalablevit_pl", *words]
    runpy.run_module("scalablevit_pl", run_name="__main__", alter_sys=True)


def begin_process(variables: Mapping[str, str]) -> None:
    """Change the environment, and with it what libraries read from it when they were imported."""
    from huggingface_hub import constants
    from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

    gc.freeze()  # what was imported stays out of each garbage collection, and in pages that processes share
    os.environ.update(variables)
    importlib.reload(constants)
    rank_zero_only.rank = _get_rank() or 0


def run_together(context: ForkServerContext, function: Callable[..., None], processes: int, *arguments: Any) -> None:
    """Call a function in several processes of one group, as `torchrun` does.

    Args:
        context: Where processes are forked.
        function: Its first argument is the rank, and `arguments` follow.
        processes: Size of the group. A single process gets none of the variables of a group.
        arguments: Picklable values.

    Raises:
        TimeoutError: A process waits for another one indefinitely.
    """
    import torch.multiprocessing

    words = (function, group_variables(processes), arguments)
    started = torch.multiprocessing.start_processes(
        run_function, words, processes, join=False, start_method=context.get_start_method()
    )
    end = time.monotonic() + LONGEST
    while not started.join(timeout=1.0):
        if time.monotonic() > end:
            for process in started.processes:
                process.kill()
            raise TimeoutError(function)


def run_function(
    rank: int, function: Callable[..., None], group: Sequence[Mapping[str, str]], arguments: Sequence[Any]
) -> None:
    begin_process(group[rank])
    function(rank, *arguments)


def group_variables(processes: int) -> list[dict[str, str]]:
    """Return the variables that `torchrun` sets in each process of a group on this machine."""
    if processes == 1:
        return [{}]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "test"}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0"}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
