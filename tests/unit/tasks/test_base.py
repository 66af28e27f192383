"""Frozen parts of a network, and learning rates by layer, in real trainings."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader

from scalablevit_pl.models import create_model
from scalablevit_pl.optim import WarmupCosineSchedule
from scalablevit_pl.tasks import ClassificationTask

SCHEDULE = partial(WarmupCosineSchedule, warmup_epochs=0, warmup_lr=0.0, min_lr=0.0)
Fit = Callable[..., pl.Trainer]


def nano(drop_path_rate: float = 0.0) -> nn.Module:
    return create_model("scalablevit_nano", num_classes=3, drop_path_rate=drop_path_rate)


def resnet() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=3, drop_rate=0.5)


def batches(count: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2 * count, 3, 32, 32, generator=generator)
    return DataLoader([{"image": image, "label": index % 3} for index, image in enumerate(images)], batch_size=2)


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    def run(task: pl.LightningModule, ckpt_path: Path | None = None, **options: Any) -> pl.Trainer:
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        values = dict.fromkeys(quiet, False) | {"accelerator": "cpu", "max_epochs": 2, "default_root_dir": tmp_path}
        trainer = pl.Trainer(**values | options)
        trainer.fit(task, batches(), batches(1), ckpt_path=ckpt_path)
        return trainer

    return run


class Watched(ClassificationTask):
    """Note in each training step which of the network's modules are in training mode, and the rates."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.seen = [*getattr(self, "seen", []), {name for name, part in self.network.named_modules() if part.training}]
        self.rates = [*getattr(self, "rates", []), [group["lr"] for group in self.optimizers().param_groups]]
        return super().training_step(batch, batch_idx)


def is_part(name: str, parts: list[str]) -> bool:
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(
    ("build", "frozen"),
    [
        (partial(nano, 0.5), ["backbone"]),
        (partial(nano, 0.5), ["backbone.stages.0", "backbone.stages.2.blocks.1", "head.norm"]),
        (resnet, ["conv1", "bn1", "layer1", "layer3.0"]),
    ],
)
def test_frozen_parts_rest_through_training_and_validation(
    build: Callable[[], nn.Module], frozen: list[str], fit: Fit
) -> None:
    task = Watched(build(), partial(AdamW, lr=0.1, weight_decay=0.5), SCHEDULE, freeze=frozen)
    before = snapshot(task.network)
    fit(task, val_check_interval=2, num_sanity_val_steps=1)
    trained = {name for name, _ in task.network.named_modules() if not is_part(name, frozen)}
    assert task.seen == [trained] * 8
    after = task.network.state_dict()
    assert all(torch.equal(after[name], tensor) == is_part(name, frozen) for name, tensor in before.items())
    assert task.resolved["frozen"] == frozen
    expected = sum(p.numel() for name, p in task.network.named_parameters() if not is_part(name, frozen))
    assert task.resolved["trainable_parameters"] == expected


@pytest.mark.parametrize(("build", "last"), [(nano, "head.fc"), (resnet, "fc")])
def test_features_are_all_but_the_last_layer(build: Callable[[], nn.Module], last: str, fit: Fit) -> None:
    task = Watched(build(), partial(AdamW, lr=0.1), SCHEDULE, freeze="features")
    before = snapshot(task.network)
    fit(task)
    assert task.seen == [{last}] * 8
    assert task.training
    after = task.network.state_dict()
    assert {name for name, tensor in before.items() if not torch.equal(after[name], tensor)} == {
        f"{last}.weight",
        f"{last}.bias",
    }
    assert task.resolved["frozen"] == ["features"]


@pytest.mark.parametrize(
    ("freeze", "trained"), [("features", ["head", "head_dist"]), (["head_dist", "features"], ["head"])]
)
def test_features_of_a_network_with_two_last_layers(freeze: str | list[str], trained: list[str]) -> None:
    network = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, img_size=32, depth=1)
    task = ClassificationTask(network, freeze=freeze).train()
    parameters = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert parameters == {f"{name}.{kind}" for name in trained for kind in ("weight", "bias")}
    assert [name for name, module in task.network.named_modules() if module.training] == trained


class Switcher(pl.Callback):
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.network.train()


def test_switching_the_networks_mode_directly_unfreezes_nothing(fit: Fit) -> None:
    task = Watched(nano(), freeze="backbone.stages")
    task.network.train()
    fit(task, callbacks=[Switcher()], max_epochs=3)
    assert not any(is_part(name, ["backbone.stages"]) for seen in task.seen for name in seen)


def test_train_and_eval_switch_all_but_the_frozen_parts() -> None:
    task = ClassificationTask(nano(), freeze="backbone")
    for switch in (lambda: task, task.train, lambda: task.eval().train()):
        assert switch() is task
        assert not any(module.training for module in task.network.backbone.modules())
        assert all(module.training for module in [task, task.network, *task.network.head.modules()])
    assert not any(module.training for module in task.eval().modules())


def test_batch_norms_that_were_exchanged_after_the_task_was_made_rest_too() -> None:
    task = ClassificationTask(resnet(), freeze="layer1")
    nn.SyncBatchNorm.convert_sync_batchnorm(task).train()
    assert isinstance(task.network.layer1[0].bn1, nn.SyncBatchNorm)
    assert not any(module.training for module in task.network.layer1.modules())


@pytest.mark.parametrize("frozen", [["backbone"], ["backbone.stages.0", "backbone.stages.1"]])
def test_gradients_past_frozen_blocks_are_the_same_with_checkpointing(frozen: list[str]) -> None:
    task = ClassificationTask(nano(0.5), freeze=frozen)
    batch = next(iter(batches()))
    gradients = []
    for enable in (False, True):
        task.network.set_grad_checkpointing(enable)
        task.network.zero_grad()
        torch.manual_seed(0)
        nn.functional.cross_entropy(task(batch["image"]), batch["label"]).backward()
        gradients.append({name: p.grad for name, p in task.network.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert set(plain) == {name for name, _ in task.network.named_parameters() if not is_part(name, frozen)}
    assert set(checkpointed) == set(plain)
    assert all(torch.equal(checkpointed[name], gradient) for name, gradient in plain.items())
    assert plain["head.fc.weight"].abs().max() > 0


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ("stages.0", "'stages.0', which is no module of ImageClassifier: .* such as 'backbone.stages.0'"),
        ("feature", "'feature', which is no module of ImageClassifier: .* such as 'features'"),
        (["head", "backbon"], "'backbon', which is no module of ImageClassifier: .* such as 'backbone'"),
        ("", "'', which is no module of ImageClassifier"),
        ("head.norm.weight", "'head.norm.weight', which is no module of ImageClassifier: .* such as 'head.norm'"),
        ("backbone.stages.0.drop", "'backbone.stages.0.drop', which has no parameters"),
        (["backbone", "head"], r"freeze=\['backbone', 'head'\] leaves nothing to train"),
        (["features", "head.fc"], r"freeze=\['features', 'head.fc'\] leaves nothing to train"),
    ],
)
def test_parts_that_cannot_be_frozen_are_named(freeze: str | list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassificationTask(nano(), freeze=freeze)


def test_features_need_a_network_that_knows_its_last_layer() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 3))
    network.num_classes = 3
    with pytest.raises(ValueError, match=r"Sequential does not say which its last layer is .* name the modules"):
        ClassificationTask(network, freeze="features")
    with pytest.raises(ValueError, match="'0', which has no parameters: name another part, such as '1'"):
        ClassificationTask(network, freeze="0")


@pytest.mark.parametrize(
    ("words", "frozen"),
    [
        ([], []),
        (["--task.freeze", "backbone"], ["backbone"]),
        (["--task.freeze", "[backbone]"], ["backbone"]),
        (["--task.freeze=[backbone.stages.0, head.norm]"], ["backbone.stages.0", "head.norm"]),
        (["--task.freeze+=backbone", "--task.freeze+=head.norm"], ["backbone", "head.norm"]),
        (["--task.freeze=features", "--task.freeze=[]"], []),
    ],
)
def test_frozen_parts_can_be_set_on_the_command_line(words: list[str], frozen: list[str]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ClassificationTask, "task", skip={"network", "optimizer", "schedule"})
    values = parser.parse_args([*words, "--task.layer_decay", "0.75"]).task
    task = ClassificationTask(nano(), **values.as_dict())
    assert task.frozen == frozen
    assert task.layer_decay == 0.75


def test_each_layer_steps_at_its_own_rate(fit: Fit) -> None:
    network = nano()
    reference = copy.deepcopy(network)
    task = ClassificationTask(network, partial(SGD, lr=0.1), SCHEDULE, base_batch_size=4, layer_decay=0.5)
    fit(task, max_steps=1, max_epochs=1, limit_train_batches=1)
    batch = next(iter(batches()))
    loss = nn.functional.cross_entropy(reference(batch["image"]), batch["label"], label_smoothing=0.1)
    loss.backward()
    rates = {
        "backbone.stages.0.patch_embed": 10,
        "backbone.stages.2.blocks.1": 4,
        "backbone.stages.3.peg": 2,
        "head": 0,
    }
    trained = dict(network.named_parameters())
    for part, above in rates.items():
        for name, parameter in reference.get_submodule(part).named_parameters(part):
            expected = parameter - 0.05 * 0.5**above * parameter.grad
            assert torch.allclose(trained[name], expected, rtol=1e-6, atol=1e-9), name


def test_the_last_layer_s_rate_is_the_one_that_is_recorded(fit: Fit) -> None:
    schedule = partial(WarmupCosineSchedule, warmup_epochs=1, warmup_lr=1e-4, min_lr=1e-3)
    task = Watched(resnet(), partial(AdamW, lr=0.1), schedule, base_batch_size=1, freeze="conv1", layer_decay=0.5)
    trainer = fit(task)
    assert task.resolved["lr"] == pytest.approx(0.2)
    scales = [group.get("lr_scale", 1.0) for group in task.resolved["parameter_groups"]]
    assert scales == [0.5**above for above in (5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0)]
    assert all("lr_scale" not in group for group in task.resolved["parameter_groups"][-2:])
    assert task.rates[0] == pytest.approx([1e-4 * scale for scale in scales])
    assert task.rates[2] == pytest.approx([(1e-4 + (0.2 - 1e-4) / 2) * scale for scale in scales])
    assert trainer.callback_metrics["train/lr"].item() == pytest.approx(task.rates[-1][-1])


def test_layers_keep_their_rates_in_a_resumed_training(fit: Fit, tmp_path: Path) -> None:
    def build() -> Watched:
        torch.manual_seed(0)
        return Watched(nano(), partial(AdamW, lr=0.01), freeze="backbone.stages.0", layer_decay=0.8)

    whole, first, second = build(), build(), build()
    fit(whole, max_epochs=4)
    # Half of the epochs, on the course of all of them.
    fit(first, max_epochs=4, callbacks=[Stopper(tmp_path / "half.ckpt")])
    trainer = fit(second, ckpt_path=tmp_path / "half.ckpt", max_epochs=4)
    assert (first.rates, second.rates) == (whole.rates[:8], whole.rates[8:])
    assert [group["lr_scale"] for group in trainer.optimizers[0].param_groups][-1] == 1.0
    assert len({group["lr_scale"] for group in trainer.optimizers[0].param_groups}) == 8
    after = second.network.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in whole.network.state_dict().items())


class Stopper(pl.Callback):
    """Stop after the second epoch and save."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch == 1

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("layer_decay", [0.0, 1.5])
def test_a_layer_decay_out_of_range_is_refused_before_a_training(layer_decay: float) -> None:
    with pytest.raises(ValueError, match=f"layer_decay must be above 0 and at most 1, .* got {layer_decay}"):
        ClassificationTask(nano(), layer_decay=layer_decay)
