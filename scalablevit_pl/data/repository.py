"""A data set's repository on the Hub: one commit of it, and those of its parquet files that are asked for."""

import json
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled

from scalablevit_pl.weights.hub.client import COMMIT_HASH, HubError, explain_hub, is_unreachable, patiently
from scalablevit_pl.weights.hub.download import note

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

# How `datasets` stores a split, such as data/train-00000-of-00294.parquet.
SHARD = re.compile(r"(?P<split>\w+(?:\.\w+)*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.parquet")


def find_commit(dataset: str, revision: str | None) -> str:
    """Return the commit that a revision is, as the Hub says, and note it for the other processes of this machine.

    A commit's own hash is taken as it is. While the Hub cannot be reached, the commit that was noted last serves.

    Args:
        dataset: A data set's id on the Hub.
        revision: Commit, tag or branch; by default the main branch.

    Raises:
        HubError: If there is no such repository or revision, it may not be read, or the Hub cannot be reached.
    """
    if revision is not None and COMMIT_HASH.fullmatch(revision):
        return revision
    return _ask(dataset, revision, noted_commit(dataset, revision), lambda: _look_up(dataset, revision)[0])


def noted_commit(dataset: str, revision: str | None) -> str | None:
    """Return the commit that a revision is, as noted in the cache, without asking the Hub."""
    if revision is not None and COMMIT_HASH.fullmatch(revision):
        return revision
    ref = _ref(dataset, revision)
    return ref.read_text().strip() if ref.is_file() else None


def list_shards(dataset: str, commit: str) -> dict[str, list[str]]:
    """List the parquet files of each split, if the repository has them as `datasets` stores them, in one folder.

    Raises:
        HubError: If the commit has not been listed before, and the Hub does not list it.
    """
    listing, folder = _listing(dataset, commit), _snapshot(dataset, commit)
    if listing.is_file():  # a commit does not change
        return group_shards(json.loads(listing.read_text()))
    # What another program has brought into the cache can only be seen by its files.
    cached = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet"))
    return group_shards(_ask(dataset, commit, cached or None, lambda: _look_up(dataset, commit)[1]))


def group_shards(names: Iterable[str]) -> dict[str, list[str]]:
    """Group parquet files by the split that their names say; none if one says none, or they lie in several folders."""
    paths = sorted(Path(name) for name in names if name.endswith(".parquet"))
    matches = [SHARD.fullmatch(path.name) for path in paths]
    splits: dict[str, list[str]] = {}
    for path, match in zip(paths, matches, strict=True):
        if match is None or path.parent != paths[0].parent:  # such as several tables, of which `datasets` knows more
            return {}
        splits.setdefault(match["split"], []).append(path.as_posix())
    return splits


def check_shards(names: Iterable[str]) -> None:
    """Check that all parquet files are there that the names of some speak of.

    Raises:
        ValueError: If one is missing; it names the first.
    """
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
    """Return the folder in the cache that holds some files of a commit, after fetching those that are missing.

    Raises:
        HubError: If one is missing and does not arrive: without permission, without network.
    """
    folder = _snapshot(dataset, commit)
    if not all((folder / name).is_file() for name in names):
        if constants.HF_HUB_OFFLINE:
            missing = sum(not (folder / name).is_file() for name in names)
            raise HubError(
                f"{missing} of {len(names)} files of {dataset!r} at commit {commit} are not in the cache, and "
                "HF_HUB_OFFLINE forbids to fetch them: unset it, or fetch them beforehand where there is a network"
            )
        logger.info("fetching %d parquet files of %s at commit %s", len(names), dataset, commit)
        _ask(
            dataset,
            commit,
            None,
            lambda: snapshot_download(dataset, repo_type="dataset", revision=commit, allow_patterns=names),
        )
    return folder


def _look_up(dataset: str, revision: str | None) -> tuple[str, list[str]]:
    """Ask the Hub for the commit of a revision and the names of its files, and note them."""
    info = HfApi().dataset_info(dataset, revision=revision)
    commit, names = info.sha or "", [file.rfilename for file in info.siblings or []]
    note(_listing(dataset, commit), json.dumps(names))
    if revision != commit:
        note(_ref(dataset, revision), commit)
    return commit, names


def _ask(dataset: str, revision: str | None, cached: Result | None, call: Callable[[], Result]) -> Result:
    """Ask the Hub; where it cannot be reached, return what is cached.

    Raises:
        HubError: If the Hub says no, or cannot be reached and nothing is cached.
    """
    try:
        return patiently(call)
    except Exception as error:
        offline = isinstance(error, OfflineModeIsEnabled)
        if cached is not None and is_unreachable(error):
            if not offline:
                logger.warning("the Hub cannot be reached: using %s as cached", dataset)
            return cached
        # So the Hub itself calls a repository of data, and so its page's address ends.
        said = explain_hub(error, f"datasets/{dataset}", revision)
        if said is None:
            raise
        raise HubError(f"{dataset!r} is not in the cache, and {said}" if offline else said) from error


def _cache(dataset: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / f"datasets--{dataset.replace('/', '--')}"


def _ref(dataset: str, revision: str | None) -> Path:
    return _cache(dataset) / "refs" / (revision or constants.DEFAULT_REVISION)


def _snapshot(dataset: str, commit: str) -> Path:
    return _cache(dataset) / "snapshots" / commit


def _listing(dataset: str, commit: str) -> Path:
    return _cache(dataset) / "listings" / f"{commit}.json"
