"""Download files of one commit into the cache and compare each with the checksum that the Hub states."""

import json
import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import SafetensorsParsingError

from scalablevit_pl.weights.hub.cache import (
    cached_commit,
    is_commit,
    is_intact,
    note_commit,
    repository_folder,
    write_note,
)
from scalablevit_pl.weights.hub.client import TRIES, HubError, HubUnreachableError, Token, hub_errors, is_shared, retry

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """Files of one commit of a repository. The folder belongs to the cache: do not change it."""

    repository: str  # owner/name
    folder: Path
    commit: str
    digests: dict[str, str]  # as the Hub states them: sha256 of large files, git's sha1 of small ones


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
    """Download files of a repository into the cache, all of one commit, and verify their checksums.

    A checksum is computed once, when the file arrives, and again if the file has changed since. Cached files are used
    while the Hub is unreachable. Interruptions are retried; a silent server is abandoned within three minutes.

    Args:
        repository: `owner/name`.
        revision: Branch, tag or commit hash; by default the main branch. A cached commit needs no network.
        files: Names of the files to download if the repository has them; by default all that `is_shared` allows.
        required: Names of files that the repository must have.
        token: Access token, or False for none; by default the one that `hf auth login` has stored.
        cache_dir: Folder of the cache; by default the Hub client's.
        local_files_only: Use cached files only, without a request.
        force_download: Download cached files again.

    Raises:
        HubError: If there is no such repository, revision or file, it may not be read, or it does not arrive intact.
    """
    cache = repository_folder(repository, cache_dir=cache_dir)
    find_cached = partial(_find_cached, repository, revision, cache, files, required)
    if local_files_only or (is_commit(revision) and not force_download):
        cached = find_cached()
        if cached is not None:
            return cached
    if local_files_only:
        raise HubError(f"{repository!r} is not in the cache: remove local_files_only to download it")
    try:
        snapshot = _list_files(repository, revision, cache, token)
    except HubUnreachableError as error:
        if force_download:
            raise
        cached = find_cached()
        if cached is None:
            raise HubError(f"{repository!r} is not in the cache, and {error}") from error
        if not constants.HF_HUB_OFFLINE:
            logger.warning("the Hub is unreachable: using %s from the cache, commit %s", repository, cached.commit)
        return cached
    missing = [name for name in required if name not in snapshot.digests]
    if missing:
        wanted = " and ".join(required)
        raise HubError(f"{repository!r} has no {' and no '.join(missing)}: choose a repository with {wanted}")
    client = partial(hf_hub_download, repository, revision=snapshot.commit, cache_dir=cache_dir, token=token)
    with hub_errors(repository, revision):
        for name in _choose(files, snapshot.digests):
            _download(client, snapshot, name, force_download)
    write_note(_listing(snapshot.folder), json.dumps(snapshot.digests))
    note_commit(cache, revision, snapshot.commit)
    return snapshot


def count_remote_parameters(snapshot: Snapshot, name: str) -> int:
    """Count the numbers in a safetensors file of a commit from its header, without downloading the file.

    Raises:
        HubError: If the Hub refuses or does not answer, or the file is damaged.
    """
    api = HfApi()
    with hub_errors(snapshot.repository, snapshot.commit):
        try:
            header = retry(
                lambda: api.parse_safetensors_file_metadata(snapshot.repository, name, revision=snapshot.commit)
            )
        except SafetensorsParsingError as error:
            raise HubError(f"{name} of {snapshot.repository!r} is not a safetensors file") from error
    return sum(header.parameter_count.values())


def _list_files(repository: str, revision: str | None, cache: Path, token: Token) -> Snapshot:
    """Ask the Hub for the commit of a revision and the checksums of its files, none of which is downloaded yet."""
    api = HfApi(token=token)
    with hub_errors(repository, revision):
        try:
            info = retry(lambda: api.model_info(repository, revision=revision, files_metadata=True))
        except (KeyError, TypeError):  # the client expects the entries of a Hub in any JSON
            info = None
    if info is None or not is_commit(info.sha):
        raise HubError(f"the answer of {constants.ENDPOINT} about {repository!r} names no commit: check HF_ENDPOINT")
    digests = {file.rfilename: (file.lfs.sha256 if file.lfs else file.blob_id) or "" for file in info.siblings or []}
    return Snapshot(repository, cache / "snapshots" / str(info.sha), str(info.sha), digests)


def _choose(files: Collection[str] | None, names: Iterable[str]) -> list[str]:
    return [name for name in names if (is_shared(name) if files is None else name in files)]


def _download(client: Callable[..., str], snapshot: Snapshot, name: str, force: bool) -> None:
    path, digest = snapshot.folder / name, snapshot.digests[name]
    for attempt in range(TRIES):
        if attempt > 0:
            logger.warning("%s of %s arrived damaged (wrong checksum): downloading it again", name, snapshot.repository)
        retry(partial(client, name, force_download=force or attempt > 0))
        if is_intact(path, digest):
            return
        path.unlink(missing_ok=True)  # a link to somewhere else would stay
    (snapshot.folder.parents[1] / "blobs" / digest).unlink(missing_ok=True)  # the cache would serve it to others
    raise HubError(
        f"{name} of {snapshot.repository!r} arrived damaged {TRIES} times, its checksum is not {digest} as the Hub "
        "states: try again later, or from another network"
    )


def _find_cached(
    repository: str, revision: str | None, cache: Path, files: Collection[str] | None, required: Collection[str]
) -> Snapshot | None:
    """Return a revision from the cache, if no file to download is missing or damaged there."""
    commit = cached_commit(cache, revision)
    if commit is None:
        return None
    folder = cache / "snapshots" / commit
    try:
        digests = dict(json.loads(_listing(folder).read_text()))
    except (OSError, ValueError):  # another program has filled the cache, and may have omitted any file
        if files is None or not required:
            return None
        digests = {path.name: path.readlink().name if path.is_symlink() else "" for path in folder.glob("*")}
    if not digests.keys() >= set(required):
        return None
    for name in _choose(files, digests):
        if not (folder / name).is_file():
            return None
        if not is_intact(folder / name, digests[name]):
            logger.warning("%s of %s is damaged in the cache", name, repository)
            return None
    return Snapshot(repository, folder, commit, digests)


def _listing(snapshot: Path) -> Path:
    """Return the note of the names and checksums of all files of a commit, cached or not."""
    return snapshot.parents[1] / "verified" / f"{snapshot.name}.json"
