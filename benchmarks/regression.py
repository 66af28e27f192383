"""Check whether the networks have become slower, by ratios to references that are measured in the same rounds.

python benchmarks/regression.py [--update]

Times differ between machines; ratios of times from the same minute on the same machine differ much less. Each ratio is
the least time of a reference over that of a network of this package, since disturbances only add time. A reference is
a timm network or a fixed stack of torch modules. `regression.json` next to this file holds the expected ratios for
each kind of processor. The exit status is 1 if a ratio has fallen by more than the tolerance in two measurements, or
if the processor is unknown. With --update the ratios of this processor are written instead.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from script import make_parser
from torch import nn

from scalablevit_pl.profiling.measurement import Plan, Result, measure
from scalablevit_pl.profiling.networks import Setting, build_network
from scalablevit_pl.profiling.report import processor
from scalablevit_pl.storage import save_json

RECORD = Path(__file__).with_name("regression.json")
TOLERANCE = 0.15
STACK, SWIN = "stack", "swin_tiny_patch4_window7_224"
NANO = {"batch_size": 16, "input_size": (64, 64)}
# A network of this package and its reference.
PAIRS = [
    (Setting("scalablevit_s", batch_size=4), Setting(SWIN, batch_size=4)),
    (Setting("scalablevit_s", "train", batch_size=2), Setting(SWIN, "train", batch_size=2)),
    (Setting("scalablevit_nano", **NANO), Setting(STACK, **NANO)),
    (Setting("scalablevit_nano", "train", **NANO), Setting(STACK, "train", **NANO)),
]
# With one thread the ratios are steadier, and independent of the number of cores.
THREADS = 1


def build(setting: Setting) -> nn.Module:
    """Build a network, or the stack, which must never change."""
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
    """Return images/s relative to the reference, each in its fastest round.

    Raises:
        SystemExit: If one of them could not be measured.
    """
    for result in (ours, reference):
        if result.note:
            sys.exit(f"{result.setting.network}: {result.note}")
    return min(reference.samples) / min(ours.samples)


def name_of(ours: Setting, reference: Setting) -> str:
    """Return the name of a ratio."""
    return f"{ours.network} over {reference.network}, {ours.mode}, batch {ours.batch_size}, {ours.size}"


def measure_pairs(pairs: Sequence[tuple[Setting, Setting]], repeats: int) -> dict[str, float]:
    """Measure pairs, interleaved, and return their ratios by name."""
    settings = [setting for pair in pairs for setting in pair]
    results = {
        result.setting: result for result in measure(settings, torch.device("cpu"), Plan(repeats, 0.2, warmup=1), build)
    }
    return {name_of(*pair): ratio(*(results[setting] for setting in pair)) for pair in pairs}


def verdict(now: float, before: float | None) -> str:
    """Compare a ratio with the expected one."""
    if before is None:
        return "new"
    return "SLOW" if now < before * (1 - TOLERANCE) else "fast" if now > before * (1 + TOLERANCE) else "ok"


def compare(ratios: Mapping[str, float], before: Mapping[str, float]) -> tuple[list[str], bool]:
    """Return a line for each ratio, and whether none is too low."""
    verdicts = {name: verdict(now, before.get(name)) for name, now in ratios.items()}
    lines = [
        f"{verdicts[name]:<4} {name}: was {f'{before[name]:.3f}' if name in before else '-'}, is {now:.3f}"
        for name, now in ratios.items()
    ]
    return lines, "SLOW" not in verdicts.values()


def main() -> int:
    """Measure and compare, and return the exit status."""
    parser = make_parser(__doc__, repeats=5)
    parser.add_argument("--update", action="store_true", help="write the ratios instead of comparing them")
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
    before = record["ratios"]
    slow = [pair for pair in PAIRS if verdict(ratios[name_of(*pair)], before.get(name_of(*pair))) == "SLOW"]
    if slow:
        ratios |= measure_pairs(slow, options.repeats)
    lines, good = compare(ratios, before)
    lines.append(f"before: {processor()}, {record['measured_on']}; tolerance {TOLERANCE:.0%}")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
