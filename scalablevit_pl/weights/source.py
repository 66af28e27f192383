"""What `--weights` names: a run, a checkpoint, a model's folder or a repository on the Hub."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Unpack

from scalablevit_pl.run_folder import RUNS
from scalablevit_pl.weights.checkpoint import TrainedClassifier, find_checkpoint, load_trained_classifier
from scalablevit_pl.weights.folder import CONFIG, FILES, WEIGHTS, is_model_folder, load_model
from scalablevit_pl.weights.hub import FetchOptions, HubError, Snapshot, fetch, is_repository, locate

# What a recipe names its network when `--weights` decides which one it is.
FROM_WEIGHTS = "from_weights"
CREATE = "scalablevit_pl.models.create_model"
BUILD = "scalablevit_pl.models.build_classifier"
# Choices of a training, not of the network that is trained.
CHOICES = ("drop_path_rate", "drop_rate", "attn_drop_rate")


def fetch_model(
    repository: str,
    revision: str | None = None,
    *,
    files: Collection[str] | None = FILES,
    **options: Unpack[FetchOptions],
) -> Snapshot:
    """Bring a model from the Hub into the cache; arguments and errors are those of `weights.hub.fetch`."""
    return fetch(repository, revision, files=files, required=(WEIGHTS, CONFIG), **options)


def locate_model(name_or_path: str | Path, revision: str | None = None, **options: Unpack[FetchOptions]) -> Path:
    """Return the folder of a model, local or fetched; arguments and errors are those of `weights.hub.locate`."""
    return locate(name_or_path, revision, files=FILES, required=(WEIGHTS, CONFIG), **options)


def pin_weights(weights: str) -> str:
    """Bring weights from the Hub into the cache and return the commit they are of, `owner/name@commit`.

    What lies here is returned as it is.

    Args:
        weights: A path, or `owner/name` with or without a revision, `owner/name@revision`.

    Raises:
        ValueError: If it is neither here nor on the Hub.
    """
    if Path(weights).exists() or not _is_remote(weights):
        return weights
    repository, _, revision = weights.partition("@")
    try:
        return f"{repository}@{fetch_model(repository, revision or None).commit}"
    except HubError as error:
        raise HubError(f"there is no file or folder {weights!r} here; on the Hub: {error}") from error


def _is_remote(weights: str) -> bool:
    return is_repository(weights.partition("@")[0]) and Path(weights).parts[0] != str(RUNS)


def weights_path(weights: str | Path) -> Path:
    """Return where weights lie: the checkpoint of a run, or a model's folder, which may be in the Hub's cache.

    Raises:
        ValueError: If there are none.
    """
    if is_model_folder(weights):
        return Path(weights)
    if Path(weights).exists() or not _is_remote(str(weights)):
        return find_checkpoint(weights)
    repository, _, revision = pin_weights(str(weights)).partition("@")
    return fetch_model(repository, revision).folder


def load_weights(weights: str | Path, average: str | None = None) -> TrainedClassifier:
    """Rebuild the classifier of a run, a checkpoint, a model's folder or a repository, with its weights.

    Args:
        weights: Where they are.
        average: `ema` takes a checkpoint's averaged weights, `none` its raw ones; by default the averaged ones if there
            are any. A model's folder holds one set.

    Raises:
        ValueError: If there is none, it cannot be rebuilt, or a set is asked for where there is only one.
    """
    path = weights_path(weights)
    if path.is_file():
        return load_trained_classifier(path, average)
    if average is not None:
        raise ValueError(f"{str(weights)!r} holds one set of weights: leave --average {average} away")
    model = load_model(path)
    names = model.class_names or [str(index) for index in range(model.num_classes)]
    return TrainedClassifier(model, names, model.preprocessing)


def adopt_network(section: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration that builds the network of weights with a recipe's choices for the training.

    From the recipe come the number of classes, the rates of dropping and gradient checkpointing.

    Args:
        section: `class_path` and `init_args` of the recipe's network.
        stored: What `ImageClassifier.config` says of the weights' network.

    Raises:
        ValueError: If the recipe asks for another network than that of the weights.
    """
    arguments = dict(section.get("init_args") or {})
    if section.get("class_path") == CREATE:
        wanted = {"name": arguments["name"], "head": arguments.get("head"), **_backbone_wishes(arguments)}
        if wanted["name"] == FROM_WEIGHTS:
            del wanted["name"]
        config = {**stored, "num_classes": arguments["num_classes"]}
        choices = {"drop_path_rate": arguments.get("drop_path_rate")}
    elif section.get("class_path") == BUILD:
        given = arguments["config"]
        wanted = {"name": given["name"], "head": given["head"], **given["backbone"]}
        config = {**stored, "num_classes": given["num_classes"]}
        choices = {name: wanted.pop(name, None) for name in CHOICES}
    else:
        raise ValueError(f"--weights starts a network made by {CREATE}, and not by {section.get('class_path')}")
    has = {"name": stored["name"], "head": stored["head"], **stored["backbone"]}
    differing = [
        f"{name} is {value!r} in the recipe and {has.get(name)!r} in the weights"
        for name, value in wanted.items()
        if value is not None and value != has.get(name)
    ]
    if differing:
        raise ValueError(f"the weights are of another network: {'; '.join(differing)}: take the weights' values")
    config["backbone"] = {**stored["backbone"], **{key: rate for key, rate in choices.items() if rate is not None}}
    checkpointing = bool(arguments.get("grad_checkpointing"))
    return {"class_path": BUILD, "init_args": {"config": config, "grad_checkpointing": checkpointing}}


def _backbone_wishes(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those arguments of `create_model` that shape the backbone and do not stand at their defaults."""
    defaults = {"window_pad": "mask", "expand_value": False, "in_channels": 3}
    return {name: arguments.get(name) for name, value in defaults.items() if arguments.get(name, value) != value}
