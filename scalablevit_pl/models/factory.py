"""Networks by name, and from the plain values that travel with weights."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from scalablevit_pl.models.attention import WindowPad
from scalablevit_pl.models.classifier import HeadName, ImageClassifier
from scalablevit_pl.models.scalablevit import (
    ScalableViT,
    scalablevit_b,
    scalablevit_l,
    scalablevit_nano,
    scalablevit_s,
)

# Each name with its builder and the head it has unless another one is asked for.
MODELS: dict[str, tuple[Callable[..., ScalableViT], HeadName]] = {
    "scalablevit_nano": (scalablevit_nano, "linear"),
    "scalablevit_s": (scalablevit_s, "mlp"),
    "scalablevit_b": (scalablevit_b, "mlp"),
    "scalablevit_l": (scalablevit_l, "mlp"),
}


def list_models() -> list[str]:
    """Return the names that `create_model` knows, small to large."""
    return list(MODELS)


def create_model(
    name: str,
    num_classes: int = 1000,
    head: HeadName | None = None,
    drop_path_rate: float | None = None,
    window_pad: WindowPad = "mask",
    expand_value: bool = False,
    in_channels: int = 3,
    grad_checkpointing: bool = False,
) -> ImageClassifier:
    """Build a randomly initialized classifier.

    Args:
        name: One of `list_models()`.
        num_classes: Number of logits; with 0 there is no last layer.
        head: `mlp` or `linear`; by default the size's own, `mlp` for s, b, l and `linear` for nano.
        drop_path_rate: Stochastic depth of the last block; by default the size's own.
        window_pad: `mask`: windows at the border attend to their real tokens only. `zero`: to zero tokens as well.
        expand_value: The variant of SSA that the published size of ScalableViT-S implies.
        in_channels: Channels of the images.
        grad_checkpointing: Recompute activations in the backward pass, which saves memory and costs time.

    Raises:
        ValueError: If the name is unknown or a value does not fit.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name.lower(), MODELS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown model {name!r}: did you mean {near!r}? There are {', '.join(MODELS)}")
    build, default_head = MODELS[name]
    drop_path = {} if drop_path_rate is None else {"drop_path_rate": drop_path_rate}
    backbone = build(window_pad=window_pad, expand_value=expand_value, in_channels=in_channels, **drop_path)
    classifier = ImageClassifier(backbone, num_classes, default_head if head is None else head, name)
    classifier.set_grad_checkpointing(grad_checkpointing)
    return classifier


def build_classifier(config: Mapping[str, Any], grad_checkpointing: bool = False) -> ImageClassifier:
    """Build the classifier that `ImageClassifier.config` describes, randomly initialized.

    Args:
        config: Name, classes, head and all arguments of the backbone in plain values.
        grad_checkpointing: Recompute activations in the backward pass, which saves memory and costs time.

    Raises:
        ValueError: If the values are not those of a classifier.
    """
    try:
        backbone = ScalableViT(**config["backbone"])
        # Older descriptions know no pooling.
        global_pool = config.get("global_pool", "avg")
        classifier = ImageClassifier(backbone, config["num_classes"], config["head"], config["name"], global_pool)
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is no description of a ScalableViT classifier: {error}") from error
    classifier.set_grad_checkpointing(grad_checkpointing)
    return classifier
