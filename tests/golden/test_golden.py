"""The numbers of the released network, on weights and images generated from fixed seeds."""

import copy

import pytest
import torch
from golden.network import DATA, TINY, build, fill, image
from safetensors.torch import load_file
from torch import Tensor

from scalablevit_pl.models import ImageClassifier, fuse
from scalablevit_pl.weights.reference import convert_reference_state_dict, read_reference_checkpoint


def fused_copy(model: ImageClassifier) -> ImageClassifier:
    fused = copy.deepcopy(model)
    fuse(fused)
    return fused


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", ["small", "base", pytest.param("large", marks=pytest.mark.slow)])
@torch.no_grad()
def test_published_sizes(size: str) -> None:
    model = build(size).eval()
    model.load_state_dict(convert_reference_state_dict(dict(fill(size))))
    expected = load_file(DATA / f"{size}_expected.safetensors")
    maps = model.backbone(image(2, 3, 224, 224))
    assert_close(model.head.pool(maps), expected["pooled"], 5e-6)
    assert_close(model.head(maps), expected["logits"], 5e-6)
    assert_close(fused_copy(model)(image(2, 3, 224, 224)), expected["logits"], 1e-5)
    # The means reach 11, so 5e-6 is five units in the last place, which the number of threads already changes.
    # In float64 only the rounding of the golden numbers themselves remains.
    for stage, feature in enumerate(model.double().backbone(image(2, 3, 224, 224).double()), start=1):
        assert_close(feature.mean((2, 3)).float(), expected[f"stage{stage}_mean"], 5e-6)
        assert_close(feature.std((2, 3)).float(), expected[f"stage{stage}_std"], 5e-6)
        assert_close(maps[stage - 1].mean((2, 3)), expected[f"stage{stage}_mean"], 2e-5)
        assert_close(maps[stage - 1].std((2, 3)), expected[f"stage{stage}_std"], 2e-5)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_tiny_networks(name: str) -> None:
    model = build(name).eval()
    model.load_state_dict(convert_reference_state_dict(dict(fill(name))))
    expected = load_file(DATA / f"{name}_expected.safetensors")
    for height, width in ((224, 224), (224, 448)):
        for network, tolerance, of_maps in ((model, 5e-6, 2e-5), (fused_copy(model), 1e-5, 3e-5)):
            maps = network.backbone(image(1, 3, height, width))
            assert_close(network.head.pool(maps), expected[f"pooled_{height}x{width}"], tolerance)
            assert_close(network.head(maps), expected[f"logits_{height}x{width}"], tolerance)
            if width == 224:
                for stage, feature in enumerate(maps, start=1):
                    assert_close(feature, expected[f"stage{stage}"], of_maps)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_both_window_modes_are_the_released_function_at_multiples_of_224(name: str) -> None:
    model = build(name, window_pad="zero").eval()
    model.load_state_dict(convert_reference_state_dict(dict(fill(name))))
    for stage, feature in enumerate(model.backbone(image(1, 3, 224, 224)), start=1):
        assert_close(feature, load_file(DATA / f"{name}_expected.safetensors")[f"stage{stage}"], 2e-5)


def test_a_checkpoint_in_the_released_layout_is_read_without_running_code() -> None:
    model = build("tiny_c").eval()
    model.load_state_dict(read_reference_checkpoint(DATA / "tiny_c_official_format.pth"))
    with torch.no_grad():
        logits = model(image(1, 3, 224, 224))
    assert_close(logits, load_file(DATA / "tiny_c_expected.safetensors")["logits_224x224"], 5e-6)
