from pathlib import Path

import pytest
import torch
from torch import nn

from scalablevit_pl.models import create_model
from scalablevit_pl.models.cost import count_multiply_adds
from scalablevit_pl.models.fusion import FusedLinear
from scalablevit_pl.profiling import networks
from scalablevit_pl.profiling.networks import Case, Setting, build_network, check_networks, image_shape, prepare

CPU = torch.device("cpu")


class Probe(nn.Module):
    """Records how it is called."""

    num_classes = 3
    in_chans = 2

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.seen: list[object] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        output = self.conv(image).mean((2, 3))
        weight = self.conv.weight
        layout = [tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (image, weight)]
        self.seen = [weight.dtype, output.dtype, self.training, torch.is_inference_mode_enabled(), image.shape, layout]
        return output


def held(case: Case) -> int:
    """Return the bytes that a case keeps between steps."""
    return sum(tensor.nbytes for tensor in case.tensors())


@pytest.mark.parametrize("name", ["scalablevit_nanno", "resnet10", "swin_tiny_patch4_window7", "SCALABLEVIT_S", ""])
def test_an_unknown_network_suggests_the_nearest_names(name: str) -> None:
    known = {"scalablevit_nanno": "scalablevit_nano", "resnet10": "resnet10t", "SCALABLEVIT_S": "scalablevit_s", "": ""}
    near = known.get(name, f"{name}_224")
    with pytest.raises(ValueError, match=f"unknown network '{name}'.*did you mean.*{near}"):
        check_networks(["resnet10t", name])
    assert check_networks(["scalablevit_l", "resnet10t"]) == {}


def test_missing_models_are_reported_before_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_model").mkdir()
    for name, message in (
        ("./typo", r"'\./typo' is neither a folder nor a repository name"),
        ("./my_model", "holds no model: give a folder with"),
        ("my_model", r"'my_model' is not the name of a network: to use the folder, write \./my_model$"),
    ):
        with pytest.raises(ValueError, match=message):
            check_networks(["resnet10t", name])


def test_the_hub_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    create_model("scalablevit_nano", num_classes=3).save_pretrained(tmp_path)
    monkeypatch.setattr(networks, "locate_model", lambda name: asked.append(name) or tmp_path)
    folders = check_networks(["owner/name"])
    for mode in ("inference", "train"):
        assert build_network(Setting("owner/name", mode), folders).num_classes == 3
    assert asked == ["owner/name"]


def test_a_network_without_classes_is_not_trained() -> None:
    network = build_network(Setting("resnet10t"))
    network.reset_classifier(0)
    prepare(network, Setting("resnet10t"), CPU)
    with pytest.raises(ValueError, match="it has no classes, which training steps need: give --mode inference"):
        prepare(network, Setting("resnet10t", "train"), CPU)


def test_a_released_model_is_loaded_from_its_folder(tmp_path: Path) -> None:
    model = create_model("scalablevit_nano", num_classes=3, in_channels=1)
    model.save_pretrained(tmp_path / "model")
    setting = Setting(str(tmp_path / "model"), input_size=(32, 48))
    built = build_network(setting)
    assert torch.equal(built.state_dict()["head.fc.weight"], model.head.fc.weight)
    assert image_shape(built, setting) == (1, 32, 48)


def test_timm_networks_of_a_fixed_size_are_built_for_another() -> None:
    # The second one refuses the argument but takes images of any size.
    for name, size in (("vit_tiny_patch16_224", (32, 48)), ("twins_pcpvt_small", (33, 49))):
        network = build_network(Setting(name, input_size=size)).eval()
        assert count_multiply_adds(network, (3, *size))[0] > 0


@pytest.mark.parametrize("name", ["scalablevit_nano", "resnet10t"])
def test_a_segmenter_is_built_and_trained_on_the_classes_of_pixels(name: str) -> None:
    setting = Setting(name, "train", batch_size=2, input_size=(33, 48), head="semantic_fpn")
    network = build_network(setting)
    assert (setting.name, network.config["head"], network.num_classes) == (f"{name} semantic_fpn", "semantic_fpn", 150)
    assert prepare(network, setting, CPU).step() > 0


def test_variants_of_our_networks_are_built() -> None:
    for head in (None, "upernet"):
        network = build_network(Setting("scalablevit_nano", head=head, window_pad="zero", expand_value=True))
        assert (network.backbone.config["window_pad"], network.backbone.config["expand_value"]) == ("zero", True)


def test_a_fused_case_is_fused() -> None:
    for fused in (False, True):
        network = create_model("scalablevit_nano")
        prepare(network, Setting("scalablevit_nano", input_size=(32, 32), fused=fused), CPU)
        assert any(isinstance(module, FusedLinear) for module in network.modules()) == fused


def test_grad_checkpointing_reaches_the_network() -> None:
    for checkpointing in (False, True):
        ours = build_network(Setting("scalablevit_nano", mode="train", grad_checkpointing=checkpointing))
        theirs = build_network(Setting("resnet10t", mode="train", grad_checkpointing=checkpointing))
        stages = [module.grad_checkpointing for module in ours.modules() if hasattr(module, "grad_checkpointing")]
        assert stages
        assert set(stages) == {checkpointing} == {theirs.grad_checkpointing}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_inference_casts_weights_and_images(precision: str, channels_last: bool) -> None:
    dtype = {"32": torch.float32, "bf16": torch.bfloat16}[precision]
    setting = Setting("x", "inference", precision, False, 4, (5, 6), channels_last)
    probe = Probe().train()
    case = prepare(probe, setting, CPU)
    assert not case.step().requires_grad
    assert probe.seen == [dtype, dtype, False, True, (4, 2, 5, 6), [channels_last] * 2]
    assert held(case) == (2 * 3 * 9 + 3 + 4 * 2 * 5 * 6) * dtype.itemsize


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_training_step_computes_everything_and_keeps_the_weights(precision: str) -> None:
    # Weights that memorize the one batch would have denormal gradients, which are slow.
    dtype = {"32": torch.float32, "bf16": torch.bfloat16}[precision]
    probe = Probe().eval()
    case = prepare(probe, Setting("x", "train", precision, False, 4, (5, 6)), CPU)
    at_first, before = held(case), probe.conv.weight.clone()
    first = case.step()
    case.step()
    moments = list(case.tensors())[4:]
    assert probe.seen == [torch.float32, dtype, True, False, (4, 2, 5, 6), [False] * 2]
    assert torch.equal(probe.conv.weight, before)
    assert torch.equal(case.step(), first)
    assert all(moment.any() for moment in moments)
    assert all(parameter.grad is None for parameter in probe.parameters())
    assert at_first == 4 * (2 * 3 * 9 + 3 + 4 * 2 * 5 * 6) + 4 * 8
    assert held(case) == at_first + 2 * 4 * (2 * 3 * 9 + 3) + 2 * 4  # two moments of each weight, and two counters
