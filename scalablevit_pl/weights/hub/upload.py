"""From a folder to a repository: everything is checked first, then one commit is made."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants, get_session
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError

from scalablevit_pl.storage import written_aside
from scalablevit_pl.weights.hub.client import (
    COMMIT_HASH,
    HubError,
    Token,
    explained,
    giving_up,
    is_repository,
    is_shared,
    is_unreachable,
    one_line,
    patiently,
)
from scalablevit_pl.weights.hub.download import Snapshot, checksum

logger = logging.getLogger(__name__)

CARD = constants.REPOCARD_NAME
# The line of a card that `scalablevit_pl.weights.card` writes for a folder.
LOADING = re.compile(r'from_pretrained\("[^"]*"\)  # this folder')
PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})


@dataclass(frozen=True)
class PushPlan:
    """What a push would do, after all that can be checked beforehand has been.

    Attributes:
        repository: `owner/name`.
        branch: Where the commit goes.
        exists: Whether there is such a repository.
        files: Names and sizes in bytes of what travels.
        left_out: Names in the folder that do not.
        card: The text of `README.md` as it will be pushed.
    """

    repository: str
    branch: str
    exists: bool
    files: dict[str, int]
    left_out: list[str]
    card: str


def plan_push(
    folder: str | Path,
    repository: str,
    *,
    check: Callable[[Path], object],
    private: bool | None = None,
    revision: str | None = None,
    token: Token = None,
    license: str | None = None,  # noqa: A002
) -> PushPlan:
    """Check all that could make a push fail or be regretted, and change nothing.

    The folder is loaded strictly, its card must state a licence that lets it be shared, and the token must be one that
    may write to the repository.

    Args:
        folder: A model's folder.
        repository: `owner/name`, or a name below the owner of the token.
        check: Loads the folder strictly; what it raises ends the push.
        private: Whether the repository has to be private.
        revision: Branch to push to; by default the main one.
        token: Access token; by default the one that `hf auth login` has stored.
        license: The licence under which the model is shared, in place of the one that the card states.

    Raises:
        HubError: If something is missing, or not allowed.
        ValueError: If the folder holds no model that loads.
    """
    folder = Path(folder)
    check(folder)
    card = _checked_card(folder, license)
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    pickles = [name for name in names if Path(name).suffix.lower() in PICKLE_SUFFIXES]
    if pickles:
        raise HubError(f"{str(folder)!r} holds {pickles[0]!r}, which can run code where it is opened: remove it")
    sizes = {name: (folder / name).stat().st_size for name in names if is_shared(name) and (folder / name).is_file()}
    if revision is not None and COMMIT_HASH.fullmatch(revision):
        raise HubError(f"a push goes to a branch, and {revision!r} is a commit: give the name of a branch")
    with explained(repository):
        repository = _allowed_repository(repository, token)
        exists = _exists(repository, token, private)
        card = LOADING.sub(f'from_pretrained("{repository}")', card)
        patiently(lambda: _validate(card))
    return PushPlan(
        repository,
        revision or constants.DEFAULT_REVISION,
        exists,
        sizes | {CARD: len(card.encode())},
        [name for name in names if name not in sizes],
        card,
    )


def push(
    folder: str | Path,
    repository: str,
    *,
    check: Callable[[Path], object],
    private: bool | None = None,
    revision: str | None = None,
    token: Token = None,
    license: str | None = None,  # noqa: A002
    commit_message: str = "Upload a model with scalablevit_pl",
) -> Snapshot:
    """Upload a model's folder as one commit, after all checks of `plan_push`. To repeat it is safe.

    Args:
        folder: A model's folder.
        repository: `owner/name`, or a name below the owner of the token; made if need be.
        check: Loads the folder strictly; what it raises ends the push.
        private: Whether a repository that is made is private; by default as the owner's settings say.
        revision: Branch to push to, made if need be; by default the main one.
        token: Access token; by default the one that `hf auth login` has stored.
        license: The licence under which the model is shared; it is written into the folder's card, as is the
            repository's name where the card says how to load the model.
        commit_message: Title of the commit.

    Returns:
        The folder, the commit and its checksums.

    Raises:
        HubError: If a check fails, or the Hub does not take the files; then nothing is committed.
        ValueError: If the folder holds no model that loads.
    """
    folder = Path(folder)
    plan = plan_push(folder, repository, check=check, private=private, revision=revision, token=token, license=license)
    if plan.card != (folder / CARD).read_text(encoding="utf-8"):
        with written_aside(folder / CARD) as aside:
            aside.write_text(plan.card, encoding="utf-8")
    api = HfApi(token=token)
    additions = [CommitOperationAdd(name, folder / name) for name in plan.files]
    with explained(plan.repository, plan.branch):
        if not plan.exists:
            patiently(lambda: api.create_repo(plan.repository, private=private, exist_ok=True))
        if plan.branch != constants.DEFAULT_REVISION:
            patiently(lambda: api.create_branch(plan.repository, branch=plan.branch, exist_ok=True))
        patiently(lambda: api.preupload_lfs_files(plan.repository, additions, revision=plan.branch, free_memory=False))
        commit = _commit(api, plan, additions, commit_message)
    digests = {name: checksum(folder / name) for name in plan.files}
    return Snapshot(plan.repository, folder, commit, digests)


def _commit(api: HfApi, plan: PushPlan, additions: Sequence[CommitOperationAdd], message: str) -> str:
    """Make the commit and return its hash; where the answer is lost, look whether it has been made."""
    try:
        with giving_up():
            return str(api.create_commit(plan.repository, additions, commit_message=message, revision=plan.branch).oid)
    except Exception as error:
        if not is_unreachable(error):
            raise
        info = patiently(lambda: api.model_info(plan.repository, revision=plan.branch, files_metadata=True))
        there = {file.rfilename: (file.lfs.sha256 if file.lfs else file.blob_id) for file in info.siblings or []}
        for addition in additions:
            path, digest = Path(str(addition.path_or_fileobj)), there.get(addition.path_in_repo) or ""
            if checksum(path, git=len(digest) == 40) != digest:
                raise HubError(
                    f"the commit to {plan.repository!r} was not made, the Hub did not answer: push again, which is safe"
                ) from error
        logger.warning("the Hub's answer to the commit was lost, but the commit has been made")
        return str(info.sha)


def _checked_card(folder: Path, license: str | None) -> str:  # noqa: A002
    """Return the card with its licence.

    Raises:
        HubError: If there is no card, it is damaged, or it states no licence under which a model may be shared.
    """
    path = folder / CARD
    if not path.is_file():
        raise HubError(f"{str(folder)!r} has no {CARD}: export the model again, or write its card")
    try:
        text = path.read_text(encoding="utf-8")
        card = ModelCard(text)
    except (ValueError, yaml.YAMLError) as error:
        raise HubError(f"{str(path)!r} has no readable metadata: {one_line(error)}") from error
    stated = card.data.get("license")
    if license is not None and license != stated:
        card.data["license"] = license
        return str(card)
    if license is None and stated in (None, "", "unknown", "other"):
        raise HubError(
            f"{str(path)!r} states {f'the licence {stated!r}' if stated else 'no licence'}, under which nobody may be "
            "allowed to share the weights: if you may, name the licence with --license"
        )
    return text


def _validate(card: str) -> None:
    """Let the Hub look at a card's metadata, which else it would refuse after the upload.

    Raises:
        HubError: If it does not take them.
    """
    # Older clients' own method asks the Hub even where another endpoint is set.
    content = {"content": card, "repoType": "model"}
    response = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=content)
    if response.status_code == 400:
        raise HubError(f"the Hub does not take the metadata of {CARD} ({response.text[:300]}): correct them")
    response.raise_for_status()


def _allowed_repository(repository: str, token: Token) -> str:
    """Return the full name of a repository that the owner of the token may write to.

    Raises:
        HubError: If there is no token, or it may not.
    """
    if not is_repository(repository) and not is_repository(f"x/{repository}"):
        raise HubError(f"{repository!r} is no name of a repository: give owner/name")
    try:
        me: dict[str, Any] = patiently(lambda: HfApi(token=token).whoami())
    except LocalTokenNotFoundError as error:
        raise HubError("a push needs a token that may write: log in with `hf auth login`, or set HF_TOKEN") from error
    owner, _, name = repository.rpartition("/")
    owner = owner or me["name"]
    organizations = [one["name"] for one in me.get("orgs") or [] if one.get("roleInOrg") != "read"]
    owners = [me["name"], *organizations]
    if owner not in owners:
        raise HubError(
            f"the token belongs to {me['name']!r}, who may not write to {owner!r}: push to {', '.join(owners)}"
        )
    if ((me.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise HubError(f"the token of {me['name']!r} may only read: make one that may write, and log in with it")
    return f"{owner}/{name}"


def _exists(repository: str, token: Token, private: bool | None) -> bool:
    """Tell whether there is such a repository.

    Raises:
        HubError: If it is public and shall be private.
    """
    try:
        info = patiently(lambda: HfApi(token=token).model_info(repository))
    except RepositoryNotFoundError:
        return False
    if private and not info.private:
        raise HubError(f"{repository!r} is there already, and public: make it private on the Hub, or push elsewhere")
    return True
