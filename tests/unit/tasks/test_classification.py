import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, IterableDataset

from scalablevit_pl.optim import WarmupCosineSchedule
from scalablevit_pl.tasks import ClassificationTask
from scalablevit_pl.tasks.metrics.averages import SampleAverages

Samples = list[dict[str, Any]]
MakeTrainer = Callable[..., pl.Trainer]
# Trains without changing a weight.
STILL = {"optimizer": partial(SGD, lr=0.0), "schedule": partial(WarmupCosineSchedule, warmup_lr=0.0, min_lr=0.0)}


class Scores(nn.Module):
    """Logits that are the image's own values, as long as the weights stay as they are."""

    def __init__(self, num_classes: int = 7) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.eye(num_classes))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, image: Tensor) -> Tensor:
        return image.flatten(1) @ self.weight + self.bias


class Recorder(pl.Callback):
    """Note losses and learning rates as they were in each training batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.logged: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"].item())
        self.logged.append(trainer.callback_metrics["train/lr"].item())


@pytest.fixture
def make_trainer(tmp_path: Path) -> MakeTrainer:
    def make(**options: Any) -> pl.Trainer:
        quiet = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "barebones"), False
        )
        values = quiet | {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": tmp_path} | options
        return pl.Trainer(**values)

    return make


def make_samples(count: int, num_classes: int = 7) -> Samples:
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, num_classes, 1, 1, generator=generator)
    labels = torch.randint(num_classes, (count,), generator=generator)
    return [{"image": image, "label": label} for image, label in zip(images, labels.tolist(), strict=True)]


def soften(samples: Samples, num_classes: int = 7) -> Samples:
    generator = torch.Generator().manual_seed(0)
    return [sample | {"label": (3.0 * torch.randn(num_classes, generator=generator)).softmax(0)} for sample in samples]


def log_probabilities(samples: Samples) -> Tensor:
    logits = torch.stack([sample["image"].flatten() for sample in samples]).double()
    return logits - logits.exp().sum(1, keepdim=True).log()


def ranks(samples: Samples, labels: list[int]) -> list[int]:
    """Return the place of each label among the logits, from 0."""
    logits = [sample["image"].flatten().tolist() for sample in samples]
    return [sorted(row, reverse=True).index(row[label]) for row, label in zip(logits, labels, strict=True)]


def calibration_error(probabilities: Tensor, labels: list[int], bins: int = 15) -> float:
    """Guo et al. 2017, equation 3, written out."""
    members: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(probabilities.tolist(), labels, strict=True):
        confidence = max(row)
        number = next(place for place in range(1, bins + 1) if confidence <= place / bins)
        members.setdefault(number, []).append((confidence, row.index(confidence) == label))
    error = 0.0
    for inside in members.values():
        accuracy = sum(right for _, right in inside) / len(inside)
        mean = sum(confidence for confidence, _ in inside) / len(inside)
        error += len(inside) / len(labels) * abs(accuracy - mean)
    return error


def share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


@pytest.mark.parametrize("part", ["val", "test"])
@pytest.mark.parametrize("count", [11, 12, 3])
def test_evaluation_counts_each_sample_once(part: str, count: int, make_trainer: MakeTrainer) -> None:
    samples = make_samples(count)
    labels = [sample["label"] for sample in samples]
    trainer = make_trainer()
    run = {"val": trainer.validate, "test": trainer.test}[part]
    (metrics,) = run(ClassificationTask(Scores()), DataLoader(samples, batch_size=4), verbose=False)
    places = ranks(samples, labels)
    probabilities = log_probabilities(samples).exp()
    assert metrics == {
        f"{part}/ece": pytest.approx(calibration_error(probabilities, labels), rel=1e-6),
        f"{part}/loss": pytest.approx(-log_probabilities(samples)[range(count), labels].mean().item(), rel=1e-6),
        f"{part}/top1": pytest.approx(share([place < 1 for place in places]), abs=1e-7),
        f"{part}/top5": pytest.approx(share([place < 5 for place in places]), abs=1e-7),
        f"{part}/samples": count,
    }


def test_training_metrics_are_averages_over_samples(make_trainer: MakeTrainer) -> None:
    samples, recorder = make_samples(11), Recorder()
    labels = [sample["label"] for sample in samples]
    trainer = make_trainer(callbacks=[recorder])
    trainer.fit(ClassificationTask(Scores(), **STILL, label_smoothing=0.0), DataLoader(samples, batch_size=4))
    losses, places = -log_probabilities(samples)[range(11), labels], ranks(samples, labels)
    metrics = trainer.callback_metrics
    assert metrics["train/loss"].item() == pytest.approx(losses.mean().item(), rel=1e-6)
    assert metrics["train/top1"].item() == pytest.approx(share([place < 1 for place in places]), abs=1e-7)
    assert metrics["train/top5"].item() == pytest.approx(share([place < 5 for place in places]), abs=1e-7)
    assert recorder.losses == pytest.approx([part.mean().item() for part in losses.split(4)], rel=1e-6)
    assert metrics["train/step_loss"].item() == pytest.approx(recorder.losses[-1])


def test_every_epoch_counts_anew(make_trainer: MakeTrainer) -> None:
    loader = DataLoader(make_samples(11), batch_size=4)
    seen = []
    for epochs in (1, 3):
        trainer = make_trainer(max_epochs=epochs, num_sanity_val_steps=2)
        trainer.fit(ClassificationTask(Scores(), **STILL), loader, loader)
        seen.append({name: value.item() for name, value in trainer.callback_metrics.items()})
    assert seen[0] == seen[1]
    assert seen[0]["val/samples"] == 11


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("soft", [False, True])
def test_the_loss_is_cross_entropy_with_smoothed_labels(
    soft: bool, smoothing: float, make_trainer: MakeTrainer
) -> None:
    samples = make_samples(8)
    targets = nn.functional.one_hot(torch.tensor([sample["label"] for sample in samples]), 7).double()
    if soft:
        samples = soften(samples)
        targets = torch.stack([sample["label"] for sample in samples]).double()
        assert targets.max() < 1.0
    smoothed = targets * (1.0 - smoothing) + targets.sum(1, keepdim=True) * smoothing / 7
    recorder = Recorder()
    task = ClassificationTask(Scores(), **STILL, label_smoothing=smoothing)
    make_trainer(callbacks=[recorder]).fit(task, DataLoader(samples, batch_size=8))
    expected = -(smoothed * log_probabilities(samples)).sum(1).mean().item()
    assert recorder.losses == [pytest.approx(expected, rel=1e-6)]


def test_accuracy_of_mixed_labels_asks_for_the_heaviest_class(make_trainer: MakeTrainer) -> None:
    samples = soften(make_samples(11))
    labels = [int(sample["label"].argmax()) for sample in samples]
    trainer = make_trainer()
    trainer.fit(ClassificationTask(Scores(), **STILL), DataLoader(samples, batch_size=4))
    places = ranks(samples, labels)
    assert trainer.callback_metrics["train/top1"].item() == pytest.approx(share([place < 1 for place in places]))
    assert trainer.callback_metrics["train/top5"].item() == pytest.approx(share([place < 5 for place in places]))


def test_evaluation_takes_no_smoothing(make_trainer: MakeTrainer) -> None:
    loader = DataLoader(make_samples(6), batch_size=4)
    losses = [
        make_trainer().validate(ClassificationTask(Scores(), label_smoothing=smoothing), loader, verbose=False)
        for smoothing in (0.0, 0.9)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("part", ["val", "test"])
def test_fillers_are_not_counted_even_if_they_are_nan(part: str, make_trainer: MakeTrainer) -> None:
    samples = [sample | {"index": index} for index, sample in enumerate(make_samples(6))]
    fillers = [sample | {"index": -1, "image": sample["image"] * math.nan} for sample in make_samples(5)]
    mixed = [*samples[:3], fillers[0], *samples[3:], *fillers[1:]]  # a batch of four fillers at the end
    results = []
    for given in (samples, mixed):
        trainer = make_trainer()
        run = {"val": trainer.validate, "test": trainer.test}[part]
        (metrics,) = run(ClassificationTask(Scores()), DataLoader(given, batch_size=4), verbose=False)
        results.append(metrics)
    assert results[0] == pytest.approx(results[1], rel=1e-12)
    assert results[1][f"{part}/samples"] == 6


def test_a_network_in_half_precision_is_counted_in_full(make_trainer: MakeTrainer) -> None:
    # In bfloat16 a count would stay at 256.
    loader = DataLoader(make_samples(600), batch_size=1)
    (metrics,) = make_trainer(precision="bf16-true").validate(ClassificationTask(Scores()), loader, verbose=False)
    assert metrics["val/samples"] == 600
    assert 0.0 < metrics["val/top1"] < 1.0
    assert metrics["val/top1"] * 600 == pytest.approx(round(metrics["val/top1"] * 600), abs=1e-3)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="Apple's GPUs have no doubles")
def test_the_number_of_samples_grows_past_what_single_precision_counts() -> None:
    metric = SampleAverages(top=1)
    metric.samples = metric.samples + 2**24
    metric.update(torch.tensor([[2.0, 1.0]]), torch.tensor([0]), torch.tensor([True]))
    assert metric.compute()["samples"].item() == 2**24 + 1


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_top5_of_few_classes_is_always_right(num_classes: int, make_trainer: MakeTrainer) -> None:
    loader = DataLoader(make_samples(9, num_classes), batch_size=4)
    (metrics,) = make_trainer().test(ClassificationTask(Scores(num_classes)), loader, verbose=False)
    assert metrics["test/top5"] == 1.0
    assert 0.0 < metrics["test/top1"] < 1.0


def test_prediction_gives_probabilities(make_trainer: MakeTrainer) -> None:
    samples = make_samples(6)
    predicted = make_trainer().predict(ClassificationTask(Scores()), DataLoader(samples, batch_size=4))
    assert torch.allclose(torch.cat(predicted).double(), log_probabilities(samples).exp(), atol=1e-7)


@pytest.mark.parametrize(
    ("base_batch_size", "accumulated", "lr"),
    [(None, 1, 0.01), (None, 3, 0.01), (4, 1, 0.01), (8, 1, 0.005), (8, 3, 0.015), (512, 1, 0.01 * 4 / 512)],
)
def test_the_learning_rate_is_scaled_to_the_global_batch(
    base_batch_size: int | None, accumulated: int, lr: float, make_trainer: MakeTrainer
) -> None:
    task = ClassificationTask(Scores(), partial(AdamW, lr=0.01), base_batch_size=base_batch_size)
    trainer = make_trainer(accumulate_grad_batches=accumulated)
    trainer.fit(task, DataLoader(make_samples(12), batch_size=4))
    assert task.resolved["lr"] == pytest.approx(lr)
    assert task.resolved["global_batch"] == 4 * accumulated
    assert trainer.lr_scheduler_configs[0].scheduler.base_lrs == [pytest.approx(lr)] * 2


def course(step: int, total: int, warmup: int, lr: float) -> float:
    """The paper's schedule, written out."""
    if step < warmup:
        return 1e-6 + (lr - 1e-6) * step / warmup
    return 1e-5 + (lr - 1e-5) * (1.0 + math.cos(math.pi * step / total)) / 2.0


@pytest.mark.parametrize(("accumulated", "steps"), [(1, range(15)), (2, [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 7, 8])])
def test_the_learning_rate_follows_its_schedule_per_optimizer_step(
    accumulated: int, steps: list[int], make_trainer: MakeTrainer
) -> None:
    recorder = Recorder()
    schedule = partial(WarmupCosineSchedule, warmup_epochs=1)
    task = ClassificationTask(Scores(), partial(AdamW, lr=0.01), schedule, base_batch_size=None)
    trainer = make_trainer(callbacks=[recorder], max_epochs=3, accumulate_grad_batches=accumulated)
    trainer.fit(task, DataLoader(make_samples(10), batch_size=2))
    per_epoch = math.ceil(5 / accumulated)
    expected = [course(step, 3 * per_epoch, per_epoch, 0.01) for step in steps]
    assert recorder.rates == pytest.approx(expected)
    assert recorder.logged == pytest.approx(expected)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-5)


def test_training_is_plain_torch_written_out(make_trainer: MakeTrainer) -> None:
    samples = make_samples(12)
    task = ClassificationTask(
        Scores(), partial(AdamW, lr=0.02, weight_decay=0.3), partial(WarmupCosineSchedule, warmup_epochs=1), 8
    )
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


def test_resolved_settings_are_recorded_in_plain_values(make_trainer: MakeTrainer) -> None:
    task = ClassificationTask(Scores(), partial(AdamW, lr=0.01, weight_decay=0.05), base_batch_size=16)
    assert task.resolved == {}
    make_trainer(max_epochs=8, accumulate_grad_batches=2).fit(task, DataLoader(make_samples(12), batch_size=4))
    assert task.resolved == {
        "parameters": 56,
        "trainable_parameters": 56,
        "frozen": [],
        "global_batch": 8,
        "base_batch_size": 16,
        "accumulated_batches": 2,
        "processes": 1,
        "samples_per_epoch": 12,
        "steps_per_epoch": 2,
        "total_steps": 16,
        "warmup_steps": 10,
        "lr": pytest.approx(0.005),
        "parameter_groups": [
            {"weight_decay": 0.05, "tensors": 1, "parameters": 49},
            {"weight_decay": 0.0, "tensors": 1, "parameters": 7},
        ],
        "precision": "32-true",
        "compile": False,
        "channels_last": False,
    }


def test_frozen_parameters_stay_and_are_counted_apart(make_trainer: MakeTrainer) -> None:
    network = Scores()
    network.weight.requires_grad_(False)
    task = ClassificationTask(network, partial(AdamW, lr=0.1), base_batch_size=None)
    make_trainer().fit(task, DataLoader(make_samples(8), batch_size=4))
    assert (task.resolved["parameters"], task.resolved["trainable_parameters"]) == (56, 7)
    assert task.resolved["parameter_groups"] == [{"weight_decay": 0.0, "tensors": 1, "parameters": 7}]
    assert torch.equal(network.weight, torch.eye(7))
    assert network.bias.abs().min() > 0.0


def test_double_precision_trains_and_evaluates(make_trainer: MakeTrainer) -> None:
    loader = DataLoader(make_samples(11), batch_size=4)
    metrics = []
    for precision in ("32-true", "64-true"):
        trainer = make_trainer(precision=precision)
        trainer.fit(ClassificationTask(Scores(), partial(SGD, lr=0.1)), loader, loader)
        metrics.append({name: value.item() for name, value in trainer.callback_metrics.items()})
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)


@pytest.mark.parametrize("num_classes", ["missing", None, 1, "10", 2.0])
def test_a_network_that_does_not_know_its_classes_is_refused(num_classes: Any) -> None:
    network = nn.Linear(3, 3)
    if num_classes != "missing":
        network.num_classes = num_classes
    with pytest.raises(ValueError, match="Linear has num_classes="):
        ClassificationTask(network)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_a_smoothing_out_of_range_is_refused(smoothing: float) -> None:
    with pytest.raises(ValueError, match=f"label_smoothing must be at least 0 and below 1, got {smoothing}"):
        ClassificationTask(Scores(), label_smoothing=smoothing)


def test_a_schedule_of_another_signature_is_refused(make_trainer: MakeTrainer) -> None:
    task = ClassificationTask(Scores(), schedule=partial(StepLR, step_size=2))
    with pytest.raises(ValueError, match=r"the schedule must take \(optimizer, total_steps, steps_per_epoch"):
        make_trainer().fit(task, DataLoader(make_samples(4), batch_size=4))


class Stream(IterableDataset[dict[str, Any]]):
    def __iter__(self) -> Any:
        return iter(make_samples(8))


@pytest.mark.parametrize(
    ("loader", "options"),
    [
        (DataLoader(Stream(), batch_size=4), {}),
        (DataLoader(make_samples(8), batch_size=4), {"max_epochs": -1}),
        (DataLoader(make_samples(8), batch_size=None), {}),
    ],
    ids=["no length", "no end", "no batch size"],
)
def test_an_unknown_number_of_steps_is_refused(
    loader: DataLoader[Any], options: dict[str, Any], make_trainer: MakeTrainer
) -> None:
    with pytest.raises(ValueError, match="the schedule needs a known number of steps and batch size"):
        make_trainer(**options).fit(ClassificationTask(Scores()), loader)


def test_training_may_be_limited_by_steps_alone(make_trainer: MakeTrainer) -> None:
    task = ClassificationTask(Scores())
    make_trainer(max_epochs=-1, max_steps=5).fit(task, DataLoader(make_samples(8), batch_size=4))
    assert (task.resolved["total_steps"], task.resolved["steps_per_epoch"]) == (5, 2)
    assert task.resolved["samples_per_epoch"] == 8


def test_a_nan_loss_makes_the_average_nan(make_trainer: MakeTrainer) -> None:
    samples = make_samples(8)
    samples[5]["image"] = samples[5]["image"] * math.nan
    trainer = make_trainer()
    trainer.fit(ClassificationTask(Scores(), **STILL), DataLoader(samples, batch_size=4))
    assert math.isnan(trainer.callback_metrics["train/loss"].item())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_precision_clipping_and_accumulation_go_together(
    precision: str, accumulated: int, make_trainer: MakeTrainer
) -> None:
    network = Scores()
    trainer = make_trainer(precision=precision, gradient_clip_val=5.0, accumulate_grad_batches=accumulated)
    trainer.fit(ClassificationTask(network), DataLoader(make_samples(8), batch_size=2))
    assert trainer.global_step == 4 // accumulated
    assert not torch.equal(network.weight, torch.eye(7))
    assert network.weight.isfinite().all()


def test_random_numbers_of_a_network_depend_on_seed_epoch_batch_and_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(seed: int, epoch: int, batch: int, rank: int) -> float:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        monkeypatch.setattr(ClassificationTask, "current_epoch", epoch)
        monkeypatch.setattr(ClassificationTask, "global_rank", rank)
        ClassificationTask(Scores()).on_train_batch_start(None, batch)
        return torch.rand(1).item()

    drawn = [draw(*numbers) for numbers in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))]
    assert len(set(drawn)) == 5
    torch.rand(7)
    assert drawn[0] == draw(0, 0, 0, 0)


@pytest.mark.parametrize("size", [0, -512])
def test_a_base_batch_size_below_one_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"base_batch_size must be at least 1, .* got {size}"):
        ClassificationTask(Scores(), base_batch_size=size)


@pytest.mark.parametrize(("rate", "message"), [(-1.0, "optimizer does not take its settings"), (math.inf, "be finite")])
def test_a_learning_rate_out_of_range_is_refused(rate: float, message: str, make_trainer: MakeTrainer) -> None:
    task = ClassificationTask(Scores(), optimizer=partial(SGD, lr=rate))
    with pytest.raises(ValueError, match=message):
        make_trainer().fit(task, DataLoader(make_samples(4), batch_size=2))
