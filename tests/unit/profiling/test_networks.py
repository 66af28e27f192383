from pathlib import Path

import pytest
import torch
from torch import nn

from scalablevit_pl.models import create_model
from scalablevit_pl.models.fusion import FusedLinear
from scalablevit_pl.profiling import networks
from scalablevit_pl.profiling.cost import count_multiply_adds
from scalablevit_pl.profiling.memory import peak_of_call
from scalablevit_pl.profiling.networks import Setting, build_network, check_networks, image_shape, prepare

CPU = torch.device("cpu")
MEGABYTE = 1_000_000


class Probe(nn.Module):
    """Notes what it is called with, and under which circumstances."""

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


@pytest.mark.parametrize("name", ["scalablevit_nanno", "resnet10", "swin_tiny_patch4_window7", "SCALABLEVIT_S", ""])
def test_an_unknown_network_is_answered_with_the_nearest(name: str) -> None:
    known = {"scalablevit_nanno": "scalablevit_nano", "resnet10": "resnet10t", "SCALABLEVIT_S": "scalablevit_s", "": ""}
    near = known.get(name, f"{name}_224")
    with pytest.raises(ValueError, match=f"unknown network '{name}'.*did you mean.*{near}"):
        check_networks(["resnet10t", name])
    assert check_networks(["scalablevit_l", "resnet10t"]) == {}


def test_models_are_looked_for_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_model").mkdir()
    for name, message in (
        ("./typo", r"'\./typo' is no folder"),
        ("./my_model", "holds no model: give a folder with"),
        ("my_model", r"'my_model' is no network's name.*give it as \./my_model$"),
    ):
        with pytest.raises(ValueError, match=message):
            check_networks(["resnet10t", name])


def test_the_hub_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    create_model("scalablevit_nano", num_classes=3).save_pretrained(tmp_path)
    monkeypatch.setattr(networks, "locate", lambda name: asked.append(name) or tmp_path)
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


def test_a_model_of_ours_is_taken_from_its_folder(tmp_path: Path) -> None:
    model = create_model("scalablevit_nano", num_classes=3, in_channels=1)
    model.save_pretrained(tmp_path / "model")
    setting = Setting(str(tmp_path / "model"), input_size=(32, 48))
    built = build_network(setting)
    assert torch.equal(built.state_dict()["head.fc.weight"], model.head.fc.weight)
    assert image_shape(built, setting) == (1, 32, 48)


def test_timm_s_networks_of_one_size_are_built_for_another() -> None:
    # The second one takes no such size as an argument, and any as images.
    for name, size in (("vit_tiny_patch16_224", (32, 48)), ("twins_pcpvt_small", (33, 49))):
        network = build_network(Setting(name, input_size=size)).eval()
        assert count_multiply_adds(network, (3, *size))[0] > 0


def test_a_fused_case_is_fused() -> None:
    for fused in (False, True):
        network = create_model("scalablevit_nano")
        prepare(network, Setting("scalablevit_nano", input_size=(32, 32), fused=fused), CPU)
        assert any(isinstance(module, FusedLinear) for module in network.modules()) == fused


def test_checkpointing_is_handed_on() -> None:
    for checkpointing in (False, True):
        ours = build_network(Setting("scalablevit_nano", mode="train", grad_checkpointing=checkpointing))
        theirs = build_network(Setting("resnet10t", mode="train", grad_checkpointing=checkpointing))
        stages = [module.grad_checkpointing for module in ours.modules() if hasattr(module, "grad_checkpointing")]
        assert stages
        assert set(stages) == {checkpointing} == {theirs.grad_checkpointing}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_inference_has_weights_and_images_in_the_type(precision: str, channels_last: bool) -> None:
    dtype = {"32": torch.float32, "bf16": torch.bfloat16}[precision]
    setting = Setting("x", "inference", precision, False, 4, (5, 6), channels_last)
    probe = Probe().train()
    case = prepare(probe, setting, CPU)
    assert not case.step().requires_grad
    assert probe.seen == [dtype, dtype, False, True, (4, 2, 5, 6), [channels_last] * 2]
    assert case.held == (2 * 3 * 9 + 3 + 4 * 2 * 5 * 6) * dtype.itemsize


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_training_step_computes_all_and_learns_nothing(precision: str) -> None:
    # Weights that learned the one batch by heart would have denormal gradients, with which processors take longer.
    dtype = {"32": torch.float32, "bf16": torch.bfloat16}[precision]
    probe = Probe().eval()
    case = prepare(probe, Setting("x", "train", precision, False, 4, (5, 6)), CPU)
    held, before = case.held, probe.conv.weight.clone()
    first = case.step()
    case.step()
    moments = list(case.tensors())[4:]
    assert probe.seen == [torch.float32, dtype, True, False, (4, 2, 5, 6), [False] * 2]
    assert torch.equal(probe.conv.weight, before)
    assert torch.equal(case.step(), first)
    assert all(moment.any() for moment in moments)
    assert all(parameter.grad is None for parameter in probe.parameters())
    assert held == 4 * (2 * 3 * 9 + 3 + 4 * 2 * 5 * 6) + 4 * 8
    assert case.held == held + 2 * 4 * (2 * 3 * 9 + 3) + 2 * 4  # two moments of each weight, and two counters


def test_the_peak_is_the_most_that_is_held_at_once() -> None:
    kept: list[torch.Tensor] = []

    def call() -> None:
        first = torch.empty(MEGABYTE, dtype=torch.uint8)
        second = torch.empty(2 * MEGABYTE, dtype=torch.uint8)
        del first, second
        kept.append(torch.empty(MEGABYTE // 2, dtype=torch.uint8))

    before = torch.empty(MEGABYTE)
    assert peak_of_call(call, CPU) == 3 * MEGABYTE
    del before
