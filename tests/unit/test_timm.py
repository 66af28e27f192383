"""The networks as timm's: built, taken apart, trained and saved by its own tools."""

import importlib
import importlib.util
import inspect
import json
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.optim
import torch
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config
from timm.models import FeatureInfo, group_parameters, load_checkpoint
from torch import Tensor, nn

import scalablevit_pl.timm
from scalablevit_pl.models import ImageClassifier, ScalableViT, build_classifier, create_model, list_models

NANO = "scalablevit_nano"
FROM_FOLDER = pytest.mark.skipif(
    [int(part) for part in timm.__version__.split(".")[:3]] < [1, 0, 31], reason="this timm reads no folders of ours"
)


def theirs(**arguments: Any) -> ImageClassifier:
    torch.manual_seed(0)
    return timm.create_model(NANO, **arguments).eval()


def image(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 70, 96, generator=torch.Generator().manual_seed(1))


def test_timm_lists_the_networks_and_no_weights_of_them() -> None:
    assert timm.list_models("scalablevit*") == sorted(list_models())
    assert timm.list_models(module="timm") == sorted(list_models())
    assert "timm" in timm.list_modules()
    for name in list_models():
        assert timm.is_model(name)
        assert not timm.models.is_model_pretrained(name)
    assert timm.list_models("scalablevit*", pretrained=True) == []


def test_a_second_import_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(scalablevit_pl.timm)
    assert timm.create_model(NANO, num_classes=2).num_classes == 2


@pytest.mark.parametrize("name", list_models())
def test_timm_builds_the_networks_of_this_package(name: str) -> None:
    with torch.device("meta"):
        model, ours = timm.create_model(name, num_classes=10), create_model(name, 10)
    assert type(model) is ImageClassifier
    assert model.config == ours.config
    assert [(key, tensor.shape) for key, tensor in model.state_dict().items()] == [
        (key, tensor.shape) for key, tensor in ours.state_dict().items()
    ]
    assert model.default_cfg is model.pretrained_cfg
    own = {key: value for key, value in ours.pretrained_cfg.items() if key != "num_classes"}
    assert model.pretrained_cfg.items() >= own.items()
    assert model.pretrained_cfg["num_classes"] == 1000  # of the entry in the registry, as with any network there


@torch.no_grad()
def test_weights_go_from_one_to_the_other() -> None:
    torch.manual_seed(3)
    ours = create_model(NANO, 10).eval()
    model = theirs(num_classes=10)
    model.load_state_dict(ours.state_dict())
    assert torch.equal(model(image()), ours(image()))


def test_arguments_reach_the_network() -> None:
    backbone = {
        "embed_dims": [8, 8, 16, 16],
        "num_heads": [1, 2, 2, 4],
        "depths": [1, 2, 2, 1],
        "spatial_ratios": [4, 2, 2, 1],
        "channel_ratios": [1.0, 2.0, 1.0, 1.0],
        "window_size": 5,
        "mlp_ratio": 2.0,
        "drop_path_rate": 0.1,
        "drop_rate": 0.2,
        "attn_drop_rate": 0.3,
        "in_channels": 4,
        "window_pad": "zero",
        "expand_value": True,
    }
    assert backbone.keys() == inspect.signature(ScalableViT).parameters.keys()
    model = theirs(head="mlp", global_pool="", num_classes=6, **backbone)
    expected = {"name": NANO, "num_classes": 6, "head": "mlp", "global_pool": "", "backbone": backbone}
    assert model.config == expected
    assert build_classifier(model.config).config == expected


def test_the_defaults_of_a_size_stay() -> None:
    with torch.device("meta"):
        assert timm.create_model("scalablevit_s").config == create_model("scalablevit_s").config
        assert timm.create_model("scalablevit_s", drop_path_rate=0.0).backbone.config["drop_path_rate"] == 0.0
        assert timm.create_model("scalablevit_s", head="linear", drop_path_rate=None).config["head"] == "linear"


def test_channels_are_told_in_timm_s_word_or_ours() -> None:
    for arguments in ({"in_chans": 1}, {"in_channels": 1}, {"in_chans": 1, "in_channels": 4}):
        model = theirs(num_classes=2, **arguments)
        assert model.in_chans == model.backbone.in_channels == 1
        assert model(image(1)).shape == (2, 2)


@pytest.mark.parametrize("unknown", ["patch_size", "not_a_model_arg", "name"])
def test_an_unknown_argument_is_refused_as_timm_refuses_it(unknown: str) -> None:
    with pytest.raises(TypeError, match=unknown):
        timm.create_model("test_resnet", **{unknown: 1})
    with pytest.raises(TypeError, match=unknown):
        timm.create_model(NANO, **{unknown: 1})


def test_there_are_no_released_weights_to_load() -> None:
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for ({NANO}|this model)"):
        timm.create_model(NANO, pretrained=True)


def test_device_and_dtype_are_those_asked_for() -> None:
    model = timm.create_model(NANO, num_classes=2, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize("feature_cls", [None, "getter", "hook", "fx"])
@pytest.mark.parametrize("training", [False, True])
def test_features_only_gives_the_backbone_s_maps(feature_cls: str | None, training: bool) -> None:
    extractor = theirs(features_only=True, feature_cls=feature_cls).train(training)
    expected = theirs().train(training).backbone(image())
    maps = extractor(image())
    assert [tuple(features.shape) for features in maps] == [tuple(features.shape) for features in expected]
    for features, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(features, other)
    assert extractor.feature_info.channels() == [features.shape[1] for features in maps]
    assert extractor.feature_info.reduction() == [4, 8, 16, 32]


@pytest.mark.parametrize(("indices", "stages"), [((1, 2), [1, 2]), ((-1,), [3]), ((0, -2), [0, 2])])
def test_an_extractor_holds_no_weights_that_it_does_not_use(indices: tuple[int, ...], stages: list[int]) -> None:
    extractor = theirs(features_only=True, out_indices=indices).train()
    maps = extractor(image())
    expected = theirs().backbone(image())
    for features, stage in zip(maps, stages, strict=True):
        assert torch.equal(features, expected[stage])
    assert extractor.feature_info.channels() == [features.shape[1] for features in maps]
    sum(features.sum() for features in maps).backward()
    assert [name for name, parameter in extractor.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_timm_reads_the_description_of_the_maps(name: str, head: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, head=head, num_classes=0)
        info = FeatureInfo(model.feature_info, (0, 1, 2, 3))
        features, maps = model.forward_intermediates(torch.empty(1, 3, 224, 224))
        assert model(torch.empty(1, 3, 224, 224)).shape == (1, model.head_hidden_size)
    assert info.channels() == [m.shape[1] for m in maps] == list(model.backbone.channels)
    assert info.reduction() == [224 // m.shape[2] for m in maps]
    assert all(isinstance(model.get_submodule(module), nn.Module) for module in info.module_name())
    assert features.shape[1:] == (model.num_features, *model.pretrained_cfg["pool_size"])


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_groups_of_parameters_follow_the_depth(coarse: bool, head: str) -> None:
    model = theirs(head=head)
    groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    assert groups.keys() == {name for name, _ in model.named_parameters()}
    depths = model.backbone.config["depths"]
    last = 1 + (len(depths) if coarse else sum(depths))
    for name, group in groups.items():
        if name.startswith("backbone.stages.0.patch_embed"):
            expected = 0
        elif match := re.match(r"backbone\.stages\.(\d)\.(?:blocks\.(\d+)\.)?", name):
            stage, block = int(match[1]), int(match[2] or 0)
            expected = 1 + (stage if coarse else sum(depths[:stage]) + block)
        else:
            expected = last
        assert group == expected, name


def names(model: nn.Module, group: dict[str, Any]) -> set[str]:
    members = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in members}


def test_layer_decay_slows_the_first_layers_most() -> None:
    model = theirs()
    groups = timm.optim.param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    scale = {name: group["lr_scale"] for group in groups for name in names(model, group)}
    decay = {name: group["weight_decay"] for group in groups for name in names(model, group)}
    assert scale.keys() == {name for name, _ in model.named_parameters()}
    assert scale["head.fc.weight"] == scale["head.norm.weight"] == 1.0
    assert scale["backbone.stages.3.blocks.1.mlp.fc1.weight"] == 0.5
    assert scale["backbone.stages.3.blocks.0.mlp.fc1.weight"] == scale["backbone.stages.3.peg.conv.weight"] == 0.25
    assert scale["backbone.stages.0.patch_embed.proj.weight"] == min(scale.values()) == 0.5**10
    assert {name for name in decay if "peg" in name and decay[name]} == set()
    assert decay["backbone.stages.3.blocks.0.attn.lim.weight"] == 0.05


def test_timm_exempts_the_position_encodings_from_weight_decay() -> None:
    model = theirs()
    free, decayed = timm.optim.param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    assert (free["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)
    assert {f"backbone.stages.{stage}.peg.conv.weight" for stage in range(4)} <= names(model, free)
    assert "backbone.stages.0.patch_embed.proj.weight" in names(model, decayed)


def test_timm_s_optimizer_trains_a_network_with_recomputed_activations() -> None:
    gradients = []
    for enable in (False, True):
        model = theirs(num_classes=3).train()
        model.set_grad_checkpointing(enable)
        assert [stage.grad_checkpointing for stage in model.backbone.stages] == [enable] * 4
        optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
        model(image()).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        before = model.head.fc.weight.detach().clone()
        optimizer.step()
        assert not torch.equal(model.head.fc.weight, before)
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_timm_makes_the_transform_of_a_network() -> None:
    model = theirs()
    model.pretrained_cfg.update(input_size=(3, 96, 96), crop_pct=0.5, mean=(0.1, 0.2, 0.3), interpolation="bilinear")
    config = resolve_model_data_config(model)
    expected = {"input_size": (3, 96, 96), "crop_pct": 0.5, "mean": (0.1, 0.2, 0.3), "interpolation": "bilinear"}
    assert config.items() >= expected.items()
    assert create_transform(**config).transforms[0].size == 192
    default = resolve_model_data_config(create_model(NANO))
    assert default["std"] == timm.data.IMAGENET_DEFAULT_STD
    assert (default["mean"], default["crop_mode"]) == (timm.data.IMAGENET_DEFAULT_MEAN, "center")


@torch.no_grad()
def test_timm_loads_weights_saved_as_safetensors(tmp_path: Path) -> None:
    torch.manual_seed(4)
    ours = create_model(NANO, 7).eval()
    save_file(ours.state_dict(), tmp_path / "model.safetensors")
    model = theirs(num_classes=7)
    load_checkpoint(model, str(tmp_path / "model.safetensors"))
    assert torch.equal(model(image()), ours(image()))
    again = theirs(num_classes=7, checkpoint_path=str(tmp_path / "model.safetensors"))
    assert torch.equal(again(image()), ours(image()))


@torch.no_grad()
def test_weights_are_fitted_to_other_classes_and_channels(tmp_path: Path) -> None:
    torch.manual_seed(4)
    ours = create_model(NANO, 1000).eval()
    save_file(ours.state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors")}
    model = theirs(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, in_chans=1)
    assert model(image(1)).shape == (2, 5)
    grey = image(1).expand(-1, 3, -1, -1)
    torch.testing.assert_close(model.backbone(image(1)), ours.backbone(grey), rtol=1e-4, atol=1e-4)
    extractor = theirs(pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
    assert torch.equal(extractor(image())[3], ours.backbone(image())[3])


def write_folder(folder: Path, model: ImageClassifier, labels: list[str]) -> None:
    save_file(model.state_dict(), folder / "model.safetensors")
    config = model.config
    description = {
        "architecture": config["name"],
        "num_classes": config["num_classes"],
        "label_names": labels,
        "model_args": {"head": config["head"], "global_pool": config["global_pool"]} | config["backbone"],
        "pretrained_cfg": model.pretrained_cfg | {"crop_pct": 1.0},
    }
    (folder / "config.json").write_text(json.dumps(description))


@FROM_FOLDER
@torch.no_grad()
def test_timm_rebuilds_a_network_from_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(5)
    backbone = ScalableViT((8, 8, 16, 16), (1, 2, 2, 4), (1, 2, 1, 1), window_size=5, in_channels=1, window_pad="zero")
    ours = ImageClassifier(backbone, 2, "mlp", NANO).eval()
    write_folder(tmp_path, ours, ["cat", "dog"])
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert model.config == ours.config
    assert torch.equal(model(image(1)), ours(image(1)))
    assert model.class_names == ["cat", "dog"]
    assert resolve_model_data_config(model)["crop_pct"] == 1.0
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, in_chans=3).eval()
    assert other(image(3)).shape == (2, 3)
    assert other.class_names is None


@FROM_FOLDER
@pytest.mark.parametrize("make", [create_model, timm.create_model], ids=["ours", "theirs"])
@torch.no_grad()
def test_timm_loads_the_networks_it_saves(make: Callable[..., ImageClassifier], tmp_path: Path) -> None:
    model = make(NANO, num_classes=4, window_pad="zero", head="mlp", in_channels=1).eval()
    model.reset_classifier(3, "")
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.config == model.config
    assert torch.equal(again(image(1)), model(image(1)))
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


def test_timm_has_a_description_of_each_network(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), torch.device("meta"):
        for name in list_models():
            timm.create_model(name)
    assert caplog.text == ""


@pytest.mark.skipif(
    importlib.util.find_spec("segmentation_models_pytorch") is None, reason="needs segmentation_models_pytorch"
)
def test_a_segmentation_decoder_takes_the_backbone() -> None:
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    model = smp.Unet(f"tu-{NANO}", encoder_weights=None, classes=2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    batch = torch.randn(2, 3, 64, 96)
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(batch), (batch[:, 0] > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())
