import time
from collections.abc import Callable
from typing import Any

import pytest
from hub_models import hub_error
from hub_server import HubServer
from huggingface_hub import HfApi, get_session
from huggingface_hub.utils import _http

from scalablevit_pl.weights.hub import client
from scalablevit_pl.weights.hub.client import HubUnreachableError, hub_errors, is_repository, is_shared, retry


@pytest.mark.parametrize("name", ["a/b", "A-1/b.c_d"])
def test_owner_and_name_make_a_repository(name: str) -> None:
    assert is_repository(name)


@pytest.mark.parametrize("name", ["a", "a/b/c", "a/", "/b", "../b", "a/..", "a b/c", "a/b@c", "", "a/b\n"])
def test_other_names_are_not_repositories(name: str) -> None:
    assert not is_repository(name)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md", "LICENSE", "LICENSE-MIT", "a.PNG"])
def test_data_text_and_pictures_are_shared(name: str) -> None:
    assert is_shared(name)


HIDDEN = [".gitattributes", ".hidden.json", "sub/config.json", "../config.json"]
CODE = ["model.py", "LICENSE.py", "LICENSE.pkl", "run.sh", "x.pkl", "x.pt", "x.ckpt", "x.bin", "x.safetensors.py"]
OTHERS = ["config.yaml", "recipe.yml", "x.onnx"]


@pytest.mark.parametrize("name", [*HIDDEN, *CODE, *OTHERS])
def test_hidden_files_code_and_pickles_are_not_shared(name: str) -> None:
    assert not is_shared(name)


def fail_times(times: int, error: Exception) -> Callable[[], int]:
    """Return a function that fails some times and then returns how often it was called."""
    calls: list[Exception] = []

    def call() -> int:
        calls.append(error)
        if len(calls) <= times:
            raise error
        return len(calls)

    return call


def test_transient_errors_are_retried_twice(waits: list[float]) -> None:
    assert retry(fail_times(2, ConnectionError())) == 3
    assert waits == [1, 2]
    with pytest.raises(ConnectionError):
        retry(fail_times(3, ConnectionError()))


@pytest.mark.parametrize("error", [PermissionError(13, "no"), ValueError("wrong"), TypeError("a bug")])
def test_other_errors_are_not_retried(error: Exception, waits: list[float]) -> None:
    with pytest.raises(type(error)):
        retry(fail_times(1, error))
    assert not waits


@pytest.mark.parametrize("error", [PermissionError(13, "no"), TypeError("a bug")])
def test_errors_of_the_disk_and_of_the_program_stay_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)), hub_errors("a/b"):
        raise error


def test_an_unreachable_hub_is_told_apart_from_one_that_refuses(hub: HubServer) -> None:
    with hub_error("'a/b'", "check the name"), hub_errors("a/b"):
        HfApi().model_info("a/b")
    hub.close()
    with pytest.raises(HubUnreachableError, match="try again later"), hub_errors("a/b"):
        HfApi().model_info("a/b")


def test_a_silent_server_is_abandoned_in_retry_only(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SILENCE", 0.1)
    hub.add_repo("a/b")
    hub.fault("hang", "GET /api/models/", times=2, seconds=0.5)
    hooks = list(get_session().event_hooks["request"])
    with pytest.raises(client.NETWORK_ERROR, match="timed out"):
        retry(lambda: HfApi().model_info("a/b"))
    assert get_session().event_hooks["request"] == hooks
    assert HfApi().model_info("a/b").id == "a/b"


def test_the_limit_holds_for_the_session_of_a_second_attempt(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SILENCE", 0.15)
    hub.add_repo("a/b")
    hub.fault("hang", "GET ", seconds=600)
    fail = fail_times(1, ConnectionError())

    def ask() -> Any:
        try:
            fail()
        except ConnectionError:
            _http.close_session()  # as the client does after some failures
            raise
        return HfApi().model_info("a/b")

    start = time.monotonic()
    with pytest.raises(client.NETWORK_ERROR, match="timed out"):
        retry(ask)
    assert time.monotonic() - start < 300
