"""Import time of the networks, against that of torch alone, which they need anyway.

python benchmarks/imports.py [--runs 10]

Each import is a process of its own, interleaved; after the first, the files are in the page cache.
"""

import argparse
import statistics
import subprocess
import sys
import time

IMPORTS = ("import torch", "from scalablevit_pl.models import create_model")


def seconds(code: str) -> float:
    """Return the time from the start of Python to its end."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Print both medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="of each (%(default)s)")
    options = parser.parse_args()
    runs = [[seconds(code) for code in IMPORTS] for _ in range(options.runs + 1)][1:]  # the first run warms up
    medians = [statistics.median(times) for times in zip(*runs, strict=True)]
    for code, median in zip(IMPORTS, medians, strict=True):
        sys.stdout.write(f"{median:6.2f} s  {median / medians[0]:4.2f}  {code}\n")


if __name__ == "__main__":
    main()
