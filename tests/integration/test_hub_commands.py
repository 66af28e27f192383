import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import constants

from scalablevit_pl.commands.main import main
from scalablevit_pl.models import build_classifier

REPO = "ada/vit"
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as hub:
        hub.add_user("hf_ada", "ada")
        yield hub


@pytest.fixture
def start(hub: HubServer, environment: dict[str, str], tmp_path: Path) -> Start:
    """Start the command as a user does, with a cache of its own, in a folder of its own."""
    home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
    settings = {**environment, **home, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_ada"}

    def start(*words: str, **changes: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "scalablevit_pl", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=settings | changes, **pipes)

    return start


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save_model(folder, 0)
    return folder


def save_model(folder: Path, seed: int) -> None:
    """Save a small classifier of which `seed` is the most probable class for any image."""
    backbone = {"embed_dims": [8] * 4, "num_heads": [1] * 4, "depths": [1] * 4, "spatial_ratios": [8, 4, 2, 1]}
    config = {"name": "small", "num_classes": 3, "head": "linear", "global_pool": "avg"}
    network = build_classifier({**config, "backbone": {**backbone, "channel_ratios": [1.0] * 4}})
    with torch.no_grad():
        network.head.fc.bias[seed] = 100.0
    network.save_pretrained(folder, license="mit")


def done(process: subprocess.Popen[str]) -> str:
    told, complaint = process.communicate(timeout=120)
    assert process.returncode == 0, complaint
    return told


def failed(process: subprocess.Popen[str], *expected: str) -> None:
    told, complaint = process.communicate(timeout=120)
    assert_one_sentence(process.returncode, told, complaint, *expected)


def assert_one_sentence(status: int, told: str, complaint: str, *expected: str) -> None:
    lines = [line for line in complaint.splitlines() if line.startswith("scalablevit: error: ")]
    assert [status, len(lines), told] == [2, 1, ""], complaint
    assert "Traceback" not in complaint
    for text in expected:
        assert text in lines[0]


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_model_travels(hub: HubServer, start: Start, model: Path, photos: Path, tmp_path: Path) -> None:
    (model / "LICENSE").write_text("words")
    told = done(start("push", "model", REPO, "--private"))
    first = hub.commits(REPO)[0]
    assert told == f"{hub.endpoint}/{REPO}\ncommit {first}\n"
    assert hub._repos[REPO].private
    old = files_in(model)
    save_model(model, 1)
    (model / "README.md.old").unlink()  # the card of the model before, which does not travel
    second = hub.commit(REPO, files_in(model))

    pulled, info = map(done, [start("pull", REPO, "pulled"), start("info", REPO)])  # which fill one cache
    assert [second in pulled, second in info, first in info] == [True, True, False]
    assert [word in info for word in ("mit", "small", "parameters")] == [True] * 3
    assert files_in(tmp_path / "pulled") == files_in(model)

    photo = str(photos / "cat" / "test_0.jpg")
    done(start("predict", "--weights", f"{REPO}@{first}", photo, "--out", "table.csv"))
    with (tmp_path / "table.csv").open() as table:
        assert next(csv.DictReader(table))["label_1"] == "0"

    hub.close()
    offline = [start("pull", REPO, name, "--revision", name, HF_HUB_OFFLINE="1") for name in ("main", "v1")]
    done(offline[0])
    failed(offline[1], "'ada/vit'", "HF_HUB_OFFLINE")
    assert files_in(tmp_path / "main") == files_in(model) != old
    assert not (tmp_path / "v1").exists()


@pytest.mark.parametrize(
    ("words", "expected", "token"),
    [
        (("push", "model", "bob/vit"), ("'ada'", "'bob'"), "hf_ada"),
        (("pull", REPO, "pulled"), ("'ada/vit'", "private", "hf auth login"), None),
        (("info", f"{REPO}s"), ("'ada/vits'", "check the name"), "hf_ada"),
        (("predict", "--weights", f"{REPO}@v1", "photo.jpg"), ("'ada/vit'", "no revision 'v1'"), "hf_ada"),
    ],
)
def test_a_mistake_gets_one_sentence(
    words: tuple[str, ...],
    expected: tuple[str, ...],
    token: str | None,
    hub: HubServer,
    hub_settings: None,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.add_repo(REPO, private=True)
    (tmp_path / "photo.jpg").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr("scalablevit_pl.commands.main.show_log", lambda: None)
    monkeypatch.setattr(sys, "argv", ["scalablevit"])  # in this process, since starting one takes seconds
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    status = main(list(words))
    told, complaint = capsys.readouterr()
    assert_one_sentence(status, told, complaint, *expected)
    assert not (tmp_path / "pulled").exists()


def test_a_pull_that_is_killed_leaves_nothing(hub: HubServer, start: Start, model: Path, tmp_path: Path) -> None:
    hub.add_repo(REPO)
    hub.commit(REPO, files_in(model))
    hub.fault("hang", "GET /cdn/")
    process = start("pull", REPO, "pulled")
    while not any(path.startswith("/cdn/") for _, path in hub.requests):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "model"]
    done(start("pull", REPO, "pulled"))
    assert files_in(tmp_path / "pulled") == files_in(model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "model", "pulled"]
