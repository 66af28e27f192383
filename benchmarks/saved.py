"""Memory held for the backward pass, for each image, with and without gradient checkpointing.

python benchmarks/saved.py [NETWORK ...] [--device cpu|cuda] [--batch-size 2] [--input-size 224]

This counts what torch saves in a forward pass with cross entropy, in training mode, in float32 and under autocast to
bf16: each piece of memory once, without the parameters. The memory for an image is the growth from this batch to twice
as large a one, divided by the batch; what does not grow is listed separately, such as the copies of weights that
autocast makes. What checkpointing recomputes, one block's activations at a time, is not counted.
"""

import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from script import DEVICE, make_parser, markdown
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from scalablevit_pl.profiling.networks import DTYPES, Setting, build_network, image_shape

NETWORKS = ("scalablevit_s", "swin_tiny_patch4_window7_224")


def saved_bytes(call: Callable[[], object], network: nn.Module) -> int:
    """Run a call and return the bytes that it saves for a backward pass, without those of a network's parameters."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Kept alive, so that no later storage gets the same address.
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    for parameter in network.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    del result
    return sum(storage.nbytes() for storage in storages.values())


def count(network: nn.Module, setting: Setting, device: torch.device) -> tuple[float, float]:
    """Return the bytes held for each image, and those held whatever the batch is."""
    dtype = DTYPES[setting.precision]
    saved = []
    for images in (setting.batch_size, 2 * setting.batch_size):
        image = torch.randn(images, *image_shape(network, setting), device=device)
        label = torch.zeros(images, dtype=torch.long, device=device)

        def loss(image: Tensor = image, label: Tensor = label) -> Tensor:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                return F.cross_entropy(network(image), label)

        saved.append(saved_bytes(loss, network))
    each = (saved[1] - saved[0]) / setting.batch_size
    return each, saved[0] - each * setting.batch_size


def main() -> None:
    """Print a table."""
    options = make_parser(__doc__, networks=NETWORKS, device=DEVICE, batch_size=2, input_size=224).parse_args()
    size, device = (options.input_size, options.input_size), torch.device(options.device)
    sys.stdout.write(
        f"torch {torch.__version__}, {options.device}, batches of {options.batch_size} and {2 * options.batch_size}, "
        f"{options.input_size}×{options.input_size}\n\n"
    )
    sys.stdout.write(markdown(("", "precision", "each image", "with checkpointing", "constant", "with checkpointing")))
    for name in options.networks:
        for precision in ("32", "bf16"):
            plain = Setting(name, "train", precision, batch_size=options.batch_size, input_size=size)
            costs = []
            for setting in (plain, replace(plain, grad_checkpointing=True)):
                torch.manual_seed(0)  # decides which paths are dropped
                costs.append(count(build_network(setting).to(device).train(), setting, device))
            cells = [f"{1e-6 * cost:.1f} MB" for pair in zip(*costs, strict=True) for cost in pair]
            sys.stdout.write(f"| `{name}` | {precision} | {' | '.join(cells)} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
