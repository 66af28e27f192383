"""Build networks by name, from their descriptions, and from stored weights."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from torch import nn

from scalablevit_pl.models.attention import WindowPad
from scalablevit_pl.models.backbone import TimmBackbone
from scalablevit_pl.models.classifier import HeadName, ImageClassifier
from scalablevit_pl.models.loading import LoadOptions, load_tensors, read_pretrained
from scalablevit_pl.models.pretrained import PretrainedNetwork
from scalablevit_pl.models.scalablevit import ScalableViT, scalablevit_b, scalablevit_l, scalablevit_nano, scalablevit_s
from scalablevit_pl.models.segmenter import DecoderName, SemanticSegmenter
from scalablevit_pl.text import one_line

if TYPE_CHECKING:
    from scalablevit_pl.weights.stored import Description, StoredModel

NETWORKS: dict[str, type[PretrainedNetwork]] = {kind.task: kind for kind in (ImageClassifier, SemanticSegmenter)}
# Arguments of `timm.create_model` that say where weights come from.
TIMM_SOURCES = frozenset({"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"})
# Each name with its builder and its default head.
MODELS: dict[str, tuple[Callable[..., ScalableViT], HeadName]] = {
    "scalablevit_nano": (scalablevit_nano, "linear"),
    "scalablevit_s": (scalablevit_s, "mlp"),
    "scalablevit_b": (scalablevit_b, "mlp"),
    "scalablevit_l": (scalablevit_l, "mlp"),
}
NANO_WIDTH = 64  # channels of its segmentation heads, which would otherwise outweigh it


def list_models() -> list[str]:
    """Return the names that `create_model` knows, small to large."""
    return list(MODELS)


def create_model(
    name: str,
    num_classes: int | None = None,
    head: HeadName | None = None,
    drop_path_rate: float | None = None,
    window_pad: WindowPad = "mask",
    expand_value: bool = False,
    in_channels: int = 3,
    grad_checkpointing: bool = False,
    in_chans: int | None = None,
) -> ImageClassifier:
    """Build a randomly initialized classifier.

    Args:
        name: One of `list_models()`.
        num_classes: Number of logits, by default 1000, or the data's classes in a run; with 0 there is no last layer.
        head: `mlp` or `linear`; by default the size's own, `mlp` for s, b, l and `linear` for nano.
        drop_path_rate: Stochastic depth of the last block; by default the size's own.
        window_pad: `mask`: windows at the border attend to their real tokens only. `zero`: to zero tokens as well.
        expand_value: The variant of SSA that the published size of ScalableViT-S implies.
        in_channels: Channels of the images.
        grad_checkpointing: Recompute activations in the backward pass, which saves memory and costs time.
        in_chans: timm's name of `in_channels`, which it overrides.

    Raises:
        ValueError: If the name is unknown or a value does not fit.
    """
    if name not in MODELS:
        import timm  # a third of a second that known names do not need

        timms = f"; timm's needs --model.network timm.create_model --model.network.model_name {name}"
        raise ValueError(f"unknown model {name!r}: there are {', '.join(MODELS)}{timms if timm.is_model(name) else ''}")
    default_head = MODELS[name][1]
    in_channels = in_channels if in_chans is None else in_chans
    backbone = _build_backbone(name, drop_path_rate, window_pad, expand_value, in_channels)
    num_classes = 1000 if num_classes is None else num_classes
    classifier = ImageClassifier(backbone, num_classes, default_head if head is None else head, name)
    classifier.set_grad_checkpointing(grad_checkpointing)
    return classifier


def create_segmenter(
    name: str,
    num_classes: int | None = None,
    head: DecoderName = "semantic_fpn",
    width: int | None = None,
    auxiliary: bool | None = None,
    out_norm: bool = True,
    dropout: float = 0.1,
    drop_path_rate: float | None = None,
    window_pad: WindowPad = "mask",
    expand_value: bool = False,
    in_channels: int = 3,
    grad_checkpointing: bool = False,
    pretrained: bool = False,
) -> SemanticSegmenter:
    """Build a network for semantic segmentation, randomly initialized.

    Args:
        name: Backbone: one of `list_models()`, or a network of timm with maps of strides 4, 8, 16 and 32.
        num_classes: Number of classes, by default 150, or the data's classes in a run.
        head: `semantic_fpn` or `upernet`.
        width: Channels of the head; by default 64 for nano, else 256 for `semantic_fpn` and 512 for `upernet`.
        auxiliary: Build an auxiliary head for a second loss in training; by default with `upernet`.
        out_norm: Normalize the backbone's maps.
        dropout: Fraction of the channels that are dropped before the last layers.
        drop_path_rate: Stochastic depth of the last block; by default the backbone's own.
        window_pad: As for `create_model`; for our own backbones.
        expand_value: As for `create_model`; for our own backbones.
        in_channels: Channels of the images.
        grad_checkpointing: Recompute activations in the backward pass, which saves memory and costs time.
        pretrained: Load timm's weights into a backbone of timm, which may need a download.

    Raises:
        ValueError: If the name is unknown or a value does not fit.
    """
    backbone: ScalableViT | TimmBackbone
    if name in MODELS:
        if pretrained:
            raise ValueError(f"pretrained is for networks of timm: load weights into {name!r} with --weights")
        backbone = _build_backbone(name, drop_path_rate, window_pad, expand_value, in_channels)
    else:
        if window_pad != "mask" or expand_value:
            raise ValueError(f"window_pad and expand_value are for {', '.join(MODELS)}: omit them for {name!r}")
        backbone = TimmBackbone(name, in_channels, drop_path_rate, pretrained)
    if width is None and name == "scalablevit_nano":
        width = NANO_WIDTH
    auxiliary = head == "upernet" if auxiliary is None else auxiliary
    num_classes = 150 if num_classes is None else num_classes
    segmenter = SemanticSegmenter(backbone, num_classes, head, width, auxiliary, out_norm, dropout, name)
    if grad_checkpointing:  # which not all networks of timm know
        segmenter.set_grad_checkpointing()
    return segmenter


def _build_backbone(
    name: str, drop_path_rate: float | None, window_pad: WindowPad, expand_value: bool, in_channels: int
) -> ScalableViT:
    drop_path = {} if drop_path_rate is None else {"drop_path_rate": drop_path_rate}
    build = MODELS[name][0]
    return build(window_pad=window_pad, expand_value=expand_value, in_channels=in_channels, **drop_path)


def build_classifier(config: Mapping[str, Any], grad_checkpointing: bool = False) -> ImageClassifier:
    """Build the classifier that `ImageClassifier.config` describes, randomly initialized.

    Args:
        config: Name, classes, head and all arguments of the backbone in plain values.
        grad_checkpointing: Recompute activations in the backward pass, which saves memory and costs time.

    Raises:
        ValueError: If the values do not describe a classifier.
    """
    try:
        classifier = ImageClassifier.from_config(config)
    except (KeyError, TypeError) as error:
        raise ValueError(f"this does not describe a ScalableViT classifier: {error}") from error
    classifier.set_grad_checkpointing(grad_checkpointing)
    return classifier


def from_pretrained(
    pretrained_model_name_or_path: str | Path, *, num_classes: int | None = None, **options: Unpack[LoadOptions]
) -> PretrainedNetwork:
    """Load a network of any task from a folder or from the Hugging Face Hub, in eval mode.

    Arguments and errors are those of `PretrainedNetwork.from_pretrained`.
    """
    network: PretrainedNetwork = build_stored(read_pretrained(pretrained_model_name_or_path, **options), num_classes)
    return network


def build_stored(stored: "StoredModel", num_classes: int | None = None) -> Any:
    """Build the network of stored weights around them, in eval mode; with `num_classes` as `from_pretrained` does.

    Raises:
        ValueError: If nothing here builds such a network, or the weights do not fit it.
    """
    description = stored.description
    if "class_path" in description.config:
        return _build_timm(stored)
    if not is_known(description):
        name = (description.network_class or "its class").rpartition(".")[2]
        raise ValueError(
            f"{stored.source!r} holds a network for {description.task} that is not part of this package: load it with "
            f"{name}.from_pretrained"
        )
    return NETWORKS[description.task].from_stored(stored, num_classes)


def check_folder(folder: Path) -> None:
    """Check that a folder holds a whole model; a network of another package is checked as far as its files go.

    Raises:
        ValueError: If it does not.
    """
    from scalablevit_pl.weights.folder import read_folder

    stored = read_folder(folder)
    if stored.description.network_class is None:
        build_stored(stored)


def is_known(description: "Description") -> bool:
    """Return whether a class of this package builds the network."""
    return description.network_class is None and description.task in NETWORKS


def _build_timm(stored: "StoredModel") -> nn.Module:
    import timm  # a third of a second that our own networks do not need

    from scalablevit_pl.weights.checkpoint import TIMM_FACTORY

    config, source = stored.description.config, stored.source
    try:
        arguments = dict(config["init_args"])
        # A name may also mean a repository to download from: a checkpoint builds its network and nothing else.
        if config["class_path"] != TIMM_FACTORY or not timm.is_model(arguments["model_name"]):
            raise ValueError(f"timm does not know its network {arguments.get('model_name')!r}")
        network: nn.Module = timm.create_model(**{k: v for k, v in arguments.items() if k not in TIMM_SOURCES})
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"{source!r} describes no network that can be rebuilt: {reason}") from error
    load_tensors(network, stored.tensors, source)
    return network.eval()
