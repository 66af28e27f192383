"""What the Hub's client leaves to its callers: patience with interruptions, and one sentence for a failure."""

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
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
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

Result = TypeVar("Result")
Token = str | bool | None
# The client has changed its HTTP library between releases; its own errors derive from that of the one it uses.
NETWORK_ERROR = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
TRIES = 3
SILENCE = 15.0  # seconds without a byte from the server after which a request is given up
COMMIT_HASH = re.compile(r"[0-9a-f]{40}")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What may go to the Hub and come from it: nothing that runs when it is opened.
SHARED_SUFFIXES = frozenset({".safetensors", ".json", ".md", ".png", ".csv", ".txt"})
HOOKS = threading.Lock()


class HubError(ValueError):
    """What keeps a model from coming from the Hub or going there; the message says what to do."""


def is_repository(name: str) -> bool:
    """Tell whether a name can be that of a repository: `owner/name`."""
    return REPOSITORY.fullmatch(name) is not None


def is_shared(name: str) -> bool:
    """Tell whether a file in a model's folder is one that travels: no subfolder, no hidden file, no code, no pickle."""
    path = Path(name)
    plain = path.suffix.lower() in SHARED_SUFFIXES or (not path.suffix and path.name.startswith("LICENSE"))
    return "/" not in name and not name.startswith(".") and plain


def repository_url(repository: str) -> str:
    """Return the address of a repository's page."""
    return f"{constants.ENDPOINT}/{repository}"


@contextmanager
def giving_up() -> Iterator[None]:
    """Bound the silence of a server in all requests: most of the client's would wait for ever."""
    session = get_session()

    def bound(request: Any) -> None:
        limits = request.extensions.get("timeout") or {}
        kinds = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = {kind: min(limits.get(kind) or SILENCE, SILENCE) for kind in kinds}

    with HOOKS:  # other threads have the same session
        hooks = session.event_hooks
        session.event_hooks = {**hooks, "request": [*hooks["request"], bound]}
    try:
        yield
    finally:
        with HOOKS:
            hooks = session.event_hooks
            session.event_hooks = {**hooks, "request": [hook for hook in hooks["request"] if hook is not bound]}


def patiently(call: Callable[[], Result]) -> Result:
    """Call a function again after an interruption that may pass, which the client does for some requests only.

    A request that has run out of time is not made again: where that can help, the client has done so. Each call gets
    limits of its own, since the client begins a new session after some failures.
    """
    for attempt in range(1, TRIES):
        try:
            with giving_up():
                return call()
        except Exception as error:
            if not may_pass(error) or _timed_out(error):
                raise
            time.sleep(attempt)
    with giving_up():
        return call()


def may_pass(error: Exception) -> bool:
    """Tell whether the same request may succeed a little later."""
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in (408, 429, 500, 502, 503, 504)
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return False
    if isinstance(error, JSONDecodeError):  # an answer that broke off
        return True
    if isinstance(error, RuntimeError):  # of an upload, for which older clients retry less
        cause = error.__cause__
        return isinstance(cause, NETWORK_ERROR) and not isinstance(cause, HfHubHTTPError) and not _timed_out(cause)
    return isinstance(error, NETWORK_ERROR | ConnectionError) or "Consistency check failed" in str(error)


def _timed_out(error: BaseException | None) -> bool:
    return type(error).__name__.endswith("Timeout")


def is_unreachable(error: Exception) -> bool:
    """Tell whether the Hub has given no answer, as against one that is no."""
    return may_pass(error) or isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError)


@contextmanager
def explained(repository: str, revision: str | None = None) -> Iterator[None]:
    """Turn what the Hub's client raises into one sentence; errors of the disk stay as they are.

    Raises:
        HubError: In the place of the client's errors.
    """
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        sentence = explain_hub(error, repository, revision)
        if sentence is None:
            raise
        raise HubError(sentence) from error


def explain_hub(error: Exception, repository: str, revision: str | None) -> str | None:
    """Return one sentence for what the Hub's client raises, or None for an error that is not its own."""
    login = "log in with `hf auth login` or give a token"
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE forbids to ask the Hub for {repository!r}: unset it"
    if isinstance(error, HFValidationError):
        return f"{repository!r} is no name of a repository: give owner/name"
    if isinstance(error, GatedRepoError):
        return f"{repository!r} is gated: accept its terms at {repository_url(repository)}, then {login}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repository!r} has no revision {revision!r}: give a branch, a tag or a commit hash that it has"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"the Hub has no repository {repository!r}, or it is private: check the name, or {login} that may read it"
        )
    if isinstance(error, LocalEntryNotFoundError) or (may_pass(error) and not isinstance(error, HfHubHTTPError)):
        hub, reason = constants.ENDPOINT, one_line(error)
        return f"the Hub at {hub} cannot be reached for {repository!r}, or breaks off ({reason}): try again later"
    if isinstance(error, EntryNotFoundError):
        return f"a file of {repository!r} is missing on the Hub: {one_line(error)}"
    if isinstance(error, HfHubHTTPError):
        return _refusal(error, repository)
    if isinstance(error, RuntimeError):
        reason = one_line(error.__cause__ or error)
        return f"the upload to {repository!r} failed and nothing was committed ({reason}): push again"
    if isinstance(error, ValueError):  # such as metadata of a card that the Hub does not take
        return f"the Hub does not take this for {repository!r} ({one_line(error)}): correct it"
    return None


def _refusal(error: HfHubHTTPError, repository: str) -> str:
    status, said = error.response.status_code, error.server_message or one_line(error)
    remedies: Mapping[int, str] = {
        401: "the token is wrong or expired: log in with `hf auth login`",
        403: "the token may not do this: make one that may, and log in with it",
        412: "the repository has changed meanwhile: push again",
    }
    remedy = remedies.get(status, "try again later" if status >= 500 or status == 429 else "see what the Hub says")
    return f"the Hub answered {status} for {repository!r} ({' '.join(str(said).split())[:200]}): {remedy}"


def one_line(error: BaseException) -> str:
    """Shorten a message to one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
