"""Networks of timm as backbones."""

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_networks import rewrite
from timm.models import group_parameters

from scalablevit_pl.models import create_segmenter, from_pretrained
from scalablevit_pl.models.backbone import TimmBackbone, build_backbone
from scalablevit_pl.optim import parameter_groups
from scalablevit_pl.weights.folder import CARD

# Of each kind of timm's networks: fixed sizes and maps with the channels last; tokens; five maps; sides rounded down.
NAMES = ["swin_tiny_patch4_window7_224", "twins_svt_small", "resnet10t", "convnext_atto"]
SWIN = NAMES[0]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_images_of_any_size_give_four_maps(name: str) -> None:
    backbone = TimmBackbone(name, in_channels=1).eval()
    assert backbone.strides == (4, 8, 16, 32)
    for size in [(64, 96), (33, 50), (1, 1), (229, 15)]:
        for features, channels, stride in zip(
            backbone(torch.randn(2, 1, *size)), backbone.channels, backbone.strides, strict=True
        ):
            assert features.shape == (2, channels, *(math.ceil(side / stride) for side in size))


@torch.no_grad()
def test_maps_are_those_of_features_only() -> None:
    torch.manual_seed(0)
    backbone, image = TimmBackbone("resnet10t").eval(), torch.randn(2, 3, 64, 96)
    theirs = timm.create_model("resnet10t", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    theirs.load_state_dict(backbone.model.state_dict())
    for ours, plain in zip(backbone(image), theirs(image), strict=True):
        torch.testing.assert_close(ours, plain)


@torch.no_grad()
def test_swin_shifts_the_windows_of_its_last_stage() -> None:
    # At the fixed size that stage is one window, which timm does not shift; images for dense tasks are larger.
    backbone = TimmBackbone(SWIN)
    assert [block.shift_size for block in backbone.model.layers[3].blocks] == [(0, 0), (3, 3)]


def test_the_published_parameters_of_segmenters_on_timm_s_networks() -> None:
    with torch.device("meta"):  # of Swin's paper: 60 M; of that of Twins: 28.3 M and 54.4 M with class tokens' remains
        counts = {
            (name, head): sum(p.numel() for p in create_segmenter(name, head=head).parameters())
            for name, head in ((SWIN, "upernet"), ("twins_svt_small", "semantic_fpn"))
        }
    assert counts == {(SWIN, "upernet"): 59_941_862, ("twins_svt_small", "semantic_fpn"): 27_798_934}


@pytest.mark.parametrize("name", [SWIN, "resnet10t"])
@torch.no_grad()
def test_a_saved_segmenter_on_a_network_of_timm_comes_back(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    network = create_segmenter(name, num_classes=3, width=8, drop_path_rate=0.1).eval()
    network.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert again.config == network.config
    card = (tmp_path / CARD).read_text(encoding="utf-8")
    assert f"A network for semantic segmentation on the backbone `{name}` of timm" in card
    assert "scalablevit\n- safetensors" not in card
    image = torch.randn(1, 3, 70, 50)
    assert torch.equal(again(image), network(image))
    half = from_pretrained(tmp_path, dtype=torch.bfloat16, num_classes=4)
    assert half(image.bfloat16()).shape == (1, 4, 18, 13)


def test_a_description_builds_networks_of_timm_and_downloads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_segmenter("resnet10t", num_classes=3, width=8).save_pretrained(tmp_path)
    made, create = [], timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **given: made.append(given) or create(name, **given))
    rewrite(tmp_path, lambda config: config["config"]["backbone"].update(pretrained=True, checkpoint_path="x"))
    from_pretrained(tmp_path)
    assert {given["pretrained"] for given in made} == {False}
    assert not any("checkpoint_path" in given for given in made)
    for name in ("hf-hub:owner/name", "local-dir:/tmp", 5, "resnet10t.unknown/tag"):
        rewrite(tmp_path, lambda config, name=name: config["config"]["backbone"].update(model_name=name))
        with pytest.raises(ValueError, match="describes no network that can be built"):
            from_pretrained(tmp_path)


def test_channels_of_a_trained_network_of_timm_are_kept(tmp_path: Path) -> None:
    create_segmenter("resnet10t", num_classes=3, width=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a network of timm, which keeps its channels: remove in_chans=1"):
        from_pretrained(tmp_path, in_chans=1)


def test_layers_and_exempt_parameters_are_those_of_timm() -> None:
    network = create_segmenter(SWIN, num_classes=3, width=8)
    assert len(network.no_weight_decay()) == sum((2, 2, 6, 2))
    assert all(name.startswith("backbone.model.layers.") for name in network.no_weight_decay())
    model = network.backbone.model
    theirs = group_parameters(model, model.group_matcher(), reverse=True)
    ours = group_parameters(network, network.group_matcher(), reverse=True)
    assert {name: ours[f"backbone.model.{name}"] for name in theirs} == theirs
    assert {ours[name] for name in ours if name.startswith("head.")} == {max(theirs.values()) + 1}
    assert sum(len(group["params"]) for group in parameter_groups(network, 0.9)) == len(list(network.parameters()))


def test_gradient_checkpointing_reaches_the_network_of_timm() -> None:
    network = create_segmenter(SWIN, num_classes=3, width=8, grad_checkpointing=True)
    assert {layer.grad_checkpointing for layer in network.backbone.model.layers} == {True}
    network.set_grad_checkpointing(False)
    assert {layer.grad_checkpointing for layer in network.backbone.model.layers} == {False}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_network_is_one_graph(name: str) -> None:
    network, image = create_segmenter(name, num_classes=3, width=8).eval(), torch.randn(1, 3, 70, 96)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image), network(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_224", r"has maps with strides \[16\]: choose one of timm's networks with 4, 8, 16 and 32"),
        ("scalablevit_x", "timm does not know the network 'scalablevit_x'"),
        ("hf-hub:owner/name", "timm does not know the network 'hf-hub:owner/name'"),
    ],
)
def test_other_networks_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        TimmBackbone(name)


def test_options_of_our_backbones_are_refused_for_others_and_the_reverse() -> None:
    options: dict[str, Any]
    for options in ({"window_pad": "zero"}, {"expand_value": True}):
        with pytest.raises(ValueError, match="window_pad and expand_value are for scalablevit_nano, scalablevit_s"):
            create_segmenter("resnet10t", **options)
    with pytest.raises(ValueError, match="pretrained is for networks of timm"):
        create_segmenter("scalablevit_s", pretrained=True)


def test_a_description_without_a_name_of_timm_is_a_scalablevit() -> None:
    config = create_segmenter("scalablevit_nano").backbone.config
    assert build_backbone(config).config == config
