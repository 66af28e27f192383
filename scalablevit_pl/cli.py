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

from scalablevit_pl import __version__
from scalablevit_pl.run_folder import CONFIG, existing_run, run_folder

PACKAGE = Path(__file__).parent
# Beside the recipes in an installed package; in a checkout they lie at its top.
CONFIG_FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")

HELP = """\
usage: scalablevit COMMAND [OPTIONS]

Train, evaluate and use ScalableViT image classifiers.

commands:
  fit        train a network as a recipe says
  validate   evaluate a run on its validation images
  test       evaluate a run on its test images, with tables and pictures
  predict    classify images
  export     make a folder of a run's weights that can be used and shared
  convert    make such a folder of a checkpoint of the authors' release
  push       upload such a folder to the Hugging Face Hub
  pull       download such a folder
  info       show what is in such a folder, here or on the Hub

options:
  --help     show this page; after a command, the page of that command
  --version  show the version

examples:
  scalablevit fit --config recipes/quickstart.yaml --run first
  scalablevit test --run first
  scalablevit predict --weights runs/first photo.jpg more_photos/ --out out.csv
  scalablevit export runs/first first_model
"""

FIT_HELP = """\
usage: scalablevit fit --config RECIPE [--config MORE] [OPTIONS]

Train a network as a recipe says. Later files and options win over earlier ones.

  --config FILE              a recipe, such as recipes/quickstart.yaml: a path,
                             or one of those that come with the package
  --run NAME                 folder runs/NAME for all that the run leaves
                             (default: the recipe's name, date and time)
  --resume last|best|FILE    go on from a checkpoint of the run
  --weights RUN|FILE|FOLDER|OWNER/NAME[@REVISION]   start from trained weights
                             (from other classes: with a new last layer)
  --seed_everything INT      seed of all random numbers

data
  --data.dataset NAME        id on the Hugging Face Hub, a folder (parquet, or
                             one folder per class), or fashion_mnist_sample
  --data.image_column NAME   where there is not exactly one of type Image
  --data.label_column NAME   where there is not exactly one of type ClassLabel
  --data.val_split NAME      default: validation, or else a tenth of train
  --data.batch_size INT      samples of a batch on each process
  --data.num_workers INT     loader processes of each process
  --data.preprocessing.input_size INT     side of the network's input in pixels
  --data.augmentation.auto_augment NAME   such as rand-m9-mstd0.5-inc1, or null
  --data.augmentation.mixup FLOAT, --data.augmentation.cutmix FLOAT

network and optimization
  --model.network.name NAME             scalablevit_nano, _s, _b, _l
  --model.network.num_classes INT       must be that of the data
  --model.network.drop_path_rate FLOAT  stochastic depth
  --model.optimizer.lr FLOAT            learning rate at base_batch_size
  --model.base_batch_size INT|null      global batch that the rate is meant for
  --model.label_smoothing FLOAT
  --model.freeze backbone|features|LIST  what is not trained: modules by name,
                                        or all features (a linear probe)
  --model.layer_decay FLOAT             of the learning rate, layer by layer

trainer (Lightning's, all of its options)
  --trainer.max_epochs INT
  --trainer.accelerator auto|cpu|gpu    --trainer.devices INT
  --trainer.num_nodes INT               --trainer.strategy auto|ddp
  --trainer.precision 32-true|bf16-mixed|16-mixed
  --trainer.accumulate_grad_batches INT

  --print_config   show the resolved configuration and stop
  --traceback      show where an error came from
  --help-all       show every option
"""

EVALUATE_HELP = """\
usage: scalablevit {command} --run RUN [OPTIONS]

{purpose}

  --run NAME                 a run: a name below runs/, or a path; its
                             config.yaml is used unless --config is given, and
                             the results are written into it
  --ckpt_path best|last|FILE weights (default: the run's best, or else its last)
  --weights FOLDER|OWNER/NAME[@REVISION]    weights of a model instead
  --config FILE              a recipe instead of the run's own configuration
  --data.batch_size INT      samples of a batch on each process
  --data.num_workers INT     loader processes of each process
  --trainer.accelerator auto|cpu|gpu    --trainer.devices INT
  --print_config   show the resolved configuration and stop
  --traceback      show where an error came from
  --help-all       show every option
"""

PREDICT_HELP = """\
usage: scalablevit predict --weights WEIGHTS IMAGE|FOLDER ... [OPTIONS]
       scalablevit predict --run RUN [OPTIONS]

Classify image files, or the test images of a run's data set (into its
predictions.csv). A row gives index, path, and the five most probable classes.

image files
  --weights WEIGHTS          a run folder (its best weights), a checkpoint, a
                             model's folder, or OWNER/NAME[@REVISION] on the Hub
  --out FILE                 the CSV to write (default: to the screen)
  --batch_size INT           images at a time (default: 32)
  --num_workers INT          loader processes (default: 2)
  --accelerator auto|cpu|gpu

test images of a run
  --run NAME                 a run: a name below runs/, or a path
  --ckpt_path best|last|FILE weights (default: the run's best, or else its last)

  --traceback      show where an error came from
  --help-all       show every option of the second form
"""

EXPORT_HELP = """\
usage: scalablevit export RUN|CHECKPOINT FOLDER [OPTIONS]

Make a folder of trained weights that can be used and shared: model.safetensors,
config.json, and README.md, the model's card, with the run's recipe and results.

  --average ema|none   averaged or raw weights (default: averaged if there are)
  --license NAME       licence for the card, such as apache-2.0
  --overwrite          replace a model that is in the folder
  --traceback          show where an error came from
"""

CONVERT_HELP = """\
usage: scalablevit convert REFERENCE.pth FOLDER --model NAME|CONFIG [OPTIONS]

Make a model's folder of a checkpoint of the authors' release, without running
any code that may be in it.

  --model NAME|FILE    scalablevit_s, _b, _l, or a JSON file with arguments of
                       ScalableViT: the numbers of heads are not in checkpoints
  --overwrite          replace a model that is in the folder
  --traceback          show where an error came from
"""

PUSH_HELP = """\
usage: scalablevit push FOLDER OWNER/NAME [OPTIONS]

Upload a model's folder to the Hugging Face Hub as one commit, after checking
the folder, its card and licence, and the token. To repeat it is safe.

  --private            make the repository private, if it has to be made
  --revision BRANCH    branch to push to (default: main)
  --license NAME       licence in the place of the card's, such as apache-2.0
  --dry-run            check everything, show what would be done, do nothing
  --traceback          show where an error came from
"""

PULL_HELP = """\
usage: scalablevit pull OWNER/NAME FOLDER [OPTIONS]

Download a model from the Hugging Face Hub: all files of one commit, each with
its checksum compared. The folder appears when it is complete.

  --revision REVISION  branch, tag or commit (default: the main branch)
  --overwrite          replace a model that is in the folder
  --traceback          show where an error came from
"""

INFO_HELP = """\
usage: scalablevit info FOLDER|OWNER/NAME [OPTIONS]

Show what is in a model's folder, here or on the Hugging Face Hub: the network,
its cost, labels, metrics, commit and checksum. Weights are not downloaded.

  --revision REVISION  branch, tag or commit (default: the main branch)
  --traceback          show where an error came from
"""

PURPOSES = {
    "validate": "Evaluate a run on its validation images; writes val.json.",
    "test": "Evaluate a run on its test images; writes test.json, predictions.csv,\npredictions.png and confusion.png.",
}
EXPERIMENTS = ("fit", "validate", "test", "predict")
RELEASE_PAGES = {
    "export": EXPORT_HELP,
    "convert": CONVERT_HELP,
    "push": PUSH_HELP,
    "pull": PULL_HELP,
    "info": INFO_HELP,
}
COMMANDS = (*EXPERIMENTS, *RELEASE_PAGES)


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
        return run(command, [option for option in options if option != "--traceback"])
    except BrokenPipeError:  # whoever read the table has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        from scalablevit_pl.explanation import explain

        sentence = None if "--traceback" in options else explain(error)
        if sentence is None:
            raise
        return fail(sentence)


def show_log() -> None:
    """Let the package's messages appear on standard error, and none that are no use to its users."""
    logger = logging.getLogger(__package__)
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
        "Be aware that when using `ckpt_path`, callbacks",  # an evaluation needs none of a fit's
        "The '.*' does not have many workers",
        r"Found \d+ module\(s\) in eval mode",  # frozen ones, as asked for
    ):
        warnings.filterwarnings("ignore", message)


def is_first_process() -> bool:
    """Tell whether this is the only process of a run or the one that speaks for all, however they were started."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))


def fail(sentence: str) -> int:
    """Say what went wrong on standard error and return the exit status for it."""
    sys.stderr.write(f"scalablevit: error: {sentence}\n")
    return 2


def help_page(command: str) -> str:
    """Return the page of the options that people use."""
    pages = {"fit": FIT_HELP, "predict": PREDICT_HELP, **RELEASE_PAGES}
    return pages.get(command) or EVALUATE_HELP.format(command=command, purpose=PURPOSES[command])


def run(command: str, options: list[str]) -> int:
    """Run a command with its options and return its exit status."""
    if command == "predict" and not has(options, "--run", "--config", "-c", "--help-all"):
        from scalablevit_pl.prediction import predict_files

        predict_files(options)
        return 0
    if command in RELEASE_PAGES:
        from scalablevit_pl import release

        release.COMMANDS[command](options)
        return 0
    # Lightning starts the processes of further devices with sys.argv, so what is settled here has to stand there.
    sys.argv[1:] = [command, *settle(command, options)]
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from scalablevit_pl.experiment import ExperimentCLI

    try:
        ExperimentCLI(shlex.join(["scalablevit", command, *options]))
    except SIGTERMException:  # which would end with status 0, as if all were done
        fail("stopped by SIGTERM: go on with --resume last")
        return 128 + signal.SIGTERM
    return 0


def settle(command: str, options: list[str]) -> list[str]:
    """Spell out what is short for something else: a recipe of the package, a run's own configuration, a run's name.

    Raises:
        ValueError: If there is no such recipe or run.
    """
    if "--help-all" in options:
        return ["--help"]
    if any(option.partition("=")[0].endswith(".help") for option in options):
        return options  # shows the arguments of a class and does nothing else
    words = split_values(options)
    if has(words, "--weights"):
        words = settle_weights(words)
    named = value_of(words, "--run")
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
        words += ["--run", default_run(words)]
    if not any(word.startswith(("--config", "--data", "--model", "--print_config")) for word in words):
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


def settle_weights(words: list[str]) -> list[str]:
    """Put the commit in the place of a repository's name, so that all processes that this one starts take the same one.

    Raises:
        ValueError: If a checkpoint is given, too, or there are no such weights.
    """
    if has(words, "--ckpt_path"):
        raise ValueError("--weights starts anew and --resume or --ckpt_path goes on with a run: give one of them")
    from scalablevit_pl.weights import pin_weights

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
