from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from scalablevit_pl.diagnosis import hub
from scalablevit_pl.weights.hub.client import HubError


def test_files_in_the_cache_are_not_counted_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda _, name, **__: "here" if name == "a" else None)
    assert hub.missing_bytes("lab/pets", hub.Listing("1" * 40, {"a": 5, "b": 7})) == 7


def answer(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=SimpleNamespace(method="GET", url="https://hub"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (lambda: GatedRepoError("gated", response=answer(403)), "accept"),
        (lambda: RepositoryNotFoundError("none", response=answer(404)), "has no repository"),
    ],
)
def test_no_access_fails(error: Callable[[], Exception], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise error()

    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    with pytest.raises(HubError, match=words):
        hub.check_repository("ILSVRC/imagenet-1k", None)


def test_unaccepted_terms_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [SimpleNamespace(rfilename=name, size=size) for name, size in (("train.parquet", 7), ("README.md", 1))]
    info = SimpleNamespace(sha="1" * 40, gated="manual", private=False, siblings=files)
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: info)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise GatedRepoError("gated", response=answer(403))

    monkeypatch.setattr(HfApi, "auth_check", refuse)
    with pytest.raises(HubError, match="accept its terms"):
        hub.check_repository("ILSVRC/imagenet-1k", "1" * 40)
    monkeypatch.setattr(HfApi, "auth_check", lambda *_, **__: None)
    finding, listing = hub.check_repository("ILSVRC/imagenet-1k", "1" * 40)
    assert (finding.status, listing.sizes) == ("ok", {"train.parquet": 7})
    finding, _ = hub.check_repository("ILSVRC/imagenet-1k", "main")
    assert (finding.status, finding.remedy) == ("warn", f"pin it with --data.revision {'1' * 40}")
