import csv
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked_command import ForkedCommand
from hub_models import REPO, files_in, save_small_model
from hub_server import HubServer
from integration.conftest import Start

from scalablevit_pl.commands.main import main

HubStart = Callable[..., ForkedCommand]


@pytest.fixture
def start_online(hub: HubServer, start: Start, tmp_path: Path) -> HubStart:
    """Start the command with its own cache and folder, and with the Hub on loopback."""
    home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
    settings = {**home, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_ada"}

    def start_online(*words: str, **changes: str) -> ForkedCommand:
        return start(*words, cwd=tmp_path, **settings | changes)

    return start_online


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_small_model(tmp_path / "model")


def output(process: ForkedCommand) -> str:
    done = process.wait()
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_one_sentence(status: int, out: str, err: str, *expected: str) -> None:
    lines = [line for line in err.splitlines() if line.startswith("scalablevit: error: ")]
    assert [status, len(lines), out] == [2, 1, ""], err
    assert "Traceback" not in err
    for text in expected:
        assert text in lines[0]


def test_a_model_is_pushed_pulled_and_used(
    hub: HubServer, start_online: HubStart, model: Path, photos: Path, tmp_path: Path
) -> None:
    (model / "LICENSE").write_text("words")
    before = files_in(model)
    told = output(start_online("push", "model", REPO, "--private"))
    first = hub.commits(REPO)[0]
    assert told == f"{hub.endpoint}/{REPO}\ncommit {first}\n"
    assert hub.repos[REPO].private
    assert files_in(model) == before
    save_small_model(model, 1)
    (model / "README.md.old").unlink()  # the backup of the previous card, which is not shared
    second = hub.commit(REPO, files_in(model))

    pulled, info = map(
        output, [start_online("pull", REPO, "pulled"), start_online("info", REPO)]
    )  # both fill the same cache
    assert [second in pulled, second in info, first in info] == [True, True, False]
    assert all(word in info for word in ("mit", "small", "parameters"))
    assert files_in(tmp_path / "pulled") == files_in(model)

    photo = str(photos / "cat" / "test_0.jpg")
    output(start_online("predict", "--weights", f"{REPO}@{first}", photo, "--out", "table.csv"))
    with (tmp_path / "table.csv").open() as table:
        assert next(csv.DictReader(table))["label_1"] == "0"

    hub.close()
    cached, missing = [
        start_online("pull", REPO, name, "--revision", name, HF_HUB_OFFLINE="1") for name in ("main", "v1")
    ]
    output(cached)
    done = missing.wait()
    assert_one_sentence(done.returncode, done.stdout, done.stderr, "'ada/vit'", "HF_HUB_OFFLINE")
    assert files_in(tmp_path / "main") == files_in(model)
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
def test_an_error_is_one_sentence(
    words: tuple[str, ...],
    expected: tuple[str, ...],
    token: str | None,
    hub: HubServer,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.add_repo(REPO, private=True)
    (tmp_path / "photo.jpg").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("scalablevit_pl.commands.main.show_log", lambda: None)
    monkeypatch.setattr(sys, "argv", ["scalablevit"])  # in this process: starting one takes seconds
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    status = main(list(words))
    assert_one_sentence(status, *capsys.readouterr(), *expected)
    assert not (tmp_path / "pulled").exists()


def test_a_killed_pull_leaves_nothing(hub: HubServer, start_online: HubStart, model: Path, tmp_path: Path) -> None:
    hub.add_repo(REPO)
    hub.commit(REPO, files_in(model))
    hub.fault("hang", "GET /cdn/")
    process = start_online("pull", REPO, "pulled")
    while not hub.lines("GET /cdn/"):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "model"]
    output(start_online("pull", REPO, "pulled"))
    assert files_in(tmp_path / "pulled") == files_in(model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "model", "pulled"]
