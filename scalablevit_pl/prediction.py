"""Classify image files with a trained network."""

import argparse
import contextlib
import difflib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Never

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from scalablevit_pl.callbacks.prediction import PredictionWriter
from scalablevit_pl.callbacks.progress import LineEnd
from scalablevit_pl.checkpoint import find_checkpoint, load_trained_classifier
from scalablevit_pl.data.images import ImageFiles
from scalablevit_pl.data.source import images_below
from scalablevit_pl.tasks import ClassificationTask


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Never:
        raise ValueError(f"{message}: see scalablevit predict --help")


def predict_files(options: list[str]) -> None:
    """Run `scalablevit predict --weights PATH IMAGE|FOLDER … [--out FILE]`.

    Raises:
        ValueError: If an option is wrong, the weights cannot be loaded or an image cannot be read; nothing is written.
    """
    arguments = _parse(options)
    paths = find_images(arguments.images)
    if arguments.out is not None:
        _check_out(arguments.out, [*paths, find_checkpoint(arguments.weights)])
    trained = load_trained_classifier(arguments.weights)
    loader = DataLoader(
        ImageFiles(paths, trained.preprocessing),
        batch_size=arguments.batch_size,
        num_workers=min(arguments.num_workers, len(paths) // arguments.batch_size),
    )
    trainer = pl.Trainer(
        accelerator=arguments.accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[LineEnd(), PredictionWriter(arguments.out or sys.stdout, trained.class_names)],
    )
    with contextlib.redirect_stdout(sys.stderr):  # Lightning's progress bar, which must not end up in the table
        trainer.predict(ClassificationTask(trained.network), loader, return_predictions=False)


def _check_out(out: Path, used: list[Path]) -> None:
    """Refuse a path that could not be written or would replace what is used, before anything is predicted."""
    if not out.parent.is_dir():
        raise ValueError(f"--out {str(out)!r} lies in a folder that does not exist: make it first")
    if out.exists() and not out.is_file():
        raise ValueError(
            f"--out {str(out)!r} is no file: give the name of one, or leave it away to write to the screen"
        )
    if out.resolve() in {path.resolve() for path in used}:
        raise ValueError(f"--out {str(out)!r} is one of the images or the weights: choose another name")


def find_images(sources: Iterable[Path]) -> list[Path]:
    """Return image files as given, and those in given folders and below, sorted.

    Raises:
        ValueError: If a source does not exist or a folder holds no image.
    """
    paths: list[Path] = []
    for source in sources:
        found = images_below(source) if source.is_dir() else [source]
        if not found or not (source.is_file() or source.is_dir()):
            missing = "holds no images" if source.is_dir() else "does not exist"
            raise ValueError(f"{str(source)!r} {missing}: give image files or folders with images")
        paths += found
    return paths


def _parse(options: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="scalablevit predict", add_help=False, allow_abbrev=False)
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--accelerator", choices=["auto", "cpu", "gpu"], default="auto")
    known = [option for action in parser._actions for option in action.option_strings]
    for option in options:
        name = option.partition("=")[0]
        if name.startswith("-") and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown option {name}: did you mean {near}?")
    arguments = parser.parse_intermixed_args(options)
    if arguments.batch_size < 1 or arguments.num_workers < 0:
        raise ValueError(
            f"need --batch_size ≥ 1 and --num_workers ≥ 0, got {arguments.batch_size} and {arguments.num_workers}"
        )
    return arguments
