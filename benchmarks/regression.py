"""See whether the networks have become slower than they were, by ratios to references that are measured in turns.

python benchmarks/regression.py [--update]

Times differ from machine to machine; ratios of times that were measured in the same minute on the same one differ much
less. Each ratio is images/s of a network of ours over those of a reference: a network of timm's, or a fixed stack of
torch's own modules. `regression.json` beside this file holds what they were, and on what. The exit status is 1 if one
has fallen by more than the tolerance. With --update they are written instead.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from scalablevit_pl.profiling.measurement import Plan, Result, measure
from scalablevit_pl.profiling.networks import Setting, build_network
from scalablevit_pl.profiling.report import processor, size_of
from scalablevit_pl.storage import save_json

RECORD = Path(__file__).with_name("regression.json")
TOLERANCE = 0.15
STACK = "stack"
SWIN = "swin_tiny_patch4_window7_224"
# A network of ours and its reference.
PAIRS = [
    (Setting("scalablevit_s", batch_size=4), Setting(SWIN, batch_size=4)),
    (Setting("scalablevit_s", "train", batch_size=2), Setting(SWIN, "train", batch_size=2)),
    (
        Setting("scalablevit_nano", batch_size=16, input_size=(64, 64)),
        Setting(STACK, batch_size=16, input_size=(64, 64)),
    ),
    (
        Setting("scalablevit_nano", "train", batch_size=16, input_size=(64, 64)),
        Setting(STACK, "train", batch_size=16, input_size=(64, 64)),
    ),
]
# Of one thread the ratios are steadier than of all, and no number of cores decides them.
THREADS = 1


def build(setting: Setting) -> nn.Module:
    """Build a network, or the stack, which must stay as it is."""
    if setting.network != STACK:
        return build_network(setting)
    mixers = [
        nn.Sequential(
            nn.Conv2d(64, 64, 3, padding=1, groups=64),
            nn.GroupNorm(1, 64),
            nn.Conv2d(64, 256, 1),
            nn.GELU(),
            nn.Conv2d(256, 64, 1),
        )
        for _ in range(8)
    ]
    return nn.Sequential(nn.Conv2d(3, 64, 4, 4), *mixers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 1000))


def ratio(ours: Result, reference: Result) -> float:
    """Return the median over the rounds of images/s over images/s.

    Raises:
        SystemExit: If one of them could not be measured.
    """
    for result in (ours, reference):
        if result.note:
            sys.exit(f"{result.setting.network}: {result.note}")
    return statistics.median(theirs / mine for mine, theirs in zip(ours.samples, reference.samples, strict=True))


def name_of(ours: Setting, reference: Setting) -> str:
    """Name a ratio."""
    return f"{ours.network} over {reference.network}, {ours.mode}, batch {ours.batch_size}, {size_of(ours)}"


def compare(ratios: Mapping[str, float], before: Mapping[str, float], tolerance: float) -> tuple[list[str], bool]:
    """Return a line for each ratio, and whether none has fallen by more than the tolerance."""
    lines, good = [], True
    for name, now in ratios.items():
        was = before.get(name)
        word = "new " if was is None else "SLOW" if now < was * (1 - tolerance) else "ok  "
        word = "fast" if was is not None and now > was * (1 + tolerance) else word
        good &= word != "SLOW"
        lines.append(f"{word} {name}: was {'-' if was is None else f'{was:.3f}'}, is {now:.3f}")
    return lines, good


def main() -> int:
    """Measure and compare, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds (%(default)s)")
    parser.add_argument("--update", action="store_true", help="write the ratios in the place of comparing them")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    settings = [setting for pair in PAIRS for setting in pair]
    results = {
        result.setting: result
        for result in measure(settings, torch.device("cpu"), Plan(options.repeats, 0.2, warmup=1), build)
    }
    ratios = {name_of(*pair): ratio(*(results[setting] for setting in pair)) for pair in PAIRS}
    if options.update:
        measured_on = f"{processor()}, {THREADS} thread, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
        save_json(
            {"measured_on": measured_on, "ratios": {name: round(value, 4) for name, value in ratios.items()}}, RECORD
        )
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    lines, good = compare(ratios, record["ratios"], TOLERANCE)
    sys.stdout.write("\n".join([*lines, f"before: {record['measured_on']}; tolerance {TOLERANCE:.0%}"]) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
