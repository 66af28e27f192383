"""The command `profile`: measure what networks cost, interleaved in one run."""

import json
import os
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch

from scalablevit_pl.commands.arguments import OptionParser, check_output
from scalablevit_pl.models import list_models
from scalablevit_pl.models.segmenter import DECODERS
from scalablevit_pl.profiling.measurement import Plan, measure
from scalablevit_pl.profiling.networks import Setting, build_network, check_networks
from scalablevit_pl.profiling.report import describe, headline, report
from scalablevit_pl.storage import save_json

Value = TypeVar("Value")
BATCH_SIZES = {"cpu": [1, 8], "cuda": [1, 128]}
# What to do if nothing could be measured, by a part of the reason; the first that occurs counts.
REMEDIES = {
    ": give ": "",  # the reason names a remedy
    " is damaged": ": use an intact copy of it",
    "does not compile": ": give --compile false",
    "out of memory": ": give a smaller --batch-size or --input-size",
    "": ": give another --input-size, --batch-size or --mode",
}


def profile(words: list[str]) -> None:
    """Run `scalablevit profile MODEL [MODEL …] [OPTIONS]`."""
    options = read_options(words)
    folders = check_networks(options.networks)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    plan = Plan(options.repeats, options.seconds, options.warmup)
    results = measure(settings_of(options), device, plan, partial(build_network, folders=folders))
    if not any(result.seconds for result in results):
        reasons = dict.fromkeys(f"{result.setting.name}: {result.note}{_remedy(result.note)}" for result in results)
        raise ValueError(f"nothing could be measured: {'; '.join(reasons)}")
    record = describe(results, device, plan)
    write_record(record, report(results, record), options.json)
    if options.plot:
        from scalablevit_pl.profiling.picture import draw_profile  # imports matplotlib

        draw_profile(results, options.plot, headline(record))


def write_record(record: dict[str, Any], table: str, path: Path | None) -> None:
    """Print a table and write its record to a file; for `-`, print the record instead of the table."""
    screen = str(path) == "-"
    sys.stdout.write(json.dumps(record, indent=2) + "\n" if screen else table)
    if path and not screen:
        save_json(record, path)


def check_json(path: Path | None) -> None:
    """Check that the file of `--json` can be written."""
    if path and str(path) != "-":
        check_output("--json", path)


def _remedy(note: str) -> str:
    return next(remedy for part, remedy in REMEDIES.items() if part in note)


def read_options(words: list[str]) -> Namespace:
    """Parse the command's options, and fill in what depends on the device."""
    positive = whole_number(1)
    parser = OptionParser("profile")
    parser.add_argument("networks", nargs="+", metavar="MODEL")
    parser.add_argument("--head", type=list_of(_one_of(*DECODERS)), default=[None])
    parser.add_argument("--window-pad", choices=("mask", "zero"), default="mask")
    parser.add_argument("--expand-value", action="store_true")
    parser.add_argument("--batch-size", type=list_of(positive))
    parser.add_argument("--input-size", type=list_of(_size), default=[(224, 224)])
    parser.add_argument("--precision", type=list_of(_one_of("32", "bf16", "fp16")), default=["32"])
    parser.add_argument("--mode", type=list_of(_one_of("inference", "train")), default=["inference"])
    parser.add_argument("--compile", type=list_of(_one_of("false", "true")), default=["false"])
    parser.add_argument("--fuse", type=list_of(_one_of("false", "true")), default=["false"])
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--grad-checkpointing", action="store_true")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--repeats", type=positive, default=10)
    parser.add_argument("--seconds", type=float, default=0.1)
    parser.add_argument("--warmup", type=positive, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.read(words)
    options.networks = list(dict.fromkeys(options.networks))
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.batch_size = options.batch_size or BATCH_SIZES[options.device]
    _check(options)
    return options


def _check(options: Namespace) -> None:
    cuda, fused, cores = options.device == "cuda", "true" in options.fuse, os.cpu_count() or 1
    for wrong, message in (
        (cuda and not torch.cuda.is_available(), "torch finds no GPU for --device cuda: give --device cpu"),
        (not cuda and "fp16" in options.precision, "--precision fp16 needs a GPU: on a CPU give 32 or bf16"),
        (
            options.grad_checkpointing and "train" not in options.mode,
            "--grad-checkpointing is for training steps: also give --mode train",
        ),
        (fused and cuda, "--fuse true is for a CPU: give --device cpu, or --compile true on a GPU"),
        (
            fused and not ("inference" in options.mode and "false" in options.compile),
            "--fuse true is for uncompiled inference: also give --mode inference and --compile false",
        ),
        (
            options.head != [None] and any("/" in name for name in options.networks),
            "--head builds a head on an untrained backbone: omit it for a model's folder, which has its own",
        ),
        (
            (options.expand_value or options.window_pad != "mask") and not set(options.networks) <= set(list_models()),
            f"--window-pad and --expand-value are for {', '.join(list_models())}: give no other network",
        ),
        (not 0.0 <= options.seconds <= 3600.0, f"--seconds must be between 0 and 3600, got {options.seconds:g}"),
        (
            options.threads and options.threads > cores,
            f"--threads must be at most {cores}, the cores of this machine, got {options.threads}",
        ),
    ):
        if wrong:
            raise ValueError(message)
    check_json(options.json)
    if options.plot:
        from scalablevit_pl.profiling.picture import MOST_NETWORKS

        check_output("--plot", options.plot, ".png")
        if len(options.networks) * len(options.head) > MOST_NETWORKS:
            raise ValueError(f"--plot can distinguish at most {MOST_NETWORKS} networks, got {len(options.networks)}")


def list_of(read: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """Return a reader of values that are separated by commas, each of which counts once."""
    return lambda text: list(dict.fromkeys(read(word) for word in text.split(",")))


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return a reader of a whole number within bounds."""
    allowed = f"of at least {least}" if most is None else f"from {least} to {most}"

    def value(text: str) -> int:
        if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
            raise ArgumentTypeError(f"{text!r} is not a whole number {allowed}")
        return int(text)

    return value


def _one_of(*known: str) -> Callable[[str], str]:
    def value(text: str) -> str:
        if text not in known:
            raise ArgumentTypeError(f"{text!r} is not one of {', '.join(known)}")
        return text

    return value


def _size(text: str) -> tuple[int, int]:
    sides = [whole_number(1)(side) for side in text.lower().split("x")]
    if len(sides) > 2:
        raise ArgumentTypeError(f"{text!r} is neither a side nor HEIGHTxWIDTH")
    return sides[0], sides[-1]


def settings_of(options: Namespace) -> list[Setting]:
    """Return every case that the options ask for, with the networks of a comparison next to each other.

    Gradient checkpointing applies to training steps only, fused layers to uncompiled inference only.
    """
    settings = []
    lists = options.input_size, options.batch_size, options.mode, options.precision, options.compile, options.fuse
    for size, batch, mode, precision, compiled, fused in product(*lists):
        how = (mode, precision, compiled == "true", batch, size, options.channels_last)
        checkpointing = options.grad_checkpointing and mode == "train"
        fuse = fused == "true" and mode == "inference" and compiled == "false"
        settings += [
            Setting(network, *how, checkpointing, fuse, head, options.window_pad, options.expand_value)
            for network in options.networks
            for head in options.head
        ]
    return list(dict.fromkeys(settings))
