"""The `scalablevit` command. What answers at once does so without importing torch."""

import difflib
import logging
import os
import shlex
import signal
import sys
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from scalablevit_pl import __version__
from scalablevit_pl.commands.pages import COMMANDS, HELP, RELEASE_PAGES, help_page
from scalablevit_pl.run_folder import CONFIG, existing_run, resumable_checkpoints, run_folder

if TYPE_CHECKING:
    from scalablevit_pl.callbacks.preemption import PreemptedError

PACKAGE = Path(__file__).parents[1]
logger = logging.getLogger("scalablevit_pl")
# Beside the recipes in an installed package; in a checkout they lie at its top.
CONFIG_FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")


def main(args: list[str] | None = None) -> int:
    """Run a command and return its exit status: 0, or 2 after an error that is said in one sentence.

    Args:
        args: The words after `scalablevit`; by default the process's own.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return 0
    if args[0] == "--version":
        sys.stdout.write(f"scalablevit_pl {__version__}\n")
        return 0
    command, options = args[0], args[1:]
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        return fail(f"unknown command {command!r}: {f'did you mean {near[0]}?' if near else 'see scalablevit --help'}")
    if "--help" in options or "-h" in options:
        sys.stdout.write(help_page(command))
        return 0
    show_log()
    try:
        # The doctor shows the traces of what it finds, and goes on.
        return run(command, [option for option in options if option != "--traceback" or command == "doctor"])
    except BrokenPipeError:  # whoever read the table has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        if "--traceback" in options:  # asks where it hangs
            raise
        sys.stderr.write("scalablevit: interrupted\n")
        return 128 + signal.SIGINT
    except Exception as error:
        from scalablevit_pl.explanation import explain

        sentence = None if "--traceback" in options else explain(error)
        if sentence is None:
            raise
        if getattr(error, "raised_by_all", False) and not is_first_process():
            return 2  # the first process says it
        return fail(sentence)


def show_log() -> None:
    """Let the package's messages appear on standard error, and none that are no use to its users."""
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addFilter(lambda record: record.levelno >= logging.ERROR or is_first_process())
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
            lambda record: not record.getMessage().startswith(("💡", "TPU available"))
        )
    for message in (
        ".*isinstance.treespec, LeafSpec.* is deprecated",  # Lightning's own, with a new torch
        "Using `DistributedSampler` with the dataloaders",  # which for us counts no sample twice
        "You're resuming from a checkpoint that ended before the epoch ended",  # our sampler goes on where it did
        r"It is recommended to use `self.log\('(val|test)",  # where all processes have computed the same number
        "Be aware that when using `ckpt_path`, callbacks",  # an evaluation needs none of a fit's
        "The '.*' does not have many workers",
        r"Found \d+ module\(s\) in eval mode",  # frozen ones, as asked for
    ):
        warnings.filterwarnings("ignore", message)


def is_first_process() -> bool:
    """Tell whether this is the only process of a run or the one that speaks for all, however they were started."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))


def started_with_others() -> bool:
    """Tell whether torchrun or SLURM has started other processes of the run, which see the same command line."""
    return any(int(os.environ.get(name, "1")) > 1 for name in ("WORLD_SIZE", "SLURM_NTASKS"))


def fail(sentence: str) -> int:
    """Say what went wrong on standard error and return the exit status for it."""
    sys.stderr.write(f"scalablevit: error: {sentence}\n")
    return 2


def run(command: str, options: list[str]) -> int:
    """Run a command with its options and return its exit status."""
    if command == "predict" and not has(options, "--run", "--config", "-c", "--help-all"):
        from scalablevit_pl.commands.predict import predict_files

        predict_files(options)
        return 0
    if command == "plot":
        from scalablevit_pl.commands.plot import plot_runs

        plot_runs(options)
        return 0
    if command == "profile" and options[:1] == ["data"]:
        from scalablevit_pl.commands import profile_data

        own, options = profile_data.read_options(options[1:])
        sys.argv[1:] = ["fit", *settle("fit", options)]
        profile_data.profile_data(own)
        return 0
    if command == "profile":
        from scalablevit_pl.commands.profile import profile

        profile(options)
        return 0
    if command in RELEASE_PAGES:
        from scalablevit_pl.commands import convert, export, info, pull, push

        functions = {
            "export": export.export_run,
            "convert": convert.convert_reference,
            "push": push.push_folder,
            "pull": pull.pull_repository,
            "info": info.show_info,
        }
        functions[command](options)
        return 0
    if command == "doctor":
        from scalablevit_pl.commands.doctor import diagnose, read_options

        own, options = read_options(options)
        sys.argv[1:] = ["fit", *settle("fit", options)]
        return diagnose(own)
    # Lightning starts the processes of further devices with sys.argv, so what is settled here has to stand there.
    sys.argv[1:] = [command, *settle(command, options)]
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from scalablevit_pl.callbacks.preemption import PreemptedError
    from scalablevit_pl.experiment.cli import ExperimentCLI

    try:
        ExperimentCLI(shlex.join(["scalablevit", command, *options]))
    except PreemptedError as stop:
        return end_preempted(stop)
    except SIGTERMException:  # which would end with status 0, as if all were done
        fail("stopped by SIGTERM")
        return 128 + signal.SIGTERM
    return 0


def end_preempted(stop: "PreemptedError") -> int:
    """Say how a stopped run goes on, have SLURM run it again if that is what was asked for, and return the exit status.

    Raises:
        ValueError: If SLURM refuses.
    """
    from scalablevit_pl.callbacks.preemption import REQUEUE, requeue_job

    first = is_first_process()
    job = requeue_job() if first and stop.signum == REQUEUE else None
    if job is not None:
        logger.info("%s: job %s is requeued and will go on", stop, job)
    if stop.signum == REQUEUE and "SLURM_JOB_ID" in os.environ:
        return 0  # of all tasks: where one ends with an error, SLURM may end the first one before it has asked
    if first:
        fail(f"{stop}: go on with --resume auto")
    return 128 + stop.signum


def settle(command: str, options: list[str]) -> list[str]:
    """Spell out what is short for something else: a recipe of the package, a run's own configuration, a run's name.

    Raises:
        ValueError: If there is no such recipe or run.
    """
    if "--help-all" in options:
        return ["--help"]
    if any(word in ("-c", "--config") and value.startswith("--") for word, value in pairwise([*options, "--"])):
        raise ValueError("--config has no value: write the name of a recipe behind it")
    if any(option.partition("=")[0].endswith(".help") for option in options):
        return options  # shows the arguments of a class and does nothing else
    words = split_values(options)
    named = value_of(words, "--run")
    if command == "fit" and named and goes_on_from_weights(words, run_folder(named)):
        # Its own configuration describes the network in full, and in other words than what it started from.
        words = without(words, "--config", "--weights", "--model.network")
    if has(words, "--weights"):
        words = settle_weights(words)
    run = named or run_of_checkpoint(value_of(words, "--ckpt_path"))
    if run is not None:
        # What --weights names is evaluated without a run; the folder is for the results alone.
        needs_none = command == "fit" or has(words, "--weights")
        folder = run_folder(run) if needs_none else existing_run(run)
        if run != named or command != "fit":
            words += ["--run", str(Path.cwd() / folder) if os.sep not in str(folder) else str(folder)]
        if not has(words, "--config") and (folder / CONFIG).is_file():
            words = ["--config", str(folder / CONFIG), *words]
    else:
        if started_with_others():
            raise ValueError(
                "several processes need one name for the run, which each would make up: give it with --run"
            )
        words += ["--run", default_run(words)]
    if not any(word.startswith(("--config", "--print_config")) or names_class(word) for word in words):
        raise ValueError(
            "there is nothing to start from: give a recipe with --config, such as --config recipes/quickstart.yaml"
            if command == "fit"
            else "there is nothing to start from: give a run with --run"
        )
    if command != "fit" and not has(words, "--weights"):
        words += ["--weights", "null"]  # what a run started from, as its configuration says, is not what is evaluated
    for position, word in enumerate(words[:-1]):
        if word == "--config":
            words[position + 1] = str(find_config(words[position + 1]))
    return words


def names_class(word: str) -> bool:
    """Tell whether an option says what data or model are; without one that does, those of their parts are unknown."""
    return word.partition("=")[0] in ("--data", "--model", "--data.class_path", "--model.class_path")


def goes_on_from_weights(words: list[str], folder: Path) -> bool:
    """Tell whether a command line that starts a run from weights meets that run again, to go on with it."""
    again = value_of(words, "--ckpt_path") == "auto" and has(words, "--weights")
    return again and (folder / CONFIG).is_file() and bool(resumable_checkpoints(folder))


def without(words: list[str], *names: str) -> list[str]:
    """Leave out some options, with their values and the options of their parts."""
    kept: list[str] = []
    skipped = False
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--"):
            skipped = any(name == left or name.startswith(f"{left}.") for left in names)
        if not skipped:
            kept.append(word)
    return kept


def settle_weights(words: list[str]) -> list[str]:
    """Put the commit in the place of a repository's name, so that all processes that this one starts take the same one.

    Raises:
        ValueError: If a checkpoint is given, too, other than with `auto`, or there are no such weights.
    """
    if has(words, "--ckpt_path") and value_of(words, "--ckpt_path") != "auto":
        raise ValueError("--weights starts anew and --resume or --ckpt_path goes on with a run: give one of them")
    from scalablevit_pl.weights.source import pin_weights

    position = len(words) - 1 - words[::-1].index("--weights")
    if position + 1 < len(words) and words[position + 1] != "null":
        words[position + 1] = pin_weights(words[position + 1])
    return words


def split_values(options: list[str]) -> list[str]:
    """Write `--option=value` as two words where we look at the value, and synonyms by one name."""
    names = {"-c": "--config", "--resume": "--ckpt_path"}
    words: list[str] = []
    for option in options:
        name, equals, value = option.partition("=")
        name = names.get(name, name)
        looked_at = name in ("--config", "--run", "--ckpt_path", "--weights")
        words += [name, value] if equals and looked_at else [name] if looked_at else [option]
    return words


def has(options: list[str], *names: str) -> bool:
    """Tell whether one of the options is given."""
    return any(option.partition("=")[0] in names for option in options)


def value_of(words: list[str], name: str) -> str | None:
    """Return the last value given to an option."""
    values = [value for option, value in pairwise(words) if option == name]
    return values[-1] if values else None


def default_run(words: list[str]) -> str:
    """Name a run after its recipe, which is the first configuration, with date and time."""
    recipe = words[words.index("--config") + 1] if "--config" in words[:-1] else "run"
    return f"{Path(recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def run_of_checkpoint(checkpoint: str | None) -> str | None:
    """Return the folder of the run that a checkpoint lies in, if it lies in one."""
    folder = Path(checkpoint or "").resolve().parent
    in_run = checkpoint is not None and folder.name == "checkpoints" and (folder.parent / CONFIG).is_file()
    return str(folder.parent) if in_run else None


def find_config(name: str) -> Path:
    """Return the configuration of that name: a path, or below `configs/` of the package.

    Raises:
        ValueError: If there is none; it names the nearest.
    """
    for candidate in (Path(name), *(folder / name for folder in CONFIG_FOLDERS)):
        if candidate.is_file():
            return candidate
    known = sorted(
        {path.relative_to(folder).as_posix() for folder in CONFIG_FOLDERS for path in folder.glob("recipes/*")}
    )
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    raise ValueError(f"there is no configuration {name!r}, neither here nor in the package: {hint}")
