"""Checkpoints of the reference release become classifiers; other files are refused."""

import argparse
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.network import DATA, SIZES, TINY, fill, image
from safetensors.torch import load_file
from small_networks import Bomb
from torch import Tensor

from scalablevit_pl.models import ImageClassifier, ScalableViT, list_models
from scalablevit_pl.models.conversion import convert_checkpoint
from scalablevit_pl.preprocessing import Preprocessing

TINY_C = DATA / "tiny_c_official_format.pth"
SLOW = {"base", "large"}


def arguments(name: str = "tiny_c") -> dict[str, Any]:
    config = TINY[name]
    shared = {key: config[key] for key in ("embed_dims", "num_heads", "depths")}
    return shared | {"spatial_ratios": config["sr_ratios"], "channel_ratios": config["c_ratios"]}


def write_arguments(folder: Path, content: Any = None) -> str:
    path = folder / "arguments.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content or arguments()), encoding="utf-8")
    return str(path)


def write_checkpoint(folder: Path, weights: Any, **others: Any) -> Path:
    """Write a checkpoint like the release's training."""
    options = argparse.Namespace(model="scalablevit", lr=1e-3, output_dir=None)
    torch.save({"model": weights, "optimizer": {}, "epoch": 3, "args": options} | others, folder / "weights.pth")
    return folder / "weights.pth"


def reference(**changes: Any) -> dict[Any, Any]:
    weights = dict(fill("tiny_c")) | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in weights.items() if value is not None}


def refusal(path: Path, model: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  its message is the result
        convert_checkpoint(path, model)
    (sentence,) = str(caught.value).splitlines()
    assert len(sentence) < 700
    return sentence


@torch.no_grad()
def test_the_released_layout_converts_to_the_golden_logits(tmp_path: Path) -> None:
    model = convert_checkpoint(TINY_C, write_arguments(tmp_path))
    expected = load_file(DATA / "tiny_c_expected.safetensors")
    for height, width in ((224, 224), (224, 448)):
        logits = model(image(1, 3, height, width))
        torch.testing.assert_close(logits, expected[f"logits_{height}x{width}"], rtol=0, atol=1e-4)
    assert not any(module.training for module in model.modules())
    assert (model.num_classes, model.config["head"], model.class_names) == (10, "linear", None)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_tiny_checkpoints_convert_and_survive_a_folder(tmp_path: Path, name: str) -> None:
    path = write_checkpoint(tmp_path, dict(fill(name)))
    model = convert_checkpoint(path, write_arguments(tmp_path, arguments(name)))
    logits = model(image(1, 3, 224, 224))
    expected = load_file(DATA / f"{name}_expected.safetensors")["logits_224x224"]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path / "model")
    again = ImageClassifier.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(again(image(1, 3, 224, 224)), logits, rtol=0, atol=1e-5)
    # The folder's own description can replace the arguments.
    twice = convert_checkpoint(path, str(tmp_path / "model" / "config.json"))
    assert twice.config == model.config
    assert torch.equal(twice(image(1, 3, 224, 224)), logits)


@pytest.mark.parametrize(
    "size", [pytest.param(size, marks=[pytest.mark.slow] if size in SLOW else []) for size in SIZES]
)
@torch.no_grad()
def test_published_sizes_convert_with_every_tensor(tmp_path: Path, size: str) -> None:
    weights = dict(fill(size))
    names = [f"class {index}" for index in range(1000)]
    model = convert_checkpoint(write_checkpoint(tmp_path, weights), SIZES[size], names)
    converted = model.state_dict()
    assert len(converted) == len(weights)
    # Each tensor is in the network once, with all of its values.
    sums = sorted(tensor.double().sum().item() for tensor in weights.values())
    assert sorted(tensor.double().sum().item() for tensor in converted.values()) == sums
    logits = model(image(2, 3, 224, 224))
    expected = load_file(DATA / f"{size}_expected.safetensors")["logits"]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert model.config["name"] == SIZES[size]
    assert model.config["head"] == "mlp"
    assert model.preprocessing == Preprocessing()
    assert model.class_names == names


def test_wide_values_are_recognized_by_a_projection_s_shape(tmp_path: Path) -> None:
    plain = convert_checkpoint(TINY_C, write_arguments(tmp_path))
    assert plain.config["backbone"]["expand_value"] is False
    with torch.device("meta"):
        shapes = ScalableViT(**arguments(), expand_value=True).state_dict()
    wide = reference()
    for stage in range(4):
        for block in range(1, TINY["tiny_c"]["depths"][stage], 2):
            for layer in ("attn.v.weight", "attn.v.bias", "attn.proj.weight"):
                ours = shapes.get(f"stages.{stage}.blocks.{block}.{layer}")
                if ours is not None:
                    wide[f"stages.{stage}.{block}.{layer}"] = torch.randn(ours.shape)
    model = convert_checkpoint(write_checkpoint(tmp_path, wide), write_arguments(tmp_path))
    assert model.config["backbone"]["expand_value"] is True
    assert model(image(1, 3, 64, 64)).shape == (1, 10)


def test_channels_classes_and_head_are_read_from_the_weights(tmp_path: Path) -> None:
    weights = reference(
        patch_embeds__0__proj__weight=torch.randn(16, 5, 7, 7),
        head__weight=torch.randn(4, 128),
        head__bias=torch.randn(4),
    )
    # What the file says of them is about another network.
    path, model = write_checkpoint(tmp_path, weights), write_arguments(tmp_path, arguments() | {"in_channels": 3})
    converted = convert_checkpoint(path, model, ["one", "two", "three"])
    assert (converted.in_chans, converted.num_classes, converted.class_names) == (5, 4, None)
    assert converted(image(1, 5, 64, 64)).shape == (1, 4)
    assert torch.equal(converted.head.fc.weight, weights["head.weight"])
    hidden = {"head.0.weight": torch.randn(4096, 128), "head.0.bias": torch.randn(4096)}
    hidden |= {f"head.1.{kind}": torch.randn(4096) for kind in ("weight", "bias")}
    hidden |= {"head.3.weight": torch.randn(4, 4096), "head.3.bias": torch.randn(4)}
    weights = {key: value for key, value in weights.items() if not key.startswith("head.")} | hidden
    converted = convert_checkpoint(write_checkpoint(tmp_path, weights), model)
    assert converted.config["head"] == "mlp"
    assert torch.equal(converted.head.hidden_norm.bias, hidden["head.1.bias"])


@pytest.mark.parametrize("name", list_models())
def test_the_wrong_size_names_a_tensor(name: str) -> None:
    sentence = refusal(TINY_C, name)
    assert f"the tensors of '{TINY_C} as {name}' are not those of the network" in sentence
    assert "backbone.stages." in sentence


def test_other_depths_name_a_tensor(tmp_path: Path) -> None:
    sentence = refusal(TINY_C, write_arguments(tmp_path, arguments() | {"depths": [2, 3, 2, 3]}))
    assert "stages.3.blocks.2" in sentence


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"norm__weight": None}, "missing ['norm.weight'], unknown none"),
        ({"stages__0__1__mlp__fc1__bias": None}, "missing ['stages.0.1.mlp.fc1.bias'], unknown none"),
        ({"head__2__weight": torch.ones(1)}, "missing none, unknown ['head.2.weight']"),
        ({"norm__weight": torch.ones(127)}, "head.norm.weight"),
        ({"norm__weight": torch.ones(128, 1)}, "head.norm.weight"),
        ({"norm__weight": torch.full((128,), math.nan)}, "head.norm.weight"),
        ({"norm__weight": torch.tensor([math.inf, -math.inf] * 64)}, "head.norm.weight"),
        ({"norm__weight": torch.ones(128, dtype=torch.int64)}, "head.norm.weight"),
        ({"norm__weight": torch.ones(128).to_sparse()}, "head.norm.weight"),
        ({"norm__weight": "a string"}, "head.norm.weight"),
        ({"norm__weight": 1.0}, "head.norm.weight"),
        ({"norm__weight": None, "norm__bias": None}, "missing ['norm.bias', 'norm.weight']"),
        ({"patch_embeds__0__proj__weight": torch.ones(())}, "backbone.stages.0.patch_embed.proj.weight"),
        ({"head__weight": torch.ones(())}, "head.fc.weight"),
        ({"stages__0__0__attn__proj__weight": torch.ones(())}, "stages.0.blocks.0.attn.proj.weight"),
        ({"patch_embeds__0__proj__weight": torch.ones(16, 0, 7, 7)}, "in_channels"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_weights_that_do_not_fit_are_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    path = write_checkpoint(tmp_path, reference(**changes))
    assert named in refusal(path, write_arguments(tmp_path))


def test_a_file_whose_weights_are_not_finite_is_named(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, reference(norm__weight=torch.full((128,), math.nan)))
    assert f"of {str(path)!r} holds NaN or infinite weights" in refusal(path, write_arguments(tmp_path))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "pickle"])
@pytest.mark.parametrize("place", ["args", "model", "weight"])
def test_a_checkpoint_that_runs_code_is_refused_before_it_runs(tmp_path: Path, legacy: bool, place: str) -> None:
    path, mark = tmp_path / "weights.pth", tmp_path / "code was run"
    checkpoint: dict[str, Any] = {"model": reference(), "args": argparse.Namespace()}
    if place == "weight":
        checkpoint["model"]["norm.weight"] = Bomb(mark)
    else:
        checkpoint[place] = Bomb(mark)
    torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    assert f"cannot read '{path}' as a checkpoint" in refusal(path, write_arguments(tmp_path))
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()


def test_a_plain_pickle_that_runs_code_is_refused_before_it_runs(tmp_path: Path) -> None:
    path, mark = tmp_path / "weights.pth", tmp_path / "code was run"
    path.write_bytes(pickle.dumps({"model": Bomb(mark)}, protocol=2))
    assert f"cannot read '{path}' as a checkpoint" in refusal(path, "scalablevit_s")
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no checkpoint"),
        lambda path: path.write_bytes(TINY_C.read_bytes()[:-1000]),
        lambda path: torch.save({"state_dict": {}}, path),
        lambda path: torch.save([1, 2], path),
        lambda path: torch.save({"model": torch.ones(1)}, path),
        lambda path: path.write_bytes((DATA / "tiny_c_expected.safetensors").read_bytes()),
    ],
    ids=["missing", "folder", "empty", "text", "truncated", "other", "list", "tensor", "safetensors"],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "weights.pth")
    assert "weights.pth" in refusal(tmp_path / "weights.pth", write_arguments(tmp_path))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "does not hold JSON with the arguments"),
        ("[1]", "does not hold JSON with the arguments"),
        ("3", "does not hold JSON with the arguments"),
        ("null", "does not hold JSON with the arguments"),
        ('"scalablevit_s"', "does not hold JSON with the arguments"),
        ("[" * 100_000, "does not hold JSON with the arguments"),
        ('{"model_args": 3}', "does not hold JSON with the arguments"),
        ('{"model_args": {}}', "does not hold JSON with the arguments"),
        ("{}", "embed_dims"),
        (arguments() | {"patch_size": 4}, "patch_size"),
        (arguments() | {"num_heads": [3, 3, 3, 3]}, "num_heads=3 must divide dim=16"),
        (arguments() | {"embed_dims": [2**40] * 4}, "describes no network that can be built"),
        (arguments() | {"mlp_ratio": math.inf}, "describes no network that can be built"),
        (arguments() | {"mlp_ratio": "4"}, "describes no network that can be built"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_file_without_arguments_is_named(tmp_path: Path, content: Any, named: str) -> None:
    model = write_arguments(tmp_path, content) if content != "" else write_arguments(tmp_path, " ")
    sentence = refusal(TINY_C, model)
    assert named in sentence
    assert model in sentence


@pytest.mark.parametrize("model", ["scalablevit_xl", "", ".", "no/such/file.json"])
def test_an_unknown_model_is_answered_with_the_known_ones(model: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{model!r} is neither one of scalablevit_nano")):
        convert_checkpoint(TINY_C, model)


def test_converted_weights_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    model = convert_checkpoint(TINY_C, write_arguments(tmp_path))
    theirs: dict[str, Tensor] = torch.load(TINY_C, weights_only=False)["model"]
    assert torch.equal(model.head.norm.weight, theirs["norm.weight"])
    assert torch.equal(model.head.fc.bias, theirs["head.bias"])
    assert torch.equal(model.backbone.stages[3].blocks[1].attn.proj.weight, theirs["stages.3.1.attn.proj.weight"])
