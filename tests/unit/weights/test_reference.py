"""Weights of the reference release under the names of this package."""

import json
import re

import pytest
import torch
from golden.network import DATA, SIZES, TINY, build
from torch import Tensor

from scalablevit_pl.models import ImageClassifier
from scalablevit_pl.weights.reference import convert_reference_state_dict, read_reference_checkpoint

# Our names, part by part, and those of the reference.
REFERENCE_NAMES = [
    (r"^head\.norm\.", "norm."),
    (r"^head\.hidden\.", "head.0."),
    (r"^head\.hidden_norm\.", "head.1."),
    (r"^backbone\.stages\.(\d)\.patch_embed\.", r"patch_embeds.\1."),
    (r"^backbone\.stages\.(\d)\.peg\.conv\.", r"pos_block.\1.proj.0."),
    (r"^backbone\.stages\.(\d)\.blocks\.(\d+)\.", r"stages.\1.\2."),
    (r"\.lim\.", ".lim_func."),
    (r"\.depthwise\.", ".reduction.0."),
    (r"\.pointwise\.", ".reduction.1."),
    (r"\.attn\.norm\.", ".attn.norm_act.0."),
]


def reference(name: str) -> dict[str, Tensor]:
    shapes = json.loads((DATA / f"{name}_keys.json").read_text())
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def classifier(name: str) -> ImageClassifier:
    with torch.device("meta"):
        return build(name)


@pytest.mark.parametrize("name", [*SIZES, *TINY])
def test_each_reference_weight_gets_one_of_our_names(name: str) -> None:
    theirs = reference(name)
    ours = convert_reference_state_dict(theirs)
    classifier(name).load_state_dict(ours, assign=True)
    for key, tensor in ours.items():
        original = key.replace("head.fc", "head.3" if "head.hidden.weight" in ours else "head")
        for pattern, replacement in REFERENCE_NAMES:
            original = re.sub(pattern, replacement, original)
        assert theirs.pop(original) is tensor, key
    assert not theirs


@pytest.mark.parametrize(
    "key",
    [
        "norm.bias",
        "head.3.weight",
        "head.1.bias",
        "patch_embeds.2.proj.weight",
        "pos_block.3.proj.0.bias",
        "stages.1.0.attn.lim_func.weight",
        "stages.1.1.attn.reduction.1.bias",
        "stages.2.2.mlp.fc2.weight",
        "stages.3.1.attn.q.bias",
    ],
)
def test_a_missing_reference_weight_is_named(key: str) -> None:
    theirs = reference("tiny_a")
    del theirs[key]
    with pytest.raises(ValueError, match=re.escape(f"missing ['{key}'], unknown none")):
        convert_reference_state_dict(theirs)


@pytest.mark.parametrize(
    "key",
    [
        "extra",
        "head.4.weight",
        "patch_embeds.4.proj.weight",
        "stages.4.0.norm1.weight",
        "stages.0.x.norm1.weight",
        "stages.0.0.attn.k.weight",
        "stages.0.1.attn.relative_position_bias_table",
    ],
)
def test_an_unknown_reference_weight_is_named(key: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"missing none, unknown ['{key}']")):
        convert_reference_state_dict(reference("tiny_a") | {key: torch.empty(1)})


def test_a_missing_block_is_named() -> None:
    theirs = {key: tensor for key, tensor in reference("tiny_a").items() if not key.startswith("stages.2.1.")}
    with pytest.raises(ValueError, match=r"missing \['stages.2.1.attn.k.bias', .*unknown none"):
        convert_reference_state_dict(theirs)


def test_our_own_names_are_not_those_of_the_reference() -> None:
    with pytest.raises(ValueError, match=r"missing \['head.bias', .*unknown \['backbone.stages.0.blocks.0"):
        convert_reference_state_dict(classifier("tiny_a").state_dict())


@pytest.mark.parametrize("key", ["stages.0.1000000000.norm1.weight", f"stages.3.{10**30}.norm1.weight"])
def test_a_hostile_number_of_blocks_takes_no_time(key: str) -> None:
    with pytest.raises(ValueError, match="these are not the weights of a reference ScalableViT"):
        convert_reference_state_dict(reference("tiny_a") | {key: torch.ones(3)})


def test_names_that_are_not_strings_are_refused() -> None:
    with pytest.raises(ValueError, match="not all names are strings"):
        convert_reference_state_dict(reference("tiny_a") | {7: torch.ones(3)})  # type: ignore[dict-item]


def test_a_reference_checkpoint_is_read() -> None:
    weights = read_reference_checkpoint(DATA / "tiny_c_official_format.pth")
    assert weights.keys() == build("tiny_c").state_dict().keys()
