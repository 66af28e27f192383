"""Weight decay by kind of parameter, learning rates by layer, and the learning rate of every step."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.optim
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from scalablevit_pl.models import create_model
from scalablevit_pl.optim import PolynomialSchedule, WarmupCosineSchedule, parameter_groups


def names(network: nn.Module, group: dict[str, Any]) -> set[str]:
    members = [id(parameter) for parameter in group["params"]]
    assert len(set(members)) == len(members)
    return {name for name, parameter in network.named_parameters() if id(parameter) in members}


def formula(step: int, base: float, total: int, warmup: int, warmup_lr: float, min_lr: float) -> float:
    if step < warmup:
        return warmup_lr + step * (base - warmup_lr) / warmup
    return min_lr + (base - min_lr) * math.cos(math.pi * min(step / total, 1) / 2) ** 2


def course(optimizer: Optimizer, schedule: WarmupCosineSchedule, steps: int) -> list[list[float]]:
    """Learning rates of all groups at each of the next steps."""
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return rates


def optimizer_with(*rates: float) -> Optimizer:
    return SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def test_biases_norms_and_position_encodings_take_no_weight_decay() -> None:
    network = create_model("scalablevit_nano", num_classes=10, head="mlp")
    decayed, exempt = parameter_groups(network)
    assert set(decayed) == {"params"}
    assert exempt["weight_decay"] == 0.0
    expected = {
        name
        for name, parameter in network.named_parameters()
        if name.endswith("bias") or "norm" in name or "peg" in name
    }
    assert names(network, exempt) == expected
    assert names(network, decayed) == {name for name, _ in network.named_parameters()} - expected
    assert "backbone.stages.0.blocks.0.attn.lim.weight" not in expected


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_timm_networks_are_split_as_timm_splits_them(name: str) -> None:
    network = timm.create_model(name, num_classes=3)
    listed = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    theirs = timm.optim.param_groups_weight_decay(network, 0.05, no_weight_decay_list=listed)
    expected = {group["weight_decay"]: names(network, group) for group in theirs}
    decayed, exempt = parameter_groups(network)
    assert names(network, decayed) == expected[0.05]
    assert names(network, exempt) == expected[0.0]


def test_parameters_listed_by_a_timm_network_are_exempt_whatever_their_shape() -> None:
    network = timm.create_model("test_vit", num_classes=3)
    _, exempt = parameter_groups(network)
    assert network.pos_embed.ndim == 3
    assert "pos_embed" in names(network, exempt)


def test_biases_of_two_dimensions_and_scalars_are_exempt() -> None:
    network = nn.Module()
    network.table = nn.Module()
    network.table.bias = nn.Parameter(torch.zeros(2, 3))
    network.temperature = nn.Parameter(torch.tensor(1.0))
    network.bias_table = nn.Parameter(torch.zeros(2, 3))
    decayed, exempt = parameter_groups(network)
    assert names(network, decayed) == {"bias_table"}
    assert names(network, exempt) == {"table.bias", "temperature"}


def test_frozen_parameters_are_left_out_and_shared_ones_come_once() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    network[0].requires_grad_(False)
    network[2].weight = network[1].weight
    decayed, exempt = parameter_groups(network)
    assert decayed["params"] == [network[1].weight]
    assert names(network, exempt) == {"1.bias", "2.bias"}


def test_groups_without_parameters_are_left_out() -> None:
    network = nn.Linear(2, 2)
    network.weight.requires_grad_(False)
    assert [set(group) for group in parameter_groups(network)] == [{"params", "weight_decay"}]
    network.requires_grad_(False)
    assert parameter_groups(network) == []


def test_the_optimizer_s_own_decay_is_for_the_first_group_only() -> None:
    optimizer = AdamW(parameter_groups(create_model("scalablevit_nano")), weight_decay=0.07)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.07, 0.0]


NETWORKS = {
    "nano": lambda: create_model("scalablevit_nano", num_classes=10, head="mlp"),
    "vit": lambda: timm.create_model("test_vit", num_classes=3),
    "resnet": lambda: timm.create_model("resnet10t", num_classes=3),
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=2, embed_dim=12, depths=(1, 2, 3, 1)
    ),
}


def layer_scales(network: nn.Module, layer_decay: float) -> dict[str, float]:
    return {
        name: group["lr_scale"] for group in parameter_groups(network, layer_decay) for name in names(network, group)
    }


def layers_above_in_nano(name: str) -> int:
    """Count by hand: patch embedding, nine blocks in stages of 2, 2, 3 and 2, and the head."""
    if name.startswith("head."):
        return 0
    if name.startswith("backbone.stages.0.patch_embed"):
        return 10
    _, _, stage, part, block, *_ = name.split(".")
    return [9, 7, 5, 2][int(stage)] - (int(block) if part == "blocks" else 0)


def layers_above_in_resnet(name: str) -> int:
    """Count by hand: stem, four stages of one block, and the last layer."""
    if name.startswith("fc."):
        return 0
    return 5 - int(name.split(".")[0].removeprefix("layer")) if name.startswith("layer") else 5


@pytest.mark.parametrize(
    ("network", "layers_above"), [("nano", layers_above_in_nano), ("resnet", layers_above_in_resnet)]
)
def test_learning_rates_fall_from_layer_to_layer(network: str, layers_above: Callable[[str], int]) -> None:
    built = NETWORKS[network]()
    expected = {name: pytest.approx(0.7 ** layers_above(name)) for name, _ in built.named_parameters()}
    assert layer_scales(built, 0.7) == expected


@pytest.mark.parametrize("network", NETWORKS)
def test_layers_are_those_of_timm(network: str) -> None:
    built = NETWORKS[network]()
    listed = built.no_weight_decay() if hasattr(built, "no_weight_decay") else ()
    theirs = timm.optim.param_groups_layer_decay(built, 0.05, listed, layer_decay=0.6)
    expected = {(group["lr_scale"], group["weight_decay"]): names(built, group) for group in theirs}
    ours = parameter_groups(built, 0.6)
    assert len(ours) == len(expected)
    assert {(group["lr_scale"], group.get("weight_decay", 0.05)): names(built, group) for group in ours} == expected
    assert all(set(group) <= {"params", "lr_scale", "weight_decay"} for group in ours)


@pytest.mark.parametrize("network", NETWORKS)
def test_layers_leave_weight_decay_alone_and_take_each_parameter_once(network: str) -> None:
    built = NETWORKS[network]()
    whole, parts = parameter_groups(built), parameter_groups(built, 0.9)
    members = [id(parameter) for group in parts for parameter in group["params"]]
    assert sorted(members) == sorted(id(parameter) for parameter in built.parameters())
    for group, is_exempt in zip(whole, (False, True), strict=True):
        split = [names(built, part) for part in parts if ("weight_decay" in part) == is_exempt]
        assert set().union(*split) == names(built, group)
    assert {part["weight_decay"] for part in parts if "weight_decay" in part} == {0.0}


def test_frozen_layers_are_in_no_group_and_count_nevertheless() -> None:
    network = NETWORKS["nano"]()
    before = layer_scales(network, 0.8)
    network.backbone.stages[1].requires_grad_(False)
    network.head.requires_grad_(False)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert 0 < len(trained) < len(before)
    assert layer_scales(network, 0.8) == {name: before[name] for name in trained}


def test_without_layer_decay_a_network_need_not_know_its_layers() -> None:
    assert len(parameter_groups(nn.Linear(2, 2), 1.0)) == 2
    with pytest.raises(ValueError, match=r"Linear does not define its layers .* leave layer_decay at 1"):
        parameter_groups(nn.Linear(2, 2), 0.9)


@pytest.mark.parametrize("layer_decay", [0.0, -0.5, 1.01, math.nan])
def test_a_layer_decay_out_of_range_is_named(layer_decay: float) -> None:
    with pytest.raises(ValueError, match=f"layer_decay must be above 0 and at most 1, .* got {layer_decay}"):
        parameter_groups(NETWORKS["nano"](), layer_decay)


@pytest.mark.parametrize(
    ("total", "steps_per_epoch", "warmup_epochs", "warmup"),
    [
        (40, 4, 5.0, 20),
        (40, 4, 0.0, 0),
        (30, 10, 0.3, 3),
        (30, 7, 0.1, 1),  # 0.7 steps
        (30, 4, 1.3, 5),  # 5.2 steps
        (5, 2, 4.0, 8),  # a warm-up longer than the training
        (1, 1, 0.0, 0),
    ],
)
def test_every_step_has_the_learning_rate_of_the_formula(
    total: int, steps_per_epoch: int, warmup_epochs: float, warmup: int
) -> None:
    bases = (1e-3, 4e-2, 5e-6)
    optimizer = optimizer_with(*bases)
    schedule = WarmupCosineSchedule(optimizer, total, steps_per_epoch, warmup_epochs, warmup_lr=2e-6, min_lr=3e-5)
    rates = course(optimizer, schedule, total + 10)
    for step, actual in enumerate(rates):
        expected = [formula(step, base, total, warmup, 2e-6, 3e-5) for base in bases]
        assert actual == pytest.approx(expected, rel=1e-9, abs=1e-15), step


def optimizer_with_scales(rate: float, *scales: float) -> Optimizer:
    return SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate * by, "lr_scale": by} for by in scales])


def test_a_layer_s_rate_is_a_multiple_of_the_last_one_s_at_every_step() -> None:
    scales = (0.25, 0.01, 1.0)
    optimizer = optimizer_with_scales(1e-3, *scales)
    schedule = WarmupCosineSchedule(optimizer, 30, 4, 1.3, warmup_lr=2e-6, min_lr=3e-5)
    for step, actual in enumerate(course(optimizer, schedule, 40)):
        whole = formula(step, 1e-3, 30, 5, 2e-6, 3e-5)
        assert actual == pytest.approx([scale * whole for scale in scales], rel=1e-9), step


@pytest.mark.parametrize(("rate", "said"), [(1e-3, []), (5e-6, ["5e-06"])])
def test_only_the_rate_of_the_last_layer_is_too_low_for_the_course(
    rate: float, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        WarmupCosineSchedule(optimizer_with_scales(rate, 1e-4, 1.0), 30, 4, min_lr=1e-5)
    assert [record.args[0] for record in caplog.records] == [pytest.approx(float(text)) for text in said]


@pytest.mark.parametrize("stop", [2, 17])
def test_layers_resume_with_their_saved_rates(stop: int, tmp_path: Path) -> None:
    def build() -> tuple[Optimizer, WarmupCosineSchedule]:
        optimizer = optimizer_with_scales(1e-3, 0.3, 1.0)
        return optimizer, WarmupCosineSchedule(optimizer, 20, 2, 2.5)

    whole = course(*build(), 30)
    optimizer, schedule = build()
    course(optimizer, schedule, stop)
    torch.save([optimizer.state_dict(), schedule.state_dict()], tmp_path / "state")
    optimizer, schedule = build()
    states = torch.load(tmp_path / "state", weights_only=True)
    optimizer.load_state_dict(states[0])
    schedule.load_state_dict(states[1])
    assert [group["lr_scale"] for group in optimizer.param_groups] == [0.3, 1.0]
    assert course(optimizer, schedule, 30 - stop) == whole[stop:]


def test_a_resumed_schedule_keeps_its_own_multiples() -> None:
    saved, own, resumed = (
        WarmupCosineSchedule(optimizer_with_scales(1e-3, scale, 1.0), 20, 2) for scale in (0.5, 0.1, 0.1)
    )
    for schedule in (saved, own):
        course(schedule.optimizer, schedule, 13)
    resumed.load_state_dict(saved.state_dict())
    assert [group["lr"] for group in resumed.optimizer.param_groups] == own.get_last_lr()


def test_the_paper_s_course_is_the_default() -> None:
    optimizer = optimizer_with(1e-3)
    rates = [rate for (rate,) in course(optimizer, WarmupCosineSchedule(optimizer, 300, 1), 310)]
    assert rates[0] == pytest.approx(1e-6)
    assert rates[4] == pytest.approx(1e-6 + (1e-3 - 1e-6) * 4 / 5)
    # The cosine began at step 0, so the warm-up ends a little below the base rate.
    assert rates[5] == pytest.approx(1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * 5 / 300)))
    assert rates[150] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates[300:] == pytest.approx([1e-5] * 10)
    assert max(rates) == rates[5]


@pytest.mark.parametrize("stop", [2, 5, 17, 24])
def test_a_schedule_resumes_from_its_saved_step(stop: int) -> None:
    def build() -> tuple[Optimizer, WarmupCosineSchedule]:
        optimizer = optimizer_with(1e-3, 4e-2)
        return optimizer, WarmupCosineSchedule(optimizer, 20, 2, 2.5)

    whole = course(*build(), 30)
    optimizer, schedule = build()
    course(optimizer, schedule, stop)
    states = optimizer.state_dict(), schedule.state_dict()
    optimizer, schedule = build()
    optimizer.load_state_dict(states[0])
    schedule.load_state_dict(states[1])
    assert course(optimizer, schedule, 30 - stop) == whole[stop:]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"total_steps": 0}, "got 0 and 5.0"),
        ({"total_steps": -4}, "got -4 and 5.0"),
        ({"warmup_epochs": -0.5}, "got 10 and -0.5"),
    ],
)
def test_schedules_without_steps_or_with_negative_warm_up_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"total_steps must be at least 1 and warmup_epochs not negative, {named}"):
        WarmupCosineSchedule(optimizer_with(1e-3), **{"total_steps": 10, "steps_per_epoch": 2} | arguments)


def test_a_resumed_schedule_keeps_its_step_and_follows_its_own_course() -> None:
    def schedule(total_steps: int) -> WarmupCosineSchedule:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return WarmupCosineSchedule(optimizer, total_steps, 10, warmup_epochs=0.5, warmup_lr=0.1, min_lr=0.01)

    short, long, resumed = schedule(20), schedule(40), schedule(40)
    for _ in range(15):
        short.optimizer.step()
        short.step()
        long.optimizer.step()
        long.step()
    resumed.optimizer.load_state_dict(short.optimizer.state_dict())
    resumed.load_state_dict(short.state_dict())
    assert resumed.optimizer.param_groups[0]["lr"] == long.optimizer.param_groups[0]["lr"]
    resumed.optimizer.step()
    resumed.step()
    long.optimizer.step()
    long.step()
    assert resumed.get_last_lr() == long.get_last_lr()


def polynomial(step: int, base: float, total: int, power: float, low: float, warmup: int, factor: float) -> float:
    """Compute the rate as mmcv's hook does: the polynomial, times a line during the warm-up."""
    rate = low + (base - low) * (1.0 - min(step, total) / total) ** power
    return rate * (1.0 - (1.0 - step / warmup) * (1.0 - factor)) if step < warmup else rate


@pytest.mark.parametrize(("power", "warmup", "factor"), [(0.9, 0, 0.5), (1.0, 7, 1e-6), (2.0, 1, 0.1), (0.0, 40, 0.0)])
def test_the_polynomial_schedule_is_its_formula(power: float, warmup: int, factor: float) -> None:
    optimizer = optimizer_with(1e-3, 4e-2)
    schedule = PolynomialSchedule(optimizer, 30, power, 1e-6, warmup, factor)
    for step, actual in enumerate(course(optimizer, schedule, 40)):
        expected = [polynomial(step, base, 30, power, 1e-6, warmup, factor) for base in (1e-3, 4e-2)]
        assert actual == pytest.approx(expected, rel=1e-9, abs=1e-18), step


def test_the_polynomial_schedule_multiplies_layers_and_warns_of_low_rates(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = optimizer_with_scales(1e-3, 0.25, 1.0)
    schedule = PolynomialSchedule(optimizer, 20, min_lr=1e-4, warmup_steps=3)
    assert all(low == pytest.approx(0.25 * high, rel=1e-9) for low, high in course(optimizer, schedule, 25))
    assert caplog.messages == []
    PolynomialSchedule(optimizer_with(1e-5), 20, min_lr=1e-4)
    assert "the learning rate 1e-05 is below min_lr 0.0001, so it would rise" in caplog.text


@pytest.mark.parametrize("stop", [2, 17])
def test_a_polynomial_schedule_resumes_from_its_saved_step_with_its_own_settings(stop: int) -> None:
    def build(total: int) -> tuple[Optimizer, PolynomialSchedule]:
        optimizer = optimizer_with(1e-3, 4e-2)
        return optimizer, PolynomialSchedule(optimizer, total, warmup_steps=5)

    optimizer, schedule = build(20)
    course(optimizer, schedule, stop)
    states = optimizer.state_dict(), schedule.state_dict()
    optimizer, schedule = build(40)
    optimizer.load_state_dict(states[0])
    schedule.load_state_dict(states[1])
    assert course(optimizer, schedule, 50 - stop) == course(*build(40), 50)[stop:]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"total_steps": 0}, "total_steps must be at least 1 and warmup_steps not negative, got 0 and 0"),
        ({"warmup_steps": -1}, "total_steps must be at least 1 and warmup_steps not negative, got 10 and -1"),
        ({"power": -0.5}, "power must not be negative and warmup_factor from 0 to 1, got -0.5 and 1e-06"),
        ({"warmup_factor": 2.0}, "power must not be negative and warmup_factor from 0 to 1, got 0.9 and 2.0"),
    ],
)
def test_settings_of_the_polynomial_that_are_out_of_range_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        PolynomialSchedule(optimizer_with(1e-3), **{"total_steps": 10} | arguments)
