import logging
import os
from collections.abc import Iterator

import pytest

# Before any test imports torch or datasets: nothing may wait for a network, and two workers share two cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def log() -> Iterator[None]:
    """Leave the package's log as it was: the command lets it speak on the screen, and on nothing else."""
    logger = logging.getLogger("scalablevit_pl")
    before = (logger.level, logger.propagate, [*logger.handlers], [*logger.filters])
    yield
    level, logger.propagate, logger.handlers, logger.filters = before
    logger.setLevel(level)
