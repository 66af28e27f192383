"""The command in a forked process, as tests/integration/conftest.py starts it."""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path


def run_command(words: Sequence[str], cwd: Path, stdout: Path, stderr: Path) -> None:
    """Run `python -m scalablevit_pl`."""
    # Loaders fork their processes, as they do there: with this process's method, each would import everything.
    multiprocessing.set_start_method(None, force=True)
    for stream, path in ((sys.stdout, stdout), (sys.stderr, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.chdir(cwd)
    sys.argv = ["scalablevit_pl", *words]
    runpy.run_module("scalablevit_pl", run_name="__main__", alter_sys=True)
