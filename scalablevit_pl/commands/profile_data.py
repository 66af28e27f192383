"""The command `profile data`: compare the train loader of a fit with torchvision's folders and timm's transform."""

import difflib
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

from scalablevit_pl.commands.arguments import OptionParser
from scalablevit_pl.commands.profile import check_json, list_of, whole_number, write_record
from scalablevit_pl.data import BaseDataModule
from scalablevit_pl.experiment.start import parse_fit
from scalablevit_pl.profiling.loader import compare, describe, loader_builders, report, take_images, time_stages

MOST_WORKERS = 256  # a typing error such as 22222 would keep the machine busy with starting processes


def profile_data(options: list[str]) -> None:
    """Run `scalablevit profile data [OPTIONS] [OPTIONS OF A FIT]`."""
    own, others = read_options(options)
    fit, _ = parse_fit(others)
    datamodule = fit.build("data").data
    if not isinstance(datamodule, BaseDataModule):
        raise ValueError(
            f"only the loader of a BaseDataModule can be measured, got {type(datamodule).__name__}: set --data to one"
        )
    datamodule.num_workers = own.workers[0]  # a stream distributes its files over them
    datamodule.prepare("fit")
    datamodule.setup("fit")
    with _sigterm_raises(), tempfile.TemporaryDirectory() as folder:
        images = take_images(datamodule, own.images)
        builders = loader_builders(datamodule, images, Path(folder))
        for workers in own.workers:  # fail before the first measurement
            builders["ours"](workers)
        torch.set_num_threads(1)  # as in a loader process
        rates = {workers: compare(builders, workers, own.rounds, own.seconds) for workers in own.workers}
        stages = time_stages(datamodule, own.rounds)
        sizes = [len(image.read()) for image, _ in images]
    record = describe(datamodule, sizes, rates, stages, own)
    write_record(record, report(record), own.json)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Exit by an exception on SIGTERM inside the block, so that temporary files are removed."""
    before = signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def read_options(options: list[str]) -> tuple[SimpleNamespace, list[str]]:
    """Return the command's own options, and the remaining ones, which are those of a fit."""
    parser = OptionParser("profile data")
    parser.add_argument("--workers", type=list_of(whole_number(0, MOST_WORKERS)), default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    own, others = parser.parse_known_args(options, SimpleNamespace())
    known = [option for action in parser._actions for option in action.option_strings]
    for name in (option.partition("=")[0] for option in others if option.startswith("--")):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)  # no option of a fit is that similar
        if near:
            raise ValueError(f"unknown option {name}: did you mean {near[0]}?")
    if not 0.0 < own.seconds < 3600.0:
        raise ValueError(f"--seconds must be above 0 and below 3600, got {own.seconds:g}")
    if own.rounds < 1 or own.images < 1:
        raise ValueError(f"--rounds and --images must be at least 1, got {own.rounds} and {own.images}")
    check_json(own.json)
    return own, others
