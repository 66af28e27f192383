"""Products of large matrices: the rate a device can reach, as a reference for networks."""

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F

from scalablevit_pl.profiling.timing import seconds_per_call

# Sides of square matrices. The best of several is taken: too low a reference would flatter the networks.
SIDES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
# If a product takes more seconds than this, no larger one is tried: some processors emulate a type slowly.
LONGEST = 1.0


def best_rate(seconds: Mapping[int, float]) -> float:
    """Return the best operations per second of products, given the seconds of each side.

    A multiply-add counts as two operations.
    """
    return max(2 * side**3 / taken for side, taken in seconds.items())


def matrix_calls(dtype: torch.dtype, device: torch.device) -> dict[int, Callable[[], object]]:
    """Return for each side N a call that multiplies two matrices `(N, N)` as a linear layer does.

    Sides that do not fit into memory are omitted, and those above the first that takes over a second.
    """
    calls: dict[int, Callable[[], object]] = {}
    for side in SIDES[device.type]:
        try:
            call = _product(side, dtype, device)
            call()
            taken = seconds_per_call(call, 1, device)
        except RuntimeError:  # out of memory, on a GPU or on a CPU
            continue
        calls[side] = call
        if taken > LONGEST:
            break
    return calls


def _product(side: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return torch.inference_mode()(lambda: F.linear(left, right))
