"""Products of large matrices: the pace that a device can reach, which networks are compared with."""

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F

from scalablevit_pl.profiling.timing import seconds_a_call

# Sides of square matrices. The best of several is taken: a bound that is too low would flatter the networks.
SIDES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
# Seconds of a call above which no larger one is tried: some processors know a type by slow detours only.
LONGEST = 1.0


def matrix_calls(dtype: torch.dtype, device: torch.device) -> dict[int, Callable[[], object]]:
    """Return for each side N the product of two matrices `(N, N)`, as a linear layer makes it.

    Sides for which there is no memory are left out, and those above one that takes over a second.
    """
    calls: dict[int, Callable[[], object]] = {}
    for side in SIDES[device.type]:
        try:
            call = _product(side, dtype, device)
            call()
            taken = seconds_a_call(call, 1, device)
        except RuntimeError:  # of a GPU's memory as of a CPU's
            continue
        calls[side] = call
        if taken > LONGEST:
            break
    return calls


def _product(side: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def multiply() -> object:
        with torch.inference_mode():
            return F.linear(left, right)

    return multiply


def best_rate(seconds: Mapping[int, float]) -> tuple[float, int]:
    """Return the most operations a second, a multiply-add being two, and the side with which they were reached.

    Args:
        seconds: What a product took, by side.
    """
    return max((2 * side**3 / taken, side) for side, taken in seconds.items())
