import errno
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_models import REPO, files_in, hub_error, same_weights
from hub_server import HubServer, StoredFile
from huggingface_hub import HfApi, constants, file_download, get_session, hf_hub_download
from safetensors.torch import load_file

from scalablevit_pl import from_pretrained
from scalablevit_pl.weights.folder import CONFIG, FILES, WEIGHTS
from scalablevit_pl.weights.hub import cache, client, download
from scalablevit_pl.weights.hub.cache import checksum
from scalablevit_pl.weights.hub.download import Snapshot
from scalablevit_pl.weights.source import locate_model

LIMIT = 180.0  # seconds that the documentation states
SILENCE = client.SILENCE
MODEL: Any = {"files": FILES, "required": (WEIGHTS, CONFIG)}

fetch = partial(download.fetch, **MODEL)
fetch_all = partial(download.fetch, required=(WEIGHTS, CONFIG))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def cached(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models--ada--vit"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shared(snapshot: Snapshot) -> dict[str, bytes]:
    return files_in(snapshot.folder)


# Commits


def test_each_revision_gives_its_own_weights(hub: HubServer, repo: str, models: list[Path]) -> None:
    old = hub.commits(repo)[0]
    HfApi(token="hf_ada").create_branch(repo, branch="v1")
    new = hub.commit(repo, files_in(models[1]))
    for _ in range(2):  # from the server, from the cache
        for revision, expected in ((None, 1), ("main", 1), (new, 1), (old, 0), ("v1", 0)):
            assert same_weights(from_pretrained(repo, revision=revision), models[expected])
    assert [fetch(repo).commit, fetch(repo, "v1").commit] == [new, old]


def test_all_files_are_of_one_commit(
    hub: HubServer, repo: str, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, calls, real = hub.commits(repo)[0], [], download._download

    def commit_after_each(*arguments: Any) -> None:
        real(*arguments)
        calls.append(hub.commit(repo, files_in(models[2]), f"change {len(calls)}"))

    monkeypatch.setattr(download, "_download", commit_after_each)
    snapshot = fetch(repo)
    assert len(calls) == 3
    assert snapshot.commit == old
    assert shared(snapshot) == files_in(models[0])
    assert same_weights(from_pretrained(repo), models[2])


def test_a_branch_may_be_named_below_another(hub: HubServer, repo: str, models: list[Path]) -> None:
    for branch in ("try", "try/one"):  # which cannot both be files in the cache
        HfApi(token="hf_ada").create_branch(repo, branch=branch)
        assert same_weights(from_pretrained(repo, revision=branch), models[0])


# The cache


@pytest.mark.parametrize("forbidden", [True, False])
def test_cached_revisions_need_no_server(
    hub: HubServer, repo: str, models: list[Path], offline: Any, forbidden: bool
) -> None:
    HfApi(token="hf_ada").create_branch(repo, branch="try/one")
    commit = fetch(repo).commit
    fetch(repo, "try/one")
    hub.close()
    if forbidden:
        offline()
    for revision in (None, "main", "try/one", commit):
        for local in (True, False):
            assert shared(fetch(repo, revision, local_files_only=local)) == files_in(models[0])
    with hub_error(REPO, "is not in the cache", "HF_HUB_OFFLINE" if forbidden else hub.endpoint):
        fetch(repo, "other")


def test_the_cache_does_not_replace_a_refusal(hub: HubServer, repo: str) -> None:
    fetch(repo)
    hub.repos[repo].private = True
    with hub_error("or it is private"):
        fetch(repo)
    del hub.repos[repo]
    with hub_error("no repository"):
        fetch(repo)


def test_using_the_cache_is_logged(hub: HubServer, repo: str, caplog: pytest.LogCaptureFixture) -> None:
    commit = fetch(repo).commit
    hub.fault("status", "/api/models/", times=3, status=503)
    with caplog.at_level(logging.WARNING, "scalablevit_pl"):
        assert fetch(repo).commit == commit
    assert [record.message for record in caplog.records if commit in record.message]


def test_a_cached_commit_needs_no_request_and_a_branch_one(hub: HubServer, repo: str) -> None:
    commit = fetch(repo).commit
    hub.requests.clear()
    assert fetch(repo, commit).commit == commit
    assert not hub.requests
    fetch(repo)
    assert len(hub.requests) == 1


def test_local_files_only_sends_no_request(hub: HubServer, repo: str) -> None:
    with hub_error(REPO, "remove local_files_only"):
        fetch(repo, local_files_only=True)
    assert not hub.requests


def test_the_cache_is_used_only_if_it_holds_all_wanted_files(
    hub: HubServer, repo: str, models: list[Path], offline: Any
) -> None:
    more = {"zebra.png": b"picture", "LICENSE": b"words"}
    commit = hub.commit(repo, more)
    assert shared(fetch(repo, commit)) == files_in(models[0])
    with hub_error(REPO, "local_files_only"):
        fetch_all(repo, commit, local_files_only=True)
    assert shared(fetch_all(repo, commit)) == files_in(models[0]) | more
    offline()
    assert shared(fetch_all(repo, commit)) == files_in(models[0]) | more


def test_files_required_later_are_required_of_the_cache(hub: HubServer, repo: str, models: list[Path]) -> None:
    commit = hub.commit(repo, {WEIGHTS: None})
    download.fetch(repo, commit, files=[CONFIG])
    with hub_error(REPO, f"has no {WEIGHTS}"):
        fetch(repo, commit)


def test_a_cache_filled_by_another_program_serves_the_required_files(
    hub: HubServer, repo: str, models: list[Path], offline: Any
) -> None:
    hub.commit(repo, {"zebra.png": b"picture"})
    paths = [Path(hf_hub_download(repo, name)) for name in (WEIGHTS, CONFIG)]
    offline()
    assert same_weights(from_pretrained(repo), models[0])
    for unknown in (fetch_all, partial(download.fetch, files=FILES)):  # it may lack any other file
        with hub_error("HF_HUB_OFFLINE"):
            unknown(repo)
    flip(paths[0])
    with hub_error("HF_HUB_OFFLINE"):
        fetch(repo)


def test_a_checksum_is_computed_once(hub: HubServer, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(path: Path, git: bool = False) -> str:
        calls.append(path.name)
        return checksum(path, git)

    monkeypatch.setattr(cache, "checksum", counted)
    commit = fetch(repo).commit
    assert sorted(calls) == sorted(FILES)
    for revision in (None, commit):
        fetch(repo, revision)
        fetch(repo, revision, local_files_only=True)
    assert len(calls) == 3
    fetch(repo, force_download=True)
    assert len(calls) == 6


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("pinned", [True, False])
def test_a_byte_flipped_in_the_cache_is_noticed(hub: HubServer, repo: str, name: str, pinned: bool) -> None:
    snapshot = fetch(repo)
    flip(snapshot.folder / name)
    hub.requests.clear()
    again = fetch(repo, snapshot.commit if pinned else None)
    assert (again.folder / name).read_bytes() == hub.files(repo)[name]
    assert len(hub.lines("HEAD")) == 1


def test_a_link_out_of_the_cache_is_replaced_and_its_target_stays(hub: HubServer, repo: str, tmp_path: Path) -> None:
    own, link = tmp_path / "own.json", fetch(repo).folder / CONFIG
    own.write_text("mine")
    link.unlink()
    link.symlink_to(own)
    assert (fetch(repo).folder / CONFIG).read_bytes() == hub.files(repo)[CONFIG]
    link.unlink()
    link.symlink_to(own)
    hub.fault("flip", "GET .*resolve.*config", times=1000)
    with hub_error("damaged 3 times"):
        fetch(repo)
    assert own.read_text() == "mine"
    assert not link.is_symlink()


@pytest.mark.parametrize("tag", ["../../../escaped", "0-1", "."])
@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_file_in_the_cache_is_named_after_a_digest_alone(
    hub: HubServer, repo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, tag: str
) -> None:
    data, etag = hub.files(repo)[name], StoredFile.etag
    monkeypatch.setattr(StoredFile, "etag", property(lambda file: tag if file.data == data else etag.fget(file)))
    assert (fetch(repo).folder / name).read_bytes() == data
    others = [40, 40] if name == WEIGHTS else [40, 64]
    assert sorted(len(path.name) for path in cached(tmp_path).glob("blobs/*")) == [*others, len("etag-") + 64]
    assert not [*tmp_path.rglob("escaped*")]


def test_an_answer_without_a_commit_is_refused(hub: HubServer, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    info = HfApi().model_info(repo, files_metadata=True)
    info.sha = "../../elsewhere"
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: info)
    with hub_error(repo, hub.endpoint, "names no commit", "HF_ENDPOINT"):
        fetch(repo)


def test_parameters_are_counted_from_the_header_of_a_file(hub: HubServer, repo: str, models: list[Path]) -> None:
    snapshot = fetch(repo, files=(CONFIG,))
    count = sum(tensor.numel() for tensor in load_file(models[0] / WEIGHTS).values())
    assert download.count_remote_parameters(snapshot, WEIGHTS) == count
    assert not (snapshot.folder / WEIGHTS).exists()
    with hub_error(repo, CONFIG, "is not a safetensors file"):
        download.count_remote_parameters(snapshot, CONFIG)


def test_a_full_disk_is_explained(repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # as `write` does, without the name of a file

    monkeypatch.setattr(file_download, "http_get", fill)
    with hub_error(repo, "the disk is full", "HF_HOME"):
        fetch(repo)


def test_a_damaged_cache_is_not_used_offline(hub: HubServer, repo: str, offline: Any) -> None:
    flip(fetch(repo).folder / WEIGHTS)
    offline()
    with hub_error(REPO, "HF_HUB_OFFLINE"):
        fetch(repo)


@pytest.mark.parametrize("kind", [PermissionError, FileNotFoundError, NotADirectoryError])
def test_a_read_only_cache_is_used(
    hub: HubServer, repo: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[OSError]
) -> None:
    fetch(repo)
    shutil.rmtree(cached(tmp_path) / "verified")
    shutil.rmtree(cached(tmp_path) / "refs")

    @contextmanager
    def refuse(path: Path) -> Iterator[Path]:
        raise kind(1, "no", str(path))
        yield path

    monkeypatch.setattr(cache, "written_aside", refuse)
    for revision in (None, hub.commits(repo)[0]):
        assert shared(fetch(repo, revision)) == files_in(models[0])
    assert not [*cached(tmp_path).glob("verified/*"), *cached(tmp_path).glob("refs/*")]


def test_eight_threads_fetch_at_once(hub: HubServer, repo: str, models: list[Path], tmp_path: Path) -> None:
    hooks = list(get_session().event_hooks["request"])
    for round_ in range(3):
        start, place = threading.Barrier(8), tmp_path / f"cache{round_}"

        def one(_: int, start: threading.Barrier = start, place: Path = place) -> dict[str, bytes]:
            start.wait()
            return shared(fetch(REPO, cache_dir=place))

        with ThreadPoolExecutor(8) as pool:
            assert all(files == files_in(models[0]) for files in pool.map(one, range(8)))
        assert not [path for path in place.rglob("*") if path.name.endswith((".part", ".incomplete"))]
    assert get_session().event_hooks["request"] == hooks


def test_force_download_downloads_again(hub: HubServer, repo: str) -> None:
    commit = fetch(repo).commit
    for revision in (None, commit):
        hub.requests.clear()
        fetch(repo, revision, force_download=True)
        assert len(hub.lines("GET /cdn/")) == 1
    hub.close()
    with hub_error(hub.endpoint):
        fetch(repo, force_download=True)


def test_cache_dir_replaces_the_clients_cache(hub: HubServer, repo: str, tmp_path: Path) -> None:
    other = {"cache_dir": tmp_path / "other"}
    assert tmp_path / "other" in fetch(repo, **other).folder.parents
    assert not (tmp_path / "cache").exists()
    from_pretrained(repo, local_files_only=True, **other)
    with hub_error(REPO):
        from_pretrained(repo, local_files_only=True)


# Permissions and names


def test_a_given_token_wins(hub: HubServer, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def sent(**token: Any) -> set[str | None]:
        hub.headers.clear()
        fetch(repo, force_download=True, **token)
        return {headers.get("authorization") for headers in hub.headers} - {None}

    assert sent() == set()
    Path(constants.HF_TOKEN_PATH).write_text("hf_bob")
    assert sent() == {"Bearer hf_bob"}
    monkeypatch.setenv("HF_TOKEN", "hf_ada_read")
    assert sent() == {"Bearer hf_ada_read"}
    assert sent(token="hf_ada") == {"Bearer hf_ada"}
    assert sent(token=False) == set()


@pytest.mark.parametrize(
    ("kind", "token", "expected"),
    [
        ("missing", None, ["check the name", "hf auth login"]),
        ("missing", "hf_bob", ["check the name", "hf auth login"]),
        ("private", None, ["private", "hf auth login"]),
        ("private", "hf_bob", ["private", "hf auth login"]),
        ("gated", None, ["is gated", "accept its terms at", "/ada/vit"]),
        ("gated", "hf_bob", ["is gated", "accept its terms at", "/ada/vit"]),
        ("public", "hf_wrong", ["401", "hf auth login"]),
    ],
)
def test_an_unreadable_repository_is_explained(
    hub: HubServer, models: list[Path], tmp_path: Path, kind: str, token: str | None, expected: list[str]
) -> None:
    if kind != "missing":
        hub.add_repo(REPO, private=kind == "private", gated=kind == "gated")
        hub.commit(REPO, files_in(models[0]))
    with hub_error("'ada/vit'", *expected, "there is no file or folder 'ada/vit' here"):
        locate_model(REPO, token=token)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    if kind in ("private", "gated"):
        assert same_weights(from_pretrained(REPO, token="hf_ada_read"), models[0])


@pytest.mark.parametrize("revision", ["v7", "0" * 40])
def test_a_missing_revision_is_explained(hub: HubServer, repo: str, revision: str) -> None:
    with hub_error("'ada/vit'", f"no revision {revision!r}", "branch, tag or commit"):
        fetch(repo, revision)


@pytest.mark.parametrize(
    "name", ["vit", "a/b/c", "../x", "ada/", "http://x/y", "ada/vi--t", "ada/vit.git", f"ada/{'x' * 97}"]
)
def test_a_malformed_name_is_explained(hub: HubServer, tmp_path: Path, monkeypatch: Any, name: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with hub_error(repr(name), "owner/name"):
        locate_model(name)


def test_a_local_folder_comes_first(
    hub: HubServer, repo: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models[1], tmp_path / REPO)
    assert same_weights(from_pretrained(repo), models[1])
    assert not hub.requests


# Untrusted files


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors.index.json"])
def test_nothing_is_downloaded_without_the_required_files(hub: HubServer, name: str, models: list[Path]) -> None:
    hub.add_repo(REPO)
    hub.commit(REPO, {name: b"\x80\x04cposix\nsystem\n", CONFIG: (models[0] / CONFIG).read_bytes()})
    with hub_error("'ada/vit'", "has no model.safetensors", "choose a repository"):
        fetch(REPO)
    assert not hub.lines("/resolve/")


def test_code_and_pickles_stay_on_the_hub(hub: HubServer, repo: str, models: list[Path]) -> None:
    foreign = ("pytorch_model.bin", "modeling.py", "LICENSE.py", "sub/config.json", "../up.json", ".hidden.json")
    hub.commit(repo, dict.fromkeys(foreign, b"no"))
    assert shared(fetch_all(repo)) == files_in(models[0])
    assert not [line for name in foreign for line in hub.lines(f"/{name}")]


def test_weights_are_never_unpickled(
    hub: HubServer, repo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "pickle")
    for name in ("load", "jit.load"):
        monkeypatch.setattr(f"torch.{name}", lambda *_, **__: pytest.fail("a pickle was loaded"))
    from_pretrained(repo)
    hub.commit(repo, {WEIGHTS: (tmp_path / "pickle").read_bytes()})
    with pytest.raises(ValueError, match=WEIGHTS):
        from_pretrained(repo)


# Interruptions

TRANSIENT = [
    ("status", "GET /api/models/", {"times": 2}),
    ("status", "GET /api/models/", {"times": 2, "status": 429}),
    ("cut", "GET /api/models/", {"times": 2}),
    ("reset", "GET /api/models/", {"times": 2}),
    ("truncate", "GET /api/models/", {"times": 2}),
    ("lose", "GET /api/models/", {"times": 2}),
    ("status", "HEAD .*safetensors", {"times": 2}),
    ("lose", "HEAD .*safetensors", {"times": 2}),
    ("status", "GET /cdn/", {"times": 2, "status": 503}),
    ("cut", "GET /cdn/", {"times": 2}),
    ("reset", "GET /cdn/", {"times": 2}),
    ("truncate", "GET /cdn/", {"times": 2}),
    ("flip", "GET /cdn/", {"times": 2}),
    ("flip", "GET .*resolve.*config", {"times": 2}),
]
BREAKS_OFF = ["ENDPOINT", "breaks off", "try again later"]
LASTING = [
    ("status", "GET /api/models/", {}, ["500", "try again later"]),
    ("status", "GET /api/models/", {"status": 429}, ["429", "try again later"]),
    ("status", "GET /api/models/", {"status": 418}, ["418"]),
    ("cut", "GET /api/models/", {}, BREAKS_OFF),
    ("reset", "GET /api/models/", {}, BREAKS_OFF),
    ("truncate", "GET /api/models/", {}, BREAKS_OFF),
    ("status", "GET /api/models/", {"status": 200}, ["ENDPOINT", "names no commit"]),
    ("status", "HEAD ", {}, ["ENDPOINT", "cannot be reached", "try again later"]),
    ("status", "GET /cdn/", {"status": 503}, ["503", "try again later"]),
    ("status", "GET /cdn/", {"status": 404}, ["404"]),
    ("cut", "GET /cdn/", {"after": 0}, BREAKS_OFF),
    ("reset", "GET /cdn/", {}, BREAKS_OFF),
    ("truncate", "GET /cdn/", {}, BREAKS_OFF),
    ("flip", "GET /cdn/", {}, [WEIGHTS, "damaged 3 times", "try again later"]),
    ("flip", "GET .*resolve.*config", {}, [CONFIG, "damaged 3 times", "try again later"]),
]


@pytest.mark.parametrize(("kind", "match", "options"), TRANSIENT)
def test_a_transient_failure_is_retried(
    hub: HubServer, repo: str, models: list[Path], kind: Any, match: str, options: Any
) -> None:
    hub.fault(kind, match, **options)
    assert shared(fetch(repo)) == files_in(models[0])
    assert sum(fault.times for fault in hub.faults) == 0


@pytest.mark.parametrize(("kind", "match", "options", "expected"), LASTING)
def test_a_lasting_failure_is_explained_and_leaves_nothing_damaged(
    hub: HubServer,
    repo: str,
    models: list[Path],
    tmp_path: Path,
    waits: list[float],
    kind: Any,
    match: str,
    options: Any,
    expected: list[str],
) -> None:
    hub.fault(kind, match, times=1000, **options)
    with hub_error("'ada/vit'", *(text.replace("ENDPOINT", hub.endpoint) for text in expected)):
        fetch(repo)
    assert sum(waits) < LIMIT
    assert not [path for path in (tmp_path / "cache").rglob("*") if "incomplete" in path.name]
    for path in cached(tmp_path).glob("blobs/*"):
        assert checksum(path, git=len(path.name) == 40) == path.name
    hub.faults.clear()
    assert shared(fetch(repo)) == files_in(models[0])


@pytest.mark.parametrize("match", ["GET /api/models/", "HEAD .*safetensors", "GET /cdn/", "GET .*resolve.*config"])
def test_a_silent_server_is_abandoned(
    hub: HubServer,
    repo: str,
    models: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    waits: list[float],
    match: str,
) -> None:
    monkeypatch.setattr(client, "SILENCE", 0.15)
    hub.fault("hang", match, times=1000, seconds=600)
    start = time.monotonic()
    with hub_error(hub.endpoint, "try again later"):
        fetch(repo)
    assert time.monotonic() - start < 300
    hung = 1000 - hub.faults[0].times
    assert hung * SILENCE + sum(waits) < LIMIT  # with the real limit
    hub.faults.clear()
    assert shared(fetch(repo)) == files_in(models[0])


def test_the_cache_is_used_when_the_server_is_silent(
    hub: HubServer, repo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = fetch(repo).commit
    monkeypatch.setattr(client, "SILENCE", 0.15)
    hub.fault("hang", "GET /api/models/", seconds=600)
    start = time.monotonic()
    assert fetch(repo).commit == commit
    assert time.monotonic() - start < 300
