"""The Hub client's cache on disk, and the notes that this package keeps in it.

A repository's folder in the cache holds `refs/REVISION` (a commit's hash) and `snapshots/COMMIT/NAME` (links to files).
"""

import hashlib
import logging
from pathlib import Path

from huggingface_hub import constants

from scalablevit_pl.storage import written_aside
from scalablevit_pl.weights.hub.client import COMMIT_HASH, DIGEST

logger = logging.getLogger(__name__)


def repository_folder(repository: str, repo_type: str = "model", cache_dir: str | Path | None = None) -> Path:
    """Return the folder of a repository in the cache."""
    return Path(cache_dir or constants.HF_HUB_CACHE) / f"{repo_type}s--{repository.replace('/', '--')}"


def is_commit(revision: str | None) -> bool:
    """Return whether a revision is a commit's full hash, and so never changes."""
    return revision is not None and COMMIT_HASH.fullmatch(revision) is not None


def cached_commit(cache: Path, revision: str | None) -> str | None:
    """Return the commit that a revision had when the Hub was last asked; None if it never was."""
    if revision is not None and is_commit(revision):
        return revision
    try:
        return _ref(cache, revision).read_text().strip()
    except (OSError, ValueError):  # there is none, or no file can have such a name
        return None


def note_commit(cache: Path, revision: str | None, commit: str) -> None:
    """Note the commit of a branch or tag. The client does so only where it resolves the name itself."""
    if not is_commit(revision):
        write_note(_ref(cache, revision), commit)


def _ref(cache: Path, revision: str | None) -> Path:
    return cache / "refs" / (revision or constants.DEFAULT_REVISION)


def write_note(path: Path, text: str) -> None:
    """Write a note into the cache, which may be read-only or shared with other processes: a failure is only logged."""
    try:
        if not path.is_file() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_aside(path) as aside:
                aside.write_text(text)
    except OSError as error:
        logger.debug("cannot write the note %s: %s", path, error)


def is_intact(path: Path, digest: str) -> bool:
    """Compare a file of a snapshot with its checksum, unless that was done since the file was last written."""
    if DIGEST.fullmatch(digest) is None:  # an endpoint other than the Hub may state none
        return True
    stat = path.stat()
    verified, state = path.parents[2] / "verified" / digest, f"{stat.st_size} {stat.st_mtime_ns}"
    if verified.is_file() and verified.read_text() == state:
        return True
    if checksum(path, git=len(digest) == 40) != digest:
        return False
    write_note(verified, state)
    return True


def checksum(path: Path, git: bool = False) -> str:
    """Compute a file's sha256, or the sha1 that git identifies it by."""
    with path.open("rb") as file:
        if not git:
            return hashlib.file_digest(file, "sha256").hexdigest()
        data = file.read()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
