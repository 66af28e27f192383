"""Random numbers as functions of their purpose, so that an interrupted run resumes exactly."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def run_seed() -> int:
    """Return the seed of the run, set by `lightning.seed_everything`, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def derive_seed(*numbers: int) -> int:
    """Mix non-negative whole numbers to a seed of 64 bits; other numbers give an unrelated seed."""
    low, high = np.random.SeedSequence(numbers).generate_state(2)
    return int(high) << 32 | int(low)


def seed_generators(*numbers: int) -> None:
    """Seed the global generators of Python, NumPy and torch (CPU) with `derive_seed(*numbers)`.

    timm's transforms draw from all three and do not accept a generator.
    """
    seed = derive_seed(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)  # of the CPU only: a worker process must not touch a GPU


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed the global generators as `seed_generators` does, and restore them afterwards."""
    with preserved():
        seed_generators(*numbers)
        yield


@contextmanager
def preserved() -> Iterator[None]:
    """Restore the global generators of Python, NumPy and torch (CPU) at the end of a block.

    This costs several times as much as seeding them, so use it once for a batch, not for each sample.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
