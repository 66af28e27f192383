from pathlib import Path

import pytest
from hub_models import REPO, files_in, hub_error, save_small_model
from hub_server import HubServer
from safetensors.torch import load_file, save_file

from scalablevit_pl.commands.push import push_folder
from scalablevit_pl.weights.folder import FILES, WEIGHTS


@pytest.fixture
def folder(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_TOKEN", "hf_ada")
    return save_small_model(tmp_path / "model")


def test_a_dry_run_lists_what_a_push_would_do(hub: HubServer, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "notes").write_text("mine")
    before = files_in(folder)
    push_folder([str(folder), REPO, "--dry-run", "--private", "--license", "apache-2.0"])
    lines = capsys.readouterr().out.splitlines()
    assert "ada/vit, branch main, a new private repository" in lines[0]
    assert all(any(name in line and "bytes" in line for line in lines) for name in FILES)
    assert [line.split()[0] for line in lines if "bytes" not in line] == ["would", "notes"]
    assert [line for line in hub.lines() if not line.startswith("GET")] == ["POST /api/validate-yaml"]
    assert not hub.repos
    assert files_in(folder) == before


def test_weights_that_are_not_finite_are_not_pushed(hub: HubServer, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["head.fc.bias"][0] = float("nan")
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"head\.fc\.bias .*NaN"):
        push_folder([str(folder), REPO])
    assert not hub.requests


def test_a_refused_push_is_one_sentence(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    with hub_error("'bob'", "'ada'"):
        push_folder([str(folder), REPO])
