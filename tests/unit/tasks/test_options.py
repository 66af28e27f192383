"""Precision, clipping and accumulation against a loop written out; compiled, channels-last and recomputed networks."""

import copy
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader

from scalablevit_pl.models import ImageClassifier, ScalableViT, create_model
from scalablevit_pl.optim import WarmupCosineSchedule
from scalablevit_pl.tasks import ClassificationTask

SCHEDULE = partial(WarmupCosineSchedule, warmup_epochs=0, min_lr=0.01)
Fit = Callable[..., pl.Trainer]


def nano(drop_path_rate: float = 0.0) -> nn.Module:
    return create_model("scalablevit_nano", num_classes=7, drop_path_rate=drop_path_rate)


def swin(drop_path_rate: float = 0.0) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 2, "embed_dim": 12, "depths": (1, 2, 2, 1)}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=7, drop_path_rate=drop_path_rate, **sizes)


def twins(drop_path_rate: float = 0.0) -> nn.Module:
    sizes = {"img_size": 32, "embed_dims": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8), "depths": (2, 2, 2, 1)}
    return timm.create_model("twins_svt_small", num_classes=7, drop_path_rate=drop_path_rate, **sizes)


def small() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.GELU(), nn.Linear(8, 7))
    network.num_classes = 7
    return network


def batches(count: int, size: int = 2) -> DataLoader[Any]:
    images = torch.randn(size * count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return DataLoader([{"image": image, "label": index % 7} for index, image in enumerate(images)], batch_size=size)


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    def run(task: pl.LightningModule, count: int = 3, **options: Any) -> pl.Trainer:
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        values = dict.fromkeys(quiet, False) | {"accelerator": "cpu", "max_epochs": 2, "default_root_dir": tmp_path}
        trainer = pl.Trainer(**values | options)
        trainer.fit(task, batches(count))
        return trainer

    return run


def written_out(
    network: nn.Module, precision: str, fused: bool, clip: tuple[float, str] | None, accumulated: int, count: int
) -> int:
    """Train two epochs at a constant rate; a group that the epoch's end cuts short is divided by its full size."""
    groups = [
        {"params": [network[1].weight, network[3].weight]},
        {"params": [network[1].bias, network[3].bias], "weight_decay": 0.0},
    ]
    optimizer, steps = AdamW(groups, lr=0.01, weight_decay=0.3, fused=fused), 0
    for _ in range(2):
        for index, batch in enumerate(batches(count)):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = nn.functional.cross_entropy(network(batch["image"]), batch["label"], label_smoothing=0.1)
            (loss / accumulated).backward()
            if (index + 1) % accumulated and index + 1 < count:
                continue
            if clip is not None and clip[1] == "norm":
                nn.utils.clip_grad_norm_(network.parameters(), clip[0])
            elif clip is not None:
                nn.utils.clip_grad_value_(network.parameters(), clip[0])
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    return steps


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])  # on CPUs the last one is bf16-mixed
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [None, (0.02, "norm"), (1e-3, "value")])
@pytest.mark.parametrize("accumulated", [1, 4])
@pytest.mark.filterwarnings("ignore:You passed .Trainer.accelerator=.cpu., precision=.16-mixed")
def test_precision_clipping_and_accumulation_are_the_loop_written_out(
    precision: str, fused: bool, clip: tuple[float, str] | None, accumulated: int, fit: Fit
) -> None:
    task = ClassificationTask(small(), partial(AdamW, lr=0.01, weight_decay=0.3, fused=fused), SCHEDULE, None)
    options = {"precision": precision, "accumulate_grad_batches": accumulated}
    if clip is not None:
        options |= {"gradient_clip_val": clip[0], "gradient_clip_algorithm": clip[1]}
    trainer = fit(task, count=5, **options)
    resolved = "32-true" if precision == "32-true" else "bf16-mixed"
    network = small()
    steps = written_out(network, resolved, fused, clip, accumulated, count=5)
    assert task.resolved["total_steps"] == trainer.global_step == steps == (10 if accumulated == 1 else 4)
    assert (task.resolved["precision"], task.resolved["accumulated_batches"]) == (resolved, accumulated)
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(task.network.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)


def test_a_fused_optimizer_is_not_clipped_where_the_loss_is_scaled(fit: Fit) -> None:
    task = ClassificationTask(small(), partial(AdamW, fused=True))
    options = {"plugins": MixedPrecision("16-mixed", "cpu"), "gradient_clip_val": 5.0}
    with pytest.raises(ValueError, match=r"gradient_clip_val=5.0 does not go with a fused AdamW in 16-mixed, .*: set"):
        fit(task, **options)


ADAMW = partial(AdamW, lr=1e-3)


def trained(
    network: nn.Module, fit: Fit, optimizer: Any = ADAMW, **options: Any
) -> tuple[ClassificationTask, pl.Trainer]:
    torch.manual_seed(0)
    task = ClassificationTask(network, optimizer, SCHEDULE, None, **options)
    return task, fit(task)


def short() -> nn.Module:
    sizes = {"embed_dims": (8, 16, 32, 64), "num_heads": (1, 2, 4, 8), "depths": (1, 1, 1, 2)}
    return ImageClassifier(ScalableViT(**sizes), 7, "linear")


@pytest.mark.parametrize("build", [short, pytest.param(swin, marks=pytest.mark.slow)])
def test_a_compiled_network_learns_the_same_under_the_same_names(
    build: Callable[..., nn.Module], fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, network = [], build()

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile_(*args, **options, backend=backend))
    # Compiled, windows are masked in the place of being cut, which rounds otherwise. AdamW would make whole steps of
    # that where a gradient is nothing but rounding, as those of keys' biases are.
    optimizer = partial(SGD, lr=0.1)
    plain, _ = trained(copy.deepcopy(network), fit, optimizer)
    assert not graphs
    assert any(not torch.equal(*pair) for pair in zip(plain.network.parameters(), network.parameters(), strict=True))
    task, trainer = trained(network, fit, optimizer, compile=True)
    assert graphs
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    names = [name for name in saved if name.startswith("network.")]
    assert names == [f"network.{name}" for name in plain.network.state_dict()]
    for name, tensor in plain.network.state_dict().items():
        torch.testing.assert_close(task.network.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    assert task.resolved["compile"] is True


@pytest.mark.parametrize("build", [nano, twins])
def test_channels_last_computes_the_same(build: Callable[..., nn.Module], fit: Fit) -> None:
    network = build().eval()
    other = copy.deepcopy(network)
    image, seen = next(iter(batches(1)))["image"], []
    task = ClassificationTask(other, channels_last=True)
    other.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    expected, actual = network(image), task(image)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    convolutions = [part.weight for part in other.modules() if isinstance(part, nn.Conv2d)]
    assert convolutions
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)
    expected.square().sum().backward()
    actual.square().sum().backward()
    for ours, theirs in zip(other.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def gradients(task: ClassificationTask) -> dict[str, Tensor]:
    torch.manual_seed(5)
    batch = next(iter(batches(1, size=6)))
    nn.functional.cross_entropy(task.train()(batch["image"]), batch["label"]).backward()
    return {name: p.grad for name, p in task.network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("build", "freeze"), [(nano, []), (swin, []), (swin, ["patch_embed"]), (swin, ["patch_embed", "layers.0"])]
)
def test_recomputed_activations_drop_the_same_paths(build: Callable[..., nn.Module], freeze: list[str]) -> None:
    network = build(drop_path_rate=0.5)
    copies = [copy.deepcopy(network) for _ in range(3)]
    kept = gradients(ClassificationTask(copies[0], freeze=freeze))
    recomputed = gradients(ClassificationTask(copies[1], freeze=freeze, grad_checkpointing=True))
    assert kept.keys() == recomputed.keys()
    assert all(torch.equal(kept[name], gradient) for name, gradient in recomputed.items())
    # Without the paths being dropped the gradients are others.
    for part in copies[2].modules():
        for name in {"rate", "drop_prob"} & vars(part).keys():
            if type(part).__name__ == "DropPath":
                setattr(part, name, 0.0)
    whole = gradients(ClassificationTask(copies[2], freeze=freeze))
    assert not all(torch.equal(kept[name], gradient) for name, gradient in whole.items())


def test_activations_are_recomputed_only_where_asked_for() -> None:
    for enable in (False, True):
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        task = ClassificationTask(swin(), grad_checkpointing=enable)
        task.network.layers[2].blocks[0].register_forward_pre_hook(count)  # recomputing stops inside a block
        gradients(task)
        assert calls == 1 + enable


@pytest.mark.parametrize("build", [twins, small])
def test_networks_that_cannot_recompute_are_named(build: Callable[..., nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"(Twins|Sequential) cannot recompute its activations: leave grad_checkp"):
        ClassificationTask(build(), grad_checkpointing=True)


@pytest.mark.parametrize(("build", "first", "last"), [(swin, "patch_embed", "head"), (twins, "patch_embeds.0", "head")])
def test_timm_s_networks_are_frozen_and_learn_by_layer(
    build: Callable[..., nn.Module], first: str, last: str, fit: Fit
) -> None:
    network = build()
    before = copy.deepcopy(network.state_dict())
    task, trainer = trained(network, fit, freeze=first, layer_decay=0.5)
    for name, tensor in network.state_dict().items():
        frozen = name.startswith(f"{first}.") or name not in dict(network.named_parameters())
        assert torch.equal(before[name], tensor) == frozen, name
    scales = {id(p): group["lr_scale"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert len(scales) == sum(p.requires_grad for p in network.parameters())
    assert {scales[id(p)] for p in network.get_submodule(last).parameters()} == {1.0}
    assert min(scales.values()) < 0.5**5
    assert task.resolved["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("base", "said"), [(None, []), (2, []), (8, [(2, 8, 0.01, 0.0025)]), (1, [(2, 1, 0.01, 0.02)])]
)
def test_a_scaled_learning_rate_is_logged(
    base: int | None, said: list[Any], fit: Fit, caplog: pytest.LogCaptureFixture
) -> None:
    task = ClassificationTask(small(), partial(AdamW, lr=0.01), SCHEDULE, base)
    with caplog.at_level(logging.INFO, "scalablevit_pl"):
        fit(task)
    spoken = [record.args for record in caplog.records if "scaled in proportion" in record.msg]
    assert spoken == [pytest.approx(values) for values in said]
