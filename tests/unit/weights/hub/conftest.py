import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_models import REPO, files_in, save_small_model
from hub_server import HubServer
from huggingface_hub import file_download
from huggingface_hub.utils import _http

from scalablevit_pl.weights.hub import client


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models: two of the same network, and one whose weights do not fit the configuration of the others."""
    parent = tmp_path_factory.mktemp("models")
    return [save_small_model(parent / f"model{seed}", seed, dim=16 if seed == 2 else 8) for seed in range(3)]


@pytest.fixture(autouse=True)
def waits(hub_settings: None, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the waits between retries instead of waiting."""
    waits: list[float] = []
    clock = SimpleNamespace(**{**vars(time), "sleep": waits.append})
    for module in (client, _http, file_download):
        monkeypatch.setattr(module, "time", clock)
    return waits


@pytest.fixture
def repo(hub: HubServer, models: list[Path]) -> str:
    hub.add_repo(REPO)
    hub.commit(REPO, files_in(models[0]))
    return REPO


@pytest.fixture
def folder(models: list[Path], tmp_path: Path) -> Path:
    """A model that a test may change."""
    return Path(shutil.copytree(models[0], tmp_path / "model0"))
