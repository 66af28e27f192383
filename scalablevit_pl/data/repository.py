"""A data set's repository on the Hub: one commit of it, and only the parquet files that are needed."""

import json
import logging
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download

from scalablevit_pl.weights.hub.cache import cached_commit, is_commit, note_commit, repository_folder, write_note
from scalablevit_pl.weights.hub.client import HubError, HubUnreachableError, Result, ask

logger = logging.getLogger(__name__)

# How `datasets` stores a split, such as data/train-00000-of-00294.parquet.
SHARD = re.compile(r"(?P<split>\w+(?:\.\w+)*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.parquet")


def find_commit(dataset: str, revision: str | None) -> str:
    """Ask the Hub for the commit of a revision, and note it for the other processes of this machine.

    A commit's own hash is returned as it is. While the Hub is unreachable, the last noted commit is used.

    Args:
        dataset: A data set's id on the Hub.
        revision: Commit, tag or branch; by default the main branch.
    """
    if revision is not None and is_commit(revision):
        return revision
    return _ask(dataset, revision, noted_commit(dataset, revision), lambda: _list_files(dataset, revision)[0])


def noted_commit(dataset: str, revision: str | None) -> str | None:
    """Return the commit of a revision as noted in the cache, without a request."""
    return cached_commit(_cache(dataset), revision)


def list_shards(dataset: str, commit: str) -> dict[str, list[str]]:
    """List the parquet files of each split; empty if the repository does not store them as `datasets` does."""
    listing, folder = _listing(dataset, commit), _snapshot(dataset, commit)
    if listing.is_file():  # a commit does not change
        return group_shards(json.loads(listing.read_text()))
    # Of what another program has cached, only the files themselves are known.
    cached = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet"))
    return group_shards(_ask(dataset, commit, cached or None, lambda: _list_files(dataset, commit)[1]))


def group_shards(names: Iterable[str]) -> dict[str, list[str]]:
    """Group parquet files by the split in their names; empty if a name has none, or they lie in several folders."""
    paths = sorted(Path(name) for name in names if name.endswith(".parquet"))
    matches = [SHARD.fullmatch(path.name) for path in paths]
    splits: dict[str, list[str]] = {}
    for path, match in zip(paths, matches, strict=True):
        if match is None or path.parent != paths[0].parent:  # such as several tables, which `datasets` can read
            return {}
        splits.setdefault(match["split"], []).append(path.as_posix())
    return splits


def check_shards(names: Iterable[str]) -> None:
    """Check that no parquet file of a numbered set is missing."""
    found: dict[tuple[str, str, str], set[int]] = {}
    for path in map(Path, names):
        match = SHARD.fullmatch(path.name)
        if match is not None:
            found.setdefault((str(path.parent), match["split"], match["count"]), set()).add(int(match["number"]))
    for (_, split, count), numbers in found.items():
        missing = sorted(set(range(int(count))) - numbers)
        if missing:
            raise ValueError(
                f"{len(missing)} of the {int(count)} parquet files of split {split!r} are missing, the first is "
                f"{split}-{missing[0]:05}-of-{count}.parquet: fetch them"
            )


def fetch_shards(dataset: str, commit: str, names: list[str]) -> Path:
    """Download those files of a commit that are not cached, and return the folder in the cache that holds them."""
    folder = _snapshot(dataset, commit)
    missing = sum(not (folder / name).is_file() for name in names)
    if missing and constants.HF_HUB_OFFLINE:
        raise HubError(
            f"{missing} of {len(names)} files of {dataset!r} at commit {commit} are not in the cache, and "
            "HF_HUB_OFFLINE is set: unset it, or download them beforehand on a machine with network access"
        )
    if missing:
        logger.info("downloading %d parquet files of %s at commit %s", len(names), dataset, commit)
        download = partial(snapshot_download, dataset, repo_type="dataset", revision=commit, allow_patterns=names)
        _ask(dataset, commit, None, download)
    return folder


def _list_files(dataset: str, revision: str | None) -> tuple[str, list[str]]:
    """Ask the Hub for the commit of a revision and the names of its files, and note both."""
    info = HfApi().dataset_info(dataset, revision=revision)
    commit, names = info.sha or "", [file.rfilename for file in info.siblings or []]
    write_note(_listing(dataset, commit), json.dumps(names))
    note_commit(_cache(dataset), revision, commit)
    return commit, names


def _ask(dataset: str, revision: str | None, cached: Result | None, call: Callable[[], Result]) -> Result:
    """Ask the Hub; if it is unreachable, return the cached answer."""
    try:
        return ask(call, f"datasets/{dataset}", revision)  # the Hub's own name for it, which ends its page's address
    except HubUnreachableError as error:
        if cached is None:
            raise HubError(f"{dataset!r} is not in the cache, and {error}") from error
        if not constants.HF_HUB_OFFLINE:
            logger.warning("the Hub is unreachable: using %s from the cache", dataset)
        return cached


def _cache(dataset: str) -> Path:
    return repository_folder(dataset, repo_type="dataset")


def _snapshot(dataset: str, commit: str) -> Path:
    return _cache(dataset) / "snapshots" / commit


def _listing(dataset: str, commit: str) -> Path:
    return _cache(dataset) / "listings" / f"{commit}.json"
