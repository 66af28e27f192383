"""The cost of a network: multiply-adds and memory."""

import math
import os
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

NORMS = (
    torch.ops.aten.native_layer_norm,
    torch.ops.aten.native_batch_norm,
    torch.ops.aten._native_batch_norm_legit_no_training,  # what the one before becomes in eval mode
)


def count_multiply_adds(network: nn.Module, image: tuple[int, int, int]) -> tuple[int, int]:
    """Count the multiply-adds of any network for one image: of convolutions and linear layers, and of attention.

    Biases, norms and activations are not counted. Nothing is computed, and the network, which may be on any device and
    is counted in its mode, is not changed. `image` is channels, height and width.
    """
    counts = count_by_operator(network, image)
    attention = sum(count for name, count in counts.items() if "bmm" in name or "attention" in name)
    return sum(counts.values()) - attention, attention


def count_by_operator(network: nn.Module, image: tuple[int, int, int]) -> dict[str, int]:
    """Count the multiply-adds for one image like `count_multiply_adds`, by operator such as `aten.addmm`."""
    # torch counts a multiply-add as two operations.
    return {
        str(operator): count // 2 for operator, count in _operations(network, image).items() if operator not in NORMS
    }


def count_norms(network: nn.Module, image: tuple[int, int, int]) -> int:
    """Count the multiply-adds of norms for one image like `count_multiply_adds`: two for each number.

    One normalizes the number, the other scales and shifts it. Counters such as mmcv's include them.
    """
    counts = _operations(network, image)
    return sum(count for operator, count in counts.items() if operator in NORMS) // 2


def _operations(network: nn.Module, image: tuple[int, int, int]) -> dict[Any, int]:
    """Count the operations for one image by operator."""
    state = {name: tensor.to("meta") for name, tensor in chain(network.named_parameters(), network.named_buffers())}
    # On the meta device torch decomposes attention into batched products, which are counted separately.
    mapping = dict.fromkeys(NORMS, _norm_operations)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        functional_call(network, state, (torch.empty(1, *image, device="meta"),))
    counts: dict[Any, int] = counter.get_flop_counts()["Global"]
    return counts


def _norm_operations(shape: Any, *_args: Any, **_options: Any) -> int:
    operations: int = 4 * math.prod(shape)
    return operations


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes of tensors that a call holds at once, in addition to those that existed before.

    On a GPU this is the count of torch's allocator. On a CPU it is the running sum of the allocations that torch's
    profiler sees, without what libraries such as oneDNN allocate themselves. Make the call once before: what a first
    one allocates and keeps is not part of a step.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences warnings about missing GPUs
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    results = trace.profiler.kineto_results if trace.profiler is not None else None
    changes = [event for event in (results.events() if results else []) if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak
