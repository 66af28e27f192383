"""Frozen parts of a network, in real trainings."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
from jsonargparse import ArgumentParser
from small_tasks import Scores, make_images, make_samples, nano, swin, twins
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

from scalablevit_pl.optim import WarmupCosineSchedule
from scalablevit_pl.tasks import ClassificationTask

SCHEDULE = partial(WarmupCosineSchedule, warmup_epochs=0, warmup_lr=0.0, min_lr=0.0)
ADAMW = partial(AdamW, lr=0.1, weight_decay=0.5)
MakeTrainer = Callable[..., pl.Trainer]


def resnet() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=7, drop_rate=0.5)


def batches() -> DataLoader[Any]:
    return DataLoader(make_images(8), batch_size=2)


class Watched(ClassificationTask):
    """Record in each training step which of the network's modules are in training mode."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.seen = [*getattr(self, "seen", []), {name for name, part in self.network.named_modules() if part.training}]
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
        (swin, ["patch_embed"]),
        (twins, ["patch_embeds.0"]),
    ],
)
def test_frozen_parts_stay_in_eval_mode_and_unchanged(
    build: Callable[[], nn.Module], frozen: list[str], make_trainer: MakeTrainer
) -> None:
    task = Watched(build(), ADAMW, SCHEDULE, freeze=frozen)
    before, learned = snapshot(task.network), {name for name, _ in task.network.named_parameters()}
    make_trainer(max_epochs=2, val_check_interval=2, num_sanity_val_steps=1).fit(task, batches(), batches())
    trained = {name for name, _ in task.network.named_modules() if not is_part(name, frozen)}
    assert task.seen == [trained] * 8
    after = task.network.state_dict()
    for name, tensor in before.items():
        if name in learned:
            assert torch.equal(after[name], tensor) == is_part(name, frozen), name
        else:  # statistics of batch norms, and constants
            assert torch.equal(after[name], tensor) or not is_part(name, frozen), name
    assert task.resolved["frozen"] == frozen
    expected = sum(p.numel() for name, p in task.network.named_parameters() if not is_part(name, frozen))
    assert task.resolved["trainable_parameters"] == expected


@pytest.mark.parametrize(("build", "last"), [(nano, "head.fc"), (resnet, "fc")])
def test_features_are_all_but_the_last_layer(
    build: Callable[[], nn.Module], last: str, make_trainer: MakeTrainer
) -> None:
    task = Watched(build(), ADAMW, SCHEDULE, freeze="features")
    before = snapshot(task.network)
    make_trainer().fit(task, batches())
    assert task.seen == [{last}] * 4
    assert task.training
    after = task.network.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed == {f"{last}.weight", f"{last}.bias"}
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


def test_switching_the_networks_mode_directly_unfreezes_nothing(make_trainer: MakeTrainer) -> None:
    task = Watched(nano(), freeze="backbone.stages")
    task.network.train()
    make_trainer(callbacks=[Switcher()], max_epochs=3).fit(task, batches(), batches())
    assert not any(is_part(name, ["backbone.stages"]) for seen in task.seen for name in seen)


def test_train_and_eval_switch_all_but_the_frozen_parts() -> None:
    task = ClassificationTask(nano(), freeze="backbone")
    for switch in (lambda: task, task.train, lambda: task.eval().train()):
        assert switch() is task
        assert not any(module.training for module in task.network.backbone.modules())
        assert all(module.training for module in [task, task.network, *task.network.head.modules()])
    assert not any(module.training for module in task.eval().modules())


def test_batch_norms_that_were_replaced_after_construction_stay_frozen() -> None:
    task = ClassificationTask(resnet(), freeze="layer1")
    nn.SyncBatchNorm.convert_sync_batchnorm(task).train()
    assert isinstance(task.network.layer1[0].bn1, nn.SyncBatchNorm)
    assert not any(module.training for module in task.network.layer1.modules())


@pytest.mark.parametrize("frozen", [["backbone"], ["backbone.stages.0", "backbone.stages.1"]])
def test_gradients_past_frozen_blocks_are_the_same_with_checkpointing(frozen: list[str]) -> None:
    task = ClassificationTask(nano(0.5), freeze=frozen)
    batch, gradients = next(iter(batches())), []
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


def test_parameters_that_were_frozen_outside_stay_and_are_not_counted(make_trainer: MakeTrainer) -> None:
    network = Scores()
    network.weight.requires_grad_(False)
    task = ClassificationTask(network, partial(AdamW, lr=0.1), base_batch_size=None)
    make_trainer().fit(task, DataLoader(make_samples(8), batch_size=4))
    assert (task.resolved["parameters"], task.resolved["trainable_parameters"]) == (56, 7)
    assert task.resolved["parameter_groups"] == [{"weight_decay": 0.0, "tensors": 1, "parameters": 7}]
    assert torch.equal(network.weight, torch.eye(7))
    assert network.bias.abs().min() > 0.0


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ("stages.0", "'stages.0', which is not a module of ImageClassifier: did you mean 'backbone.stages.0'"),
        ("feature", "'feature', which is not a module of ImageClassifier: did you mean 'features'"),
        (["head", "backbon"], "'backbon', which is not a module of ImageClassifier: did you mean 'backbone'"),
        ("", "'', which is not a module of ImageClassifier"),
        ("head.norm.weight", "'head.norm.weight', which is not a module of ImageClassifier: .* 'head.norm'"),
        ("backbone.stages.0.drop", "'backbone.stages.0.drop', which has no parameters"),
        (["backbone", "head"], r"freeze=\['backbone', 'head'\] leaves nothing to train: freeze fewer parts"),
        (["features", "head.fc"], r"freeze=\['features', 'head.fc'\] leaves nothing to train"),
    ],
)
def test_parts_that_cannot_be_frozen_are_named(freeze: str | list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassificationTask(nano(), freeze=freeze)


def test_features_need_a_network_that_knows_its_last_layer() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 3))
    network.num_classes = 3
    with pytest.raises(ValueError, match=r"get_classifier method, which Sequential does not have: name the modules"):
        ClassificationTask(network, freeze="features")
    with pytest.raises(ValueError, match="'0', which has no parameters: did you mean '1'"):
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
