"""Time and memory of loading ScalableViT-S from a folder, against the least that torch and safetensors need for it.

python benchmarks/loading.py [--runs N]

The least is: the network built on the meta device, `safetensors.torch.load_file`, `load_state_dict(assign=True)`.
Ours checks the configuration, the names, the shapes and that all weights are finite, besides.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import safetensors
import torch
from safetensors.torch import load_file
from torch import nn

from scalablevit_pl.models import ImageClassifier, build_classifier, create_model
from scalablevit_pl.weights import folder as model_folder

# In a process of its own: memory is counted from after the imports.
MEMORY = """
import sys
import scalablevit_pl.weights.hub
from scalablevit_pl.models import ImageClassifier


def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


before = status("VmRSS")
model = ImageClassifier.from_pretrained(sys.argv[1])
print(status("VmHWM") - before)
"""


def least(folder: Path) -> nn.Module:
    """Load without any check but those of `load_state_dict`."""
    with torch.device("meta"):
        model = build_classifier(model_folder.network_config(model_folder.read_config(folder)))
    model.load_state_dict(load_file(folder / model_folder.WEIGHTS), assign=True)
    return model.eval()


def unchecked(folder: Path) -> nn.Module:
    """Load as the package does, without looking for weights that are not finite."""
    with mock.patch.object(model_folder, "check_finite"):
        return ImageClassifier.from_pretrained(folder)


def measure(ways: dict[str, Callable[[Path], nn.Module]], folder: Path, runs: int) -> dict[str, list[float]]:
    """Time each way of loading in seconds, in turns, so that what disturbs one disturbs all."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(runs + 2):
        for name, load in ways.items():
            start = time.perf_counter()
            model = load(folder)
            if run >= 2:  # the first ones warm up
                times[name].append(time.perf_counter() - start)
            del model
    return times


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30, help="timed runs of each way (%(default)s)")
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "scalablevit_s"
        create_model("scalablevit_s").save_pretrained(folder)
        size = (folder / model_folder.WEIGHTS).stat().st_size
        ways = {"least": least, "from_pretrained": ImageClassifier.from_pretrained, "without check": unchecked}
        times = {name: statistics.median(values) for name, values in measure(ways, folder, runs).items()}
        peaks = [
            int(subprocess.run([sys.executable, "-c", MEMORY, str(folder)], capture_output=True, check=True).stdout)
            for _ in range(3)
        ]
    lines = [
        f"torch {torch.__version__}, safetensors {safetensors.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads; medians of {runs} interleaved runs; file {size / 1e6:.1f} MB",
        *(f"{name:<16} {seconds * 1e3:7.1f} ms   {seconds / times['least']:.2f} ×" for name, seconds in times.items()),
        f"{'finiteness check':<16} {(times['from_pretrained'] - times['without check']) * 1e3:7.1f} ms",
        f"{'peak memory':<16} {statistics.median(peaks) / size:.2f} × the file",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
