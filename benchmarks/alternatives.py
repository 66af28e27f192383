"""Parts of ScalableViT-S against other ways to compute the same: what was tried, and its cost.

python benchmarks/alternatives.py [--device cpu|cuda] [--precision 32|bf16] [--batch-size N] [--repeats N]

For each part, at the shapes of S for 224×224: milliseconds of the forward pass without gradients and of forward and
backward pass, all ways of a part interleaved, and their ratio to the first way. A way that a device does not support
has the reason instead of the time. The default batch is 8, on a GPU 256.
"""

import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from script import DEVICE, make_parser, markdown
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scalablevit_pl.models.fusion import onednn_linear
from scalablevit_pl.models.kernels import attend, sum_patches
from scalablevit_pl.profiling.measurement import Plan, full_float32
from scalablevit_pl.profiling.networks import DTYPES
from scalablevit_pl.profiling.report import describe, headline
from scalablevit_pl.profiling.timing import time_interleaved

Way = Callable[..., Tensor]
HEADER = ("forward, ms", "ratio", "and backward, ms", "ratio")
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN's": SDPBackend.CUDNN_ATTENTION,
}


def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend without a fused kernel."""
    return torch.softmax(query @ key.transpose(-2, -1) * 0.2, -1) @ value


def padded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with the fused kernel that torch selects, with the value padded to the width of the query."""
    wide = F.pad(value, (0, query.shape[-1] - value.shape[-1]))
    return F.scaled_dot_product_attention(query, key, wide, scale=0.2)[..., : value.shape[-1]].contiguous()


def by_kernel(kernel: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with a given kernel."""
    with sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(query, key, value, scale=0.2)


def shifted(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute a depthwise 3×3 convolution as nine products with shifted maps."""
    height, width = image.shape[2:]
    around = F.pad(image, (1, 1, 1, 1))
    total = bias.view(-1, 1, 1).expand_as(image)
    for row in range(3):
        for column in range(3):
            part = around[:, :, row : row + height, column : column + width]
            total = torch.addcmul(total, part, weight[:, :, row, column].unsqueeze(-1))
    return total


def convolved(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute a depthwise 3×3 convolution with torch."""
    return F.conv2d(image, weight, bias, padding=1, groups=len(weight))


def channels_first(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute a depthwise 3×3 convolution on a channels-first copy."""
    output = convolved(image.contiguous(), weight, bias)
    return output.contiguous(memory_format=torch.channels_last)


def fused(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute a linear layer as a fused network does on a CPU."""
    if torch.is_grad_enabled():
        raise NotImplementedError("has no gradients")
    return onednn_linear(tokens, weight, bias)


def parts(device: torch.device, dtype: torch.dtype, batch: int) -> dict[str, tuple[list[Tensor], dict[str, Way]]]:
    """Return for each part its inputs and the ways to compute it, the network's own first."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def heads(count: int, tokens: int, width: int) -> Tensor:
        return random(count, tokens, 8, width).transpose(1, 2)

    def feature_map(side: int, channels: int) -> Tensor:
        return random(batch, side, side, channels).permute(0, 3, 1, 2)

    def as_convolution(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(tokens.permute(0, 3, 1, 2), weight[:, :, None, None], bias).permute(0, 2, 3, 1)

    attention: dict[str, Way] = {
        "as it is": partial(attend, scale=0.2),
        "written out": written_out,
        "kernel of one width": padded,
    }
    if device.type == "cuda":
        attention |= {name: partial(by_kernel, kernel) for name, kernel in KERNELS.items()}
    found: dict[str, tuple[list[Tensor], dict[str, Way]]] = {
        "windows of stage 3": ([heads(batch * 4, 49, 32) for _ in range(3)], attention),
        "attention to the reduced map, stage 3": (
            [heads(batch, 196, 40), heads(batch, 49, 40), heads(batch, 49, 32)],
            attention,
        ),
        "linear layer of 256 to 1024, stage 3": (
            [random(batch, 14, 14, 256), random(1024, 256), random(1024)],
            {"as it is": F.linear, "fused": fused, "1×1 convolution": as_convolution},
        ),
        "depthwise 3×3, stage 3": (
            [feature_map(14, 256), random(256, 1, 3, 3), random(256)],
            {"as it is": convolved, "channels first": channels_first, "shifted": shifted},
        ),
    }
    for stage, (side, dim, ratio) in enumerate(((56, 64, 8), (28, 128, 4), (14, 256, 2)), start=1):
        found[f"reduction of stage {stage}"] = (
            [feature_map(side, dim), random(dim, 1, ratio, ratio), random(dim)],
            {"convolution": partial(F.conv2d, stride=ratio, groups=dim), "sum": sum_patches},
        )
    return found


def steps(inputs: list[Tensor], way: Way) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return the forward pass without gradients, and the forward and backward pass."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    def both() -> object:
        output = way(*leaves)
        return torch.autograd.grad(output, leaves, torch.ones_like(output))

    return torch.no_grad()(lambda: way(*inputs)), both


def rows(inputs: list[Tensor], ways: Mapping[str, Way], device: torch.device, plan: Plan) -> list[list[str]]:
    """Measure the ways to compute a part and return their rows."""
    calls = {(name, passes): step for name, way in ways.items() for passes, step in enumerate(steps(inputs, way))}
    timings = time_interleaved(calls, device, plan.repeats, plan.seconds)
    medians = {key: statistics.median(samples) for key, samples in timings.samples.items()}
    first = next(iter(ways))

    def cells(name: str, passes: int) -> list[str]:
        if (name, passes) in timings.failures:
            return [timings.failures[name, passes][:60], "–"]
        taken = medians[name, passes]
        return [f"{1e3 * taken:.3f}", f"{taken / medians.get((first, passes), taken):.2f}"]

    return [[name, *cells(name, 0), *cells(name, 1)] for name in ways]


def main() -> None:
    """Print a table for each part."""
    options = make_parser(__doc__, device=DEVICE, precision="32", batch_size=None, repeats=10).parse_args()
    device, plan = torch.device(options.device), Plan(options.repeats, 0.05)
    batch = options.batch_size or (256 if options.device == "cuda" else 8)
    sys.stdout.write(f"{headline(describe([], device, plan))}; {options.precision}, batch {batch}\n")
    with full_float32():
        for title, (inputs, ways) in parts(device, DTYPES[options.precision], batch).items():
            sys.stdout.write(f"\n{markdown((title, *HEADER), rows(inputs, ways, device, plan))}")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
