"""What loading the training images of a fit costs, beside torchvision's folders with timm's transform."""

import argparse
import difflib
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from scalablevit_pl.commands.arguments import OptionParser, check_output
from scalablevit_pl.data import ClassificationDataModule
from scalablevit_pl.experiment.fit_plan import FitPlan
from scalablevit_pl.profiling.loader import Comparison, Loaders, Source, compare, time_stages
from scalablevit_pl.profiling.loading_report import describe, report
from scalablevit_pl.storage import save_json

MOST_WORKERS = 256  # a slip such as 22222 would keep the machine busy with starting processes


def profile_data(own: SimpleNamespace) -> None:
    """Measure the train loader of the fit in `sys.argv`.

    Args:
        own: As `read_options` gives them.

    Raises:
        ValueError: If the data cannot be loaded, or no loader can be made of them.
    """
    datamodule = _load(FitPlan(), own.workers[0])
    with _ended_by_sigterm(), tempfile.TemporaryDirectory() as folder:
        source = Source(datamodule, own.images, Path(folder))
        loaders = Loaders(source)
        for workers in own.workers:  # before any is measured, which takes its time
            loaders.ours(workers)
        comparisons: list[Comparison] = [compare(loaders, workers, own.rounds, own.seconds) for workers in own.workers]
        stages = time_stages(source, own.rounds)
        record = describe(datamodule, source, comparisons, stages, own)
    if str(own.json) == "-":
        sys.stdout.write(json.dumps(record, indent=2) + "\n")
    else:
        sys.stdout.write(report(record))
    if own.json is not None and str(own.json) != "-":
        save_json(record, own.json)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end a block as an exception does, so that what it has begun is cleared away."""
    before = signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def read_options(options: list[str]) -> tuple[SimpleNamespace, list[str]]:
    """Return the command's own options, and the others, which are those of a fit.

    Raises:
        ValueError: If a value is out of its range, or no file can be written where `--json` says.
    """
    parser = OptionParser("profile data")
    parser.add_argument("--workers", type=_counts, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    own, others = parser.parse_known_args(options, SimpleNamespace())
    known = [option for action in parser._actions for option in action.option_strings]
    for name in (option.partition("=")[0] for option in others if option.startswith("--")):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)  # none of a fit's options is so near
        if near:
            raise ValueError(f"unknown option {name}: did you mean {near[0]}?")
    if not 0.0 < own.seconds < 3600.0:
        raise ValueError(f"--seconds must be above 0 and below 3600, got {own.seconds:g}")
    if own.rounds < 1 or own.images < 1:
        raise ValueError(f"--rounds and --images must be at least 1, got {own.rounds} and {own.images}")
    if own.json is not None and str(own.json) != "-":
        check_output("--json", own.json)
    return own, others


def _counts(text: str) -> list[int]:
    """Read numbers of loader processes, such as `0,1,2`."""
    words = text.split(",")
    if not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers, such as 0,1,2")
    counts = list(dict.fromkeys(map(int, words)))
    if max(counts) > MOST_WORKERS:
        raise argparse.ArgumentTypeError(f"at most {MOST_WORKERS} loader processes can be measured, got {text!r}")
    return counts


def _load(plan: FitPlan, workers: int) -> ClassificationDataModule:
    """Load the training data as a fit does.

    Raises:
        ValueError: If the datamodule is none of this package's.
    """
    if "data" in plan.faults:
        raise plan.faults["data"]
    datamodule: Any = plan.built["data"]
    if not isinstance(datamodule, ClassificationDataModule):
        raise ValueError(
            f"{type(datamodule).__name__} is no ClassificationDataModule, whose loaders alone can be measured: "
            "set --data to one"
        )
    datamodule.trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"))  # type: ignore[assignment]  # which splits
    datamodule.prepare_data()
    datamodule.trainer = None
    datamodule.num_workers = workers  # by which a stream shares out its files
    datamodule.setup("fit")
    return datamodule
