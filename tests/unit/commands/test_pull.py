import json
from pathlib import Path

import pytest
from hub_models import REPO, files_in, hub_error, save_small_model
from hub_server import HubServer

from scalablevit_pl import from_pretrained
from scalablevit_pl.commands.pull import pull_repository
from scalablevit_pl.weights.folder import CONFIG, WEIGHTS
from scalablevit_pl.weights.hub import client


@pytest.fixture
def model(hub: HubServer, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that is also on the Hub."""
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    folder = save_small_model(tmp_path_factory.mktemp("models") / "model")
    hub.add_repo(REPO)
    hub.commit(REPO, files_in(folder))
    return folder


def pull(folder: Path, *options: str) -> Path:
    pull_repository([REPO, str(folder), *options])
    return folder


def test_a_pull_copies_all_shared_files_of_a_revision(hub: HubServer, model: Path, tmp_path: Path) -> None:
    first = hub.commit(REPO, {"zebra.png": b"picture", "LICENSE": b"words", "code.py": b"no"})
    hub.commit(REPO, {"LICENSE": b"other words"})
    expected = files_in(model) | {"zebra.png": b"picture", "LICENSE": b"words"}
    assert files_in(pull(tmp_path / "pulled", "--revision", first)) == expected


def test_a_folder_is_replaced_only_with_overwrite(hub: HubServer, model: Path, tmp_path: Path) -> None:
    target = save_small_model(tmp_path / "target", seed=1)
    (target / "notes").write_text("mine")
    before = files_in(target)
    with pytest.raises(ValueError, match="--overwrite"):
        pull(target)
    assert not hub.requests
    hub.fault("reset", "GET /cdn/", times=3)
    with hub_error("try again later"):
        pull(target, "--overwrite")
    assert files_in(target) == before
    assert files_in(pull(target, "--overwrite")) == files_in(model) | {"notes": b"mine"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "target"]


def test_pulled_files_are_independent_of_the_cache(hub: HubServer, model: Path, tmp_path: Path) -> None:
    pulled = pull(tmp_path / "pulled")
    assert not any(path.is_symlink() for path in pulled.iterdir())
    (pulled / WEIGHTS).write_bytes(b"")
    from_pretrained(REPO)


def test_a_model_that_does_not_load_is_not_pulled(
    hub: HubServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = json.loads((model / CONFIG).read_text())
    arguments = {"class_path": "os.system", "init_args": ["touch x"], "depths": [10**9] * 4}
    hostile = config | {"auto_map": {"AutoModel": "modeling.Evil"}, "model_args": config["model_args"] | arguments}
    hub.commit(REPO, {CONFIG: json.dumps(hostile).encode(), "modeling.py": b"import os; os.system('touch x')"})
    with pytest.raises(ValueError, match="4000000000 blocks"):
        pull(tmp_path / "pulled")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
