import gc
import logging
import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from forked_command import PRELOADED
from hub_server import HubServer

# Before any test imports torch or datasets: nothing may wait for a network, and two workers share two cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """Leave what was imported out of each garbage collection: a million objects take a fifth of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def log() -> Iterator[None]:
    """Restore the loggers that the command directs to the screen and nowhere else."""
    names = ("", "scalablevit_pl", "lightning.pytorch", "lightning.fabric")
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger.level, logger.propagate, [*logger.handlers], [*logger.filters]) for logger in loggers]
    yield
    for logger, (level, *rest) in zip(loggers, before, strict=True):
        logger.propagate, logger.handlers, logger.filters = rest
        logger.setLevel(level)


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    cache = tmp_path_factory.mktemp("cache")
    # The processes that a command starts import a user's modules, which tests have beside them, from this path.
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    settings = {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return {**os.environ, **settings}


@pytest.fixture(scope="session")
def forkserver(environment: dict[str, str]) -> Iterator[ForkServerContext]:
    """Start processes that need not import the package again."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        yield context


@pytest.fixture
def hub_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Replace settings that the Hub's client read from the environment when it was imported."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def hub(hub_settings: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on loopback with a few users, used by the client."""
    from huggingface_hub import constants

    with HubServer() as hub:
        # Older clients read these even if they are given an endpoint.
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        hub.add_user("hf_ada", "ada", orgs={"lab": "write", "readers": "read"})
        hub.add_user("hf_ada_read", "ada", role="read")
        hub.add_user("hf_bob", "bob")
        yield hub
