"""Access to a data set on the Hub, and the size of what a run downloads."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import datasets
from huggingface_hub import HfApi, constants, get_token, try_to_load_from_cache

from scalablevit_pl.diagnosis.finding import Finding
from scalablevit_pl.weights.hub.client import ask


class Listing(NamedTuple):
    """The files of a data repository at a commit, with their sizes in bytes: parquet files, if there are any."""

    commit: str
    sizes: Mapping[str, int]


def check_token() -> Finding:
    """Report the user whose token the Hub will see."""
    if constants.HF_HUB_OFFLINE:
        text = "HF_HUB_OFFLINE is set: only the cache can be used"
        return Finding("warn", "Hub", text, "unset it to check the Hub")
    if get_token() is None:
        return Finding("ok", "Hub token", "none, which is enough for data that is neither gated nor private")
    user = ask(HfApi().whoami, "your account")
    return Finding("ok", "Hub token", f"of {user['name']}")


def check_repository(dataset: str, revision: str | None) -> tuple[Finding, Listing]:
    """Check that a data set can be read from the Hub, and list its files."""
    api, name = HfApi(), f"datasets/{dataset}"
    info = ask(lambda: api.dataset_info(dataset, revision=revision, files_metadata=True), name, revision)
    # The list of a gated repository's files is public; its files are not.
    if info.gated or info.private:
        ask(lambda: api.auth_check(dataset, repo_type="dataset"), name, revision)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    tables = {name: size for name, size in sizes.items() if name.endswith(".parquet")}
    listing = Listing(str(info.sha), tables or sizes)
    kind = "gated, and its terms are accepted" if info.gated else "private" if info.private else "public"
    text = f"{dataset} can be read ({kind}), commit {info.sha}"
    if revision == info.sha:
        return Finding("ok", "Hub access", text), listing
    given = f"revision {revision!r} is" if revision else "no revision is"
    remedy = f"pin it with --data.revision {info.sha}"
    return Finding("warn", "Hub access", f"{text}; {given} given, so later runs may get other data", remedy), listing


def missing_bytes(dataset: str, listing: Listing) -> int:
    """Return the bytes of files that are not in the cache, which returns the path of those that are."""
    cached = partial(try_to_load_from_cache, dataset, revision=listing.commit, repo_type="dataset")
    return sum(size for name, size in listing.sizes.items() if not isinstance(cached(name), str))


@contextmanager
def offline() -> Iterator[None]:
    """Use only the cache inside the block."""
    modules: tuple[Any, ...] = (constants, datasets.config)
    with ExitStack() as stack:
        for module in modules:
            stack.callback(setattr, module, "HF_HUB_OFFLINE", module.HF_HUB_OFFLINE)
            module.HF_HUB_OFFLINE = True
        yield
