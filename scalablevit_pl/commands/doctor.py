"""The command `doctor`: check everything a fit needs, and suggest a fix for each problem."""

import sys
from types import SimpleNamespace

from scalablevit_pl.commands.arguments import OptionParser
from scalablevit_pl.diagnosis.examination import Examination
from scalablevit_pl.diagnosis.speed import quiet
from scalablevit_pl.experiment.start import parse_fit


def read_options(options: list[str]) -> tuple[SimpleNamespace, list[str]]:
    """Return the doctor's own options, and the remaining ones, which are those of a fit."""
    parser = OptionParser("doctor")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--traceback", action="store_true")
    own, others = parser.parse_known_args(options, SimpleNamespace())
    if own.images < 1 or not 0.0 < own.seconds < 3600.0:
        raise ValueError(
            f"--images must be at least 1 and --seconds above 0 and below 3600, got {own.images} and {own.seconds}"
        )
    return own, others


def diagnose(options: list[str]) -> int:
    """Check a fit, print the findings, and return the exit status: 1 if a check fails, else 0."""
    own, others = read_options(options)
    with quiet():  # the findings replace the log
        findings = list(Examination(*parse_fit(others), own).findings())
    counts = {status: sum(finding.status == status for finding in findings) for status in ("ok", "warn", "FAIL")}
    sys.stdout.write("\n" + ", ".join(f"{count} {status}" for status, count in counts.items()) + "\n")
    return 1 if counts["FAIL"] else 0
