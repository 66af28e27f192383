"""Classifiers by name and by description: their sizes, weight names and heads."""

import inspect
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scalablevit_pl.models import ImageClassifier, ScalableViT, build_classifier, create_model, list_models
from scalablevit_pl.models.classifier import HeadName
from scalablevit_pl.models.heads.classification import LinearHead, MlpHead

NANO_KEYS = json.loads((Path(__file__).parent / "nano_keys.json").read_text())
# No value is a default.
BACKBONE: dict[str, Any] = {
    "embed_dims": [4, 8, 12, 16],
    "num_heads": [1, 2, 3, 4],
    "depths": [2, 1, 1, 2],
    "spatial_ratios": [4, 2, 2, 1],
    "channel_ratios": [0.5, 1.0, 1.0, 1.0],
    "window_size": 3,
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.1,
    "drop_rate": 0.2,
    "attn_drop_rate": 0.3,
    "in_channels": 2,
    "window_pad": "zero",
    "expand_value": True,
}


def on_meta(name: str, **kwargs: Any) -> ImageClassifier:
    with torch.device("meta"):
        return create_model(name, **kwargs)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def custom(head: HeadName = "mlp", num_classes: int = 3) -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(ScalableViT(**BACKBONE), num_classes, head)


def test_models_are_listed_small_to_large() -> None:
    assert list_models() == ["scalablevit_nano", "scalablevit_s", "scalablevit_b", "scalablevit_l"]
    sizes = [count(on_meta(name)) for name in list_models()]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("name", "num_classes", "backbone", "classifier"),
    [
        ("scalablevit_nano", 10, None, 2_761_378),
        ("scalablevit_s", 1000, 25_793_008, 32_000_472),
        ("scalablevit_b", 1000, 74_625_072, 81_881_624),
        ("scalablevit_l", 1000, 100_983_200, 109_288_840),
    ],
)
def test_parameter_counts(name: str, num_classes: int, backbone: int | None, classifier: int) -> None:
    model = on_meta(name, num_classes=num_classes)
    assert count(model) == classifier
    assert backbone is None or count(model.backbone) == backbone


def test_the_published_size_of_s_has_expanded_values() -> None:
    assert count(on_meta("scalablevit_s", expand_value=True)) == 32_381_320


def test_weight_names_and_shapes_of_nano_stay() -> None:
    assert shapes(on_meta("scalablevit_nano", num_classes=10)) == NANO_KEYS


@pytest.mark.parametrize(("name", "rate"), [("nano", 0.0), ("s", 0.2), ("b", 0.5), ("l", 0.5)])
def test_sizes_have_their_own_stochastic_depth_unless_told(name: str, rate: float) -> None:
    assert on_meta(f"scalablevit_{name}").backbone.stages[3].blocks[-1].drop_path.rate == pytest.approx(rate)
    told = on_meta(f"scalablevit_{name}", drop_path_rate=0.1)
    assert told.backbone.stages[3].blocks[-1].drop_path.rate == pytest.approx(0.1)
    assert on_meta(f"scalablevit_{name}", drop_path_rate=0.0).backbone.config["drop_path_rate"] == 0.0


def test_create_model_passes_its_arguments_on() -> None:
    arguments: dict[str, Any] = {"window_pad": "zero", "expand_value": True, "in_channels": 1}
    model = on_meta("scalablevit_nano", num_classes=7, head="mlp", grad_checkpointing=True, **arguments)
    assert isinstance(model.head, MlpHead)
    assert model.num_classes == model.head.fc.out_features == 7
    assert model.backbone.config.items() >= arguments.items()
    assert all(stage.grad_checkpointing for stage in model.backbone.stages)
    assert not any(stage.grad_checkpointing for stage in on_meta("scalablevit_nano").backbone.stages)


@pytest.mark.parametrize(
    ("name", "head"), [("scalablevit_nano", LinearHead), ("scalablevit_s", MlpHead), ("scalablevit_l", MlpHead)]
)
def test_sizes_have_their_own_head_unless_told(name: str, head: type[LinearHead]) -> None:
    assert type(on_meta(name).head) is head
    assert type(on_meta(name, head="linear").head) is LinearHead


def test_the_description_holds_every_argument() -> None:
    assert BACKBONE.keys() == inspect.signature(ScalableViT).parameters.keys()
    expected = {"name": "scalablevit_custom", "num_classes": 3, "head": "linear", "backbone": BACKBONE}
    assert custom("linear").config == expected
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in BACKBONE.items()}
    assert ScalableViT(**tuples).config == BACKBONE


@pytest.mark.parametrize("head", ["mlp", "linear"])
@torch.no_grad()
def test_a_description_in_json_rebuilds_the_classifier(head: HeadName) -> None:
    model = custom(head).eval()
    rebuilt = build_classifier(json.loads(json.dumps(model.config))).eval()
    assert rebuilt.config == model.config
    assert shapes(rebuilt) == shapes(model)
    rebuilt.load_state_dict(model.state_dict())
    image = torch.randn(2, 2, 70, 45)
    assert torch.equal(rebuilt(image), model(image))


@pytest.mark.parametrize("name", list_models())
def test_named_models_are_rebuilt_from_their_description(name: str) -> None:
    model = on_meta(name, num_classes=5)
    assert model.config["name"] == name
    with torch.device("meta"):
        rebuilt = build_classifier(json.loads(json.dumps(model.config)))
    assert rebuilt.config == model.config
    assert shapes(rebuilt) == shapes(model)


def layer_norm(features: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    centred = features - features.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias


@pytest.mark.parametrize("kind", [LinearHead, MlpHead])
@torch.no_grad()
def test_heads_normalize_the_last_map_then_average_its_tokens(kind: type[LinearHead]) -> None:
    torch.manual_seed(0)
    head = kind((8, 8, 8, 12), 5).eval()
    for parameter in head.parameters():
        parameter.normal_(std=0.3)
    maps = [torch.randn(2, channels, 3, 2) for channels in (8, 8, 8, 12)]
    tokens = maps[-1].flatten(2).transpose(1, 2)
    features = pooled = layer_norm(tokens, head.norm).sum(1) / 6
    if isinstance(head, MlpHead):
        hidden = layer_norm(pooled @ head.hidden.weight.T + head.hidden.bias, head.hidden_norm)
        assert hidden.shape == (2, 4096)
        features = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(head.pool(maps), pooled)
    torch.testing.assert_close(head.pre_logits(head.pool(maps)), features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head(maps), features @ head.fc.weight.T + head.fc.bias, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_logits_are_the_head_on_the_backbone_s_maps() -> None:
    model = custom(num_classes=4).eval()
    image = torch.randn(2, 2, 33, 70)
    logits = model(image)
    assert logits.shape == (2, 4)
    assert torch.equal(logits, model.head(model.backbone(image)))


def test_the_convolutions_of_position_encodings_take_no_weight_decay() -> None:
    names = {f"backbone.stages.{stage}.peg.conv.weight" for stage in range(4)}
    assert on_meta("scalablevit_nano").no_weight_decay() == names
    assert names <= NANO_KEYS.keys()


def test_gradient_checkpointing_reaches_all_stages_and_goes_again() -> None:
    model = on_meta("scalablevit_nano")
    for enable in (True, False):
        model.set_grad_checkpointing(enable)
        assert [stage.grad_checkpointing for stage in model.backbone.stages] == [enable] * 4


@pytest.mark.parametrize(
    ("name", "near"),
    [("scalablevit_nan", "scalablevit_nano"), ("scalablevit-b", "scalablevit_b")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"unknown model '{name}': did you mean '{near}'"):
        create_model(name)


@pytest.mark.parametrize("name", ["", "resnet50"])
def test_a_name_unlike_any_is_answered_with_all(name: str) -> None:
    with pytest.raises(ValueError, match=", ".join(list_models())):
        create_model(name)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"head": "conv"}, "head must be one of ['linear', 'mlp'], got 'conv'"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"num_classes": -3}, "got -3"),
        ({"window_pad": "reflect"}, "got 'reflect'"),
        ({"drop_path_rate": 1.0}, "got 1.0"),
    ],
)
def test_values_that_do_not_fit_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        on_meta("scalablevit_nano", **arguments)


@pytest.mark.parametrize("key", ["name", "num_classes", "head", "backbone"])
def test_a_description_without_one_of_its_values_is_refused(key: str) -> None:
    config = {name: value for name, value in custom().config.items() if name != key}
    with pytest.raises(ValueError, match=f"no description of a ScalableViT classifier.*{key}"):
        build_classifier(config)


@pytest.mark.parametrize("config", [{}, [], "scalablevit_s", None], ids=str)
def test_what_is_no_description_is_refused(config: Any) -> None:
    with pytest.raises(ValueError, match="no description of a ScalableViT classifier"):
        build_classifier(config)


@pytest.mark.parametrize(
    "values",
    [
        {"backbone": "scalablevit_s"},
        {"backbone": None},
        {"num_classes": "ten"},
        {"num_classes": 0},
        {"head": ["mlp"]},
        {"head": "os.system"},
    ],
    ids=str,
)
def test_a_description_with_other_values_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no description of a ScalableViT classifier|must be"):
        build_classifier(custom().config | values)


@pytest.mark.parametrize("values", [{"patch_size": 16}, {"depths": 4}, {"window_size": "seven"}, {"in_channels": None}])
def test_a_description_of_another_backbone_is_refused(values: dict[str, Any]) -> None:
    config = custom().config
    with pytest.raises(ValueError, match="no description of a ScalableViT classifier"):
        build_classifier(config | {"backbone": config["backbone"] | values})


def test_networks_need_nothing_but_torch() -> None:
    code = """
import sys
for name in ("lightning", "datasets", "jsonargparse", "timm", "torchvision", "torchmetrics", "PIL", "yaml"):
    sys.modules[name] = None
import torch
from scalablevit_pl.models import create_model
assert create_model("scalablevit_nano", num_classes=10)(torch.zeros(1, 3, 28, 28)).shape == (1, 10)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
