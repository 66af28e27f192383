"""Upload a model's folder as one commit, after everything has been checked. The folder itself never changes."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session
from huggingface_hub.errors import RepositoryNotFoundError

from scalablevit_pl.text import one_line
from scalablevit_pl.weights.card import parse_card
from scalablevit_pl.weights.hub.cache import is_commit
from scalablevit_pl.weights.hub.client import (
    HubError,
    HubUnreachableError,
    Token,
    ask,
    hub_errors,
    is_repository,
    is_shared,
    retry,
)
from scalablevit_pl.weights.hub.download import Snapshot

CARD = constants.REPOCARD_NAME
# The line that loads a model in a card written by `scalablevit_pl.weights.card`.
LOADING = re.compile(r'from_pretrained\("[^"]*"\)  # this folder')
PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})


@dataclass(frozen=True)
class PushPlan:
    """The effect of a push, after every check that is possible beforehand."""

    folder: Path
    repository: str  # owner/name
    branch: str
    exists: bool  # the repository
    private: bool | None  # a new repository; None for the owner's default
    files: dict[str, int]  # names of the files to upload, with their sizes in bytes
    left_out: list[str]  # names in the folder that are not uploaded
    card: str  # text of `README.md` in the commit: the folder's, with the repository's name and the licence
    api: HfApi = field(repr=False, compare=False)  # holds the token


def plan_push(
    folder: str | Path,
    repository: str,
    *,
    check: Callable[[Path], object],
    private: bool | None = None,
    branch: str | None = None,
    token: Token = None,
    license: str | None = None,  # noqa: A002
) -> PushPlan:
    """Check everything that could make a push fail or be regretted, without changing anything.

    The card must state a licence that allows sharing, and the token must be allowed to write to the repository.

    Args:
        folder: A model's folder.
        repository: `owner/name`, or a name below the owner of the token.
        check: Load the folder strictly; an error that it raises is passed on.
        private: Whether a new repository is private, by default as its owner's settings say. An existing public one is
            refused if this is True.
        branch: Branch to push to, by default the main one.
        token: Access token; by default the one that `hf auth login` has stored.
        license: Licence under which the model is shared, instead of the one in the folder's card.

    Raises:
        HubError: If something is missing or not allowed.
    """
    folder, branch, api = Path(folder), branch or constants.DEFAULT_REVISION, HfApi(token=token)
    check(folder)
    card = _read_card(folder, license)
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    pickles = [name for name in names if Path(name).suffix.lower() in PICKLE_SUFFIXES]
    if pickles:
        raise HubError(f"{str(folder)!r} holds {pickles[0]!r}, which can run code when it is opened: remove it")
    if is_commit(branch):
        raise HubError(f"{branch!r} is a commit, and a push needs a branch: give the name of one")
    sizes = {name: (folder / name).stat().st_size for name in names if is_shared(name) and (folder / name).is_file()}
    with hub_errors(repository):
        repository = _writable_repository(api, repository)
        exists = _exists(api, repository, private)
        card = LOADING.sub(f'from_pretrained("{repository}")', card)
        retry(lambda: _validate(card))
    left_out = [name for name in names if name not in sizes]
    sizes[CARD] = len(card.encode())
    return PushPlan(folder, repository, branch, exists, private, sizes, left_out, card, api)


def push(plan: PushPlan, commit_message: str = "Upload a model with scalablevit_pl") -> Snapshot:
    """Upload the files of a plan as one commit. A missing repository or branch is created; a push can be repeated.

    Returns:
        The folder, with the commit and the sha256 of each file in it.

    Raises:
        HubError: If the Hub refuses the files. Then nothing is committed.
    """
    contents = {name: plan.card.encode() if name == CARD else plan.folder / name for name in plan.files}

    def commit() -> Snapshot:
        additions = [CommitOperationAdd(name, content) for name, content in contents.items()]
        made = plan.api.create_commit(plan.repository, additions, commit_message=commit_message, revision=plan.branch)
        digests = {addition.path_in_repo: addition.upload_info.sha256.hex() for addition in additions}
        return Snapshot(plan.repository, plan.folder, str(made.oid), digests)

    with hub_errors(plan.repository, plan.branch):
        if not plan.exists:
            retry(lambda: plan.api.create_repo(plan.repository, private=plan.private, exist_ok=True))
        if plan.branch != constants.DEFAULT_REVISION:
            retry(lambda: plan.api.create_branch(plan.repository, branch=plan.branch, exist_ok=True))
    try:
        return ask(
            commit, plan.repository, plan.branch
        )  # the client skips unchanged files, so a commit whose answer was lost is found
    except HubUnreachableError as error:
        raise HubError(f"{error}; the commit is not confirmed, and pushing again is safe") from error


def _read_card(folder: Path, license: str | None) -> str:  # noqa: A002
    """Return the text of the folder's card, with another licence if one is given; refuse one that forbids sharing."""
    path = folder / CARD
    if not path.is_file():
        raise HubError(f"{str(folder)!r} has no {CARD}: export the model again, or write its card")
    try:
        text = path.read_bytes().decode()  # keeps the ends of lines
        card = parse_card(text)
    except (ValueError, yaml.YAMLError) as error:
        raise HubError(f"the metadata of {str(path)!r} cannot be read ({one_line(error)}): correct it") from error
    stated = card.data.get("license")
    if license is not None and license != stated:
        card.data["license"] = license
        return str(card)
    if license is None and stated in (None, "", "unknown", "other"):
        raise HubError(
            f"{str(path)!r} states {f'the licence {stated!r}' if stated else 'no licence'}, so sharing the weights may "
            "not be allowed: if you are allowed to, name the licence with --license"
        )
    return text


def _validate(card: str) -> None:
    """Have the Hub check a card's metadata before anything is created."""
    # The client's own method is private, and asks huggingface.co in older releases whatever the endpoint is.
    content = {"content": card, "repoType": "model"}
    response = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=content)
    if response.status_code == 400:
        raise HubError(f"the Hub rejects the metadata of {CARD} ({one_line(response.text)}): correct them")
    response.raise_for_status()


def _writable_repository(api: HfApi, repository: str) -> str:
    """Return the full name of a repository, after checking that the token may write to its owner's repositories."""
    if not is_repository(repository) and not is_repository(f"x/{repository}"):
        raise HubError(f"{repository!r} is not a valid repository name: give owner/name")
    me: dict[str, Any] = retry(api.whoami)
    owner, _, name = repository.rpartition("/")
    owner = owner or me["name"]
    organizations = [one["name"] for one in me.get("orgs") or [] if one.get("roleInOrg") != "read"]
    owners = [me["name"], *organizations]
    if owner not in owners:
        raise HubError(
            f"the token of {me['name']!r} does not allow writing to {owner!r}: push to {', '.join(owners)}, or log in "
            "with another token"
        )
    if ((me.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise HubError(f"the token of {me['name']!r} is read-only: create one with write access, and log in with it")
    return f"{owner}/{name}"


def _exists(api: HfApi, repository: str, private: bool | None) -> bool:
    """Return whether a repository exists; refuse a public one if a private one is wanted."""
    try:
        info = retry(lambda: api.model_info(repository))
    except RepositoryNotFoundError:
        return False
    if private and not info.private:
        raise HubError(f"{repository!r} exists and is public: make it private on the Hub, or push to another one")
    return True
