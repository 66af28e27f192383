"""Optimizer, schedule and record of a fit: for a given size, and in real trainings."""

import copy
import json
import logging
import math
from collections.abc import Callable
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
from forked_command import run_together
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.plugins.precision import MixedPrecision
from rate_processes import in_a_process, trace
from small_tasks import Recorder, Scores, course, make_images, make_samples, nano, swin, twins
from timm.scheduler import CosineLRScheduler, PlateauLRScheduler
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, IterableDataset

from scalablevit_pl.optim import WarmupCosineSchedule
from scalablevit_pl.tasks import ClassificationTask
from scalablevit_pl.tasks.fit import FitShape, resolve_fit

MakeTrainer = Callable[..., pl.Trainer]
SCHEDULE = partial(WarmupCosineSchedule, warmup_epochs=0, min_lr=0.01)
SHAPE = FitShape(batches_per_epoch=3, batch_size=4, total_steps=16, accumulated=2)


def loader(count: int, batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(make_samples(count), batch_size=batch_size)


# A fit of a given size, without a trainer.


def test_the_size_of_a_fit_counts_steps_and_samples_of_all_processes() -> None:
    shape = FitShape(batches_per_epoch=10, batch_size=4, total_steps=30, accumulated=4, processes=3)
    assert (shape.global_batch, shape.steps_per_epoch) == (48, 3)


@pytest.mark.parametrize("base_batch_size", [None, 16])
def test_resolved_settings_are_those_of_a_fit_of_that_size(
    base_batch_size: int | None, make_trainer: MakeTrainer
) -> None:
    optimizer = partial(AdamW, lr=0.01, weight_decay=0.05)
    task = ClassificationTask(Scores(), optimizer, base_batch_size=base_batch_size)
    assert task.resolved == {}
    resolved = task.resolve(SHAPE)
    assert resolved.record == {
        "parameters": 56,
        "trainable_parameters": 56,
        "frozen": [],
        "global_batch": 8,
        "base_batch_size": base_batch_size,
        "accumulated_batches": 2,
        "processes": 1,
        "samples_per_epoch": 12,
        "steps_per_epoch": 2,
        "total_steps": 16,
        "warmup_steps": 10,
        "lr": pytest.approx(0.01 if base_batch_size is None else 0.005),
        "parameter_groups": [
            {"weight_decay": 0.05, "tensors": 1, "parameters": 49},
            {"weight_decay": 0.0, "tensors": 1, "parameters": 7},
        ],
        "precision": "32-true",
        "compile": False,
        "channels_last": False,
    }
    assert resolved.schedule.optimizer is resolved.optimizer
    make_trainer(max_epochs=8, accumulate_grad_batches=2).fit(task, loader(12))
    assert task.resolved == resolved.record
    assert json.loads(json.dumps(task.resolved)) == task.resolved


@pytest.mark.parametrize(
    ("base_batch_size", "accumulated", "processes", "lr"),
    [(None, 1, 1, 0.01), (None, 3, 2, 0.01), (4, 1, 1, 0.01), (8, 1, 1, 0.005), (8, 3, 1, 0.015), (8, 1, 6, 0.03)],
)
def test_the_learning_rate_is_scaled_to_the_global_batch(
    base_batch_size: int | None, accumulated: int, processes: int, lr: float
) -> None:
    shape = FitShape(3, 4, 12, accumulated, processes)
    fit = resolve_fit(Scores(), partial(AdamW, lr=0.01), WarmupCosineSchedule, shape, base_batch_size)
    assert fit.record["lr"] == pytest.approx(lr)
    assert fit.schedule.base_lrs == [pytest.approx(lr)] * 2


def test_layers_have_decaying_rates_and_the_last_layer_s_is_recorded() -> None:
    network = timm.create_model("test_resnet", num_classes=7)
    fit = resolve_fit(network, partial(AdamW, lr=0.1), WarmupCosineSchedule, SHAPE, 4, layer_decay=0.5)
    assert fit.record["lr"] == pytest.approx(0.2)
    scales = [group.get("lr_scale", 1.0) for group in fit.record["parameter_groups"]]
    assert sorted(scales) == scales
    assert set(scales) == {0.5**above for above in range(6)}
    assert all("lr_scale" not in group for group in fit.record["parameter_groups"][-2:])
    assert fit.schedule.base_lrs == pytest.approx([0.2 * scale for scale in scales])


@pytest.mark.parametrize(("rate", "message"), [(-1.0, "optimizer rejects its settings"), (math.inf, "be finite")])
def test_a_learning_rate_out_of_range_is_refused(rate: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassificationTask(Scores(), optimizer=partial(SGD, lr=rate)).resolve(SHAPE)


def test_a_schedule_that_rejects_its_settings_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^the schedule StepLR rejects its settings: .*'step_size'"):
        ClassificationTask(Scores(), schedule=StepLR).resolve(SHAPE)
    with pytest.raises(ValueError, match=r"^the schedule OneCycleLR rejects its settings: .*float"):
        ClassificationTask(Scores(), schedule=partial(OneCycleLR, max_lr=0.1, pct_start=2.0)).resolve(SHAPE)
    with pytest.raises(ValueError, match=r"PlateauLRScheduler cannot resume: use torch\..*ReduceLROnPlateau"):
        ClassificationTask(Scores(), schedule=partial(PlateauLRScheduler, patience_t=2)).resolve(SHAPE)


@pytest.mark.parametrize(
    ("schedule", "wanted", "interval"),
    [
        (partial(StepLR, step_size=2), None, "epoch"),
        (partial(StepLR, step_size=2), "step", "step"),
        (partial(OneCycleLR, max_lr=0.1), None, "step"),
        (partial(CosineLRScheduler, t_initial=2), None, "epoch"),
        (partial(CosineLRScheduler, t_initial=2, t_in_epochs=False), None, "step"),
        (SCHEDULE, None, "step"),
    ],
)
def test_a_schedule_advances_by_step_if_it_knows_the_steps_else_by_epoch(
    schedule: Any, wanted: Any, interval: str
) -> None:
    fit = ClassificationTask(Scores(), schedule=schedule, schedule_interval=wanted).resolve(SHAPE)
    assert (fit.interval, fit.record["warmup_steps"]) == (interval, 0)


def test_a_schedule_gets_the_number_of_steps_that_it_is_not_given() -> None:
    by_default = ClassificationTask(Scores(), schedule=partial(OneCycleLR, max_lr=0.1)).resolve(SHAPE)
    given = ClassificationTask(Scores(), schedule=partial(OneCycleLR, max_lr=0.1, total_steps=50)).resolve(SHAPE)
    assert (by_default.schedule.total_steps, given.schedule.total_steps) == (16, 50)


def test_a_plateau_is_one_of_the_monitored_metric() -> None:
    assert ClassificationTask(Scores(), schedule=ReduceLROnPlateau).resolve(SHAPE).schedule.mode == "max"


def test_layers_of_timm_s_schedule_are_scaled_once() -> None:
    network, schedule = timm.create_model("test_resnet", num_classes=7), partial(CosineLRScheduler, t_initial=10)
    fit = resolve_fit(network, partial(AdamW, lr=0.1), schedule, SHAPE, 4, layer_decay=0.5)
    scales = [group.get("lr_scale", 1.0) for group in fit.optimizer.param_groups]
    assert min(scales) < 0.1
    assert [group["lr"] for group in fit.optimizer.param_groups] == pytest.approx([0.2 * scale for scale in scales])
    fit.schedule.step(5)
    assert [group["lr"] for group in fit.optimizer.param_groups] == pytest.approx([0.1 * scale for scale in scales])


@pytest.mark.parametrize("size", [0, -512])
def test_a_base_batch_size_below_one_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"base_batch_size must be at least 1, .* got {size}"):
        ClassificationTask(Scores(), base_batch_size=size)


@pytest.mark.parametrize("layer_decay", [0.0, 1.5])
def test_a_layer_decay_out_of_range_is_refused_before_a_training(layer_decay: float) -> None:
    with pytest.raises(ValueError, match=f"layer_decay must be above 0 and at most 1, .* got {layer_decay}"):
        ClassificationTask(nano(), layer_decay=layer_decay)


# Trainings.


class Stream(IterableDataset[dict[str, Any]]):
    def __iter__(self) -> Any:
        return iter(make_samples(8))


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (DataLoader(Stream(), batch_size=4), {}),
        (loader(8), {"max_epochs": -1}),
        (DataLoader(make_samples(8), batch_size=None), {}),
    ],
    ids=["no length", "no end", "no batch size"],
)
def test_an_unknown_number_of_steps_is_refused(
    data: DataLoader[Any], options: dict[str, Any], make_trainer: MakeTrainer
) -> None:
    with pytest.raises(ValueError, match="the schedule needs a known number of steps and batch size"):
        make_trainer(**options).fit(ClassificationTask(Scores()), data)


def test_training_may_be_limited_by_steps_alone(make_trainer: MakeTrainer) -> None:
    task = ClassificationTask(Scores())
    make_trainer(max_epochs=-1, max_steps=5).fit(task, loader(8))
    assert (task.resolved["total_steps"], task.resolved["steps_per_epoch"]) == (5, 2)
    assert task.resolved["samples_per_epoch"] == 8


@pytest.mark.parametrize(
    ("base", "logged"), [(None, []), (4, []), (16, [(4, 16, 0.01, 0.0025)]), (2, [(4, 2, 0.01, 0.02)])]
)
def test_a_scaled_learning_rate_is_logged(
    base: int | None, logged: list[Any], make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "scalablevit_pl"):
        make_trainer().fit(ClassificationTask(Scores(), partial(AdamW, lr=0.01), base_batch_size=base), loader(8))
    assert [message for message in caplog.messages if "learning rate scaled" in message] == [
        f"learning rate scaled from {before:.3g} for a batch of {base} to {after:.3g} for the global batch of {batch}"
        for batch, base, before, after in logged
    ]


@pytest.mark.parametrize(("accumulated", "steps"), [(1, range(15)), (2, [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 7, 8])])
def test_the_learning_rate_follows_its_schedule_per_optimizer_step(
    accumulated: int, steps: list[int], make_trainer: MakeTrainer
) -> None:
    recorder = Recorder()
    schedule = partial(WarmupCosineSchedule, warmup_epochs=1)
    task = ClassificationTask(Scores(), partial(AdamW, lr=0.01), schedule, base_batch_size=None)
    trainer = make_trainer(callbacks=[recorder], max_epochs=3, accumulate_grad_batches=accumulated)
    trainer.fit(task, loader(10, 2))
    per_epoch = math.ceil(5 / accumulated)
    expected = [course(step, 3 * per_epoch, per_epoch, 0.01) for step in steps]
    assert [rates[0] for rates in recorder.rates] == pytest.approx(expected)
    assert recorder.logged == pytest.approx(expected)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-5)


def test_training_is_a_plain_loop_in_torch(make_trainer: MakeTrainer) -> None:
    samples, warmup = make_samples(12), partial(WarmupCosineSchedule, warmup_epochs=1)
    task = ClassificationTask(Scores(), partial(AdamW, lr=0.02, weight_decay=0.3), warmup, 8)
    make_trainer(max_epochs=2).fit(task, DataLoader(samples, batch_size=4))

    network, loss = Scores(), nn.CrossEntropyLoss(label_smoothing=0.1)
    groups = [{"params": [network.weight]}, {"params": [network.bias], "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=0.01, weight_decay=0.3)
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = course(step, 6, 3, 0.01)
        batch = samples[4 * (step % 3) : 4 * (step % 3) + 4]
        optimizer.zero_grad()
        logits = network(torch.stack([sample["image"] for sample in batch]))
        loss(logits, torch.tensor([sample["label"] for sample in batch])).backward()
        optimizer.step()
    assert not torch.allclose(network.bias, torch.zeros(7), atol=1e-3)
    assert torch.equal(task.network.weight, network.weight)
    assert torch.equal(task.network.bias, network.bias)


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.GELU(), nn.Linear(8, 7))
    network.num_classes = 7
    return network


def batches(count: int = 5) -> DataLoader[Any]:
    return DataLoader(make_images(2 * count), batch_size=2)


def train_by_hand(
    network: nn.Module, precision: str, fused: bool, clip: tuple[float, str] | None, accumulated: int
) -> int:
    """Train two epochs at a constant rate; a group that the epoch's end cuts short is divided by its full size."""
    groups = [
        {"params": [network[1].weight, network[3].weight]},
        {"params": [network[1].bias, network[3].bias], "weight_decay": 0.0},
    ]
    optimizer, steps = AdamW(groups, lr=0.01, weight_decay=0.3, fused=fused), 0
    for _ in range(2):
        for index, batch in enumerate(batches()):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = nn.functional.cross_entropy(network(batch["image"]), batch["label"], label_smoothing=0.1)
            (loss / accumulated).backward()
            if (index + 1) % accumulated and index + 1 < 5:
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
def test_precision_clipping_and_accumulation_work_together(
    precision: str, fused: bool, clip: tuple[float, str] | None, accumulated: int, make_trainer: MakeTrainer
) -> None:
    task = ClassificationTask(perceptron(), partial(AdamW, lr=0.01, weight_decay=0.3, fused=fused), SCHEDULE, None)
    options = {"precision": precision, "accumulate_grad_batches": accumulated, "max_epochs": 2}
    if clip is not None:
        options |= {"gradient_clip_val": clip[0], "gradient_clip_algorithm": clip[1]}
    trainer = make_trainer(**options)
    trainer.fit(task, batches())
    resolved = "32-true" if precision == "32-true" else "bf16-mixed"
    network = perceptron()
    steps = train_by_hand(network, resolved, fused, clip, accumulated)
    assert task.resolved["total_steps"] == trainer.global_step == steps == (10 if accumulated == 1 else 4)
    assert (task.resolved["precision"], task.resolved["accumulated_batches"]) == (resolved, accumulated)
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(task.network.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)


def test_a_fused_optimizer_is_not_clipped_while_the_loss_is_scaled(make_trainer: MakeTrainer) -> None:
    task = ClassificationTask(perceptron(), partial(AdamW, fused=True))
    options = {"plugins": MixedPrecision("16-mixed", "cpu"), "gradient_clip_val": 5.0}
    with pytest.raises(
        ValueError, match=r"gradient_clip_val=5.0 does not work with a fused AdamW in 16-mixed, .*: set"
    ):
        make_trainer(**options).fit(task, batches())
    shape = FitShape(3, 4, 12, precision="16-mixed", gradient_clip_val=5.0, scales_loss=True)
    with pytest.raises(ValueError, match="does not work with a fused AdamW"):
        task.resolve(shape)


# Layers with rates of their own.


def test_each_layer_trains_at_its_own_rate(make_trainer: MakeTrainer) -> None:
    network = nano()
    reference = copy.deepcopy(network)
    still = partial(WarmupCosineSchedule, warmup_epochs=0, warmup_lr=0.0, min_lr=0.0)
    task = ClassificationTask(network, partial(SGD, lr=0.1), still, base_batch_size=4, layer_decay=0.5)
    make_trainer(max_steps=1, limit_train_batches=1).fit(task, batches(4))
    batch = next(iter(batches(4)))
    nn.functional.cross_entropy(reference(batch["image"]), batch["label"], label_smoothing=0.1).backward()
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


@pytest.mark.parametrize(("build", "last"), [(swin, "head"), (twins, "head")])
def test_layers_of_timm_s_networks_have_their_own_rates(
    build: Callable[[], nn.Module], last: str, make_trainer: MakeTrainer
) -> None:
    network, trainer = build(), make_trainer()
    task = ClassificationTask(network, partial(AdamW, lr=1e-3), SCHEDULE, None, layer_decay=0.5)
    trainer.fit(task, batches(1))
    scales = {id(p): group["lr_scale"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert len(scales) == len(list(network.parameters()))
    assert {scales[id(p)] for p in network.get_submodule(last).parameters()} == {1.0}
    assert min(scales.values()) < 0.5**5
    assert task.resolved["lr"] == pytest.approx(1e-3)


class Stopper(pl.Callback):
    """Stop after the second epoch and save."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch == 1

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def test_layers_keep_their_rates_in_a_resumed_training(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def fit(path: Path | None, *callbacks: pl.Callback) -> tuple[ClassificationTask, pl.Trainer, list[Any]]:
        torch.manual_seed(0)
        task = ClassificationTask(nano(), partial(AdamW, lr=0.01), freeze="backbone.stages.0", layer_decay=0.8)
        recorder = Recorder()
        trainer = make_trainer(max_epochs=4, callbacks=[recorder, *callbacks])
        trainer.fit(task, batches(4), ckpt_path=path)
        return task, trainer, recorder.rates

    whole, _, expected = fit(None)
    _, _, first = fit(None, Stopper(tmp_path / "half.ckpt"))
    resumed, trainer, second = fit(tmp_path / "half.ckpt")
    assert (first, second) == (expected[:8], expected[8:])
    assert [group["lr_scale"] for group in trainer.optimizers[0].param_groups][-1] == 1.0
    assert len({group["lr_scale"] for group in trainer.optimizers[0].param_groups}) == 8
    after = resumed.network.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in whole.network.state_dict().items())


# Schedules of torch and timm: eight batches of two, four epochs of them.

COSINE = [0.05 * (1.0 + math.cos(math.pi * step / 4)) for step in range(8)]
RATES: dict[str, tuple[Any, list[float]]] = {
    "torch, by epoch": (partial(StepLR, step_size=2), [0.1] * 8 + [0.01] * 8),
    "torch, by step": (
        partial(OneCycleLR, max_lr=0.1, pct_start=0.5, anneal_strategy="linear", final_div_factor=1.0),
        [],
    ),
    "timm, by epoch": (partial(CosineLRScheduler, t_initial=4), [COSINE[step // 4] for step in range(16)]),
    "timm, by step": (
        partial(CosineLRScheduler, t_initial=16, t_in_epochs=False),
        [0.05 * (1.0 + math.cos(math.pi * step / 16)) for step in range(16)],
    ),
    # The accuracy never changes: the first validation is the best, and the rate falls after the third and the fourth.
    "metric": (partial(ReduceLROnPlateau, patience=1), [0.1] * 12 + [0.01] * 4),
}


@pytest.mark.parametrize("name", RATES)
def test_schedules_of_torch_and_timm_have_the_same_rates_in_a_resumed_training(
    name: str, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    schedule, expected = RATES[name]

    def fit(path: Path | None, *callbacks: pl.Callback) -> list[float]:
        task = ClassificationTask(Scores(), partial(SGD, lr=0.1), schedule, None)
        task.network.weight.requires_grad_(False)
        task.network.bias.data[0] = 1e3  # the answer stays the same
        recorder = Recorder()
        trainer = make_trainer(max_epochs=4, callbacks=[recorder, *callbacks])
        trainer.fit(task, loader(16), loader(8), ckpt_path=path)
        return [rates[0] for rates in recorder.rates]

    if not expected:  # up from a 25th and down again
        expected = [0.1 * (0.04 + 0.96 * (1.0 - abs(step - 7.0) / (7.0 if step < 7 else 8.0))) for step in range(16)]
    rates = fit(None)
    assert rates == pytest.approx(expected, rel=1e-6)
    half = tmp_path / "half.ckpt"
    first = fit(None, Stopper(half))
    assert first + fit(half) == rates


def test_a_learning_rate_that_lightning_finds_is_used_and_kept_in_a_resumed_training(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def fit(path: Path | None, *callbacks: pl.Callback) -> tuple[ClassificationTask, list[float]]:
        torch.manual_seed(0)
        task, recorder = ClassificationTask(Scores(), partial(SGD, lr=0.5), SCHEDULE), Recorder()
        finder = LearningRateFinder(num_training_steps=30)
        trainer = make_trainer(max_epochs=4, callbacks=[finder, recorder, *callbacks])
        trainer.fit(task, loader(32), ckpt_path=path)
        assert (finder.optimal_lr is None) == (path is not None)
        if finder.optimal_lr is not None:
            assert task.lr == finder.optimal_lr.suggestion()
        return task, [rates[0] for rates in recorder.rates]

    whole, rates = fit(None)
    assert whole.resolved["lr"] == whole.lr != 0.5  # for the actual batch: not scaled
    assert rates == pytest.approx([0.01 + (whole.lr - 0.01) * (1 + math.cos(math.pi * t / 32)) / 2 for t in range(32)])
    _, first = fit(None, Stopper(tmp_path / "half.ckpt"))
    resumed, second = fit(tmp_path / "half.ckpt")
    assert first + second == rates
    assert torch.equal(resumed.network.weight, whole.network.weight)


# The rate of a resumed training, accumulated and on two processes.


def check_trace(found: dict[str, Any], processes: int) -> None:
    batches_per_epoch = 10 // processes
    for accumulated in (1, 4):
        case, per_epoch = found[str(accumulated)], math.ceil(batches_per_epoch / accumulated)
        global_batch = 2 * accumulated * processes
        rate = 5e-3 * global_batch / 16
        steps = [per_epoch * epoch + batch // accumulated for epoch in range(4) for batch in range(batches_per_epoch)]
        expected = [course(step, 4 * per_epoch, per_epoch, rate) for step in steps]
        assert case["rates"][0] == pytest.approx(expected[: 2 * batches_per_epoch], rel=1e-9)
        assert case["rates"][1] == pytest.approx(expected[2 * batches_per_epoch :], rel=1e-9)
        assert case["steps"] == 4 * per_epoch
        stated = {
            "global_batch": global_batch,
            "accumulated_batches": accumulated,
            "processes": processes,
            "samples_per_epoch": 20,
            "steps_per_epoch": per_epoch,
            "total_steps": 4 * per_epoch,
            "warmup_steps": per_epoch,
            "lr": pytest.approx(rate),
        }
        assert {name: case["resolved"][name] for name in stated} == stated


def test_the_rate_follows_the_formula_before_and_after_a_resume(tmp_path: Path) -> None:
    check_trace(trace(tmp_path, 1), 1)


def test_the_rate_follows_the_formula_on_two_processes(forkserver: ForkServerContext, tmp_path: Path) -> None:
    run_together(forkserver, in_a_process, 2, tmp_path)
    for rank in (0, 1):
        check_trace(json.loads((tmp_path / f"{rank}.json").read_text()), 2)
