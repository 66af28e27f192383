import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

http = sys.modules[type(get_session()).__module__]  # httpx or httpx2, as the client has it
REPO = "ada/vit"
WEIGHTS = bytes(range(256)) * 40
FILES = {"config.json": b'{"depth": 2}\n', "model.safetensors": WEIGHTS, "sub folder/note ü.txt": b"note"}


pytestmark = pytest.mark.usefixtures("hub_settings")


@pytest.fixture
def repo(hub: HubServer) -> str:
    hub.add_repo(REPO)
    hub.commit(REPO, FILES)
    return REPO


def api(hub: HubServer, token: str | bool = "hf_ada") -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=token)


def download(hub: HubServer, name: str = "model.safetensors", token: str | bool = False, **options: Any) -> bytes:
    return Path(hf_hub_download(REPO, name, endpoint=hub.endpoint, token=token, **options)).read_bytes()


def folder(place: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, data in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    return place


def requests(hub: HubServer, part: str) -> list[str]:
    return [f"{method} {path}" for method, path in hub.requests if part in f"{method} {path}"]


@pytest.mark.parametrize("mode", ["auto", "regular"])
def test_what_is_pushed_is_downloaded(hub: HubServer, tmp_path: Path, mode: Any) -> None:
    hub.upload_mode = mode
    api(hub).create_repo(REPO)
    pushed = api(hub).upload_folder(repo_id=REPO, folder_path=folder(tmp_path / "out"), commit_message="Push")
    assert hub.commits(REPO)[0] == pushed.oid
    assert len(hub.commits(REPO)) == 2
    assert hub.files(REPO).items() > FILES.items()
    assert {name: download(hub, name) for name in FILES} == FILES
    assert bool(requests(hub, "PUT /cdn/")) == (mode == "auto")
    snapshot = snapshot_download(REPO, endpoint=hub.endpoint, token=False)
    assert all((Path(snapshot) / name).read_bytes() == data for name, data in FILES.items())


def test_pushing_the_same_again_makes_no_commit(hub: HubServer, repo: str, tmp_path: Path) -> None:
    pushed = api(hub).upload_folder(repo_id=repo, folder_path=folder(tmp_path / "out"))
    assert [pushed.oid, len(hub.commits(repo))] == [hub.commits(repo)[0], 2]


def test_a_changed_file_leaves_the_old_revision(hub: HubServer, repo: str) -> None:
    old = hub.commits(repo)[0]
    new = hub.commit(repo, {"model.safetensors": b"new", "config.json": None})
    assert hub.commits(repo)[:2] == [new, old]
    assert [download(hub), download(hub, revision=old)] == [b"new", WEIGHTS]
    assert "config.json" not in hub.files(repo)
    assert hub.files(repo, old).items() >= FILES.items()


def test_listings(hub: HubServer, repo: str) -> None:
    info = api(hub).model_info(repo, files_metadata=True)
    weights = next(one for one in info.siblings or [] if one.rfilename == "model.safetensors")
    assert [info.sha, weights.size] == [hub.commits(repo)[0], len(WEIGHTS)]
    assert weights.lfs is not None
    listed = {one.path: one for one in api(hub).get_paths_info(repo, ["model.safetensors", "sub folder", "none"])}
    assert set(listed) == {"model.safetensors", "sub folder"}
    assert listed["model.safetensors"].lfs.sha256 == weights.lfs.sha256
    assert {one.path for one in api(hub).list_repo_tree(repo)} == {*FILES, ".gitattributes", "sub folder"} - {
        "sub folder/note ü.txt"
    }


def test_branches(hub: HubServer, repo: str) -> None:
    ada, old = api(hub), hub.commits(repo)[1]
    ada.create_branch(repo, branch="try/one", revision=old)
    with pytest.raises(HfHubHTTPError, match="409"):
        ada.create_branch(repo, branch="try/one")
    ada.create_branch(repo, branch="try/one", exist_ok=True)
    ada.upload_file(path_or_fileobj=b"branch", path_in_repo="b.txt", repo_id=repo, revision="try/one")
    assert download(hub, "b.txt", revision="try/one") == b"branch"
    assert hub.commits(repo, "try/one")[1:] == [old]
    assert "b.txt" not in hub.files(repo)


@pytest.mark.skipif(not hasattr(HfApi, "verify_repo_checksums"), reason="the client cannot do it yet")
def test_verify_checksums(hub: HubServer, repo: str) -> None:
    snapshot = Path(snapshot_download(repo, endpoint=hub.endpoint, token=False))
    assert not api(hub).verify_repo_checksums(repo).mismatches
    (snapshot / "model.safetensors").resolve().write_bytes(b"other")
    assert [one["path"] for one in api(hub).verify_repo_checksums(repo).mismatches] == ["model.safetensors"]


def test_missing_things(hub: HubServer, repo: str) -> None:
    with pytest.raises(RemoteEntryNotFoundError):
        download(hub, "none.json")
    with pytest.raises(RevisionNotFoundError):
        download(hub, revision="none")
    for token, status in ((False, 401), ("hf_bob", 404)):
        with pytest.raises(RepositoryNotFoundError) as caught:
            api(hub, token).model_info("ada/none")
        assert caught.value.response.status_code == status


def test_a_private_repository_is_hidden_from_others(hub: HubServer) -> None:
    hub.add_repo(REPO, private=True)
    hub.commit(REPO, FILES)
    for token, status in ((False, 401), ("hf_bob", 404)):
        with pytest.raises(RepositoryNotFoundError) as caught:
            download(hub, token=token)
        assert caught.value.response.status_code == status
    assert download(hub, token="hf_ada_read") == WEIGHTS


def test_a_gated_repository_is_listed_but_not_served(hub: HubServer) -> None:
    hub.add_repo(REPO, gated=True, granted=["cy"])
    hub.add_user("hf_cy", "cy", role="read")
    hub.commit(REPO, FILES)
    assert api(hub, False).model_info(REPO).gated == "manual"
    for token, status in ((False, 401), ("hf_bob", 403)):
        with pytest.raises(GatedRepoError) as caught:
            download(hub, token=token)
        assert caught.value.response.status_code == status
    assert download(hub, token="hf_cy") == WEIGHTS


def test_tokens(hub: HubServer, repo: str) -> None:
    who = api(hub).whoami()
    assert [
        who["name"],
        {org["name"]: org["roleInOrg"] for org in who["orgs"]},
        who["auth"]["accessToken"]["role"],
    ] == [
        "ada",
        {"lab": "write", "readers": "read"},
        "write",
    ]
    for call in (lambda wrong: wrong.whoami(), lambda wrong: wrong.model_info(repo)):
        with pytest.raises(HfHubHTTPError, match=r"Invalid (user token|credentials)") as caught:
            call(api(hub, "hf_wrong"))
        assert type(caught.value) is HfHubHTTPError
    with pytest.raises(HfHubHTTPError, match="401"):
        api(hub, False).create_repo("ada/new")


@pytest.mark.parametrize("token", ["hf_ada_read", "hf_bob"])
def test_who_may_not_write(hub: HubServer, repo: str, token: str) -> None:
    other = api(hub, token)
    other.auth_check(repo)
    may_write = f"{hub.endpoint}/api/models/{repo}/auth-check/write"
    statuses = [get_session().get(may_write, headers={"Authorization": f"Bearer {one}"}) for one in (token, "hf_ada")]
    assert [answer.status_code for answer in statuses] == [403, 200]
    upload = {"path_or_fileobj": b"x", "path_in_repo": "x", "repo_id": repo}
    for call in (
        lambda: other.upload_file(**upload),
        lambda: other.create_repo("ada/new"),
        lambda: other.create_repo("readers/new"),
    ):
        with pytest.raises(HfHubHTTPError, match="403"):
            call()
    with pytest.raises(RepositoryNotFoundError, match="401"):
        api(hub, False).upload_file(**upload)
    assert len(hub.commits(repo)) == 2


def test_creating_repositories(hub: HubServer, repo: str) -> None:
    ada = api(hub)
    assert ada.create_repo("lab/new", private=True).repo_id == "lab/new"
    assert ada.model_info("lab/new").private
    assert ada.create_repo(repo, exist_ok=True).repo_id == repo
    with pytest.raises(HfHubHTTPError, match="409"):
        ada.create_repo(repo)
    assert not ada.repo_exists("lab/none")


def test_commit_conditions(hub: HubServer, repo: str) -> None:
    ada, text = api(hub), {"path_or_fileobj": b"x", "path_in_repo": "x.txt", "repo_id": repo}
    with pytest.raises(HfHubHTTPError, match="412"):
        ada.upload_file(**text, parent_commit=hub.commits(repo)[1])
    with pytest.raises(RevisionNotFoundError):
        ada.upload_file(**text, revision="none")
    with pytest.raises(HfHubHTTPError, match="403"):
        ada.upload_file(**text, create_pr=True)
    ada.upload_file(**text, parent_commit=hub.commits(repo)[0])
    ada.delete_file("x.txt", repo)
    ada.delete_folder("sub folder", repo)
    assert set(hub.files(repo)) == {"config.json", "model.safetensors", ".gitattributes"}
    with pytest.raises(RemoteEntryNotFoundError):
        ada.delete_file("ü.txt", repo)


def test_metadata_of_a_readme(hub: HubServer, repo: str) -> None:
    readme = {"path_in_repo": "README.md", "repo_id": repo}
    with pytest.raises(ValueError, match="must be of type object"):
        api(hub).upload_file(path_or_fileobj=b"---\n- license: mit\n---\n", **readme)
    api(hub).upload_file(path_or_fileobj=b"---\nlicense: mit\ntags:\n- vit\n---\n# Title\n", **readme)
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api(hub).upload_file(path_or_fileobj=b"# Title\n", **readme)


@pytest.mark.skipif(http.__name__ == "httpx", reason="older clients do not resume it")
def test_a_closed_connection_is_resumed(hub: HubServer, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    hub.fault("cut", "GET /cdn/.*model", after=5000)
    assert download(hub) == WEIGHTS
    ranges = [headers["range"] for headers in hub.headers if "range" in headers]
    assert ranges == ["bytes=4096-"]


def test_a_reset_connection_is_not(hub: HubServer, repo: str) -> None:
    hub.fault("reset", "GET /cdn/.*model")
    with pytest.raises(http.ReadError):
        download(hub)
    assert download(hub) == WEIGHTS


@pytest.mark.parametrize("kind", ["reset", "cut", "lose"])
def test_an_answer_without_a_body_fails_as_a_whole(hub: HubServer, repo: str, kind: Any) -> None:
    hub.fault(kind, "/resolve/", method="HEAD")
    with pytest.raises((http.ReadError, http.RemoteProtocolError)):
        download(hub)


def test_a_truncated_file_raises(hub: HubServer, repo: str) -> None:
    for name in ("model.safetensors", "config.json"):
        hub.fault("truncate", rf"GET .*{name}", after=5)
        with pytest.raises(OSError, match="Consistency check failed"):
            download(hub, name)


def test_a_flipped_bit_passes_unnoticed(hub: HubServer, repo: str) -> None:
    hub.fault("flip", "GET /cdn/")
    wrong = download(hub)
    assert [at for at, (one, other) in enumerate(zip(wrong, WEIGHTS, strict=True)) if one != other] == [5120]
    assert download(hub) == wrong
    assert download(hub, force_download=True) == WEIGHTS


def test_error_statuses(hub: HubServer, repo: str) -> None:
    hub.fault("status", "/api/models/", times=2, method="GET", status=503)
    hub.fault("status", "/resolve/", status=429, headers={"Retry-After": "0"})
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="503"):
            api(hub).model_info(repo)
    assert api(hub).model_info(repo).id == repo
    assert download(hub) == WEIGHTS


def test_a_lost_answer_leaves_the_commit_made(hub: HubServer, repo: str) -> None:
    hub.fault("lose", "POST /api/.*/commit/")
    with pytest.raises(http.RemoteProtocolError):
        api(hub).upload_file(path_or_fileobj=b"new", path_in_repo="new.safetensors", repo_id=repo)
    assert hub.files(repo)["new.safetensors"] == b"new"
    assert len(hub.commits(repo)) == 3


def test_an_upload_is_retried(hub: HubServer, repo: str) -> None:
    hub.fault("status", "PUT /cdn/", status=503)
    api(hub).upload_file(path_or_fileobj=b"new", path_in_repo="new.safetensors", repo_id=repo)
    assert hub.files(repo)["new.safetensors"] == b"new"
    assert len(requests(hub, "PUT ")) == 2


def test_a_hanging_server_is_left_after_the_limit(hub: HubServer, repo: str) -> None:
    hub.fault("hang", "/api/models")
    with pytest.raises(http.ReadTimeout):
        api(hub).model_info(repo, timeout=0.2)


def test_closing_ends_what_hangs_and_refuses_what_comes() -> None:
    hub = HubServer()
    hub.add_repo(REPO)
    session = http.Client()
    assert session.get(f"{hub.endpoint}/api/models/{REPO}").status_code == 200
    hub.fault("hang", "/api/models")
    waiting = subprocess.Popen(
        [sys.executable, "-c", f"import urllib.request as u; u.urlopen('{hub.endpoint}/api/models')"]
    )
    while len(hub.requests) < 2:
        time.sleep(0.01)
    hub.close()
    assert waiting.wait(10) != 0
    with pytest.raises(http.TransportError):
        session.get(f"{hub.endpoint}/api/models/{REPO}")


def test_the_whole_client_in_its_own_process(hub: HubServer, repo: str, tmp_path: Path) -> None:
    client = "from huggingface_hub import HfApi, hf_hub_download as get"
    code = f"{client}; print(get({repo!r}, 'config.json'), HfApi().whoami()['name'])"
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_ada", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | settings, capture_output=True, text=True, check=True, timeout=60
    )
    path, name = done.stdout.split()
    assert [Path(path).read_bytes(), name] == [FILES["config.json"], "ada"]
