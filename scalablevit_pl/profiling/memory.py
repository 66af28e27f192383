"""Peak memory of a call, and pages of memory that are new to a process."""

import os
from collections.abc import Callable
from itertools import pairwise

import torch
from torch.profiler import ProfilerActivity, profile

from scalablevit_pl.profiling.networks import Setting, build_network, prepare


def peak_of_call(call: Callable[[], object], device: torch.device) -> int:
    """Make a call and return the most bytes of tensors that it held at once, beyond those that were there before.

    On a GPU that is what torch's allocator counts. On a CPU it is the running sum of what torch's profiler sees
    allocated and freed, which leaves out what libraries take for themselves.

    Args:
        call: Warm: what a first call finds and keeps is not its own.
        device: What computes.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would speak of GPUs that are not there
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    results = trace.profiler.kineto_results if trace.profiler is not None else None
    changes = [event for event in (results.events() if results else []) if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def page_faults_of_steps(setting: Setting, repeats: int, warmup: int = 3) -> list[int]:
    """Return for each of some steps on a CPU how many pages it gets that the process has not, or has given back.

    It has to be called in a process of its own: a step finds pages that anything before it has left.

    Args:
        setting: The network, and in which way it is run.
        repeats: Steps that are counted.
        warmup: Steps before.
    """
    import resource  # which not every system has

    step = prepare(build_network(setting), setting, torch.device("cpu")).step
    counts = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
    for _ in range(warmup + repeats):
        step()
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return [after - before for before, after in pairwise(counts)][warmup:]
