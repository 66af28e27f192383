"""Checkpoints of the paper's reference release: read without running code, and renamed to our layers."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from scalablevit_pl.weights.checkpoint import load_pickle

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
        raise ValueError("these are not the weights of a reference ScalableViT: not all names are strings")
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
    with torch.serialization.safe_globals([argparse.Namespace]):  # which holds the release's options
        checkpoint = load_pickle(Path(path))
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise ValueError(f"{str(path)!r} is not a checkpoint of the reference release: it has no entry 'model'")
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
        blocks = [int(found[1]) for found in map(re.compile(rf"stages\.{stage}\.(\d+)\.").match, keys) if found]
        for block in range(min(max(blocks, default=0) + 1, len(keys))):  # a hostile number would take too long
            theirs, ours = f"stages.{stage}.{block}", f"backbone.stages.{stage}.blocks.{block}"
            ssa = SSA_LAYERS_UNREDUCED if f"{theirs}.attn.kv.weight" in keys else SSA_LAYERS
            attention = ssa if block % 2 else IWSA_LAYERS
            inner = ["norm1", *(f"attn.{layer}" for layer in attention), "norm2", "mlp.fc1", "mlp.fc2"]
            layers |= {f"{theirs}.{layer}": f"{ours}.{BLOCK_NAMES.get(layer, layer)}" for layer in inner}
    return layers
