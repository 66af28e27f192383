"""What `--weights` names: a run, a checkpoint, a model's folder or a repository on the Hub."""

from functools import partial
from pathlib import Path
from typing import Any

from scalablevit_pl.run_folder import RUNS
from scalablevit_pl.weights.checkpoint import find_checkpoint, read_run
from scalablevit_pl.weights.folder import CONFIG, FILES, WEIGHTS, is_model_folder, read_folder
from scalablevit_pl.weights.hub.client import HubError, is_repository
from scalablevit_pl.weights.hub.download import Snapshot, fetch
from scalablevit_pl.weights.stored import StoredModel

# Brings a model from the Hub into the cache: `weights.hub.download.fetch` for the files of a model.
fetch_model = partial(fetch, files=FILES, required=(WEIGHTS, CONFIG))


def locate_model(name_or_path: str | Path, revision: str | None = None, **options: Any) -> Path:
    """Return a local folder, or download the repository of that name; `options` are arguments of `fetch`."""
    if isinstance(name_or_path, Path) or Path(name_or_path).is_dir():
        return Path(name_or_path)
    if not is_repository(name_or_path):
        raise HubError(f"{name_or_path!r} is neither a folder nor a repository name: give a path, or owner/name")
    return _fetch(name_or_path, revision, **options).folder


def pin_weights(weights: str) -> str:
    """Fetch weights from the Hub into the cache and return them with their commit, `owner/name@commit`.

    A local path is returned unchanged.

    Args:
        weights: A path, or `owner/name` with or without a revision, `owner/name@revision`.
    """
    if not _is_remote(weights):
        return weights
    snapshot = _fetch(weights)
    return f"{snapshot.repository}@{snapshot.commit}"


def _fetch(weights: str, revision: str | None = None, **options: Any) -> Snapshot:
    repository, _, pinned = weights.partition("@")
    try:
        return fetch_model(repository, revision or pinned or None, **options)
    except HubError as error:
        raise HubError(f"there is no file or folder {weights!r} here; on the Hub: {error}") from error


def _is_remote(weights: str) -> bool:
    named = is_repository(weights.partition("@")[0]) and Path(weights).parts[0] != str(RUNS)
    return named and not Path(weights).exists()


def weights_path(weights: str | Path) -> Path:
    """Return the path of weights: the checkpoint of a run, or a model's folder, which may be in the Hub's cache."""
    if is_model_folder(weights):
        return Path(weights)
    return _fetch(str(weights)).folder if _is_remote(str(weights)) else find_checkpoint(weights)


def load_weights(weights: str | Path, average: str | None = None) -> StoredModel:
    """Read the description and the weights of a run, a checkpoint, a model's folder or a repository.

    Args:
        weights: Path, or `owner/name` with or without `@revision`.
        average: `ema` for a checkpoint's averaged weights, `none` for its raw ones; by default the averaged ones if
            there are any. A model's folder holds one set.
    """
    path = weights_path(weights)
    if path.is_file():
        return read_run(path, average)
    if average is not None:
        raise ValueError(f"{str(weights)!r} holds one set of weights: remove --average {average}")
    return read_folder(path)
