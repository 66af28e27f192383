"""The `scalablevit` command: answers `--help` without importing torch, and dispatches to the commands."""

import difflib
import importlib
import os
import signal
import sys

from scalablevit_pl import __version__
from scalablevit_pl.commands.console import fail, is_first_process, show_log
from scalablevit_pl.commands.pages import list_pages, read_page

# The module of each command and its function, which takes the options and returns an exit status, or None for 0.
COMMANDS = {
    "fit": "experiment:fit",
    "validate": "experiment:validate",
    "test": "experiment:test",
    "predict": "experiment:predict",
    "doctor": "doctor:diagnose",
    "plot": "plot:plot_runs",
    "profile": "profile:profile",
    "profile data": "profile_data:profile_data",
    "export": "export:export_run",
    "convert": "convert:convert_reference",
    "push": "push:push_folder",
    "pull": "pull:pull_repository",
    "info": "info:show_info",
}


def main(args: list[str] | None = None) -> int:
    """Run a command and return its exit status: 0, or 2 after an error, which is reported in one line.

    Args:
        args: The words after `scalablevit`; by default those of the process.
    """
    command, *options = list(sys.argv[1:] if args is None else args) or ["--help"]
    if command in ("-h", "--help", "help"):
        sys.stdout.write(read_page())
        return 0
    if command == "--version":
        sys.stdout.write(f"scalablevit_pl {__version__}\n")
        return 0
    if command not in list_pages():
        near = difflib.get_close_matches(command, list_pages(), n=1)
        return fail(f"unknown command {command!r}: {f'did you mean {near[0]}?' if near else 'see scalablevit --help'}")
    if "--help" in options or "-h" in options:
        sys.stdout.write(read_page(command))
        return 0
    show_log()
    try:
        # The doctor itself handles --traceback: it shows the trace of each finding and continues.
        return run(command, [option for option in options if option != "--traceback" or command == "doctor"])
    except BrokenPipeError:  # the reader of the output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as stop:  # so Lightning ends an interrupted trainer, with status 1
        if "--traceback" in options or not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        return report(stop.__context__) or 0
    except (KeyboardInterrupt, Exception) as error:
        if "--traceback" in options:
            raise
        status = report(error)
        if status is None:
            raise
        return status


def run(command: str, options: list[str]) -> int:
    """Import a command, run it with its options and return its exit status."""
    if options and f"{command} {options[0]}" in COMMANDS:
        command, options = f"{command} {options[0]}", options[1:]
    module, _, function = COMMANDS[command].partition(":")
    status = getattr(importlib.import_module(f"scalablevit_pl.commands.{module}"), function)(options)
    return int(status or 0)


def report(error: BaseException) -> int | None:
    """Report an error in one line and return the exit status; None for a bug, which needs its traceback."""
    if isinstance(error, KeyboardInterrupt):
        if is_first_process():
            sys.stderr.write("scalablevit: interrupted\n")
        return 128 + signal.SIGINT
    from scalablevit_pl.explanation import explain

    sentence = explain(error)
    if sentence is None:
        return None
    if getattr(error, "raised_by_all", False) and not is_first_process():
        return 2  # the first process reports it
    return fail(sentence)
