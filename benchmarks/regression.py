"""See whether the networks have become slower than they were, by ratios to references that are measured in turns.

python benchmarks/regression.py [--update]

Times differ from machine to machine; ratios of times that were measured in the same minute on the same one differ much
less. Each ratio is the least time of a reference over that of a network of ours, since what disturbs a machine only
adds time. A reference is a network of timm's, or a fixed stack of torch's own modules. `regression.json` beside this
file holds what the ratios were, by kind of processor. The exit status is 1 if one has fallen by more than the tolerance
and has so again when its two networks were measured once more, or if nothing is known of this processor. With --update
this processor's are written instead.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from scalablevit_pl.profiling.measurement import Plan, Result, measure
from scalablevit_pl.profiling.networks import Setting, build_network
from scalablevit_pl.profiling.report import processor
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
    """Return images/s over images/s, each of its fastest round.

    Raises:
        SystemExit: If one of them could not be measured.
    """
    for result in (ours, reference):
        if result.note:
            sys.exit(f"{result.setting.network}: {result.note}")
    return min(reference.samples) / min(ours.samples)


def name_of(ours: Setting, reference: Setting) -> str:
    """Name a ratio."""
    return f"{ours.network} over {reference.network}, {ours.mode}, batch {ours.batch_size}, {ours.size}"


def measure_pairs(pairs: Sequence[tuple[Setting, Setting]], repeats: int) -> dict[str, float]:
    """Measure all of some pairs in turns, and return their ratios by name."""
    settings = [setting for pair in pairs for setting in pair]
    results = {
        result.setting: result
        for result in measure(settings, torch.device("cpu"), Plan(repeats, 0.2, warmup=1), build, matrices=False)
    }
    return {name_of(*pair): ratio(*(results[setting] for setting in pair)) for pair in pairs}


def is_slow(now: float, was: float | None, tolerance: float = TOLERANCE) -> bool:
    """Tell whether a ratio has fallen by more than the tolerance."""
    return was is not None and now < was * (1 - tolerance)


def compare(ratios: Mapping[str, float], before: Mapping[str, float], tolerance: float) -> tuple[list[str], bool]:
    """Return a line for each ratio, and whether none has fallen by more than the tolerance."""
    lines, good = [], True
    for name, now in ratios.items():
        was = before.get(name)
        word = "new " if was is None else "SLOW" if is_slow(now, was, tolerance) else "ok  "
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
    records = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    if processor() not in records and not options.update:
        sys.exit(f"no ratios are known of {processor()}: write those of an earlier commit with --update, then compare")
    torch.set_num_threads(THREADS)
    ratios = measure_pairs(PAIRS, options.repeats)
    if options.update:
        measured_on = f"{THREADS} thread, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
        rounded = {name: round(value, 4) for name, value in ratios.items()}
        records[processor()] = {"measured_on": measured_on, "ratios": rounded}
        save_json(records, RECORD)
    record = records[processor()]
    doubtful = [pair for pair in PAIRS if is_slow(ratios[name_of(*pair)], record["ratios"].get(name_of(*pair)))]
    if doubtful:
        ratios |= measure_pairs(doubtful, options.repeats)
    lines, good = compare(ratios, record["ratios"], TOLERANCE)
    sys.stdout.write(
        "\n".join([*lines, f"before: {processor()}, {record['measured_on']}; tolerance {TOLERANCE:.0%}"]) + "\n"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
