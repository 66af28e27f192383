"""Loss, metrics and predictions of classifiers against loops over the samples."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from small_tasks import (
    CLASSES,
    STILL,
    Recorder,
    Samples,
    Scores,
    calibration_error,
    log_probabilities,
    make_samples,
    mean_average_precision,
)
from torch import nn
from torch.utils.data import DataLoader

from scalablevit_pl.explanation import explain
from scalablevit_pl.tasks import ClassificationTask, MultiLabelTask, ReportData
from scalablevit_pl.tasks.classification_report import ClassificationReport

MakeTrainer = Callable[..., pl.Trainer]


def soften(samples: Samples) -> Samples:
    generator = torch.Generator().manual_seed(0)
    return [sample | {"label": (3.0 * torch.randn(CLASSES, generator=generator)).softmax(0)} for sample in samples]


def accuracy(samples: Samples, labels: list[int], top: int) -> Any:
    """Return the fraction of samples whose label is among the `top` highest logits."""
    logits = [sample["image"].flatten().tolist() for sample in samples]
    ranks = [sorted(row, reverse=True).index(row[label]) for row, label in zip(logits, labels, strict=True)]
    return pytest.approx(sum(rank < top for rank in ranks) / len(ranks), abs=1e-7)


def labels_of(samples: Samples) -> list[int]:
    return [label if isinstance(label, int) else int(label.argmax()) for label in (s["label"] for s in samples)]


@pytest.mark.parametrize("part", ["val", "test"])
@pytest.mark.parametrize("count", [11, 12, 3])
def test_evaluation_counts_each_sample_once(part: str, count: int, make_trainer: MakeTrainer) -> None:
    samples = make_samples(count)
    labels = labels_of(samples)
    trainer = make_trainer()
    run = {"val": trainer.validate, "test": trainer.test}[part]
    (metrics,) = run(ClassificationTask(Scores()), DataLoader(samples, batch_size=4), verbose=False)
    assert metrics == {
        f"{part}/ece": pytest.approx(calibration_error(log_probabilities(samples).exp(), labels), rel=1e-6),
        f"{part}/loss": pytest.approx(-log_probabilities(samples)[range(count), labels].mean().item(), rel=1e-6),
        f"{part}/top1": accuracy(samples, labels, 1),
        f"{part}/top5": accuracy(samples, labels, 5),
        f"{part}/samples": count,
    }


def test_training_metrics_are_averages_over_samples(make_trainer: MakeTrainer) -> None:
    samples, recorder = make_samples(11), Recorder()
    labels = labels_of(samples)
    trainer = make_trainer(callbacks=[recorder])
    trainer.fit(ClassificationTask(Scores(), **STILL, label_smoothing=0.0), DataLoader(samples, batch_size=4))
    losses, metrics = -log_probabilities(samples)[range(11), labels], trainer.callback_metrics
    assert metrics["train/loss"].item() == pytest.approx(losses.mean().item(), rel=1e-6)
    assert metrics["train/top1"].item() == accuracy(samples, labels, 1)
    assert metrics["train/top5"].item() == accuracy(samples, labels, 5)
    assert recorder.losses == pytest.approx([part.mean().item() for part in losses.split(4)], rel=1e-6)
    assert metrics["train/step_loss"].item() == pytest.approx(recorder.losses[-1])


# Losses.


def trained(loss: Any, samples: Samples, make_trainer: MakeTrainer, **options: Any) -> list[float]:
    """Train without changing a weight and return the losses of the batches of four."""
    recorder = Recorder()
    task = ClassificationTask(Scores(), **STILL, loss=loss, **options)
    make_trainer(callbacks=[recorder]).fit(task, DataLoader(samples, batch_size=4))
    return recorder.losses


class Focal(nn.Module):
    """The focal loss of a user: a value for each sample."""

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        probability = logits.softmax(1).gather(1, label[:, None])[:, 0]
        return -((1.0 - probability) ** 2) * probability.log()


def test_a_loss_of_the_user_gives_one_value_per_sample(make_trainer: MakeTrainer) -> None:
    samples = make_samples(8)
    own = -log_probabilities(samples)[range(8), labels_of(samples)]
    expected = (1.0 - (-own).exp()) ** 2 * own
    assert trained(Focal(), samples, make_trainer) == pytest.approx([p.mean().item() for p in expected.split(4)])


def test_a_loss_may_be_a_mean_and_take_soft_labels(make_trainer: MakeTrainer) -> None:
    samples = soften(make_samples(8))
    expected = -(torch.stack([sample["label"] for sample in samples]) * log_probabilities(samples)).sum(1)
    losses = trained(nn.CrossEntropyLoss(), samples, make_trainer)
    assert losses == pytest.approx([part.mean().item() for part in expected.split(4)], rel=1e-5)


def test_a_loss_of_each_class_is_averaged_over_the_classes(make_trainer: MakeTrainer) -> None:
    samples = make_samples(8)
    right = torch.eye(CLASSES)[labels_of(samples)]
    signed = torch.stack([sample["image"].flatten() for sample in samples]).double() * (1.0 - 2.0 * right)
    expected = (1.0 + signed.exp()).log().mean(1)
    samples = [sample | {"label": row} for sample, row in zip(samples, right, strict=True)]
    losses = trained(nn.BCEWithLogitsLoss(reduction="none"), samples, make_trainer)
    assert losses == pytest.approx([part.mean().item() for part in expected.split(4)], rel=1e-5)


def test_class_weights_are_factors_on_the_default_loss(make_trainer: MakeTrainer) -> None:
    samples, weights = make_samples(8), [0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0]
    labels = labels_of(samples)
    losses = -log_probabilities(samples)[range(8), labels] * torch.tensor([weights[label] for label in labels])
    given = trained(None, samples, make_trainer, class_weights=weights, label_smoothing=0.0)
    assert given == pytest.approx([part.mean().item() for part in losses.split(4)], rel=1e-5)


def test_a_loss_that_rejects_the_labels_is_named(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match=r"^Focal rejects logits \(4, 7\) with targets \(4, 7\): .*mixup") as error:
        trained(Focal(), soften(make_samples(4)), make_trainer)
    assert explain(error.value) is not None


@pytest.mark.parametrize("weights", [[1.0] * 6, [-1.0, *[1.0] * 6], [math.nan, *[1.0] * 6]])
def test_class_weights_are_one_number_for_each_class(weights: list[float]) -> None:
    with pytest.raises(ValueError, match=f"must be {CLASSES} numbers that are not negative"):
        ClassificationTask(Scores(), **STILL, class_weights=weights)


@pytest.mark.parametrize(("loss", "weights"), [(nn.CrossEntropyLoss(), [1.0] * CLASSES), (nn.Bilinear(1, 1, 1), None)])
def test_weights_that_a_loss_would_ignore_are_refused(loss: nn.Module, weights: list[float] | None) -> None:
    with pytest.raises(ValueError, match=f"loss={type(loss).__name__} excludes class_weights and cannot have param"):
        ClassificationTask(Scores(), loss=loss, class_weights=weights)


class Sided(nn.Module):
    """Logits that are the left pixel of each channel."""

    num_classes = CLASSES

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(CLASSES))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image[:, :, 0, 0] + self.bias


def test_flip_is_the_mean_of_the_probabilities_of_both_images(make_trainer: MakeTrainer) -> None:
    images = torch.randn(8, CLASSES, 1, 2, generator=torch.Generator().manual_seed(2))
    samples = [{"image": image, "label": index % CLASSES} for index, image in enumerate(images)]
    mean = (images[:, :, 0, 0].double().softmax(1) + images[:, :, 0, 1].double().softmax(1)) / 2.0
    recorder, loader = Recorder(), DataLoader(samples, batch_size=4)
    task = ClassificationTask(Sided(), **STILL, tta="flip", label_smoothing=0.0)
    predicted = torch.cat(make_trainer().predict(task, loader))
    torch.testing.assert_close(predicted.double(), mean, rtol=1e-6, atol=1e-7)
    (metrics,) = make_trainer().test(task, loader, verbose=False)
    labels = labels_of(samples)
    assert metrics["test/loss"] == pytest.approx(-mean[range(8), labels].log().mean().item(), rel=1e-6)
    assert metrics["test/ece"] == pytest.approx(calibration_error(mean, labels), rel=1e-5)
    make_trainer(callbacks=[recorder]).fit(task, loader)
    trained = -images[:, :, 0, 0].double().log_softmax(1)[range(8), labels]
    assert recorder.losses == pytest.approx([part.mean().item() for part in trained.split(4)], rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("soft", [False, True])
def test_the_loss_is_cross_entropy_with_smoothed_labels(
    soft: bool, smoothing: float, make_trainer: MakeTrainer
) -> None:
    samples = make_samples(8)
    targets = nn.functional.one_hot(torch.tensor(labels_of(samples)), CLASSES).double()
    if soft:
        samples = soften(samples)
        targets = torch.stack([sample["label"] for sample in samples]).double()
        assert targets.max() < 1.0
    smoothed = targets * (1.0 - smoothing) + targets.sum(1, keepdim=True) * smoothing / CLASSES
    recorder = Recorder()
    task = ClassificationTask(Scores(), **STILL, label_smoothing=smoothing)
    make_trainer(callbacks=[recorder]).fit(task, DataLoader(samples, batch_size=8))
    expected = -(smoothed * log_probabilities(samples)).sum(1).mean().item()
    assert recorder.losses == [pytest.approx(expected, rel=1e-6)]


def test_accuracy_of_mixed_labels_is_that_of_the_heaviest_class(make_trainer: MakeTrainer) -> None:
    samples, trainer = soften(make_samples(11)), make_trainer()
    trainer.fit(ClassificationTask(Scores(), **STILL), DataLoader(samples, batch_size=4))
    assert trainer.callback_metrics["train/top1"].item() == accuracy(samples, labels_of(samples), 1)
    assert trainer.callback_metrics["train/top5"].item() == accuracy(samples, labels_of(samples), 5)


def test_evaluation_does_not_smooth_labels(make_trainer: MakeTrainer) -> None:
    loader = DataLoader(make_samples(6), batch_size=4)
    losses = [
        make_trainer().validate(ClassificationTask(Scores(), label_smoothing=smoothing), loader, verbose=False)
        for smoothing in (0.0, 0.9)
    ]
    assert losses[0] == losses[1]


def test_a_network_in_half_precision_is_evaluated_in_full(make_trainer: MakeTrainer) -> None:
    # In bfloat16 a count would stay at 256.
    loader = DataLoader(make_samples(600), batch_size=1)
    (metrics,) = make_trainer(precision="bf16-true").validate(ClassificationTask(Scores()), loader, verbose=False)
    assert metrics["val/samples"] == 600
    assert 0.0 < metrics["val/top1"] < 1.0
    assert metrics["val/top1"] * 600 == pytest.approx(round(metrics["val/top1"] * 600), abs=1e-3)


@pytest.mark.parametrize("num_classes", [2, 5, 6])
def test_top5_is_logged_for_more_than_five_classes(num_classes: int, make_trainer: MakeTrainer) -> None:
    samples = make_samples(9, num_classes)
    loader = DataLoader(samples, batch_size=4)
    (metrics,) = make_trainer().test(ClassificationTask(Scores(num_classes)), loader, verbose=False)
    assert metrics.get("test/top5") == (accuracy(samples, labels_of(samples), 5) if num_classes > 5 else None)
    assert 0.0 < metrics["test/top1"] < 1.0


def test_a_checkpoint_with_top5_of_few_classes_is_resumed() -> None:
    task = ClassificationTask(Scores(3))
    task.setup("fit")
    task.trainer = SimpleNamespace(world_size=1, global_rank=0, callbacks=[])  # type: ignore[assignment]
    sums = {"mean_value": torch.tensor([6.0]), "weight": torch.tensor([3.0])}
    task.on_load_checkpoint({"train_averages": {"top5": {"tp": torch.ones(1, 1)}, "loss": sums}})
    assert task.averages["loss"].compute() == 2.0  # type: ignore[operator]


def test_predictions_are_probabilities(make_trainer: MakeTrainer) -> None:
    samples = make_samples(6)
    predicted = make_trainer().predict(ClassificationTask(Scores()), DataLoader(samples, batch_size=4))
    assert torch.allclose(torch.cat(predicted).double(), log_probabilities(samples).exp(), atol=1e-7)


def test_a_nan_loss_makes_the_average_nan(make_trainer: MakeTrainer) -> None:
    samples = make_samples(8)
    samples[5]["image"] = samples[5]["image"] * math.nan
    trainer = make_trainer()
    trainer.fit(ClassificationTask(Scores(), **STILL), DataLoader(samples, batch_size=4))
    assert math.isnan(trainer.callback_metrics["train/loss"].item())


def test_metrics_are_described_and_the_monitored_one_is_among_them() -> None:
    task = ClassificationTask
    assert (task.monitor, task.mode) == ("top1", "max")
    assert {name: info.plotted for name, info in task.described.items()} == {"loss": True, "top1": True, "top5": False}
    assert set(task.shown) <= task.described.keys()
    assert "smoothed or mixed labels" in task.described["loss"].training  # the validation has neither


def test_the_report_is_that_of_classifiers() -> None:
    data = ReportData(["cat", "dog"], 3, None)
    report = ClassificationTask(Scores()).report(data, predict=True)
    assert isinstance(report, ClassificationReport)
    assert report.predict


@pytest.mark.parametrize("num_classes", ["missing", None, 1, "10", 2.0])
def test_a_network_without_a_valid_number_of_classes_is_refused(num_classes: Any) -> None:
    network = nn.Linear(3, 3)
    if num_classes != "missing":
        network.num_classes = num_classes
    with pytest.raises(ValueError, match="Linear has num_classes="):
        ClassificationTask(network)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_a_smoothing_out_of_range_is_refused(smoothing: float) -> None:
    with pytest.raises(ValueError, match=f"label_smoothing must be at least 0 and below 1, got {smoothing}"):
        ClassificationTask(Scores(), label_smoothing=smoothing)


# Class weights from the data.


class Counted(pl.LightningDataModule):
    """Samples whose labels are known, as a datamodule of this package knows them."""

    class_names: ClassVar = [f"class {index}" for index in range(CLASSES)]

    def __init__(self, samples: Samples) -> None:
        super().__init__()
        self.samples = samples

    def training_labels(self) -> torch.Tensor:
        return torch.tensor(labels_of(self.samples))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.samples, batch_size=4)


def test_balanced_class_weights_have_the_mean_one(make_trainer: MakeTrainer) -> None:
    samples = make_samples(40)
    labels = labels_of(samples)
    weights = [40 / (CLASSES * labels.count(label)) for label in range(CLASSES)]
    assert sum(weights[label] for label in labels) == pytest.approx(40)
    losses = -log_probabilities(samples)[range(40), labels] * torch.tensor([weights[label] for label in labels])
    recorder, trainer = Recorder(), make_trainer(enable_checkpointing=False)
    trainer.callbacks.append(recorder)
    task = ClassificationTask(Scores(), **STILL, class_weights="balanced", label_smoothing=0.0)
    trainer.fit(task, datamodule=Counted(samples))
    assert recorder.losses == pytest.approx([part.mean().item() for part in losses.split(4)], rel=1e-5)
    resumed = ClassificationTask(Scores(), class_weights="balanced")
    resumed.load_state_dict(task.state_dict())
    assert resumed.criterion.weight.tolist() == pytest.approx(weights)


def test_balanced_class_weights_need_images_of_each_class_and_a_datamodule(make_trainer: MakeTrainer) -> None:
    task = ClassificationTask(Scores(), class_weights="balanced")
    samples = [sample | {"label": index % 5} for index, sample in enumerate(make_samples(8))]
    with pytest.raises(ValueError, match=r"no training image of 'class 5': add some, or give numbers$"):
        make_trainer().fit(task, datamodule=Counted(samples))
    with pytest.raises(ValueError, match=r"needs a BaseDataModule: give a number for each class$"):
        make_trainer().fit(task, DataLoader(samples))
    make_trainer().test(task, DataLoader(samples), verbose=False)


# Any number of classes for an image.


def tagged(count: int) -> Samples:
    """Draw images with any number of classes each; the last class has none."""
    labels = torch.randint(2, (count, CLASSES), generator=torch.Generator().manual_seed(count)).float()
    labels[:, -1] = 0.0
    return [sample | {"label": label} for sample, label in zip(make_samples(count), labels, strict=True)]


def test_metrics_of_several_labels_are_those_of_loops(make_trainer: MakeTrainer) -> None:
    samples = tagged(11)
    samples[3]["image"] = samples[4]["image"]  # equal scores
    logits = torch.stack([sample["image"].flatten() for sample in samples]).double()
    labels = torch.stack([sample["label"] for sample in samples]).double()
    (metrics,) = make_trainer().test(MultiLabelTask(Scores()), DataLoader(samples, batch_size=4), verbose=False)
    losses = labels * (-logits).exp().log1p() + (1.0 - labels) * logits.exp().log1p()
    found, both = (logits > 0.0).double(), ((logits > 0.0) & (labels > 0.0)).sum(0)
    assert metrics == {
        "test/loss": pytest.approx(losses.mean().item(), rel=1e-6),
        "test/map": pytest.approx(mean_average_precision(logits.tolist(), labels.bool().tolist()), rel=1e-6),
        "test/f1": pytest.approx((2 * both / (found.sum(0) + labels.sum(0))).mean().item(), rel=1e-6),
        "test/samples": 11,
    }


def test_training_with_several_labels(make_trainer: MakeTrainer) -> None:
    samples, recorder = tagged(8), Recorder()
    trainer = make_trainer(callbacks=[recorder])
    trainer.fit(MultiLabelTask(Scores(), **STILL), DataLoader(samples, batch_size=4))
    logits = torch.stack([sample["image"].flatten() for sample in samples]).double()
    labels = torch.stack([sample["label"] for sample in samples]).double()
    losses = labels * (-logits).exp().log1p() + (1.0 - labels) * logits.exp().log1p()
    assert recorder.losses == pytest.approx([part.mean().item() for part in losses.split(4)], rel=1e-6)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(losses.mean().item(), rel=1e-6)
    assert 0.0 < trainer.callback_metrics["train/f1"].item() < 1.0


def test_flip_is_the_mean_of_the_probabilities_of_each_class(make_trainer: MakeTrainer) -> None:
    images = torch.randn(8, CLASSES, 1, 2, generator=torch.Generator().manual_seed(2))
    mean = (images[:, :, 0, 0].double().sigmoid() + images[:, :, 0, 1].double().sigmoid()) / 2.0
    predicted = make_trainer().predict(MultiLabelTask(Sided(), tta="flip"), DataLoader([{"image": x} for x in images]))
    torch.testing.assert_close(torch.cat(predicted).double(), mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("task", "other"), [(ClassificationTask, "MultiLabel"), (MultiLabelTask, "Classification")])
def test_labels_of_the_other_kind_are_refused(task: Any, other: str, make_trainer: MakeTrainer) -> None:
    data = Counted(make_samples(8))
    data.multi_label = task is ClassificationTask  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=rf"{task.__name__} is not for that: set --model .*tasks.{other}Task$"):
        make_trainer().fit(task(Scores()), datamodule=data)
