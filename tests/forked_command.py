"""The command in a process forked from one that has imported what every command imports.

Importing it takes far longer than most tests. Processes that a command starts itself start Python anew.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

PRELOADED = ["scalablevit_pl.experiment.run", "scalablevit_pl.tasks", "scalablevit_pl.data"]
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
    os.environ.update(variables)
    sys.argv = ["scalablevit_pl", *words]
    runpy.run_module("scalablevit_pl", run_name="__main__", alter_sys=True)
