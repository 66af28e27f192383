"""Build a classifier from a checkpoint of the reference release."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalablevit_pl.models.classifier import ImageClassifier
from scalablevit_pl.models.factory import create_model, list_models
from scalablevit_pl.preprocessing import Preprocessing
from scalablevit_pl.weights.folder import classifier_config
from scalablevit_pl.weights.reference import read_reference_checkpoint
from scalablevit_pl.weights.stored import CLASSIFICATION, Description, StoredModel, check_finite


def convert_checkpoint(path: str | Path, model: str, class_names: Sequence[str] = ()) -> ImageClassifier:
    """Build the classifier of a reference checkpoint around its weights; every tensor is used.

    The head, the number of classes, the images' channels and `expand_value` are read from the shapes of the weights.

    Args:
        path: A `.pth` file of the release.
        model: One of `list_models()`, a JSON file with the arguments of `ScalableViT`, or a model's `config.json`: a
            checkpoint does not hold the numbers of heads.
        class_names: Names of the classes, used if the checkpoint has as many: the release was trained on ImageNet.
    """
    tensors = read_reference_checkpoint(path)
    check_finite(tensors, repr(str(path)))
    name, arguments = _architecture(model)
    arguments["in_channels"] = _side(tensors, "backbone.stages.0.patch_embed.proj.weight", 1)
    projections = [tensor.shape for name, tensor in tensors.items() if name.endswith("attn.proj.weight")]
    arguments["expand_value"] = any(shape != shape[::-1] for shape in projections)  # as wide as SSA's queries
    config = {
        "name": name,
        "num_classes": _side(tensors, "head.fc.weight", 0),
        "head": "mlp" if "head.hidden.weight" in tensors else "linear",
        "global_pool": "avg",
        "backbone": arguments,
    }
    known = len(class_names) == config["num_classes"]
    labels, preprocessing = (list(class_names), Preprocessing()) if known else (None, None)
    description = Description(CLASSIFICATION, config, labels, preprocessing)
    return ImageClassifier.from_stored(StoredModel(description, tensors, f"{path} as {model}"))


def _architecture(model: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the backbone's arguments that `--model` means."""
    if model in list_models():
        with torch.device("meta"):
            return model, dict(create_model(model).backbone.config)
    path = Path(model)
    if not path.is_file():
        raise ValueError(
            f"{model!r} is neither one of {', '.join(list_models())} nor a JSON file with the arguments of ScalableViT"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config: dict[str, Any] = classifier_config(content) if "model_args" in content else {"backbone": dict(content)}
    except (KeyError, RecursionError, TypeError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{model!r} does not hold JSON with the arguments of ScalableViT: {error}") from error
    return config.get("name", "scalablevit_custom"), config["backbone"]


def _side(tensors: Mapping[str, Tensor], name: str, axis: int) -> int:
    shape = tensors[name].shape
    if len(shape) <= axis:
        raise ValueError(f"{name} has the shape {list(shape)}, which is not that of a weight")
    return shape[axis]
