import hashlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import HfApi, constants, file_download, get_session, hf_hub_download
from huggingface_hub.utils import _http
from safetensors.torch import load_file, save_file

from scalablevit_pl import from_pretrained
from scalablevit_pl.commands import release
from scalablevit_pl.models import ImageClassifier, build_classifier
from scalablevit_pl.weights import hub as hub_package
from scalablevit_pl.weights.folder import CARD, CONFIG, FILES, WEIGHTS, load_model
from scalablevit_pl.weights.hub import cache as cache_notes
from scalablevit_pl.weights.hub import (
    HubError,
    client,
    download,
    is_repository,
    is_shared,
)
from scalablevit_pl.weights.source import fetch_model as fetch
from scalablevit_pl.weights.source import locate_model as locate

REPO = "ada/vit"
LIMIT = 180.0  # seconds that the documentation states
SILENCE = client.SILENCE
plan_push = partial(hub_package.plan_push, check=load_model)
push = partial(hub_package.push, check=load_model)


def small_model(seed: int, dim: int = 8) -> ImageClassifier:
    backbone = {"embed_dims": [dim] * 4, "num_heads": [1] * 4, "depths": [1] * 4, "spatial_ratios": [8, 4, 2, 1]}
    config = {"name": "small", "num_classes": 3, "head": "linear", "global_pool": "avg"}
    torch.manual_seed(seed)
    return build_classifier({**config, "backbone": {**backbone, "channel_ratios": [1.0] * 4}})


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models: two of the same network, and one whose weights do not fit the others' configuration."""
    folders = [tmp_path_factory.mktemp("models") / f"model{number}" for number in range(3)]
    for number, folder in enumerate(folders):
        small_model(number, dim=16 if number == 2 else 8).save_pretrained(folder, license="mit")
    return folders


@pytest.fixture(autouse=True)
def waits(hub_settings: None, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been waited between retries, by us and by the client."""
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
    return Path(shutil.copytree(models[0], tmp_path / "model"))


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def requests(hub: HubServer, part: str = "") -> list[str]:
    return [f"{method} {path}" for method, path in hub.requests if part in f"{method} {path}"]


def posts(hub: HubServer) -> list[str]:
    return [line for line in requests(hub) if not line.startswith(("GET", "HEAD"))]


def one_sentence(error: pytest.ExceptionInfo[HubError], *expected: str) -> str:
    sentence = str(error.value)
    assert "\n" not in sentence
    assert "Traceback" not in sentence
    assert len(sentence) < 600
    for text in expected:
        assert text in sentence
    return sentence


def same_weights(model: ImageClassifier, folder: Path) -> bool:
    stored = load_file(folder / WEIGHTS)
    return all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models--ada--vit"


def pull(folder: Path, *options: str) -> Path:
    release.pull_repository([REPO, str(folder), *options])
    return folder


# Push and pull


@pytest.mark.parametrize("mode", ["auto", "regular"])
@pytest.mark.parametrize("revision", [None, "try/one"])
def test_what_is_pushed_is_pulled(
    hub: HubServer, folder: Path, tmp_path: Path, mode: Any, revision: str | None
) -> None:
    hub.upload_mode = mode
    (folder / "LICENSE").write_text("do what you like\n")
    (folder / "confusion.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\xff")
    (folder / "history.csv").write_bytes(b"epoch,loss\r\n1,0.5\r\n")
    pushed = push(folder, REPO, token="hf_ada", revision=revision)
    assert hub.commits(REPO, revision or "main")[0] == pushed.commit
    assert len(hub.commits(REPO, revision or "main")) == 2
    assert bool(requests(hub, "PUT /cdn/")) == (mode == "auto")
    assert pushed.digests[WEIGHTS] == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    chosen = [] if revision is None else ["--revision", revision]
    assert files_in(pull(tmp_path / "pulled", *chosen)) == files_in(folder)
    model = from_pretrained(REPO, revision=pushed.commit)
    assert same_weights(model, folder)
    assert not model.training


def test_an_old_revision_gives_the_old_weights(hub: HubServer, repo: str, models: list[Path]) -> None:
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

    def commit_after_each(*arguments: Any) -> Path:
        path = real(*arguments)
        hub.commit(repo, files_in(models[2]), f"change {len(calls)}")
        calls.append(path)
        return path

    monkeypatch.setattr(download, "_download", commit_after_each)
    snapshot = fetch(repo)
    assert len(calls) == 3
    assert snapshot.commit == old
    assert files_in(snapshot.folder) == files_in(models[0])
    assert same_weights(from_pretrained(repo), models[2])


def test_a_commit_between_two_requests_does_not_mix(hub: HubServer, repo: str, models: list[Path]) -> None:
    hub.fault("hang", f"HEAD /{repo}/resolve/", seconds=0.5)
    with ThreadPoolExecutor(1) as pool:
        fetched = pool.submit(fetch, repo)
        while not requests(hub, "HEAD"):
            time.sleep(0.01)
        hub.commit(repo, files_in(models[2]))
        assert files_in(fetched.result().folder) == files_in(models[0])


# The cache


@pytest.mark.parametrize("gone", ["offline", "unreachable"])
def test_a_warm_cache_needs_no_server(
    hub: HubServer, repo: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    HfApi(token="hf_ada").create_branch(repo, branch="try/one")
    commit = fetch(repo).commit
    fetch(repo, "try/one")
    hub.close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", gone == "offline")
    for revision in (None, "main", "try/one", commit):
        assert same_weights(from_pretrained(repo, revision=revision), models[0])
        assert same_weights(from_pretrained(repo, revision=revision, local_files_only=True), models[0])
    assert files_in(pull(tmp_path / "pulled")) == files_in(models[0])
    with pytest.raises(HubError) as error:
        fetch(repo, "other")
    one_sentence(error, REPO, "HF_HUB_OFFLINE" if gone == "offline" else hub.endpoint)


def test_the_cache_is_said_to_be_used(hub: HubServer, repo: str, caplog: pytest.LogCaptureFixture) -> None:
    commit = fetch(repo).commit
    hub.fault("status", "/api/models/", times=3, status=503)
    with caplog.at_level(logging.WARNING, "scalablevit_pl"):
        assert fetch(repo).commit == commit
    assert [record.message for record in caplog.records if commit in record.message]


def test_a_cached_commit_needs_no_request(hub: HubServer, repo: str) -> None:
    commit = fetch(repo).commit
    hub.requests.clear()
    assert fetch(repo, commit).commit == commit
    from_pretrained(repo, revision=commit)
    assert not hub.requests
    fetch(repo)
    assert len(hub.requests) == 1


def test_nothing_is_asked_with_local_files_only(hub: HubServer, repo: str) -> None:
    with pytest.raises(HubError) as error:
        from_pretrained(repo, local_files_only=True)
    one_sentence(error, REPO, "local_files_only")
    assert not hub.requests


def test_a_cached_commit_lacks_nothing_that_is_wanted(
    hub: HubServer, repo: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"zebra.png": b"picture", "LICENSE": b"words"}
    commit = hub.commit(repo, more)
    fetch(repo)  # three files
    pulled = pull(tmp_path / "pulled", "--revision", commit)
    assert files_in(pulled) == files_in(models[0]) | more
    hub.close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert files_in(pull(tmp_path / "again", "--revision", commit)) == files_in(models[0]) | more


def test_offline_a_pull_is_whole_or_refused(
    hub: HubServer, repo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit(repo, {"zebra.png": b"picture"})
    fetch(repo)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError) as error:
        pull(tmp_path / "pulled")
    one_sentence(error, REPO, "HF_HUB_OFFLINE")
    assert not (tmp_path / "pulled").exists()


def test_a_cache_that_another_program_has_filled(
    hub: HubServer, repo: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit(repo, {"zebra.png": b"picture"})
    for name in (WEIGHTS, CONFIG):
        path = hf_hub_download(repo, name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same_weights(from_pretrained(repo), models[0])
    with pytest.raises(HubError):  # nothing tells which files it has left out
        pull(tmp_path / "pulled")
    flip(Path(path).with_name(WEIGHTS))
    with pytest.raises(HubError):
        from_pretrained(repo)


def test_a_checksum_is_computed_once(hub: HubServer, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = cache_notes.checksum

    def counted(path: Path, git: bool = False) -> str:
        calls.append(path.name)
        return real(path, git)

    monkeypatch.setattr(cache_notes, "checksum", counted)
    commit = fetch(repo).commit
    assert sorted(calls) == sorted(FILES)
    for revision in (None, commit):
        from_pretrained(repo, revision=revision)
        from_pretrained(repo, revision=revision, local_files_only=True)
    assert len(calls) == 3
    fetch(repo, force_download=True)
    assert len(calls) == 6


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("pinned", [True, False])
def test_a_byte_that_flips_in_the_cache_is_noticed(hub: HubServer, repo: str, name: str, pinned: bool) -> None:
    snapshot = fetch(repo)
    right = hub.files(repo)[name]
    flip(snapshot.folder / name)
    hub.requests.clear()
    again = fetch(repo, snapshot.commit if pinned else None)
    assert (again.folder / name).read_bytes() == right
    assert len(requests(hub, "HEAD")) == 1


def test_a_damaged_cache_is_not_used_offline(hub: HubServer, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(fetch(repo).folder / WEIGHTS)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError) as error:
        from_pretrained(repo)
    one_sentence(error, REPO, "HF_HUB_OFFLINE")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", [PermissionError, FileNotFoundError, NotADirectoryError])
def test_a_cache_that_cannot_be_written_is_read(
    hub: HubServer, repo: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[OSError]
) -> None:
    fetch(repo)
    shutil.rmtree(cache(tmp_path) / "verified")
    shutil.rmtree(cache(tmp_path) / "refs")

    @contextmanager
    def refused(path: Path) -> Iterator[Path]:
        raise kind(1, "no", str(path))
        yield path

    monkeypatch.setattr(cache_notes, "written_aside", refused)
    before = {path: path.stat().st_mtime_ns for path in cache(tmp_path).rglob("*")}
    for revision in (None, hub.commits(repo)[0]):
        assert same_weights(from_pretrained(repo, revision=revision), models[0])
    assert before.items() <= {path: path.stat().st_mtime_ns for path in cache(tmp_path).rglob("*.*")}.items() | (
        before.items()
    )


def test_a_branch_may_take_the_place_of_another_in_the_cache(hub: HubServer, repo: str, models: list[Path]) -> None:
    api = HfApi(token="hf_ada")
    for branch in ("try", "try/one"):
        api.create_branch(repo, branch=branch)
        assert same_weights(from_pretrained(repo, revision=branch), models[0])


def test_many_fetch_at_once(hub: HubServer, repo: str, models: list[Path], tmp_path: Path) -> None:
    hooks = get_session().event_hooks["request"]
    for round_ in range(3):
        start, place = threading.Barrier(8), tmp_path / f"cache{round_}"

        def one(_: int, start: threading.Barrier = start, place: Path = place) -> dict[str, bytes]:
            start.wait()
            return files_in(fetch(REPO, cache_dir=place).folder)

        with ThreadPoolExecutor(8) as pool:
            assert all(files == files_in(models[0]) for files in pool.map(one, range(8)))
        assert not [path for path in place.rglob("*") if path.name.endswith((".part", ".incomplete"))]
    assert get_session().event_hooks["request"] == hooks


def test_force_download_fetches_again(hub: HubServer, repo: str) -> None:
    commit = fetch(repo).commit
    for revision in (None, commit):
        hub.requests.clear()
        from_pretrained(repo, revision=revision, force_download=True)
        assert len(requests(hub, "GET /cdn/")) == 1
    hub.close()
    with pytest.raises(HubError) as error:
        from_pretrained(repo, force_download=True)
    one_sentence(error, hub.endpoint)


def test_the_cache_may_lie_elsewhere(hub: HubServer, repo: str, tmp_path: Path) -> None:
    assert tmp_path / "other" in fetch(repo, cache_dir=tmp_path / "other").folder.parents
    assert not (tmp_path / "cache").exists()
    from_pretrained(repo, cache_dir=tmp_path / "other", local_files_only=True)
    with pytest.raises(HubError):
        from_pretrained(repo, local_files_only=True)


# Who may read, and what there is


def test_the_token_that_is_given_wins(hub: HubServer, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
        ("missing", None, ["'ada/vit'", "check the name", "token"]),
        ("missing", "hf_bob", ["'ada/vit'", "check the name", "token"]),
        ("private", None, ["'ada/vit'", "private", "hf auth login"]),
        ("private", "hf_bob", ["'ada/vit'", "private", "token"]),
        ("gated", None, ["'ada/vit' is gated", "/ada/vit", "accept its terms"]),
        ("gated", "hf_bob", ["'ada/vit' is gated", "/ada/vit", "accept its terms"]),
        ("public", "hf_wrong", ["401", "'ada/vit'", "hf auth login"]),
    ],
)
def test_what_may_not_be_read(
    hub: HubServer, models: list[Path], tmp_path: Path, kind: str, token: str | None, expected: list[str]
) -> None:
    if kind != "missing":
        hub.add_repo(REPO, private=kind == "private", gated=kind == "gated")
        hub.commit(REPO, files_in(models[0]))
    with pytest.raises(HubError) as error:
        from_pretrained(REPO, token=token)
    one_sentence(error, *expected, "there is no folder 'ada/vit' here")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    if kind in ("private", "gated"):
        assert same_weights(from_pretrained(REPO, token="hf_ada_read"), models[0])


def test_what_is_not_there(hub: HubServer, repo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # beside which there is no folder x
    with pytest.raises(HubError) as error:
        fetch(repo, "v7")
    one_sentence(error, "'ada/vit'", "no revision 'v7'", "branch, a tag or a commit")
    with pytest.raises(HubError) as error:
        fetch(repo, "0" * 40)
    one_sentence(error, "'ada/vit'", "no revision")
    for name in ("vit", "a/b/c", "../x", "ada/", "http://x/y"):
        with pytest.raises(HubError) as error:
            locate(name)
        one_sentence(error, repr(name), "owner/name")
    for name in ("ada/vi--t", "ada/vit.git", f"ada/{'x' * 97}"):
        with pytest.raises(HubError) as error:
            locate(name)
        one_sentence(error, repr(name), "owner/name")


def test_a_folder_here_comes_first(
    hub: HubServer, repo: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models[1], tmp_path / REPO)
    assert same_weights(from_pretrained(repo), models[1])
    assert not hub.requests


@pytest.mark.parametrize("name", ["a/b", "A-1/b.c_d"])
def test_names_of_repositories(name: str) -> None:
    assert is_repository(name)


@pytest.mark.parametrize("name", ["a", "a/b/c", "a/", "/b", "../b", "a/..", "a b/c", "a/b@c", "", "a/b\n"])
def test_other_names(name: str) -> None:
    assert not is_repository(name)


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        *((name, True) for name in (*FILES, "LICENSE", "LICENSE.md", "LICENSE-MIT", "a.PNG")),
        *((name, False) for name in (".gitattributes", ".hidden.json", "sub/config.json", "../config.json")),
        *((name, False) for name in ("model.py", "pytorch_model.bin", "x.pkl", "x.pt", "x.ckpt", "x.safetensors.py")),
        *(
            (name, False)
            for name in (
                "config.yaml",
                "recipe.yml",
                "LICENSE.py",
                "LICENSE.pkl",
                "LICENSE.bin",
                "LICENSE.sh",
                "run.sh",
                "x.onnx",
            )
        ),
    ],
)
def test_what_travels(name: str, shared: bool) -> None:
    assert is_shared(name) == shared


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors.index.json", "model.ckpt"])
def test_a_repository_without_our_files_is_refused_untouched(hub: HubServer, name: str, models: list[Path]) -> None:
    hub.add_repo(REPO)
    hub.commit(REPO, {name: b"\x80\x04cposix\nsystem\n", CONFIG: (models[0] / CONFIG).read_bytes()})
    with pytest.raises(HubError) as error:
        from_pretrained(REPO)
    one_sentence(error, "'ada/vit'", "has no model.safetensors")
    assert not requests(hub, "/resolve/")


def test_code_and_pickles_stay_on_the_hub(hub: HubServer, repo: str, models: list[Path], tmp_path: Path) -> None:
    foreign = ("pytorch_model.bin", "modeling.py", "LICENSE.py", "sub/config.json", "../up.json", ".hidden.json")
    hub.commit(repo, dict.fromkeys(foreign, b"no"))
    assert files_in(pull(tmp_path / "pulled")) == files_in(models[0])
    assert not [line for name in foreign for line in requests(hub, f"/{name}")]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"class_path": "os.system", "model_args": {"class_path": "os.system", "init_args": ["touch x"]}}, CONFIG),
        ({"architecture": "os.system", "auto_map": {"AutoModel": "modeling.Evil"}, "model_args": {}}, CONFIG),
        ({"model_args": {"embed_dims": [8] * 4, "depths": [10**9] * 4, "head": "linear"}}, "4000000000 blocks"),
        ({"schema": 99}, "update"),
        ({"schema": None}, "schema"),
        ({"num_classes": 4}, "another shape"),
    ],
)
def test_a_configuration_runs_no_code(
    hub: HubServer,
    repo: str,
    models: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Any,
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    config = json.loads((models[0] / CONFIG).read_text()) | change
    hub.commit(repo, {CONFIG: json.dumps(config).encode(), "modeling.py": b"import os; os.system('touch x')"})
    start = time.monotonic()
    with pytest.raises(ValueError, match=expected) as error:
        from_pretrained(repo)
    assert time.monotonic() - start < 5
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=expected):
        pull(tmp_path / "pulled")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_unknown_settings_of_a_configuration_name_no_class(hub: HubServer, repo: str, models: list[Path]) -> None:
    config = json.loads((models[0] / CONFIG).read_text())
    config |= {"architecture": "os.system", "class_path": "os.system", "auto_map": {"AutoModel": "x.y"}}
    hub.commit(repo, {CONFIG: json.dumps(config).encode()})
    assert type(from_pretrained(repo)) is ImageClassifier


def test_weights_are_never_unpickled(
    hub: HubServer, repo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "pickle")
    for name in ("load", "jit.load"):
        monkeypatch.setattr(f"torch.{name}", lambda *_, **__: pytest.fail("a pickle was loaded"))
    from_pretrained(repo)
    hub.commit(repo, {WEIGHTS: (tmp_path / "pickle").read_bytes()})
    with pytest.raises(ValueError, match="no whole safetensors file"):
        from_pretrained(repo)


# Interruptions of a download

PASSING = [
    ("status", "GET /api/models/", {"times": 2}),
    ("status", "GET /api/models/", {"times": 2, "status": 429}),
    ("cut", "GET /api/models/", {"times": 2}),
    ("reset", "GET /api/models/", {"times": 2}),
    ("truncate", "GET /api/models/", {"times": 2}),
    ("lose", "GET /api/models/", {"times": 2}),
    ("status", "HEAD .*safetensors", {"times": 2}),
    ("reset", "HEAD .*config", {"times": 2}),
    ("lose", "HEAD .*safetensors", {"times": 2}),
    ("status", "GET /cdn/", {"times": 2, "status": 503}),
    ("status", "GET .*resolve.*config", {"times": 2}),
    ("cut", "GET /cdn/", {"times": 2}),
    ("reset", "GET /cdn/", {"times": 2}),
    ("reset", "GET .*resolve.*config", {"times": 2}),
    ("truncate", "GET /cdn/", {"times": 2}),
    ("lose", "GET /cdn/", {"times": 2}),
    ("flip", "GET /cdn/", {"times": 2}),
    ("flip", "GET .*resolve.*config", {"times": 2}),
    ("flip", "GET .*resolve.*README", {"times": 1}),
]
LASTING = [
    ("status", "GET /api/models/", {}, ["500", "'ada/vit'", "try again later"]),
    ("status", "GET /api/models/", {"status": 429}, ["429", "'ada/vit'", "try again later"]),
    ("status", "GET /api/models/", {"status": 418}, ["418", "'ada/vit'"]),
    ("cut", "GET /api/models/", {}, ["ENDPOINT", "'ada/vit'", "breaks off", "try again later"]),
    ("reset", "GET /api/models/", {}, ["ENDPOINT", "'ada/vit'", "breaks off", "try again later"]),
    ("truncate", "GET /api/models/", {}, ["ENDPOINT", "'ada/vit'", "breaks off", "try again later"]),
    ("status", "HEAD ", {}, ["ENDPOINT", "cannot be reached", "'ada/vit'", "try again later"]),
    ("status", "GET /cdn/", {"status": 503}, ["503", "'ada/vit'", "try again later"]),
    ("status", "GET /cdn/", {"status": 404}, ["404", "'ada/vit'"]),
    ("cut", "GET /cdn/", {"after": 0}, ["ENDPOINT", "'ada/vit'", "breaks off", "try again later"]),
    ("reset", "GET /cdn/", {}, ["ENDPOINT", "'ada/vit'", "breaks off", "try again later"]),
    ("truncate", "GET /cdn/", {}, ["ENDPOINT", "'ada/vit'", "breaks off", "try again later"]),
    ("flip", "GET /cdn/", {}, [WEIGHTS, "'ada/vit'", "damaged 3 times", "try again later"]),
    ("flip", "GET .*resolve.*config", {}, [CONFIG, "'ada/vit'", "damaged 3 times", "try again later"]),
]


@pytest.mark.parametrize(("kind", "match", "options"), PASSING)
def test_a_passing_interruption_is_got_over(
    hub: HubServer, repo: str, models: list[Path], tmp_path: Path, kind: Any, match: str, options: Any
) -> None:
    hub.fault(kind, match, **options)
    assert files_in(pull(tmp_path / "pulled")) == files_in(models[0])
    assert sum(fault.times for fault in hub._faults) == 0


@pytest.mark.parametrize(("kind", "match", "options", "expected"), LASTING)
def test_a_lasting_interruption_gets_one_sentence_and_leaves_nothing(
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
    with pytest.raises(HubError) as error:
        pull(tmp_path / "pulled")
    one_sentence(error, *(text.replace("ENDPOINT", hub.endpoint) for text in expected))
    assert sum(waits) < LIMIT
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []
    assert not [path for path in (tmp_path / "cache").rglob("*") if "incomplete" in path.name]
    for path in cache(tmp_path).glob("blobs/*"):  # nothing bad is left
        assert cache_notes.checksum(path, git=len(path.name) == 40) == path.name
    hub._faults.clear()
    assert files_in(pull(tmp_path / "pulled")) == files_in(models[0])


@pytest.mark.parametrize("match", ["GET /api/models/", "HEAD .*safetensors", "GET /cdn/", "GET .*resolve.*config"])
def test_a_server_that_hangs_is_given_up(
    hub: HubServer,
    repo: str,
    models: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    waits: list[float],
    match: str,
) -> None:
    monkeypatch.setattr(client, "SILENCE", 0.15)
    hub.fault("hang", match, times=1000, seconds=12)
    start = time.monotonic()
    with pytest.raises(HubError) as error:
        pull(tmp_path / "pulled")
    one_sentence(error, hub.endpoint, "try again later")
    assert time.monotonic() - start < 10
    hung = 1000 - hub._faults[0].times
    assert hung * SILENCE + sum(waits) < LIMIT  # what it would have taken without our hurry
    assert not (tmp_path / "pulled").exists()
    hub._faults.clear()
    assert files_in(pull(tmp_path / "pulled")) == files_in(models[0])


def test_a_server_that_hangs_leaves_the_cache(hub: HubServer, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = fetch(repo).commit
    monkeypatch.setattr(client, "SILENCE", 0.15)
    hub.fault("hang", "GET /api/models/", seconds=12)
    start = time.monotonic()
    assert fetch(repo).commit == commit
    assert time.monotonic() - start < 10


def test_a_new_session_is_bounded_too(hub: HubServer, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SILENCE", 0.15)
    real, closed = download._download, []

    def download_anew(*arguments: Any) -> Path:
        _http.close_session()  # as the client does after a connection that was refused
        if not closed:
            hub.fault("hang", "HEAD ", times=1000, seconds=12)
        closed.append(True)
        return real(*arguments)

    monkeypatch.setattr(download, "_download", download_anew)
    start = time.monotonic()
    with pytest.raises(HubError):
        fetch(repo)
    assert time.monotonic() - start < 9


def test_limits_end_with_our_calls(hub: HubServer, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SILENCE", 0.1)
    fetch(repo)
    hub.fault("hang", "GET /api/models/", seconds=0.4)
    assert HfApi().model_info(repo).id == repo


# The folder of a pull


def test_a_model_is_not_replaced_unasked(hub: HubServer, repo: str, models: list[Path], tmp_path: Path) -> None:
    target = Path(shutil.copytree(models[1], tmp_path / "target"))
    (target / "notes").write_text("mine")
    before = files_in(target)
    with pytest.raises(ValueError, match="--overwrite"):
        pull(target)
    assert not hub.requests
    assert files_in(target) == before
    hub.fault("reset", "GET /cdn/", times=3)
    with pytest.raises(HubError):
        pull(target, "--overwrite")
    assert files_in(target) == before
    assert files_in(pull(target, "--overwrite")) == files_in(models[0]) | {"notes": b"mine"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "target"]


def test_a_pull_does_not_hand_out_the_cache(hub: HubServer, repo: str, tmp_path: Path) -> None:
    pulled = pull(tmp_path / "pulled")
    assert not any(path.is_symlink() for path in pulled.iterdir())
    (pulled / WEIGHTS).write_bytes(b"")
    from_pretrained(repo)


def test_a_model_that_does_not_load_is_not_pulled(
    hub: HubServer, repo: str, models: list[Path], tmp_path: Path
) -> None:
    hub.commit(repo, {WEIGHTS: (models[2] / WEIGHTS).read_bytes()})
    with pytest.raises(ValueError, match="another shape"):
        pull(tmp_path / "pulled")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


# What is checked before a push


def change_card(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / CARD).write_text((folder / CARD).read_text().replace(old, new, 1))

    return change


def poison(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["head.fc.bias"][0] = float("nan")
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        (None, {"token": None}, ["needs a token", "hf auth login"]),
        (None, {"token": "hf_wrong"}, ["401", "hf auth login"]),
        (None, {"token": "hf_ada_read"}, ["'ada'", "may only read"]),
        (None, {"token": "hf_bob"}, ["'bob'", "may not write to 'ada'", "push to bob"]),
        (None, {"repository": "strangers/vit"}, ["'ada'", "'strangers'", "ada, lab"]),
        (None, {"repository": "a/b/c"}, ["'a/b/c'", "owner/name"]),
        (None, {"repository": "ada/.."}, ["'ada/..'", "owner/name"]),
        (None, {"repository": "ada/vi--t"}, ["'ada/vi--t'", "owner/name"]),
        (None, {"repository": ""}, ["''", "owner/name"]),
        (None, {"revision": "0" * 40}, ["branch", "is a commit"]),
        (lambda folder: (folder / CARD).unlink(), {}, [CARD, "export the model again"]),
        (change_card("license: mit", "license: other"), {}, ["'other'", "--license"]),
        (change_card("license: mit", "license: unknown"), {}, ["'unknown'", "--license"]),
        (change_card("license: mit", "licence: mit"), {}, ["no licence", "--license"]),
        (change_card("license: mit", "license: [mit"), {}, [CARD, "no readable metadata"]),
        (lambda folder: (folder / CARD).write_bytes(b"\xff\xfe"), {}, [CARD, "no readable metadata"]),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"), {}, ["'pytorch_model.bin'", "remove it"]),
        (lambda folder: (folder / "last.ckpt").write_bytes(b"x"), {}, ["'last.ckpt'", "remove it"]),
        (lambda folder: (folder / "X.PKL").write_bytes(b"x"), {}, ["'X.PKL'", "remove it"]),
        (poison, {}, ["head.fc.bias", "not finite"]),
        (lambda folder: (folder / WEIGHTS).unlink(), {}, [WEIGHTS]),
        (lambda folder: (folder / CONFIG).write_text("{}"), {}, [CONFIG, "schema"]),
    ],
)
def test_a_push_is_checked_first(
    hub: HubServer, folder: Path, change: Callable[[Path], None] | None, options: dict[str, Any], expected: list[str]
) -> None:
    if change is not None:
        change(folder)
    before = files_in(folder)
    given = {"repository": REPO, "token": "hf_ada"} | options
    for attempt in (plan_push, push):
        with pytest.raises(ValueError, match=expected[0]) as error:
            attempt(folder, **given)
        one_sentence(error, *expected)
    assert not posts(hub)
    assert not hub._repos
    assert files_in(folder) == before


def test_a_dry_run_changes_nothing(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ada")
    (folder / "notes").write_text("mine")
    before = files_in(folder)
    release.push_folder([str(folder), REPO, "--dry-run", "--private", "--license", "apache-2.0"])
    told = capsys.readouterr().out
    assert "ada/vit, branch main, a new private repository" in told
    assert all(name in told for name in FILES)
    assert "notes" in told.partition("is left out")[0].splitlines()[-1]
    assert posts(hub) == ["POST /api/validate-yaml"]
    assert not hub._repos
    assert files_in(folder) == before


def test_a_plan(hub: HubServer, folder: Path) -> None:
    (folder / "picture.png").write_bytes(b"12345")
    (folder / "sub").mkdir()
    plan = plan_push(folder, "vit", token="hf_ada")
    assert [plan.repository, plan.branch, plan.exists, plan.left_out] == [REPO, "main", False, ["sub"]]
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    assert plan.files == sizes | {CARD: len(plan.card.encode())}
    hub.add_repo("lab/vit", private=True)
    assert plan_push(folder, "lab/vit", token="hf_ada", revision="try").exists


def test_the_licence_is_written_into_the_card(hub: HubServer, folder: Path) -> None:
    change_card("license: mit", "license: other")(folder)
    rest = (folder / CARD).read_text().partition("\n# ")[2].replace('("model0")  # this folder', f'("{REPO}")')
    push(folder, REPO, token="hf_ada", license="apache-2.0")
    assert "license: apache-2.0" in (folder / CARD).read_text()
    assert (folder / CARD).read_text().partition("\n# ")[2] == rest
    assert hub.files(REPO)[CARD] == (folder / CARD).read_bytes()


# The push itself


def test_only_what_is_shared_travels(hub: HubServer, folder: Path, models: list[Path]) -> None:
    for name in (".git/config", ".hidden.json", ".env", "sub/config.json", "code.py", "notes", "model.onnx"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("private")
    (folder / "folder.json").mkdir()
    push(folder, REPO, token="hf_ada")
    there = {name: data for name, data in hub.files(REPO).items() if name != ".gitattributes"}
    assert there == files_in(models[0]) | {CARD: (folder / CARD).read_bytes()}


@pytest.mark.parametrize("mode", ["auto", "regular"])
def test_a_push_is_one_commit_and_may_be_repeated(hub: HubServer, folder: Path, models: list[Path], mode: Any) -> None:
    hub.upload_mode = mode
    first = push(folder, REPO, token="hf_ada", commit_message="The first")
    assert [first.commit, len(hub.commits(REPO))] == [hub.commits(REPO)[0], 2]
    assert hub._repos[REPO].at("main").message == "The first"
    again = push(folder, REPO, token="hf_ada")
    assert [again.commit, len(hub.commits(REPO))] == [first.commit, 2]
    shutil.copyfile(models[1] / WEIGHTS, folder / WEIGHTS)
    second = push(folder, REPO, token="hf_ada")
    assert hub.commits(REPO)[:2] == [second.commit, first.commit]
    assert hub.files(REPO, first.commit)[WEIGHTS] != hub.files(REPO)[WEIGHTS] == (folder / WEIGHTS).read_bytes()


def test_a_push_to_a_branch_leaves_the_main_one(hub: HubServer, repo: str, models: list[Path]) -> None:
    before = hub.commits(repo)
    pushed = push(models[1], repo, token="hf_ada", revision="try/one")
    assert hub.commits(repo) == before
    assert hub.commits(repo, "try/one") == [pushed.commit, *before]
    assert push(models[1], repo, token="hf_ada", revision="try/one").commit == pushed.commit


@pytest.mark.parametrize("private", [True, False, None])
def test_a_repository_is_made_as_it_shall_be(hub: HubServer, folder: Path, private: bool | None) -> None:
    push(folder, "lab/vit", token="hf_ada", private=private)
    assert hub._repos["lab/vit"].private == bool(private)


def test_a_repository_that_is_there_stays_private(hub: HubServer, folder: Path) -> None:
    hub.add_repo(REPO, private=True)
    push(folder, REPO, token="hf_ada", private=False)
    assert hub._repos[REPO].private


def test_push_to_hub_returns_the_commit(hub: HubServer, models: list[Path]) -> None:
    model = from_pretrained(models[0])
    url = model.push_to_hub("vit", token="hf_ada", license="mit", private=True, commit_message="Hello")
    assert url == f"{hub.endpoint}/ada/vit/commit/{hub.commits(REPO)[0]}"
    assert hub._repos[REPO].private
    assert hub._repos[REPO].at("main").message == "Hello"
    assert same_weights(from_pretrained(REPO, token="hf_ada"), models[0])
    with pytest.raises(HubError) as error:
        model.push_to_hub("vit", token="hf_ada")
    one_sentence(error, "no licence")


@pytest.mark.parametrize("mode", ["auto", "regular"])
@pytest.mark.parametrize("branch", [None, "try"])
def test_a_lost_answer_to_the_commit(
    hub: HubServer, repo: str, models: list[Path], mode: Any, branch: str | None
) -> None:
    hub.upload_mode = mode
    hub.fault("lose", "POST .*/commit/")
    pushed = push(models[1], repo, token="hf_ada", revision=branch)
    history = hub.commits(repo, branch or "main")
    assert [pushed.commit, len(history)] == [history[0], 3]
    assert hub.files(repo, pushed.commit).items() >= files_in(models[1]).items()


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
    ],
)
def test_a_push_gets_over_what_passes(hub: HubServer, folder: Path, kind: Any, match: str, options: Any) -> None:
    hub.fault(kind, match, **options)
    pushed = push(folder, REPO, token="hf_ada", revision="try", private=True)
    assert sum(fault.times for fault in hub._faults) == 0
    assert hub.commits(REPO, "try")[0] == pushed.commit
    assert len(hub.commits(REPO, "try")) == 2
    assert hub._repos[REPO].private
    assert hub.files(REPO, "try").items() >= files_in(folder).items()


@pytest.mark.parametrize(
    ("kind", "match", "options", "expected"),
    [
        ("status", "POST .*/commit/", {"status": 403}, ["403", "the token may not", "'ada/vit'"]),
        ("status", "POST .*/commit/", {"status": 412}, ["412", "'ada/vit'", "push again"]),
        ("status", "POST .*/commit/", {"status": 500}, ["'ada/vit'", "was not made", "push again"]),
        ("reset", "POST .*/preupload/", {}, ["ENDPOINT", "try again later"]),
        ("status", "POST .*/preupload/", {"status": 403}, ["403", "the token may not", "'ada/vit'"]),
        ("status", "PUT /cdn/", {"status": 500}, ["'ada/vit'", "nothing was committed", "push again"]),
        ("status", "PUT /cdn/", {"status": 403}, ["'ada/vit'"]),
        ("status", "POST .*/objects/batch", {"status": 500}, ["'ada/vit'"]),
        ("status", "GET /api/whoami", {"status": 500}, ["'ada/vit'", "500"]),
    ],
)
def test_a_push_that_fails_commits_nothing(
    hub: HubServer, repo: str, models: list[Path], kind: Any, match: str, options: Any, expected: list[str]
) -> None:
    before = hub.commits(repo)
    hub.fault(kind, match, times=1000, **options)
    with pytest.raises(HubError) as error:
        push(models[1], repo, token="hf_ada")
    one_sentence(error, *(text.replace("ENDPOINT", hub.endpoint) for text in expected))
    assert hub.commits(repo) == before
    hub._faults.clear()
    pushed = push(models[1], repo, token="hf_ada")
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
        ("POST .*/commit/", "was not made"),
        ("(POST .*/commit/|GET .*/revision/)", "try again later"),
    ],
)
def test_a_push_to_a_server_that_hangs_ends(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float], match: str, expected: str
) -> None:
    monkeypatch.setattr(client, "SILENCE", 0.15)
    hub.fault("hang", match, times=1000, seconds=12)
    start = time.monotonic()
    with pytest.raises(HubError) as error:
        push(folder, REPO, token="hf_ada")
    one_sentence(error, expected)
    assert time.monotonic() - start < 10
    hung = 1000 - hub._faults[0].times
    assert hung * SILENCE + sum(waits) < LIMIT
    hub._faults.clear()
    pushed = push(folder, REPO, token="hf_ada")
    assert hub.commits(REPO)[0] == pushed.commit
    assert len(hub.commits(REPO)) == 2


def test_a_commit_that_comes_late_is_found_by_the_next_push(
    hub: HubServer, repo: str, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SILENCE", 0.15)
    hub.fault("hang", "POST .*/commit/", seconds=0.6)
    with pytest.raises(HubError) as error:
        push(models[1], repo, token="hf_ada")
    one_sentence(error, "push again, which is safe")
    while len(hub.commits(repo)) == 2:
        time.sleep(0.01)
    assert push(models[1], repo, token="hf_ada").commit == hub.commits(repo)[0]
    assert len(hub.commits(repo)) == 3


def test_a_push_offline(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError) as error:
        push(folder, REPO, token="hf_ada")
    assert "cache" not in one_sentence(error, REPO, "HF_HUB_OFFLINE")


def test_a_push_that_shall_be_private_does_not_go_to_a_public_repository(
    hub: HubServer, folder: Path, repo: str
) -> None:
    before = hub.commits(REPO)
    with pytest.raises(HubError) as error:
        push(folder, REPO, private=True, token="hf_ada")
    one_sentence(error, REPO, "public")
    assert hub.commits(REPO) == before


def test_the_card_says_how_to_load_from_the_repository(hub: HubServer, folder: Path) -> None:
    assert 'from_pretrained("model0")  # this folder' in (folder / CARD).read_text()
    push(folder, REPO, token="hf_ada")
    card = hub.files(REPO)[CARD].decode()
    assert f'from_pretrained("{REPO}")\n' in card
    assert (folder / CARD).read_text() == card


def test_metadata_that_the_hub_refuses_stop_a_push_before_anything_is_sent(hub: HubServer, folder: Path) -> None:
    hub.fault("status", "validate-yaml", status=400, times=3)
    with pytest.raises(HubError) as error:
        push(folder, REPO, token="hf_ada")
    one_sentence(error, "README.md")
    assert not [path for path in posts(hub) if "validate-yaml" not in path]


def test_an_organization_that_one_may_only_read_is_no_place_to_push_to(hub: HubServer, folder: Path) -> None:
    with pytest.raises(HubError) as error:
        push(folder, "readers/vit", token="hf_ada")
    one_sentence(error, "'readers'", "push to ada, lab")
