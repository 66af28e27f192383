"""Retries, time limits and readable errors for calls of the Hub's client."""

import errno
import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants, get_session
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from scalablevit_pl.text import one_line

Result = TypeVar("Result")
Token = str | bool | None
# The client's HTTP library differs between its releases; its own errors derive from that library's.
NETWORK_ERROR = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
TRIES = 3
SILENCE = 15.0  # seconds without a byte from the server after which a request is abandoned
COMMIT_HASH = re.compile(r"[0-9a-f]{40}")
DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Files that are shared: nothing that runs when it is opened.
SHARED_SUFFIXES = frozenset({".safetensors", ".json", ".md", ".png", ".csv", ".txt"})

LOGIN = "log in with `hf auth login` or give a token"
# The first class that fits is taken: some derive from others below.
EXPLANATIONS: tuple[tuple[type[Exception], str], ...] = (
    (OfflineModeIsEnabled, "HF_HUB_OFFLINE is set, so the Hub is not asked for {repository!r}: unset it"),
    (HFValidationError, "{repository!r} is not a valid repository name: give owner/name"),
    (GatedRepoError, f"{{repository!r}} is gated: accept its terms at {{url}}, then {LOGIN}"),
    (RevisionNotFoundError, "{repository!r} has no revision {revision!r}: give an existing branch, tag or commit hash"),
    (
        RepositoryNotFoundError,
        f"the Hub has no repository {{repository!r}}, or it is private: check the name, or {LOGIN} that can read it",
    ),
    (LocalTokenNotFoundError, "{repository!r} needs a token: log in with `hf auth login`, or set HF_TOKEN"),
)
REMEDIES = {
    401: "the token is wrong or expired: log in with `hf auth login`",
    403: "the token lacks the permission: log in with one that has it",
    412: "the repository has changed in the meantime: push again",
}


class HubError(ValueError):
    """A model cannot be downloaded or uploaded; the message says what to do."""


class HubUnreachableError(HubError):
    """The Hub did not answer, so what is cached may be used instead."""


def is_repository(name: str) -> bool:
    """Return whether a name has the form of a repository's, `owner/name`."""
    return REPOSITORY.fullmatch(name) is not None


def is_shared(name: str) -> bool:
    """Return whether a file of a model's folder is shared: no subfolder, no hidden file, no code, no pickle."""
    path = Path(name)
    plain = path.suffix.lower() in SHARED_SUFFIXES or (not path.suffix and path.name.startswith("LICENSE"))
    return "/" not in name and not name.startswith(".") and plain


def repository_url(repository: str) -> str:
    """Return the address of a repository's page."""
    return f"{constants.ENDPOINT}/{repository}"


def retry(call: Callable[[], Result]) -> Result:
    """Call a function up to three times, as long as it fails for a transient reason.

    The client itself retries some requests only. A request that timed out is not repeated: where that can help, the
    client has done so.
    """
    for attempt in range(1, TRIES):
        try:
            with limited_silence():
                return call()
        except Exception as error:
            if not _is_transient(error) or _timed_out(error):
                raise
            time.sleep(attempt)
    with limited_silence():
        return call()


def ask(call: Callable[[], Result], repository: str, revision: str | None = None) -> Result:
    """Call a function with retries; its errors are those of `hub_errors`."""
    with hub_errors(repository, revision):
        return retry(call)


@contextmanager
def limited_silence() -> Iterator[None]:
    """Limit how long a server may stay silent, and what it may name files. Most requests would wait indefinitely.

    The client replaces its session after some failures, so each call needs its own limits.
    """
    hooks = get_session().event_hooks
    hooks["request"].append(_limit_silence)  # threads share the session: each adds and removes one of equal hooks
    hooks["response"].append(_replace_etag)
    try:
        yield
    finally:
        hooks["request"].remove(_limit_silence)
        hooks["response"].remove(_replace_etag)


def _limit_silence(request: Any) -> None:
    limits = request.extensions.get("timeout") or {}
    kinds = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {kind: min(limits.get(kind) or SILENCE, SILENCE) for kind in kinds}


def _replace_etag(response: Any) -> None:
    """Replace an ETag that is not a digest by one that is safe as a file name: the client names cached files so."""
    for name in ("X-Linked-ETag", "ETag"):
        etag = response.headers.get(name)
        if etag is not None and not DIGEST.fullmatch(etag.removeprefix("W/").strip('"')):
            response.headers[name] = f"etag-{hashlib.sha256(etag.encode()).hexdigest()}"


def _is_transient(error: Exception) -> bool:
    """Return whether the same request may succeed a little later."""
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in (408, 429, 500, 502, 503, 504)
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return False
    if isinstance(error, JSONDecodeError):  # the answer was cut off
        return True
    if isinstance(error, RuntimeError):  # an upload, which older clients retry less often
        cause = error.__cause__
        return isinstance(cause, NETWORK_ERROR) and not isinstance(cause, HfHubHTTPError) and not _timed_out(cause)
    return isinstance(error, NETWORK_ERROR | ConnectionError) or "Consistency check failed" in str(error)


def _timed_out(error: BaseException | None) -> bool:
    return type(error).__name__.endswith("Timeout")


@contextmanager
def hub_errors(repository: str, revision: str | None = None) -> Iterator[None]:
    """Raise a `HubError` of one sentence instead of the client's errors; most errors of the disk stay as they are.

    Raises:
        HubUnreachableError: If the Hub did not answer.
        HubError: If it refused.
    """
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        sentence = _explain(error, repository, revision)
        if sentence is None:
            raise
        unreachable = _is_transient(error) or isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError)
        raise (HubUnreachableError if unreachable else HubError)(sentence) from error


def _explain(error: Exception, repository: str, revision: str | None) -> str | None:
    """Return one sentence for an error of the Hub's client, or None for any other error."""
    for kind, sentence in EXPLANATIONS:
        if isinstance(error, kind):
            return sentence.format(repository=repository, revision=revision, url=repository_url(repository))
    reason = one_line(error, 200)
    if isinstance(error, HfHubHTTPError) and not isinstance(error, EntryNotFoundError):
        status, reason = error.response.status_code, one_line(error.server_message or error, 200)
        remedy = REMEDIES.get(status, "try again later" if status >= 500 or status == 429 else "see the Hub's message")
        return f"the Hub answered {status} for {repository!r} ({reason}): {remedy}"
    if isinstance(error, LocalEntryNotFoundError) or _is_transient(error):
        address = constants.ENDPOINT
        return f"the Hub at {address} cannot be reached for {repository!r}, or breaks off ({reason}): try again later"
    if isinstance(error, EntryNotFoundError):
        return f"a file of {repository!r} is missing on the Hub: {reason}"
    if isinstance(error, RuntimeError):
        reason = one_line(error.__cause__ or error, 200)
        return f"the upload to {repository!r} failed and nothing was committed ({reason}): push again"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full, {repository!r} does not fit: free some, or move the cache with HF_HOME"
    if isinstance(error, ValueError):  # such as the metadata of a card
        return f"the Hub rejected the data for {repository!r} ({reason}): correct them"
    return None
