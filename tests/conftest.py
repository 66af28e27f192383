import logging
import os
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture
def hub_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Set what the Hub's client has read from the environment when it was imported."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
