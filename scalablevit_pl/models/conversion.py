"""From a checkpoint of the reference release to a classifier."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalablevit_pl.data.imagenet import imagenet_names
from scalablevit_pl.models import ImageClassifier, build_classifier, create_model, list_models
from scalablevit_pl.preprocessing import Preprocessing
from scalablevit_pl.weights.checkpoint import read_reference_checkpoint
from scalablevit_pl.weights.folder import annotate, check_finite, network_config

IMAGENET_CLASSES = 1000


def convert_checkpoint(path: str | Path, model: str) -> ImageClassifier:
    """Build the classifier of a reference checkpoint around its weights; every tensor is used.

    The head, the number of classes, the images' channels and `expand_value` are read from the shapes of the weights.

    Args:
        path: A `.pth` file of the release.
        model: One of `list_models()`; or a JSON file with the arguments of `ScalableViT`, or a model's `config.json`:
            the numbers of heads are not in the checkpoint.

    Raises:
        ValueError: If the file cannot be read, or its weights are not those of that network; it names a tensor.
    """
    tensors = read_reference_checkpoint(path)
    check_finite(tensors, repr(str(path)))
    name, arguments = _architecture(model)
    hidden = "head.hidden.weight" in tensors
    read = {"in_channels": _side(tensors, "backbone.stages.0.patch_embed.proj.weight", 1)}
    config = {
        "name": name,
        "num_classes": _side(tensors, "head.fc.weight", 0),
        "head": "mlp" if hidden else "linear",
        "backbone": arguments | read | {"expand_value": _expands_value(tensors)},
    }
    try:
        with torch.device("meta"):
            classifier = build_classifier(config)
    except (ArithmeticError, RuntimeError, ValueError) as error:
        raise ValueError(f"{model!r} describes no network that can be built: {error}") from error
    try:
        classifier.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {str(path)!r} are not those of {model!r}: {' '.join(str(error).split())[:300]}"
        ) from error
    if classifier.num_classes == IMAGENET_CLASSES:
        annotate(classifier, list(imagenet_names()), Preprocessing())
    return classifier.eval()


def _architecture(model: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the backbone's arguments that `--model` means.

    Raises:
        ValueError: If it is neither a name nor a file with arguments.
    """
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
        config: dict[str, Any] = network_config(content) if "model_args" in content else {"backbone": dict(content)}
    except (KeyError, RecursionError, TypeError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{model!r} holds no JSON with the arguments of ScalableViT: {error}") from error
    return config.get("name", "scalablevit_custom"), config["backbone"]


def _side(tensors: Mapping[str, Tensor], name: str, axis: int) -> int:
    """Return a side of a tensor.

    Raises:
        ValueError: If it has no such side.
    """
    shape = tensors[name].shape
    if len(shape) <= axis:
        raise ValueError(f"{name} has the shape {list(shape)}, which is not that of a weight")
    return shape[axis]


def _expands_value(tensors: Mapping[str, Tensor]) -> bool:
    """Tell by a projection that is not square whether SSA's values are as wide as its queries."""
    projections = [tensor for name, tensor in tensors.items() if name.endswith("attn.proj.weight")]
    return any(tensor.shape != tensor.shape[::-1] for tensor in projections)
