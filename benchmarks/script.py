"""What the scripts share: their options and Markdown tables."""

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS: dict[str, dict[str, Any]] = {
    "networks": {"nargs": "*", "metavar": "NETWORK", "help": "of this package or of timm"},
    "mode": {"choices": ("inference", "train")},
    "precision": {"choices": ("32", "bf16")},
    "device": {"choices": ("cpu", "cuda")},
    "batch_size": {"type": int},
    "input_size": {"type": int},
    "repeats": {"type": int, "help": "rounds (%(default)s)"},
}


def make_parser(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser with the shared options that are given a default here."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        option = name if name == "networks" else f"--{name.replace('_', '-')}"
        parser.add_argument(option, default=default, **OPTIONS[name])
    return parser


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]] = ()) -> str:
    """Format a table; more rows can follow it."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *rows))
