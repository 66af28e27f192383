"""Parameters and multiply-adds of networks."""

import json
import math
from typing import Any

import pytest
import timm
import torch
from golden.network import DATA, SIZES
from torch import Tensor, nn

from scalablevit_pl.models import ImageClassifier, ScalableViT, create_model
from scalablevit_pl.models.cost import count_multiply_adds, count_norms, peak_memory
from scalablevit_pl.models.pretrained import card_subject

MEGABYTE = 1_000_000


def on_meta(name: str, **options: Any) -> ImageClassifier:
    with torch.device("meta"):
        return create_model(name, **options)


@pytest.mark.parametrize(("size", "published"), [("small", 4.095), ("base", 8.567), ("large", 14.686)])
def test_costs_of_the_published_sizes_match_the_release(size: str, published: float) -> None:
    network = on_meta(SIZES[size])
    assert count_multiply_adds(network, (3, 224, 224))[0] / 1e9 == pytest.approx(published, rel=1e-3)
    shapes = json.loads((DATA / f"{size}_keys.json").read_text()).values()
    assert card_subject(network).parameters == sum(map(math.prod, shapes))


def counted_by_hooks(model: nn.Module, image: Tensor) -> int:
    counts: list[int] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.weight
        if isinstance(module, nn.Linear):
            counts.append(inputs[0].numel() // weight.shape[1] * weight.numel())
        else:
            counts.append(output.numel() * weight[0].numel())  # for each output one kernel

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(image)
    return sum(counts)


@pytest.mark.parametrize("size", [28, 64, 75, 224])
@pytest.mark.parametrize(
    "options", [{}, {"head": "mlp", "expand_value": True}, {"window_pad": "zero", "in_channels": 1}], ids=str
)
def test_counts_match_hooks_on_the_layers(size: int, options: dict[str, Any]) -> None:
    model = create_model("scalablevit_nano", num_classes=10, **options).eval()
    expected = counted_by_hooks(model, torch.zeros(1, model.in_chans, size, size))
    assert count_multiply_adds(model, (model.in_chans, size, size))[0] == expected


def test_attention_is_counted_separately() -> None:
    # The first stage is one window of 7 × 7 tokens. Heads do not change the count.
    dims = (8, 8, 16, 16)
    backbone = ScalableViT(dims, (1, 2, 2, 4), (1, 1, 1, 1))
    _, attention = count_multiply_adds(ImageClassifier(backbone, 3, "linear"), (3, 28, 28))
    tokens = (49, 16, 4, 1)
    assert attention == sum(2 * n * n * dim for n, dim in zip(tokens, dims, strict=True))


def test_counting_computes_nothing_and_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    count_multiply_adds(on_meta("scalablevit_l"), (3, 4096, 4096))  # would take terabytes
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("name", "published"), [("swin_tiny_patch4_window7_224", 4.5e9), ("twins_svt_small", 2.9e9)])
def test_costs_of_timm_networks_match_their_papers(name: str, published: float) -> None:
    multiply_adds, attention = count_multiply_adds(timm.create_model(name).eval(), (3, 224, 224))
    assert multiply_adds + attention == pytest.approx(published, rel=0.02)
    assert 0.02 < attention / multiply_adds < 0.05


def test_norms_are_counted_separately() -> None:
    network = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.LayerNorm(6)).eval()
    assert count_norms(network, (2, 5, 6)) == 2 * (2 * 4 * 5 * 6)
    assert count_multiply_adds(network, (2, 5, 6)) == (5 * 6 * 9 * 2 * 4, 0)


def test_any_network_is_counted_without_changing_it() -> None:
    network = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 5 * 6, 7))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert count_multiply_adds(network, (2, 5, 6)) == (5 * 6 * 9 * 2 * 4 + 4 * 5 * 6 * 7, 0)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_peak_memory_is_the_most_held_at_once() -> None:
    kept: list[torch.Tensor] = []

    def call() -> None:
        first = torch.empty(MEGABYTE, dtype=torch.uint8)
        second = torch.empty(2 * MEGABYTE, dtype=torch.uint8)
        del first, second
        kept.append(torch.empty(MEGABYTE // 2, dtype=torch.uint8))

    before = torch.empty(MEGABYTE)
    assert peak_memory(call, torch.device("cpu")) == 3 * MEGABYTE
    del before
