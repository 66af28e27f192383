"""How long the import of the networks takes, against that of torch alone, which it needs in any case.

python benchmarks/imports.py [--runs 10]

Each is a process of its own, in turns; files are in the page cache after the first.
"""

import argparse
import statistics
import subprocess
import sys
import time

IMPORTS = ("import torch", "from scalablevit_pl.models import create_model")


def seconds(code: str) -> float:
    """Return how long Python takes from its start to its end."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Print both medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="of each (%(default)s)")
    options = parser.parse_args()
    times: dict[str, list[float]] = {code: [] for code in IMPORTS}
    for run in range(options.runs + 1):
        for code in IMPORTS:
            taken = seconds(code)
            if run > 0:
                times[code].append(taken)
    least = statistics.median(times[IMPORTS[0]])
    for code in IMPORTS:
        median = statistics.median(times[code])
        sys.stdout.write(f"{median:6.2f} s  {median / least:4.2f}  {code}\n")


if __name__ == "__main__":
    main()
