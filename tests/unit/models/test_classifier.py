"""The classifier: its description, its interface to timm, its last layer, its predictions."""

import copy
import inspect
import json
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import LABELS, PREPROCESSING, annotate, small
from torch import Tensor
from torch.nn.functional import layer_norm

from scalablevit_pl.models import ImageClassifier, ScalableViT, build_classifier, create_model
from scalablevit_pl.models.classifier import HeadName
from scalablevit_pl.models.heads.classification import GlobalPool
from scalablevit_pl.preprocessing import Preprocessing

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


def shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def custom(head: HeadName = "mlp", num_classes: int = 3) -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(ScalableViT(**BACKBONE), num_classes, head)


def test_the_description_holds_every_argument() -> None:
    assert BACKBONE.keys() == inspect.signature(ScalableViT).parameters.keys()
    expected = {"name": "scalablevit_custom", "num_classes": 3, "head": "linear", "global_pool": "avg"}
    assert custom("linear").config == expected | {"backbone": BACKBONE}
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


@pytest.mark.parametrize("head", ["mlp", "linear"])
@pytest.mark.parametrize("num_classes", [0, 5])
@pytest.mark.parametrize("global_pool", ["avg", ""])
@pytest.mark.parametrize("made", ["new", "reset"])
@torch.no_grad()
def test_a_description_includes_the_last_layer_and_the_pooling(
    head: HeadName, num_classes: int, global_pool: GlobalPool, made: str
) -> None:
    if made == "new":
        model = ImageClassifier(ScalableViT(**BACKBONE), num_classes, head, global_pool=global_pool)
    else:
        model = custom(head)
        model.reset_classifier(num_classes, global_pool)
    rebuilt = build_classifier(json.loads(json.dumps(model.config)))
    assert rebuilt.config == model.config
    assert (rebuilt.num_classes, rebuilt.head.global_pool) == (num_classes, global_pool)
    rebuilt.load_state_dict(model.state_dict())
    image = torch.randn(2, 2, 64, 64)
    assert torch.equal(rebuilt.eval()(image), model.eval()(image))


def test_a_reset_leaves_recorded_descriptions_alone() -> None:
    model = custom()
    recorded, before = model.config, copy.deepcopy(model.config)
    model.reset_classifier(9)
    assert recorded == before != model.config


@torch.no_grad()
def test_logits_are_the_head_on_the_backbone_s_maps() -> None:
    model = custom(num_classes=4).eval()
    image = torch.randn(2, 2, 33, 70)
    logits = model(image)
    assert logits.shape == (2, 4)
    assert torch.equal(logits, model.head(model.backbone(image)))


def test_the_convolutions_of_position_encodings_have_no_weight_decay() -> None:
    names = {f"backbone.stages.{stage}.peg.conv.weight" for stage in range(4)}
    assert on_meta("scalablevit_nano").no_weight_decay() == names
    assert names <= on_meta("scalablevit_nano").state_dict().keys()


def test_gradient_checkpointing_is_switched_in_all_stages() -> None:
    model = on_meta("scalablevit_nano")
    for enable in (True, False):
        model.set_grad_checkpointing(enable)
        assert [stage.grad_checkpointing for stage in model.backbone.stages] == [enable] * 4


def maps_of(model: ImageClassifier, image: Tensor) -> list[Tensor]:
    """Return the outputs of the stages, observed by hooks."""
    seen: list[Tensor] = []
    handles = [stage.register_forward_hook(lambda *call: seen.append(call[-1])) for stage in model.backbone.stages]
    model(image)
    for handle in handles:
        handle.remove()
    return seen


def assert_same(maps: Any, expected: list[Tensor]) -> None:
    assert len(maps) == len(expected)
    assert all(torch.equal(*pair) for pair in zip(maps, expected, strict=True))


@pytest.mark.parametrize("head", ["mlp", "linear"])
@torch.no_grad()
def test_the_forward_pass_is_features_and_head(head: HeadName) -> None:
    model = custom(head).eval()
    image = torch.randn(2, 2, 70, 45)
    features = model.forward_features(image)
    assert features.shape == (2, model.num_features, 3, 2)
    assert torch.equal(features, maps_of(model, image)[-1])
    assert torch.equal(model.forward_head(features), model(image))
    hidden = model.forward_head(features, pre_logits=True)
    assert hidden.shape == (2, model.head_hidden_size)
    assert model.head_hidden_size == {"mlp": 4096, "linear": 16}[head]
    torch.testing.assert_close(model.get_classifier()(hidden), model(image))


@pytest.mark.parametrize(
    ("indices", "stages"),
    [(None, [0, 1, 2, 3]), (1, [3]), (3, [1, 2, 3]), ([0, 2], [0, 2]), ((-1, 1), [1, 3]), ([-4], [0])],
    ids=str,
)
@torch.no_grad()
def test_intermediates_are_the_outputs_of_the_stages(indices: Any, stages: list[int]) -> None:
    model = custom().eval()
    image = torch.randn(1, 2, 70, 45)
    maps = maps_of(model, image)
    expected = [maps[stage] for stage in stages]
    assert_same(model.forward_intermediates(image, indices, intermediates_only=True), expected)
    features, intermediates = model.forward_intermediates(image, indices)
    assert_same([features, *intermediates], [maps[-1], *expected])
    features, intermediates = model.forward_intermediates(image, indices, stop_early=True)
    assert_same([features, *intermediates], [maps[max(stages)], *expected])


@torch.no_grad()
def test_stopping_early_computes_no_further_stage() -> None:
    model = custom().eval()
    model.backbone.stages[2] = model.backbone.stages[3] = None
    image = torch.randn(1, 2, 64, 64)
    assert len(model.forward_intermediates(image, [0, 1], stop_early=True, intermediates_only=True)) == 2
    with pytest.raises(TypeError):
        model.forward_intermediates(image, [0, 1], intermediates_only=True)


@torch.no_grad()
def test_the_norm_applies_to_the_last_map_alone() -> None:
    model = custom().eval()
    torch.nn.init.normal_(model.head.norm.weight)
    image = torch.randn(1, 2, 70, 45)
    maps = maps_of(model, image)
    features, intermediates = model.forward_intermediates(image, norm=True)
    assert_same([features, *intermediates[:3]], [maps[-1], *maps[:3]])
    normalized = layer_norm(maps[-1].movedim(1, -1), (16,), model.head.norm.weight, model.head.norm.bias, 1e-6).movedim(
        -1, 1
    )
    torch.testing.assert_close(intermediates[-1], normalized, rtol=1e-4, atol=1e-5)
    assert_same(model.forward_intermediates(image, [0, 1], norm=True, intermediates_only=True), maps[:2])


@pytest.mark.parametrize("indices", [0, 5, -1, [4], [-5], [0, 9], []], ids=str)
def test_missing_stages_are_refused(indices: Any) -> None:
    model = custom()
    with pytest.raises(ValueError, match=re.escape(f"indices must choose among 4 stages, got {indices}")):
        model.forward_intermediates(torch.zeros(1, 2, 64, 64), indices)
    with pytest.raises(ValueError, match="indices must choose"):
        model.prune_intermediate_layers(indices)
    assert len(model.backbone.stages) == 4


def test_maps_are_channels_first_only() -> None:
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NHWC'"):
        custom().forward_intermediates(torch.zeros(1, 2, 64, 64), output_fmt="NHWC")


@pytest.mark.parametrize("last", range(4))
@pytest.mark.parametrize("training", [True, False])
def test_a_pruned_network_holds_only_what_its_maps_need(last: int, training: bool) -> None:
    model = custom().eval()
    image = torch.randn(1, 2, 70, 45)
    with torch.no_grad():
        expected = maps_of(model, image)[: last + 1]
    assert model.prune_intermediate_layers([0, last], prune_norm=True) == [0, last]
    assert_same(model.backbone(image), expected)
    assert torch.equal(model(image), expected[-1])  # without norm and pooling
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert model.num_features == model.head_hidden_size == BACKBONE["embed_dims"][last]
    assert (model.num_classes, list(model.head.parameters())) == (0, [])
    assert len(model.backbone.channels) == len(model.backbone.strides) == last + 1
    model.train(training)
    model(image).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_pruning_can_keep_head_and_norm() -> None:
    image = torch.randn(1, 2, 64, 64)
    model = custom().eval()
    torch.nn.init.normal_(model.head.norm.weight)
    logits, config = model(image), model.config
    assert model.prune_intermediate_layers(prune_head=False) == [3]
    assert torch.equal(model(image), logits)
    assert model.config == config
    normalized = model.forward_intermediates(image, norm=True, intermediates_only=True)[-1]
    model.prune_intermediate_layers()
    assert torch.equal(model(image), normalized)  # only the norm of the head is left
    model = custom().eval()
    model.prune_intermediate_layers([0, 1], prune_head=False)
    assert torch.equal(model(image), model.forward_features(image))  # a head without its stage


def test_a_pruned_network_can_get_a_new_last_layer() -> None:
    model = custom()
    model.prune_intermediate_layers([1])
    model.reset_classifier(7, "avg")
    features = model.forward_features(torch.randn(2, 2, 64, 64))
    expected = features.mean((2, 3)) @ model.head.fc.weight.T + model.head.fc.bias
    torch.testing.assert_close(model.forward_head(features), expected)
    assert expected.shape == (2, 7)


@pytest.mark.parametrize("options", [{"indices": [2]}, {"indices": 1}, {"prune_head": False, "prune_norm": True}])
def test_a_pruned_network_has_no_description(options: dict[str, Any]) -> None:
    model = custom()
    model.prune_intermediate_layers(**options)
    with pytest.raises(ValueError, match="does not describe"):
        build_classifier(model.config)
    model.reset_classifier(3, "avg")
    with pytest.raises(ValueError, match="does not describe"):
        build_classifier(model.config)


@pytest.mark.parametrize("head", ["mlp", "linear"])
@torch.no_grad()
def test_a_reset_replaces_the_last_layer_and_leaves_the_rest(head: HeadName) -> None:
    model = custom(head).eval()
    image = torch.randn(2, 2, 64, 64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hidden = model.forward_head(model.forward_features(image), pre_logits=True)
    model.reset_classifier(500)
    assert model.num_classes == 500
    assert model(image).shape == (2, 500)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in after if not name.startswith("head.fc."))
    weight, bias = model.get_classifier().parameters()
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not bias.any()
    model.reset_classifier(0)
    assert torch.equal(model(image), hidden)
    assert model.num_classes == len(list(model.get_classifier().parameters())) == 0
    assert custom(head, 0).state_dict().keys() == model.state_dict().keys()


def test_a_reset_keeps_the_pooling_by_default() -> None:
    model = custom()
    for given, expected in ((None, "avg"), ("", ""), (None, ""), ("avg", "avg")):
        model.reset_classifier(2, given)
        assert model.head.global_pool == model.config["global_pool"] == expected


def test_a_refused_reset_changes_nothing() -> None:
    model = custom()
    fc, config = model.get_classifier(), model.config
    for arguments, named in (((-1,), "must be at least 0, got -1"), ((5, "max"), "global_pool must be .* got 'max'")):
        with pytest.raises(ValueError, match=named):
            model.reset_classifier(*arguments)
    assert model.get_classifier() is fc
    assert (model.num_classes, model.config) == (3, config)


def test_a_new_last_layer_has_the_device_and_type_of_the_old_weights() -> None:
    model = custom().to("meta", torch.float64).eval()
    for num_classes in (4, 0, 5):
        model.reset_classifier(num_classes)
    model.backbone.float()
    assert {(p.device.type, p.dtype) for p in model.get_classifier().parameters()} == {("meta", torch.float64)}
    model.reset_classifier(6)
    assert model.get_classifier().weight.dtype == torch.float64  # that of the layer before it, not of the backbone
    assert not any(module.training for module in model.modules())


def test_feature_info_describes_the_maps() -> None:
    model = custom()
    assert [info["num_chs"] for info in model.feature_info] == BACKBONE["embed_dims"]
    image = torch.zeros(1, 2, 64, 96)
    for info, features in zip(model.feature_info, maps_of(model, image), strict=True):
        seen: list[Tensor] = []
        model.get_submodule(info["module"]).register_forward_hook(lambda *call, seen=seen: seen.append(call[-1]))
        model(image)
        assert torch.equal(seen[0], features)
        assert features.shape == (1, info["num_chs"], 64 // info["reduction"], 96 // info["reduction"])


def test_pretrained_cfg_is_the_only_record_of_preprocessing_and_labels() -> None:
    model = custom(num_classes=2)
    cfg = model.pretrained_cfg
    assert model.default_cfg is cfg
    assert (cfg["input_size"], cfg["num_classes"], model.in_chans) == ((2, 224, 224), 2, 2)
    assert f"{cfg['first_conv']}.weight" in model.state_dict()
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert custom().pretrained_cfg is not custom().pretrained_cfg


def test_class_names_are_ignored_unless_there_is_one_for_each_logit() -> None:
    model = custom(num_classes=2)
    assert model.class_names is None
    model.pretrained_cfg["label_names"] = ("cat", "dog")
    assert model.class_names == ["cat", "dog"]
    model.num_classes = 3
    assert model.class_names is None
    model.num_classes = 2
    model.pretrained_cfg["label_names"] = []
    assert model.class_names is None


def test_parameters_are_sorted_by_depth() -> None:
    names = [name for name, _ in custom().named_parameters()]
    fine, coarse = (custom().group_matcher(coarse=coarse) for coarse in (False, True))
    assert re.match(fine["stem"], "backbone.stages.0.patch_embed.norm.bias")
    for matcher in (fine, coarse):
        blocks = matcher["blocks"]
        patterns = [matcher["stem"], matcher["head"], *([blocks] if isinstance(blocks, str) else dict(blocks))]
        assert [name for name in names if not any(re.match(pattern, name) for pattern in patterns)] == []


def test_networks_need_only_torch() -> None:
    code = """
import sys
for name in ("lightning", "datasets", "jsonargparse", "timm", "torchvision", "torchmetrics", "PIL", "yaml"):
    sys.modules[name] = None
import torch
from scalablevit_pl.models import create_model
assert create_model("scalablevit_nano", num_classes=10)(torch.zeros(1, 3, 28, 28)).shape == (1, 10)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_class_names_can_be_set_one_for_each_logit() -> None:
    model = create_model("scalablevit_nano", num_classes=2)
    assert model.class_names is None
    model.class_names = ("cat", "dog")
    assert model.class_names == model.pretrained_cfg["label_names"] == ["cat", "dog"]
    with pytest.raises(ValueError, match="3 names for 2 classes"):
        model.class_names = ["a", "b", "c"]


def test_a_new_last_layer_has_no_labels_even_with_as_many_outputs() -> None:
    model = create_model("scalablevit_nano", num_classes=2)
    model.class_names = ["cat", "dog"]
    before = model.pretrained_cfg
    model.reset_classifier(2)
    assert model.class_names is None
    assert model.default_cfg is model.pretrained_cfg
    assert before["label_names"] == ["cat", "dog"]  # it may be in a record


PIXELS = np.random.RandomState(0).randint(0, 256, (40, 56, 3), dtype=np.uint8)


def predicted(model: ImageClassifier, labels: list[str]) -> list[tuple[str, float]]:
    """Sort the classes of one image by probability, without `predict`."""
    with torch.no_grad():
        probabilities = model(model.preprocess(PIXELS)[None]).softmax(1)[0].tolist()
    return sorted(zip(labels, probabilities, strict=True), key=lambda pair: -pair[1])


@pytest.mark.parametrize(("top_k", "given"), [(1, 1), (2, 2), (3, 3), (4, 3), (1000, 3)])
def test_the_most_probable_labels_come_first(top_k: int, given: int) -> None:
    model = annotate(small(), LABELS)
    (row,) = model.predict(PIXELS, top_k=top_k)
    expected = predicted(model, LABELS)[:given]
    assert [label for label, _ in row] == [label for label, _ in expected]
    assert [p for _, p in row] == pytest.approx([p for _, p in expected], rel=1e-5)


def test_five_labels_are_returned_by_default() -> None:
    assert len(small(7).predict(PIXELS)[0]) == 5


@pytest.mark.parametrize("options", [{"top_k": 0}, {"batch_size": 0}, {"top_k": -1}])
def test_numbers_below_one_are_refused(options: dict[str, int]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {options[name]}"):
        small().predict(PIXELS, **options)


def test_without_names_a_label_is_the_index_of_its_class() -> None:
    model = small()
    (row,) = model.predict(PIXELS)
    assert [label for label, _ in row] == [label for label, _ in predicted(model, ["0", "1", "2"])]
    model.pretrained_cfg["label_names"] = ["one", "two"]  # of other classes
    assert model.predict(PIXELS) == [row]


def test_a_network_without_last_layer_predicts_no_labels() -> None:
    assert small(0).predict([PIXELS, PIXELS]) == [[], []]


def test_the_preprocessing_is_that_of_pretrained_cfg() -> None:
    model = annotate(small(), LABELS)
    assert model.preprocessing == PREPROCESSING
    assert create_model("scalablevit_nano").preprocessing == Preprocessing()
    model.pretrained_cfg["crop_mode"] = "squash"
    with pytest.raises(ValueError, match="only square center crops"):
        model.predict(PIXELS)
