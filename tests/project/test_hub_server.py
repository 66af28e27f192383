"""Parts of the loopback Hub that the package's tests do not reach, and limits of the client that the package needs."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hub_models import REPO
from hub_server import HubServer
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import get_session

http = sys.modules[type(get_session()).__module__]  # httpx or httpx2, depending on the client
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


# The protocol


def test_listings_state_sizes_and_checksums(hub: HubServer, repo: str) -> None:
    info = api(hub).model_info(repo, files_metadata=True)
    weights = next(one for one in info.siblings or [] if one.rfilename == "model.safetensors")
    assert [info.sha, weights.size] == [hub.commits(repo)[0], len(WEIGHTS)]
    assert weights.lfs is not None
    listed = {one.path: one for one in api(hub).get_paths_info(repo, ["model.safetensors", "sub folder", "none"])}
    assert set(listed) == {"model.safetensors", "sub folder"}
    assert listed["model.safetensors"].lfs.sha256 == weights.lfs.sha256
    names = {one.path for one in api(hub).list_repo_tree(repo)}
    assert names == {"config.json", "model.safetensors", ".gitattributes", "sub folder"}


@pytest.mark.parametrize("token", ["hf_ada_read", "hf_bob"])
def test_only_writers_may_write(hub: HubServer, repo: str, token: str) -> None:
    other = api(hub, token)
    other.auth_check(repo)
    upload = {"path_or_fileobj": b"x", "path_in_repo": "x", "repo_id": repo}
    for call in (lambda: other.upload_file(**upload), lambda: other.create_repo("readers/new")):
        with pytest.raises(HfHubHTTPError, match="403"):
            call()
    with pytest.raises(RepositoryNotFoundError, match="401"):
        api(hub, False).upload_file(**upload)
    assert len(hub.commits(repo)) == 2


def test_the_metadata_of_a_card_are_checked(hub: HubServer, repo: str) -> None:
    readme = {"path_in_repo": "README.md", "repo_id": repo}
    with pytest.raises(ValueError, match="must be of type object"):
        api(hub).upload_file(path_or_fileobj=b"---\n- license: mit\n---\n", **readme)
    api(hub).upload_file(path_or_fileobj=b"---\nlicense: mit\ntags:\n- vit\n---\n# Title\n", **readme)
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api(hub).upload_file(path_or_fileobj=b"# Title\n", **readme)


# Faults, and the client's reaction to them


@pytest.mark.skipif(http.__name__ == "httpx", reason="older clients do not resume a download")
def test_a_closed_connection_is_resumed(hub: HubServer, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    hub.fault("cut", "GET /cdn/.*model", after=5000)
    assert download(hub) == WEIGHTS
    ranges = [headers["range"] for headers in hub.headers if "range" in headers]
    assert ranges == ["bytes=4096-"]


def test_a_reset_connection_is_not_resumed(hub: HubServer, repo: str) -> None:
    hub.fault("reset", "GET /cdn/.*model")
    with pytest.raises(http.ReadError):
        download(hub)
    assert download(hub) == WEIGHTS


def test_a_truncated_file_raises(hub: HubServer, repo: str) -> None:
    for name in ("model.safetensors", "config.json"):
        hub.fault("truncate", rf"GET .*{name}", after=5)
        with pytest.raises(OSError, match="Consistency check failed"):
            download(hub, name)


def test_a_flipped_bit_is_not_noticed(hub: HubServer, repo: str) -> None:
    hub.fault("flip", "GET /cdn/")
    wrong = download(hub)
    assert [at for at, (one, other) in enumerate(zip(wrong, WEIGHTS, strict=True)) if one != other] == [5120]
    assert download(hub) == wrong
    assert download(hub, force_download=True) == WEIGHTS


def test_only_some_requests_are_retried(hub: HubServer, repo: str) -> None:
    hub.fault("status", "GET /api/models/", status=503)
    with pytest.raises(HfHubHTTPError, match="503"):
        api(hub).model_info(repo)
    hub.fault("status", "/resolve/", status=429, headers={"Retry-After": "0"})
    assert download(hub) == WEIGHTS
    hub.fault("status", "PUT /cdn/", status=503)
    api(hub).upload_file(path_or_fileobj=b"new", path_in_repo="new.safetensors", repo_id=repo)
    assert len(hub.lines("PUT ")) == 2


def test_a_commit_is_made_although_its_answer_is_lost(hub: HubServer, repo: str) -> None:
    hub.fault("lose", "POST /api/.*/commit/")
    with pytest.raises(http.RemoteProtocolError):
        api(hub).upload_file(path_or_fileobj=b"new", path_in_repo="new.safetensors", repo_id=repo)
    assert hub.files(repo)["new.safetensors"] == b"new"
    assert len(hub.commits(repo)) == 3


def test_a_hanging_request_ends_at_the_clients_limit(hub: HubServer, repo: str) -> None:
    hub.fault("hang", "/api/models")
    with pytest.raises(http.ReadTimeout):
        api(hub).model_info(repo, timeout=0.2)


def test_closing_ends_hanging_requests_and_refuses_new_ones() -> None:
    hub = HubServer()
    hub.add_repo(REPO)
    session = http.Client()
    assert session.get(f"{hub.endpoint}/api/models/{REPO}").status_code == 200
    hub.fault("hang", "/api/models")
    code = f"import urllib.request as u; u.urlopen('{hub.endpoint}/api/models')"
    waiting = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while len(hub.requests) < 2:
        time.sleep(0.01)
    hub.close()
    assert waiting.wait(10) != 0
    with pytest.raises(http.TransportError):
        session.get(f"{hub.endpoint}/api/models/{REPO}")


def test_a_client_in_another_process_uses_the_endpoint(hub: HubServer, repo: str, tmp_path: Path) -> None:
    client = "from huggingface_hub import HfApi, hf_hub_download as get"
    code = f"{client}; print(get({repo!r}, 'config.json'), HfApi().whoami()['name'])"
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_ada", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | settings, capture_output=True, text=True, check=True, timeout=600
    )
    path, name = done.stdout.split()
    assert [Path(path).read_bytes(), name] == [FILES["config.json"], "ada"]
