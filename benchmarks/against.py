"""A network of another checkout against this one's and against Swin-T, interleaved: the effect of a change.

python benchmarks/against.py CHECKOUT [--network scalablevit_s] [--mode inference|train] [--batch-size 8]

CHECKOUT is a folder with another commit, for example from `git worktree add ../before COMMIT`. Both networks get the
same weights; the largest difference of their outputs is printed with the times. Everything runs on the CPU.
"""

import importlib
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
from script import make_parser
from torch import nn

from scalablevit_pl.models import create_model
from scalablevit_pl.profiling.measurement import Plan, measure
from scalablevit_pl.profiling.networks import Setting, build_network

PACKAGE = "scalablevit_pl"
NOW, BEFORE, SWIN = "now", "before", "swin_tiny_patch4_window7_224"


def build_before(checkout: Path, network: str) -> nn.Module:
    """Build a network with the package of another checkout, and restore this one's modules."""
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == PACKAGE}
    sys.path.insert(0, str(checkout.resolve()))
    try:
        models = importlib.import_module(f"{PACKAGE}.models")
        if not Path(models.__file__ or "").is_relative_to(checkout.resolve()):
            sys.exit(f"there is no package {PACKAGE} in {str(checkout)!r}: give the folder of a checkout")
        before: nn.Module = models.create_model(network)
    finally:
        sys.path.pop(0)
        for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
            del sys.modules[name]
        sys.modules.update(ours)
    return before


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__, mode="inference", batch_size=8, input_size=224, repeats=25)
    parser.add_argument("checkout", type=Path, help="folder of the other commit")
    parser.add_argument("--network", default="scalablevit_s", help="of this package (%(default)s)")
    options = parser.parse_args()
    size = (options.input_size, options.input_size)
    networks = {NOW: create_model(options.network), BEFORE: build_before(options.checkout, options.network)}
    networks[BEFORE].load_state_dict(networks[NOW].state_dict())
    image = torch.randn(2, 3, *size)
    with torch.inference_mode():
        now, before = (networks[name].eval()(image) for name in (NOW, BEFORE))
    sys.stdout.write(f"largest difference of the outputs: {(now - before).abs().max():.1e}\n")
    setting = Setting("", options.mode, batch_size=options.batch_size, input_size=size)
    *_, swin = results = measure(
        [replace(setting, network=name) for name in (NOW, BEFORE, SWIN)],
        torch.device("cpu"),
        Plan(options.repeats, 0.0),
        lambda setting: networks.get(setting.network) or build_network(setting),
    )
    for result in results:
        ratio = statistics.median(theirs / ours for ours, theirs in zip(result.samples, swin.samples, strict=True))
        sys.stdout.write(
            f"{result.setting.network:<30}median {statistics.median(result.samples):.3f} s  minimum "
            f"{min(result.samples):.3f} s  relative to Swin-T {ratio:.3f}\n"
        )


if __name__ == "__main__":
    main()
