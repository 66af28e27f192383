"""Start a command from trained weights: its configuration adopts their network and preprocessing."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from jsonargparse import Namespace

from scalablevit_pl.callbacks.initialization import TRAINING_ARGUMENTS
from scalablevit_pl.callbacks.run_record import CLASSES
from scalablevit_pl.models.factory import MODELS
from scalablevit_pl.models.loading import build_module, matching_tensors
from scalablevit_pl.models.scalablevit import ScalableViT
from scalablevit_pl.preprocessing import DensePreprocessing, ImagePreprocessing, Preprocessing
from scalablevit_pl.run_folder import differences
from scalablevit_pl.weights.checkpoint import TIMM_FACTORY
from scalablevit_pl.weights.stored import CLASSIFICATION, StoredModel

logger = logging.getLogger(__name__)

# Name of a recipe's network that is replaced by that of the weights.
FROM_WEIGHTS = "from_weights"
CREATE = "scalablevit_pl.models.create_model"
BUILD = "scalablevit_pl.models.build_classifier"
# The preprocessing of the datamodules that have one by default.
KINDS: dict[str, type[Preprocessing] | type[DensePreprocessing]] = {
    "scalablevit_pl.data.ClassificationDataModule": Preprocessing,
    "scalablevit_pl.data.SegmentationDataModule": DensePreprocessing,
}
STATISTICS = ("mean", "std")  # what the records of all kinds have in common


def adopt_weights(config: Namespace, stored: StoredModel, weights: str, command: str, named: Collection[str]) -> None:
    """Change a configuration so that it builds the network of the weights and uses their preprocessing.

    A network that is not one of this package's classifiers is built as configured, and so is a classifier that the
    recipe names if the weights are for another task. The weights must fit it. Only `fit` may use another image size.
    `named` are the fields of the preprocessing that options on the command line set.
    """
    if "backbone" not in stored.description.config:
        kind = stored.description.config.get("init_args", {}).get("model_name", "another network")
        raise ValueError(f"--weights needs a network with a ScalableViT backbone, but {weights!r} holds {kind}")
    described = build_module(lambda: ScalableViT(**stored.description.config["backbone"]), stored)
    matching_tensors(described, stored.tensors, weights, "backbone.")  # before it takes memory
    section = config.get("model.init_args.network")
    section = section.as_dict() if isinstance(section, Namespace) else {}
    if section.get("class_path") in (CREATE, BUILD) and _determine_network(stored, section):
        adopted = adopt_network(section, stored)
        # The description of the network stays a dictionary, as it is one argument of a function.
        arguments = Namespace(**adopted["init_args"])  # type: ignore[no-untyped-call]
        config["model.init_args.network"] = Namespace(  # type: ignore[no-untyped-call]
            class_path=adopted["class_path"], init_args=arguments
        )
    elif str(section.get("class_path")).startswith("timm."):
        raise ValueError(f"--weights starts a ScalableViT network, not one built by {section['class_path']}")
    kind = _preprocessing_kind(config)
    if stored.preprocessing is not None and kind is not None:
        _adopt_preprocessing(config, kind, stored.preprocessing, command, named)


def class_arguments(config: Any) -> tuple[Any, str]:
    """Return the arguments of a configuration's network that may include `num_classes`, and the option that sets it."""
    network = config.get("model", {}).get("init_args", {}).get("network") or {}
    arguments = network.get("init_args", {})
    if network.get("class_path") == TIMM_FACTORY:
        network["dict_kwargs"] = {"num_classes": None} | dict(network.get("dict_kwargs") or {})
        return network["dict_kwargs"], "--model.network.dict_kwargs.num_classes"
    built = network.get("class_path") == BUILD
    return (arguments["config"], "--model.network.config.num_classes") if built else (arguments, CLASSES)


def _determine_network(stored: StoredModel, section: Mapping[str, Any]) -> bool:
    """Return whether the weights determine the classifier: those of another task do so if the recipe names none."""
    return stored.description.task == CLASSIFICATION or section["init_args"].get("name") == FROM_WEIGHTS


def _preprocessing_kind(config: Namespace) -> type[Preprocessing] | type[DensePreprocessing] | None:
    """Return the record of the data's preprocessing as configured, or the datamodule's own; None for another one."""
    given = config.get("data.init_args.preprocessing")
    if given is None:
        return KINDS.get(str(config.get("data.class_path")))
    return next((kind for kind in KINDS.values() if set(given.as_dict()) == set(asdict(kind()))), None)


def _adopt_preprocessing(
    config: Namespace,
    kind: type[Preprocessing] | type[DensePreprocessing],
    stored: ImagePreprocessing,
    command: str,
    named: Collection[str],
) -> None:
    """Use the preprocessing of the weights wherever the configuration sets none; of another kind, its statistics."""
    values: dict[str, Any] = asdict(stored)
    defaults, same = asdict(kind()), isinstance(stored, kind)
    theirs = values if same else {name: values[name] for name in STATISTICS}
    given = config.get("data.init_args.preprocessing")
    given = defaults | theirs if given is None else asdict(kind(**given.as_dict()))
    # The parser adds defaults to the fields that options set, and a recipe that sets a size may set no statistics.
    if named or not same:
        unset = [key for key in theirs if key not in named and given[key] == defaults[key]]
        given |= {key: theirs[key] for key in unset}
    config["data.init_args.preprocessing"] = Namespace(**given)  # type: ignore[no-untyped-call]
    differing = differences(theirs, {key: given[key] for key in theirs}, "preprocessing")
    # The network takes images of any size, so a fit may choose another one.
    sizes = tuple(f"preprocessing.{name} " for name in ("input_size", "crop_pct", "short_side", "long_side", "divisor"))
    wrong = [line for line in differing if command != "fit" or not line.startswith(sizes)]
    if wrong:
        raise ValueError(
            f"the weights were trained on other images: {'; '.join(wrong)}: remove --data.preprocessing, or set it to "
            "their values"
        )
    for line in differing:
        logger.info("%s, as configured", line)


def adopt_network(section: Mapping[str, Any], stored: StoredModel) -> dict[str, Any]:
    """Return the configuration that builds the classifier of weights with a recipe's choices for the training.

    The recipe's `section`, built by `CREATE` or `BUILD`, supplies the number of classes, the drop rates and gradient
    checkpointing. Weights of another task supply the backbone.
    """
    arguments = dict(section.get("init_args") or {})
    config = _classifier_config(stored, arguments)
    if section["class_path"] == CREATE:
        wanted = {"name": arguments["name"], "head": arguments.get("head"), **_backbone_arguments(arguments)}
        if wanted["name"] == FROM_WEIGHTS:
            del wanted["name"]
        num_classes, choices = arguments.get("num_classes"), {"drop_path_rate": arguments.get("drop_path_rate")}
    else:
        given = arguments["config"]
        wanted = {"name": given["name"], "head": given["head"], **given["backbone"]}
        num_classes, choices = given["num_classes"], {name: wanted.pop(name, None) for name in TRAINING_ARGUMENTS}
    known = {"name": config["name"], "head": config["head"], **config["backbone"]}
    differing = [
        f"{name} is {value!r} in the recipe and {known.get(name)!r} in the weights"
        for name, value in wanted.items()
        if value is not None and value != known.get(name)
    ]
    if differing:
        raise ValueError(f"the weights are of another network: {'; '.join(differing)}: use the weights' values")
    rates = {key: rate for key, rate in choices.items() if rate is not None}
    classes = {} if num_classes is None else {"num_classes": num_classes}  # by default, the data's come later
    config |= {**classes, "backbone": config["backbone"] | rates}
    checkpointing = bool(arguments.get("grad_checkpointing"))
    return {"class_path": BUILD, "init_args": {"config": config, "grad_checkpointing": checkpointing}}


def _classifier_config(stored: StoredModel, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `config` of the weights' classifier, or of a new one on their backbone."""
    config = dict(stored.description.config)
    if stored.description.task == CLASSIFICATION:
        return config
    name = config.get("name", "scalablevit_custom")
    head = arguments.get("head") or (MODELS[name][1] if name in MODELS else "linear")
    return {"name": name, "num_classes": 1000, "head": head, "global_pool": "avg", "backbone": config["backbone"]}


def _backbone_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those arguments of `create_model` that shape the backbone and differ from their defaults."""
    if arguments.get("in_chans") is not None:
        arguments = {**arguments, "in_channels": arguments["in_chans"]}
    defaults = {"window_pad": "mask", "expand_value": False, "in_channels": 3}
    return {name: arguments.get(name) for name, value in defaults.items() if arguments.get(name, value) != value}
