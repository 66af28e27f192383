"""Time and memory of loading ScalableViT-S from a folder, against the minimum that torch and safetensors need.

python benchmarks/loading.py [--runs N]

The minimum builds the network on the meta device, and calls `safetensors.torch.load_file` and
`load_state_dict(assign=True)`. `from_pretrained` also checks the configuration, the names, the shapes and that all
weights are finite.
"""

import platform
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import safetensors
import torch
from safetensors.torch import load_file
from script import make_parser
from torch import nn

from scalablevit_pl.models import ImageClassifier, build_classifier, create_model
from scalablevit_pl.profiling.timing import time_interleaved
from scalablevit_pl.weights import folder as model_folder

# Runs in a separate process; memory is counted from after the imports.
MEMORY = """
import sys
import scalablevit_pl.weights.source
from scalablevit_pl.models import ImageClassifier


def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


before = status("VmRSS")
model = ImageClassifier.from_pretrained(sys.argv[1])
print(status("VmHWM") - before)
"""


def minimum(folder: Path) -> nn.Module:
    """Load without any check but those of `load_state_dict`."""
    with torch.device("meta"):
        model = build_classifier(model_folder.classifier_config(model_folder.read_config(folder)))
    model.load_state_dict(load_file(folder / model_folder.WEIGHTS), assign=True)
    return model.eval()


def unchecked(folder: Path) -> nn.Module:
    """Load as the package does, without the check for non-finite weights."""
    with mock.patch.object(model_folder, "check_finite"):
        return ImageClassifier.from_pretrained(folder)


def main() -> None:
    """Print a table."""
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=int, default=30, help="timed runs of each way (%(default)s)")
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "scalablevit_s"
        create_model("scalablevit_s").save_pretrained(folder)
        size = (folder / model_folder.WEIGHTS).stat().st_size
        ways = {"minimum": minimum, "from_pretrained": ImageClassifier.from_pretrained, "without check": unchecked}
        calls = {name: partial(load, folder) for name, load in ways.items()}
        samples = time_interleaved(calls, torch.device("cpu"), runs, 0.0).samples
        times = {name: statistics.median(values) for name, values in samples.items()}
        peaks = [
            int(subprocess.run([sys.executable, "-c", MEMORY, str(folder)], capture_output=True, check=True).stdout)
            for _ in range(3)
        ]
    lines = [
        f"torch {torch.__version__}, safetensors {safetensors.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads; medians of {runs} interleaved runs; file {size / 1e6:.1f} MB",
        *(f"{name:<16} {taken * 1e3:7.1f} ms   {taken / times['minimum']:.2f} ×" for name, taken in times.items()),
        f"{'finiteness check':<16} {(times['from_pretrained'] - times['without check']) * 1e3:7.1f} ms",
        f"{'peak memory':<16} {statistics.median(peaks) / size:.2f} × the file",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
