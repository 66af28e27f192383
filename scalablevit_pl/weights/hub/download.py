"""From a repository to the cache: files of one commit, each compared with the checksum that the Hub states."""

import hashlib
import json
import logging
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.file_download import repo_folder_name

from scalablevit_pl.storage import written_aside
from scalablevit_pl.weights.hub.client import (
    COMMIT_HASH,
    TRIES,
    HubError,
    Token,
    explain_hub,
    explained,
    is_repository,
    is_shared,
    is_unreachable,
    patiently,
)

logger = logging.getLogger(__name__)

DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class FetchOptions(TypedDict, total=False):
    """Arguments of `fetch` that hold for any repository."""

    token: Token
    cache_dir: str | Path | None
    local_files_only: bool
    force_download: bool


@dataclass(frozen=True)
class Snapshot:
    """Files of one commit of a repository.

    Attributes:
        repository: `owner/name`.
        folder: Where they lie; for the cache's use, so not to be changed.
        commit: The commit's hash.
        digests: Checksums that the Hub states: sha256 for large files, git's sha1 for small ones.
    """

    repository: str
    folder: Path
    commit: str
    digests: dict[str, str]


def fetch(
    repository: str,
    revision: str | None = None,
    *,
    files: Collection[str] | None = None,
    required: Collection[str] = (),
    token: Token = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Snapshot:
    """Bring files of a repository into the cache, all of one commit, and compare their checksums with the Hub's.

    A file's checksum is computed once, when it arrives; it is computed again if the file has changed since. What is
    cached serves while the Hub cannot be reached. Interruptions are retried; a server that says nothing is given up
    within three minutes.

    Args:
        repository: `owner/name`.
        revision: Branch, tag or commit hash; by default the main branch. A commit that is cached needs no network.
        files: Names of the files to fetch, as far as the repository has them; by default all that `is_shared` allows.
        required: Names of files that the repository must have; an error otherwise.
        token: Access token, or False for none; by default the one that `hf auth login` has stored.
        cache_dir: Where the files go; by default the Hub client's cache.
        local_files_only: Take what is cached and ask nobody.
        force_download: Download again what is cached.

    Raises:
        HubError: If there is no such repository, revision or file, it may not be read, or it does not arrive whole.
    """
    pinned = revision is not None and COMMIT_HASH.fullmatch(revision) is not None
    if local_files_only or (pinned and not force_download):
        cached = _cached(repository, revision, cache_dir, files, required)
        if cached is not None:
            return cached
    if local_files_only:
        raise HubError(f"{repository!r} is not in the cache: leave local_files_only away to download it")
    api = HfApi(token=token)
    try:
        info = patiently(lambda: api.model_info(repository, revision=revision, files_metadata=True))
    except Exception as error:
        helps = is_unreachable(error) and not force_download
        cached = _cached(repository, revision, cache_dir, files, required) if helps else None
        offline = isinstance(error, OfflineModeIsEnabled)
        if cached is None:
            said = explain_hub(error, repository, revision)
            if said is None:
                raise
            raise HubError(f"{repository!r} is not in the cache, and {said}" if offline and helps else said) from error
        if not offline:
            logger.warning("the Hub cannot be reached: using %s at commit %s as cached", repository, cached.commit)
        return cached
    commit: str = info.sha or ""
    digests = {file.rfilename: (file.lfs.sha256 if file.lfs else file.blob_id) or "" for file in info.siblings or []}
    missing = [name for name in required if name not in digests]
    if missing:
        raise HubError(f"{repository!r} holds no model of scalablevit_pl: it has no {' and no '.join(missing)}")
    with explained(repository, revision):
        for name in _chosen(files, digests):
            _download(repository, name, commit, digests[name], token, cache_dir, force_download)
    cache = _cache(repository, cache_dir)
    folder = cache / "snapshots" / commit
    note(_listing(folder), json.dumps(digests))
    if not pinned:  # the client does so only where it resolves the name itself, anew for each file
        note(cache / "refs" / (revision or constants.DEFAULT_REVISION), commit)
    return Snapshot(repository, folder, commit, digests)


def locate(
    name_or_path: str | Path,
    revision: str | None = None,
    *,
    files: Collection[str] | None = None,
    required: Collection[str] = (),
    **options: Unpack[FetchOptions],
) -> Path:
    """Return a local folder, or else fetch a repository of that name; arguments are those of `fetch`.

    Raises:
        HubError: If it is in neither place.
    """
    if isinstance(name_or_path, Path) or Path(name_or_path).is_dir():
        return Path(name_or_path)
    if not is_repository(name_or_path):
        raise HubError(f"{name_or_path!r} is no folder, and no name of a repository: give a path, or owner/name")
    try:
        return fetch(name_or_path, revision, files=files, required=required, **options).folder
    except HubError as error:
        raise HubError(f"there is no folder {name_or_path!r} here; on the Hub: {error}") from error


def _download(
    repository: str, name: str, commit: str, digest: str, token: Token, cache_dir: str | Path | None, force: bool
) -> Path:
    """Download a file of a commit and check it; what arrives damaged is fetched again."""
    for attempt in range(TRIES):
        again = force or attempt > 0

        def download(again: bool = again) -> str:
            return hf_hub_download(
                repository, name, revision=commit, cache_dir=cache_dir, token=token, force_download=again
            )

        path = Path(patiently(download))
        if _is_whole(path, digest):
            return path
        logger.warning("%s of %s is damaged, its checksum is not the Hub's: fetching it again", name, repository)
    path.resolve().unlink(missing_ok=True)  # else the cache would serve it to others
    path.unlink(missing_ok=True)
    raise HubError(
        f"{name} of {repository!r} arrived damaged {TRIES} times, its checksum is not {digest} as the Hub states: "
        "try again later, or from another network"
    )


def _chosen(files: Collection[str] | None, names: Collection[str]) -> list[str]:
    """Choose the files to fetch from those that a commit has."""
    return [name for name in names if (is_shared(name) if files is None else name in files)]


def _cached(
    repository: str,
    revision: str | None,
    cache_dir: str | Path | None,
    files: Collection[str] | None,
    required: Collection[str],
) -> Snapshot | None:
    """Return what the cache holds of a revision, if no file to be fetched is missing or damaged."""
    cache, commit = _cache(repository, cache_dir), revision or constants.DEFAULT_REVISION
    if COMMIT_HASH.fullmatch(commit) is None:
        try:
            commit = (cache / "refs" / commit).read_text().strip()
        except (OSError, ValueError):  # none such, or not even a name that a file can have
            return None
    folder = cache / "snapshots" / commit
    try:
        digests = dict(json.loads(_listing(folder).read_text()))
    except (OSError, ValueError):  # another program has filled the cache: what else the commit has is not known
        if files is None or not all((folder / name).is_file() for name in required):
            return None
        digests = {path.name: path.readlink().name if path.is_symlink() else "" for path in folder.iterdir()}
    names = _chosen(files, digests)
    if not all((folder / name).is_file() for name in names):
        return None
    damaged = [name for name in names if not _is_whole(folder / name, digests[name])]
    if damaged:
        logger.warning("%s of %s is damaged in the cache", damaged[0], repository)
        return None
    return Snapshot(repository, folder, commit, digests)


def _is_whole(path: Path, digest: str) -> bool:
    """Compare a cached file with its checksum, unless that has been done since the file was written."""
    if DIGEST.fullmatch(digest) is None:  # an endpoint that is not the Hub may state none
        return True
    stat = path.stat()
    verified, seen = path.parents[2] / "verified" / digest, f"{stat.st_size} {stat.st_mtime_ns}"
    if verified.is_file() and verified.read_text() == seen:
        return True
    if checksum(path, git=len(digest) == 40) != digest:
        return False
    note(verified, seen)
    return True


def checksum(path: Path, git: bool = False) -> str:
    """Compute a file's sha256, or the sha1 that git gives it."""
    with path.open("rb") as file:
        if not git:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
        digest.update(file.read())
        return digest.hexdigest()


def _cache(repository: str, cache_dir: str | Path | None) -> Path:
    """Return the folder of a repository in the cache."""
    return Path(cache_dir or constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")


def _listing(folder: Path) -> Path:
    """Return where the names and checksums of all files of a cached commit are noted."""
    return folder.parents[1] / "verified" / f"{folder.name}.json"


def note(path: Path, text: str) -> None:
    """Leave a note in the cache, which others may share: it may be read-only, or another process be faster."""
    try:
        if not path.is_file() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_aside(path) as aside:
                aside.write_text(text)
    except OSError as error:
        logger.debug("cannot note %s: %s", path, error)
