"""The cost of a network: multiply-adds and memory."""

import os
from collections.abc import Callable
from itertools import chain

import torch
from torch import nn
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


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
    state = {name: tensor.to("meta") for name, tensor in chain(network.named_parameters(), network.named_buffers())}
    # On the meta device torch decomposes attention into batched products, which are counted separately.
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(network, state, (torch.empty(1, *image, device="meta"),))
    # torch counts a multiply-add as two operations.
    return {str(operator): count // 2 for operator, count in counter.get_flop_counts()["Global"].items()}


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
