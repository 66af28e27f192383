import hashlib
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hub_models import REPO, files_in, hub_error, same_weights
from hub_server import HubServer
from huggingface_hub import constants

from scalablevit_pl import from_pretrained
from scalablevit_pl.models.factory import check_folder
from scalablevit_pl.weights.folder import CARD, CONFIG, WEIGHTS
from scalablevit_pl.weights.hub import client, upload
from scalablevit_pl.weights.hub.download import Snapshot, fetch

LIMIT = 180.0  # seconds that the documentation states
SILENCE = client.SILENCE

plan_push = partial(upload.plan_push, check=check_folder, token="hf_ada")


def push(folder: Path, repository: str, message: str = "Upload", **options: Any) -> Snapshot:
    return upload.push(plan_push(folder, repository, **options), message)


def change_card(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / CARD).write_text((folder / CARD).read_text().replace(old, new, 1))

    return change


def as_committed(folder: Path, repository: str = REPO) -> dict[str, bytes]:
    """Return the files of a folder as a push commits them, with the repository's name in the card."""
    files = files_in(folder)
    card = files[CARD].decode().replace(f'("{folder.name}")  # this folder', f'("{repository}")')
    return files | {CARD: card.encode()}


def sent(hub: HubServer) -> list[str]:
    return [line for line in hub.lines() if not line.startswith(("GET", "HEAD"))]


# The commit


@pytest.mark.parametrize(("mode", "revision"), [("auto", None), ("regular", "try/one")])
def test_a_pushed_model_is_fetched(hub: HubServer, models: list[Path], mode: Any, revision: str | None) -> None:
    hub.upload_mode = mode
    pushed = push(models[0], REPO, branch=revision)
    assert hub.commits(REPO, revision or "main")[0] == pushed.commit
    assert len(hub.commits(REPO, revision or "main")) == 2
    assert bool(hub.lines("PUT /cdn/")) == (mode == "auto")
    assert files_in(fetch(REPO, revision).folder) == as_committed(models[0])
    model = from_pretrained(REPO, revision=pushed.commit)
    assert same_weights(model, models[0])
    assert not model.training


def test_the_digests_are_those_of_the_committed_files(hub: HubServer, folder: Path) -> None:
    pushed = push(folder, REPO, license="apache-2.0")
    committed = {name: data for name, data in hub.files(REPO).items() if name != ".gitattributes"}
    assert pushed.digests == {name: hashlib.sha256(data).hexdigest() for name, data in committed.items()}
    assert (pushed.folder, pushed.repository) == (folder, REPO)


@pytest.mark.parametrize("attempt", [plan_push, push])
def test_the_folder_never_changes(hub: HubServer, folder: Path, attempt: Callable[..., Any]) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    attempt(folder, REPO, license="apache-2.0")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


def test_the_committed_card_has_the_repository_and_the_licence(hub: HubServer, folder: Path) -> None:
    change_card("license: mit", "license: other")(folder)
    push(folder, "vit", license="apache-2.0")
    metadata, _, text = hub.files(REPO)[CARD].decode().partition("\n# ")
    assert "license: apache-2.0" in metadata
    assert f'from_pretrained("{REPO}")\n' in text
    assert text == as_committed(folder)[CARD].decode().partition("\n# ")[2]


def test_a_card_that_needs_no_change_is_committed_byte_for_byte(hub: HubServer, folder: Path) -> None:
    card = b"---\r\nlicense: mit\r\n---\r\n# My own words \xc3\xa9\r\n"
    (folder / CARD).write_bytes(card)
    push(folder, REPO, license="mit")
    assert hub.files(REPO)[CARD] == card


def test_only_shared_files_are_uploaded(hub: HubServer, folder: Path, models: list[Path]) -> None:
    for name in (".git/config", ".hidden.json", ".env", "sub/config.json", "code.py", "notes", "model.onnx"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("private")
    (folder / "folder.json").mkdir()
    extra = {"LICENSE": b"words\n", "confusion.png": b"\x89PNG\r\n\x1a\n\0\xff", "history.csv": b"epoch\r\n1\r\n"}
    for name, data in extra.items():
        (folder / name).write_bytes(data)
    push(folder, REPO)
    committed = {name: data for name, data in hub.files(REPO).items() if name != ".gitattributes"}
    assert committed == as_committed(models[0]) | extra


@pytest.mark.parametrize("mode", ["auto", "regular"])
def test_a_repeated_push_makes_no_second_commit(hub: HubServer, folder: Path, models: list[Path], mode: Any) -> None:
    hub.upload_mode = mode
    first = push(folder, REPO, message="The first")
    assert [first.commit, len(hub.commits(REPO))] == [hub.commits(REPO)[0], 2]
    assert hub.repos[REPO].at("main").message == "The first"
    assert push(folder, REPO) == first
    assert len(hub.commits(REPO)) == 2
    shutil.copyfile(models[1] / WEIGHTS, folder / WEIGHTS)
    second = push(folder, REPO)
    assert hub.commits(REPO)[:2] == [second.commit, first.commit]
    assert hub.files(REPO, first.commit)[WEIGHTS] != hub.files(REPO)[WEIGHTS] == (folder / WEIGHTS).read_bytes()


def test_a_push_to_a_branch_leaves_the_main_one(hub: HubServer, repo: str, models: list[Path]) -> None:
    before = hub.commits(repo)
    pushed = push(models[1], repo, branch="try/one")
    assert hub.commits(repo) == before
    assert hub.commits(repo, "try/one") == [pushed.commit, *before]
    assert push(models[1], repo, branch="try/one").commit == pushed.commit


@pytest.mark.parametrize("private", [True, False, None])
def test_a_new_repository_is_private_if_asked(hub: HubServer, models: list[Path], private: bool | None) -> None:
    push(models[0], "lab/vit", private=private)
    assert hub.repos["lab/vit"].private == bool(private)


def test_an_existing_repository_stays_private(hub: HubServer, models: list[Path]) -> None:
    hub.add_repo(REPO, private=True)
    push(models[0], REPO, private=False)
    assert hub.repos[REPO].private


def test_push_to_hub_returns_the_address_of_the_commit(hub: HubServer, models: list[Path]) -> None:
    model = from_pretrained(models[0])
    url = model.push_to_hub("vit", token="hf_ada", license="mit", private=True, commit_message="Hello")
    assert url == f"{hub.endpoint}/ada/vit/commit/{hub.commits(REPO)[0]}"
    assert hub.repos[REPO].private
    assert hub.repos[REPO].at("main").message == "Hello"
    assert same_weights(from_pretrained(REPO, token="hf_ada"), models[0])
    with hub_error("no licence"):
        model.push_to_hub("vit", token="hf_ada")


# Checks


def add_file(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).touch()


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        (None, {"token": None}, ["needs a token", "hf auth login"]),
        (None, {"token": "hf_wrong"}, ["401", "hf auth login"]),
        (None, {"token": "hf_ada_read"}, ["'ada'", "is read-only"]),
        (None, {"token": "hf_bob"}, ["'bob'", "does not allow writing to 'ada'", "push to bob"]),
        (None, {"repository": "strangers/vit"}, ["'ada'", "'strangers'", "push to ada, lab"]),
        (None, {"repository": "readers/vit"}, ["'ada'", "'readers'", "push to ada, lab"]),
        (None, {"repository": "a/b/c"}, ["'a/b/c'", "owner/name"]),
        (None, {"repository": "ada/vi--t"}, ["'ada/vi--t'", "owner/name"]),
        (None, {"repository": ""}, ["''", "owner/name"]),
        (None, {"branch": "0" * 40}, ["is a commit", "needs a branch"]),
        (lambda folder: (folder / CARD).unlink(), {}, [CARD, "export the model again"]),
        (change_card("license: mit", "license: other"), {}, ["'other'", "--license"]),
        (change_card("license: mit", "license: unknown"), {}, ["'unknown'", "--license"]),
        (change_card("license: mit", "licence: mit"), {}, ["no licence", "--license"]),
        (change_card("license: mit", "license: [mit"), {}, [CARD, "cannot be read"]),
        (change_card("license: mit", "license: &a [mit, *a]"), {}, [CARD, "hold aliases"]),
        (lambda folder: (folder / CARD).write_bytes(b"\xff\xfe"), {}, [CARD, "cannot be read"]),
        (add_file("pytorch_model.bin"), {}, ["'pytorch_model.bin'", "remove it"]),
        (add_file("last.ckpt"), {}, ["'last.ckpt'", "remove it"]),
        (add_file("X.PKL"), {}, ["'X.PKL'", "remove it"]),
    ],
)
@pytest.mark.parametrize("attempt", [plan_push, push])
def test_a_push_is_checked_before_anything_is_sent(
    hub: HubServer,
    folder: Path,
    attempt: Callable[..., Any],
    change: Callable[[Path], None] | None,
    options: dict[str, Any],
    expected: list[str],
) -> None:
    if change is not None:
        change(folder)
    before = files_in(folder)
    with hub_error(*expected):
        attempt(folder, **({"repository": REPO} | options))
    assert not sent(hub)
    assert not hub.repos
    assert files_in(folder) == before


@pytest.mark.parametrize("attempt", [plan_push, push])
def test_a_folder_that_does_not_load_is_not_pushed(hub: HubServer, folder: Path, attempt: Callable[..., Any]) -> None:
    (folder / CONFIG).write_text("{}")
    with pytest.raises(ValueError, match="schema"):
        attempt(folder, REPO)
    assert not hub.requests


def test_a_private_push_refuses_a_public_repository(hub: HubServer, models: list[Path], repo: str) -> None:
    before = hub.commits(REPO)
    with hub_error(REPO, "is public"):
        push(models[0], REPO, private=True)
    assert hub.commits(REPO) == before


def test_metadata_that_the_hub_rejects_stop_a_push(hub: HubServer, models: list[Path]) -> None:
    hub.fault("status", "validate-yaml", status=400, times=3)
    with hub_error(CARD, "correct them"):
        push(models[0], REPO)
    assert not hub.repos


def test_a_push_needs_the_hub(hub: HubServer, models: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with hub_error(REPO, "HF_HUB_OFFLINE is set"):
        push(models[0], REPO)


def test_a_plan_names_files_and_repository(hub: HubServer, folder: Path) -> None:
    (folder / "picture.png").write_bytes(b"12345")
    (folder / "sub").mkdir()
    plan = plan_push(folder, "vit")
    assert "hf_ada" not in repr(plan)
    assert [plan.repository, plan.branch, plan.exists, plan.left_out] == [REPO, "main", False, ["sub"]]
    assert plan.files == {name: len(data) for name, data in as_committed(folder).items()}
    assert plan.card.encode() == as_committed(folder)[CARD]
    hub.add_repo("lab/vit", private=True)
    assert plan_push(folder, "lab/vit", branch="try").exists


# Interruptions


@pytest.mark.parametrize("mode", ["auto", "regular"])
@pytest.mark.parametrize("branch", [None, "try"])
def test_a_commit_whose_answer_is_lost_is_found(
    hub: HubServer, repo: str, models: list[Path], mode: Any, branch: str | None
) -> None:
    hub.upload_mode = mode
    hub.fault("lose", "POST .*/commit/")
    pushed = push(models[1], repo, branch=branch, license="apache-2.0")  # not the licence in the folder
    history = hub.commits(repo, branch or "main")
    assert [pushed.commit, len(history)] == [history[0], 3]
    committed = hub.files(repo, pushed.commit)
    assert b"license: apache-2.0" in committed[CARD]
    assert {name: hashlib.sha256(committed[name]).hexdigest() for name in pushed.digests} == pushed.digests


@pytest.mark.parametrize(
    ("kind", "match", "options"),
    [
        ("status", "GET /api/whoami", {"times": 2}),
        ("status", "GET /api/models/", {"times": 2}),
        ("reset", "GET /api/models/", {"times": 2}),
        ("status", "POST /api/repos/create", {"times": 2}),
        ("lose", "POST /api/repos/create", {"times": 2}),
        ("status", "POST .*/branch/", {"times": 2}),
        ("lose", "POST .*/branch/", {"times": 2}),
        ("status", "POST .*/preupload/", {"times": 2, "status": 503}),
        ("lose", "POST .*/preupload/", {"times": 2}),
        ("status", "POST .*/objects/batch", {"times": 2}),
        ("status", "PUT /cdn/", {"times": 2}),
        ("reset", "PUT /cdn/", {"times": 1}),
        ("lose", "PUT /cdn/", {"times": 1}),
        ("status", "POST .*/objects/verify", {"times": 1}),
        ("status", "POST .*/commit/", {"times": 2, "status": 503}),
    ],
)
def test_a_transient_failure_is_retried(
    hub: HubServer, models: list[Path], kind: Any, match: str, options: Any
) -> None:
    hub.fault(kind, match, **options)
    pushed = push(models[0], REPO, branch="try", private=True)
    assert sum(fault.times for fault in hub.faults) == 0
    assert hub.commits(REPO, "try")[0] == pushed.commit
    assert len(hub.commits(REPO, "try")) == 2
    assert hub.repos[REPO].private
    assert hub.files(REPO, "try").items() >= as_committed(models[0]).items()


@pytest.mark.parametrize(
    ("kind", "match", "options", "expected"),
    [
        ("status", "POST .*/commit/", {"status": 403}, ["403", "the token lacks the permission"]),
        ("status", "POST .*/commit/", {"status": 412}, ["412", "push again"]),
        ("status", "POST .*/commit/", {"status": 500}, ["not confirmed", "pushing again is safe"]),
        ("reset", "POST .*/preupload/", {}, ["ENDPOINT", "try again later"]),
        ("status", "POST .*/preupload/", {"status": 403}, ["403", "the token lacks the permission"]),
        ("status", "PUT /cdn/", {"status": 500}, ["nothing was committed", "push again"]),
        ("status", "PUT /cdn/", {"status": 403}, []),
        ("status", "POST .*/objects/batch", {"status": 500}, []),
        ("status", "GET /api/whoami", {"status": 500}, ["500"]),
    ],
)
def test_a_push_that_fails_commits_nothing(
    hub: HubServer, repo: str, models: list[Path], kind: Any, match: str, options: Any, expected: list[str]
) -> None:
    before = hub.commits(repo)
    hub.fault(kind, match, times=1000, **options)
    with hub_error("'ada/vit'", *(text.replace("ENDPOINT", hub.endpoint) for text in expected)):
        push(models[1], repo)
    assert hub.commits(repo) == before
    hub.faults.clear()
    pushed = push(models[1], repo)
    assert hub.commits(repo) == [pushed.commit, *before]


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ("GET /api/whoami", "try again later"),
        ("GET /api/models/", "try again later"),
        ("POST /api/repos/create", "try again later"),
        ("POST .*/preupload/", "try again later"),
        ("POST .*/objects/batch", "try again later"),
        ("PUT /cdn/", "nothing was committed"),
        ("POST .*/commit/", "not confirmed"),
    ],
)
def test_a_push_to_a_silent_server_ends(
    hub: HubServer,
    models: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    waits: list[float],
    match: str,
    expected: str,
) -> None:
    monkeypatch.setattr(client, "SILENCE", 0.15)
    hub.fault("hang", match, times=1000, seconds=600)
    start = time.monotonic()
    with hub_error(expected):
        push(models[0], REPO)
    assert time.monotonic() - start < 300
    hung = 1000 - hub.faults[0].times
    assert hung * SILENCE + sum(waits) < LIMIT  # with the real limit
    hub.faults.clear()
    pushed = push(models[0], REPO)
    assert hub.commits(REPO)[0] == pushed.commit
    assert len(hub.commits(REPO)) == 2


def test_a_late_commit_is_found_by_the_next_push(
    hub: HubServer, repo: str, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SILENCE", 0.15)
    hub.fault("hang", "POST .*/commit/", seconds=0.6)
    with hub_error("pushing again is safe"):
        push(models[1], repo)
    while len(hub.commits(repo)) == 2:
        time.sleep(0.01)
    assert push(models[1], repo).commit == hub.commits(repo)[0]
    assert len(hub.commits(repo)) == 3
