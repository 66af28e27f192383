"""Whether the Hub gives a data set, and how much of it a run would fetch."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi, constants, get_token, try_to_load_from_cache

from scalablevit_pl.diagnosis.finding import Finding, found
from scalablevit_pl.weights.hub.client import HubError, hub_errors, retry


@dataclass(frozen=True)
class Listing:
    """The files of a data set's repository at one commit.

    Attributes:
        commit: The commit.
        sizes: Bytes of each file.
    """

    commit: str
    sizes: Mapping[str, int] = field(default_factory=dict)


def check_token() -> Finding:
    """Tell whose token the Hub will see."""
    if constants.HF_HUB_OFFLINE:
        text = "HF_HUB_OFFLINE is set: only what is in the cache can be used"
        return Finding("warn", "Hub", text, "unset it to have the Hub looked at")
    if get_token() is None:
        return Finding("ok", "Hub token", "none, which does for data that are neither gated nor private")
    user, problem = _ask(lambda: HfApi().whoami(), "your account", None)
    if user is None:
        return found("Hub token", str(problem))
    return Finding("ok", "Hub token", f"of {user['name']}")


def check_repository(dataset: str, revision: str | None) -> tuple[list[Finding], Listing | None]:
    """Tell whether a data set can be read from the Hub, and list its files if it can.

    Args:
        dataset: Its id on the Hub.
        revision: Commit, tag or branch.
    """
    api, name = HfApi(), f"datasets/{dataset}"
    info, problem = _ask(lambda: api.dataset_info(dataset, revision=revision, files_metadata=True), name, revision)
    if info is None:
        return [found("Hub access", str(problem))], None
    # The list of a gated repository's files is public; its files are not.
    if info.gated or info.private:
        _, problem = _ask(lambda: api.auth_check(dataset, repo_type="dataset"), name, revision)
        if problem is not None:
            return [found("Hub access", problem)], None
    listing = Listing(info.sha, {file.rfilename: file.size or 0 for file in info.siblings or []})
    kind = "gated, and its terms are accepted" if info.gated else "private" if info.private else "public"
    pinned = revision == info.sha
    text = f"{dataset} can be read ({kind}), commit {info.sha}"
    if pinned:
        return [Finding("ok", "Hub access", text)], listing
    asked = f"revision {revision!r}" if revision else "no revision"
    remedy = f"pin it with --data.revision {info.sha}"
    return [Finding("warn", "Hub access", f"{text}; {asked} is asked for, which may move on", remedy)], listing


def _ask(call: Callable[[], Any], name: str, revision: str | None) -> tuple[Any, str | None]:
    """Return what the Hub answers, or one sentence for why it does not."""
    try:
        with hub_errors(name, revision):
            return retry(call), None
    except HubError as error:
        return None, str(error)


def files_of_splits(sizes: Mapping[str, int], splits: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    """Return the data files that some splits take, with their sizes: those that bear a split's name, or else all.

    Args:
        sizes: Bytes of each file of the repository.
        splits: The splits that are wanted, each with the words that mean it in a file's name.
    """
    tables = {name: size for name, size in sizes.items() if name.endswith(".parquet")}
    words = {word for synonyms in splits.values() for word in synonyms}
    wanted = {name: size for name, size in tables.items() if words & set(re.split(r"[^a-z0-9]+", name.lower()))}
    return wanted or tables or {name: size for name, size in sizes.items() if not name.startswith(".")}


def missing_bytes(dataset: str, commit: str, sizes: Mapping[str, int]) -> int:
    """Return how much of the files is not in the cache."""

    def cached(name: str) -> bool:
        return isinstance(try_to_load_from_cache(dataset, name, revision=commit, repo_type="dataset"), str)

    return sum(size for name, size in sizes.items() if not cached(name))


def cache_folders() -> tuple[Path, Path]:
    """Return where downloaded files lie, and where `datasets` keeps its Arrow copies."""
    return Path(constants.HF_HUB_CACHE), Path(datasets.config.HF_DATASETS_CACHE)


@contextmanager
def offline() -> Iterator[None]:
    """Let nothing ask the Hub for the time of a block: what is in the cache has to do."""
    places: list[tuple[Any, str]] = [(constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in places]
    try:
        for module, name in places:
            setattr(module, name, True)
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)
