"""Weights from elsewhere: the reference release's keys, and the checkpoints of our own runs."""

import argparse
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalablevit_pl.models import build_classifier
from scalablevit_pl.preprocessing import Preprocessing

RECORD_KEY = "scalablevit_pl"
SCHEMA = 1
AVERAGED = "ema_state_dict"
COMPILED = "_orig_mod."  # what `torch.compile(module)` puts into the names
TIMM_FACTORY = "timm.create_model"
# Arguments of it that say where weights come from.
TIMM_SOURCES = frozenset({"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"})
STAGES = 4
IWSA_LAYERS = ("qkv", "lim_func", "proj")
SSA_LAYERS = ("q", "reduction.0", "reduction.1", "norm_act.0", "k", "v", "proj")
SSA_LAYERS_UNREDUCED = ("q", "kv", "proj")
# The reference's layer names inside a block, where they differ from ours.
BLOCK_NAMES = {
    "attn.lim_func": "attn.lim",
    "attn.reduction.0": "attn.depthwise",
    "attn.reduction.1": "attn.pointwise",
    "attn.norm_act.0": "attn.norm",
}
MLP_HEAD_NAMES = {"head.0": "head.hidden", "head.1": "head.hidden_norm", "head.3": "head.fc"}


def convert_reference_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the reference release's weights to those of `ImageClassifier`.

    Args:
        state_dict: The `model` entry of a reference checkpoint, with either head and for networks of any depth.

    Returns:
        The same tensors under `backbone.*` and `head.*`.

    Raises:
        ValueError: If a key is unknown or missing; it names them.
    """
    if not all(isinstance(key, str) for key in state_dict):
        raise ValueError("these are not the weights of a reference ScalableViT: not all names are text")
    names = {
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for theirs, ours in _reference_layers(state_dict).items()
        for kind in ("weight", "bias")
    }
    missing, unknown = sorted(names.keys() - state_dict.keys()), sorted(state_dict.keys() - names.keys())
    if missing or unknown:
        raise ValueError(
            f"these are not the weights of a reference ScalableViT: missing {missing or 'none'}, "
            f"unknown {unknown or 'none'}"
        )
    return {names[key]: tensor for key, tensor in state_dict.items()}


def read_reference_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read a checkpoint of the reference release, which is pickled, without running code, and rename its weights.

    Args:
        path: A `.pth` file with an entry `model`.

    Returns:
        The weights under the names of `ImageClassifier`.

    Raises:
        ValueError: If the file is damaged, holds anything but tensors and plain values, or other weights.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):  # the release keeps its options in one
        checkpoint = _read(Path(path))
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise ValueError(f"{str(path)!r} is no checkpoint of the reference release: it has no entry 'model'")
    return convert_reference_state_dict(checkpoint["model"])


def _reference_layers(keys: Mapping[str, Tensor]) -> dict[str, str]:
    """Map the layers that a reference network with these keys must have to our names for them."""
    layers = {"norm": "head.norm"} | (MLP_HEAD_NAMES if "head.0.weight" in keys else {"head": "head.fc"})
    for stage in range(STAGES):
        layers |= {
            f"patch_embeds.{stage}.proj": f"backbone.stages.{stage}.patch_embed.proj",
            f"patch_embeds.{stage}.norm": f"backbone.stages.{stage}.patch_embed.norm",
            f"pos_block.{stage}.proj.0": f"backbone.stages.{stage}.peg.conv",
        }
        blocks = {int(key.split(".")[2]) for key in keys if _is_block_key(key, stage)}
        for block in range(min(max(blocks, default=0) + 1, len(keys))):  # a hostile number would take for ever
            theirs, ours = f"stages.{stage}.{block}", f"backbone.stages.{stage}.blocks.{block}"
            attention: tuple[str, ...]
            if block % 2 == 0:
                attention = IWSA_LAYERS
            else:
                attention = SSA_LAYERS_UNREDUCED if f"{theirs}.attn.kv.weight" in keys else SSA_LAYERS
            inner = ["norm1", *(f"attn.{layer}" for layer in attention), "norm2", "mlp.fc1", "mlp.fc2"]
            layers |= {f"{theirs}.{layer}": f"{ours}.{BLOCK_NAMES.get(layer, layer)}" for layer in inner}
    return layers


def _is_block_key(key: str, stage: int) -> bool:
    parts = key.split(".")
    return len(parts) > 3 and parts[:2] == ["stages", str(stage)] and parts[2].isdigit()


@dataclass(frozen=True)
class TrainedClassifier:
    """A network with what it takes to use it.

    Attributes:
        network: Images `(B, 3, H, W)` to logits `(B, K)`, in eval mode.
        class_names: Names of the K classes.
        preprocessing: What the images have to go through.
        average: Which of a run's weights these are: `ema`, averaged over the training, or `none`; None if not known.
    """

    network: nn.Module
    class_names: list[str]
    preprocessing: Preprocessing
    average: str | None = None


def same_classes(known: Sequence[str], names: Sequence[str]) -> bool:
    """Tell whether two lists name the same classes in the same order.

    Lists of many names, such as ImageNet's, spell a few differently from place to place: up to one in fifty may differ,
    if it does not stand elsewhere. Classes whose names are not known are numbered, and can be any as many.
    """
    if len(known) != len(names):
        return False
    if list(known) == [str(index) for index in range(len(known))]:
        return True
    differing = [(one, other) for one, other in zip(known, names, strict=True) if one != other]
    moved = any(one in names or other in known for one, other in differing)
    return not moved and len(differing) <= len(known) // 50


def find_checkpoint(weights: str | Path, names: Sequence[str] = ("best", "last")) -> Path:
    """Return the checkpoint that is meant: the file itself, or of a run folder the first that there is of some names.

    Raises:
        ValueError: If there is none, or a URL is given.
    """
    if "://" in str(weights):
        raise ValueError(f"{str(weights)!r} is a URL: download the file from a source you trust and give its path")
    path = Path(weights)
    if path.is_file():
        return path
    for name in names:
        if (path / "checkpoints" / f"{name}.ckpt").is_file():
            return path / "checkpoints" / f"{name}.ckpt"
    named = Path("runs") / path
    if (path / "config.yaml").is_file():
        raise ValueError(f"{str(path)!r} is a run that has no checkpoint yet: wait for the end of its first epoch")
    raise ValueError(
        f"{str(path)!r} is neither a checkpoint nor a run folder with checkpoints/best.ckpt or checkpoints/last.ckpt: "
        + (f"did you mean {str(named)!r}?" if named.is_dir() else "check the path")
    )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours, tensors and plain values only.

    Raises:
        ValueError: If the file is damaged, holds anything else, or is no checkpoint of this package.
    """
    checkpoint = _read(path)
    record = checkpoint.get(RECORD_KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA or "state_dict" not in checkpoint:
        raise ValueError(f"{str(path)!r} is not a checkpoint of a scalablevit_pl run of schema {SCHEMA}")
    return dict(checkpoint)


def _read(path: Path) -> Any:
    try:
        damaged = zipfile.ZipFile(path).testzip() if zipfile.is_zipfile(path) else None  # torch compares no checksums
        if damaged is not None:
            raise ValueError(f"the checksum of its part {damaged!r} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"cannot read {str(path)!r} as a checkpoint: it is damaged, or holds code or other objects than tensors "
            "and plain values"
        ) from error
    except Exception as error:  # bytes that are no pickle make the reader raise almost anything
        raise ValueError(f"cannot read {str(path)!r} as a checkpoint: {_one_line(error)}") from error


def load_trained_classifier(weights: str | Path, average: str | None = None) -> TrainedClassifier:
    """Rebuild the classifier of a run folder or checkpoint, and load its weights strictly.

    Args:
        weights: The run folder or the checkpoint.
        average: `ema` takes the weights averaged over the training, `none` the raw ones; by default the averaged ones
            if there are any.

    Raises:
        ValueError: If there is no such checkpoint, it holds no such weights, or its network cannot be rebuilt.
    """
    path = find_checkpoint(weights)
    checkpoint = read_checkpoint(path)
    average = average or ("ema" if AVERAGED in checkpoint else "none")
    section = AVERAGED if average == "ema" else "state_dict"
    if section not in checkpoint:
        raise ValueError(f"{str(path)!r} holds no averaged weights: take the raw ones with --average none")
    record = checkpoint[RECORD_KEY]
    try:
        network = _build_network(record["network"])
        class_names = list(record["class_names"])
        if isinstance(record["class_names"], str) or not all(isinstance(name, str) for name in class_names):
            raise TypeError("class_names is no list of names")
        preprocessing = Preprocessing.from_dict(record["preprocessing"])
        tensors = _network_weights(checkpoint[section])
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{str(path)!r} describes no network that can be rebuilt: {_one_line(error)}") from error
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {str(path)!r} do not fit the network it describes: {_one_line(error)}"
        ) from error
    if len(class_names) != network.num_classes:
        raise ValueError(f"{str(path)!r} names {len(class_names)} classes for a network with {network.num_classes}")
    return TrainedClassifier(network.eval(), class_names, preprocessing, average)


def _one_line(error: Exception) -> str:
    """Shorten torch's messages, which may name hundreds of tensors on as many lines."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _network_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the network's weights out of a task's; `torch.compile` may have put a name of its own between theirs."""
    prefix = "network."
    return {
        key.removeprefix(prefix).replace(COMPILED, ""): value
        for key, value in state_dict.items()
        if key.startswith(prefix)
    }


def describe_network(network: nn.Module, section: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Describe a network in plain values: its own `config`, or what a configuration made it of.

    Args:
        network: The network.
        section: `class_path`, `init_args` and `dict_kwargs` that built it, for networks without a `config`.
    """
    config = getattr(network, "config", None)
    if isinstance(config, dict):
        return config
    if not section or section.get("class_path") != TIMM_FACTORY:
        return None
    # What timm hands on to the network stands apart in a configuration.
    return {"class_path": TIMM_FACTORY, "init_args": {**section["init_args"], **section.get("dict_kwargs", {})}}


def _build_network(description: Mapping[str, Any] | None) -> nn.Module:
    if description is None:
        raise ValueError(
            "this checkpoint's network has no description in plain values: use it with its --config instead"
        )
    if description.get("class_path") == TIMM_FACTORY:
        return _build_timm_network(description["init_args"])
    return build_classifier(description)


def _build_timm_network(arguments: Mapping[str, Any]) -> nn.Module:
    import timm  # a third of a second that networks of ours need not wait for

    # A name may also mean a repository to download from, and a file other weights: what a checkpoint says builds the
    # network and does nothing else.
    if not timm.is_model(arguments["model_name"]):
        raise ValueError(f"this checkpoint's network {arguments['model_name']!r} is not one that timm knows")
    shape = {name: value for name, value in arguments.items() if name not in TIMM_SOURCES}
    network: nn.Module = timm.create_model(**shape)
    return network
