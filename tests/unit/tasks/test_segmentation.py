"""Loss and metrics of segmentation against loops over the images."""

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from small_tasks import (
    CLASSES,
    QUIET,
    STILL,
    Coarse,
    Samples,
    Scores,
    evaluation_scenes,
    training_scenes,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from scalablevit_pl.data.images import collate
from scalablevit_pl.tasks import TASKS, ReportData, SegmentationTask
from scalablevit_pl.tasks.losses import DiceLoss, FocalLoss

IGNORED = 255
MakeTrainer = Callable[..., pl.Trainer]


def loader(samples: Samples, batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(samples, batch_size, collate_fn=lambda batch: collate([dict(sample) for sample in batch]))


def resize(maps: Tensor, size: Any) -> Tensor:
    return functional.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


def predicted_logits(network: nn.Module, sample: dict[str, Any]) -> Tensor:
    """Run a network on an image alone and resize as the papers do."""
    (height, width), image = sample["resized"].tolist(), sample["image"][None]
    assert image.shape[-2:] == tuple(sample["padded"])
    return resize(resize(network(image), image.shape[-2:])[:, :, :height, :width], sample["size"].tolist())


def expected_metrics(samples: Samples, network: nn.Module) -> dict[str, Any]:
    """Loop over images and classes."""
    guesses, truths, losses = [], [], []
    for sample in samples:
        logits = predicted_logits(network, sample)
        truth = sample["mask"].long()[None]
        loss = functional.cross_entropy(logits, truth, ignore_index=IGNORED, reduction="none")
        losses.append(loss[truth != IGNORED].double())
        guesses.append(logits.argmax(1)[truth != IGNORED])
        truths.append(truth[truth != IGNORED])
    guess, truth = torch.cat(guesses), torch.cat(truths)
    ious, accuracies = [], []
    for name in range(CLASSES):
        hits = ((guess == name) & (truth == name)).sum().item()
        union = ((guess == name) | (truth == name)).sum().item()
        ious += [hits / union] if union else []
        accuracies += [hits / (truth == name).sum().item()] if (truth == name).any() else []
    assert len(accuracies) < CLASSES == len(ious)
    return {
        "miou": pytest.approx(sum(ious) / len(ious), rel=1e-12),
        "macc": pytest.approx(sum(accuracies) / len(accuracies), rel=1e-12),
        "aacc": pytest.approx((guess == truth).double().mean().item(), rel=1e-12),
        "pixels": len(truth),
        "loss": pytest.approx(torch.cat(losses).mean().item(), rel=1e-6),
        "samples": len(samples),
    }


def validate(task: SegmentationTask, trainer: pl.Trainer, data: DataLoader[Any]) -> dict[str, float]:
    trainer.validate(task, data)
    return {name.removeprefix("val/"): value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_an_evaluation_is_a_loop_over_images_of_any_size(batch_size: int, make_trainer: MakeTrainer) -> None:
    samples, network = evaluation_scenes(9), Coarse()
    data = loader(samples, batch_size)
    found = validate(SegmentationTask(network), make_trainer(), data)
    with torch.no_grad():
        assert found == expected_metrics(samples, network)


def test_the_padding_of_a_batch_changes_nothing(make_trainer: MakeTrainer) -> None:
    batch = next(iter(loader(evaluation_scenes(6), 6)))
    assert len({tuple(sides) for sides in batch["padded"].tolist()}) > 2
    task = SegmentationTask(Coarse()).eval()
    before = task.compute(task.network, batch)
    for position, (height, width) in enumerate(batch["padded"].tolist()):
        batch["image"][position, :, height:] = torch.nan
        batch["image"][position, :, :, width:] = torch.nan
    for result, other, sample in zip(before, task.compute(task.network, batch), evaluation_scenes(6), strict=True):
        assert torch.equal(result.classes, other.classes)
        assert result.loss == other.loss
        assert result.classes.shape == sample["mask"].shape


def test_predictions_are_class_maps_of_the_original_size(make_trainer: MakeTrainer) -> None:
    samples, network = evaluation_scenes(5), Coarse()
    unmasked = [{name: value for name, value in sample.items() if name != "mask"} for sample in samples]
    predictions = make_trainer().predict(SegmentationTask(network), loader(unmasked, 3))
    found = [classes for batch in predictions for classes in batch]
    assert [classes.dtype for classes in found] == [torch.uint8] * 5
    for classes, sample in zip(found, samples, strict=True):
        with torch.no_grad():
            assert torch.equal(classes.long(), predicted_logits(network, sample)[0].argmax(0))


@pytest.mark.parametrize("options", [{"tta": "flip"}, {"window": 16}, {"window": 24, "stride": 5, "tta": "flip"}])
def test_windows_and_mirror_images_do_not_depend_on_the_batch(
    options: dict[str, Any], make_trainer: MakeTrainer
) -> None:
    samples = evaluation_scenes(5)
    results = [
        validate(SegmentationTask(Coarse(), **options), make_trainer(), loader(samples, size)) for size in (1, 5)
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-9)
    plain = validate(SegmentationTask(Coarse()), make_trainer(), loader(samples))
    assert plain["aacc"] != results[0]["aacc"]


@pytest.mark.parametrize("weight", [0.4, 0.0, 2.5])
def test_the_auxiliary_head_adds_to_the_loss_in_training_alone(weight: float, make_trainer: MakeTrainer) -> None:
    samples, network = training_scenes(4), Coarse(auxiliary=True)
    batch = collate([dict(sample) for sample in samples])
    with torch.no_grad():
        losses = [
            functional.cross_entropy(resize(part(batch["image"]), (32, 32)), batch["mask"].long(), ignore_index=IGNORED)
            for part in (network, network.auxiliary)
        ]
    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(SegmentationTask(network, auxiliary_weight=weight, **STILL), loader(samples))
    expected = (losses[0] + weight * losses[1]).item()
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(expected, rel=1e-5)
    evaluated = validate(SegmentationTask(network), make_trainer(), loader(evaluation_scenes(3)))
    plain = validate(SegmentationTask(Coarse()), make_trainer(), loader(evaluation_scenes(3)))
    assert evaluated == plain


def test_training_counts_the_pixels_of_an_epoch(make_trainer: MakeTrainer) -> None:
    samples, network = training_scenes(8), Coarse()
    trainer = make_trainer(max_epochs=2, limit_val_batches=0)
    trainer.fit(SegmentationTask(network, **STILL), loader(samples))
    batch = collate([dict(sample) for sample in samples])
    with torch.no_grad():
        guess = resize(network(batch["image"]), (32, 32)).argmax(1)
    counted = batch["mask"] != IGNORED
    assert trainer.callback_metrics["train/pixels"] == counted.sum()
    accuracy = (guess == batch["mask"])[counted].double().mean().item()
    assert trainer.callback_metrics["train/aacc"].item() == pytest.approx(accuracy, rel=1e-12)
    assert {"train/miou", "train/macc"} <= set(trainer.callback_metrics)


@pytest.mark.parametrize("loss", [None, DiceLoss(), FocalLoss(), nn.CrossEntropyLoss(ignore_index=IGNORED)])
def test_images_that_are_all_ignored_cause_no_nan(loss: nn.Module | None, make_trainer: MakeTrainer) -> None:
    samples = [*training_scenes(3), training_scenes(1)[0] | {"mask": torch.full((32, 32), IGNORED, dtype=torch.uint8)}]
    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(SegmentationTask(Coarse(), loss=loss, **STILL), loader(samples, 4))
    assert math.isfinite(trainer.callback_metrics["train/loss"])
    ignored = [sample | {"mask": torch.full_like(sample["mask"], IGNORED)} for sample in evaluation_scenes(2)]
    both = validate(SegmentationTask(Coarse()), make_trainer(), loader([*evaluation_scenes(3), *ignored], 2))
    alone = validate(SegmentationTask(Coarse()), make_trainer(), loader(evaluation_scenes(3), 2))
    assert (both.pop("samples"), alone.pop("samples")) == (5, 3)
    assert both == pytest.approx(alone, rel=1e-9)


def test_a_batch_that_is_all_ignored_trains_to_zero_loss(make_trainer: MakeTrainer) -> None:
    samples = [{**sample, "mask": torch.full((32, 32), IGNORED, dtype=torch.uint8)} for sample in training_scenes(2)]
    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(SegmentationTask(Coarse(auxiliary=True)), loader(samples, 2))
    assert trainer.callback_metrics["train/loss"] == 0.0


def test_class_weights_are_factors_on_the_loss_of_each_class(make_trainer: MakeTrainer) -> None:
    samples, network, weights = training_scenes(4), Coarse(), [float(index) for index in range(CLASSES)]
    batch = collate([dict(sample) for sample in samples])
    with torch.no_grad():
        logits = resize(network(batch["image"]), (32, 32))
    options: Any = {"ignore_index": IGNORED}
    expected = functional.cross_entropy(logits, batch["mask"].long(), torch.tensor(weights), **options)
    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(SegmentationTask(network, class_weights=weights, **STILL), loader(samples))
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss": nn.CrossEntropyLoss(), "class_weights": [1.0] * CLASSES},
            "loss=CrossEntropyLoss excludes class_weights",
        ),
        ({"loss": nn.PReLU()}, "loss=PReLU excludes class_weights and cannot have parameters"),
        ({"class_weights": [1.0, 2.0]}, "class_weights must be 7 numbers that are not negative"),
        ({"class_weights": [-1.0] * CLASSES}, "class_weights must be 7 numbers that are not negative"),
        ({"class_weights": [math.nan] * CLASSES}, "class_weights must be 7 numbers that are not negative"),
        ({"auxiliary_weight": -0.4}, "auxiliary_weight must not be negative, got -0.4"),
        ({"stride": 3}, "stride must be from 1 to the window, got a stride of 3 and a window of None"),
        ({"window": 16, "stride": 17}, "stride must be from 1 to the window, got a stride of 17 and a window of 16"),
        ({"window": 0}, "stride must be from 1 to the window, got a stride of None and a window of 0"),
        ({"tta": "mirror"}, "tta must be flip or multiscale, got 'mirror'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationTask(Coarse(), **options)


@pytest.mark.parametrize("classes", [1, 256, None])
def test_networks_of_too_few_or_many_classes_are_named(classes: int | None) -> None:
    network = Scores(3)
    network.num_classes = classes
    with pytest.raises(ValueError, match=f"Scores has num_classes={classes}: use a segmenter of 2 to 255 classes"):
        SegmentationTask(network)


def test_a_loss_that_rejects_masks_is_named(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(limit_val_batches=0)
    message = r"CrossEntropyLoss rejects logits \(4, 7, 32, 32\) with targets \(4, 32, 32\)"
    with pytest.raises(ValueError, match=message):
        trainer.fit(SegmentationTask(Coarse(), loss=nn.CrossEntropyLoss()), loader(training_scenes(4)))


def test_the_default_stride_is_two_thirds_of_the_window() -> None:
    assert [SegmentationTask(Coarse(), window=window).stride for window in (512, 3, 1)] == [341, 2, 1]
    assert SegmentationTask(Coarse(), window=512, stride=512).stride == 512


def test_the_task_is_that_of_segmenters_and_reports_the_counted_network() -> None:
    assert TASKS["semantic-segmentation"] is SegmentationTask
    task = SegmentationTask(Coarse())
    task.trainer = pl.Trainer(**QUIET)
    task.setup("test")
    task.add_network("ema", Coarse(), reported=True)
    data = ReportData(["a"], 1, None)
    assert task.report(data).confusion is task.evaluations["test_ema"]["confusion"]
    assert task.report(data, predict=True).confusion is None


def test_training_resumes_within_an_epoch_with_its_counts(make_trainer: MakeTrainer) -> None:
    samples = training_scenes(6)
    whole = make_trainer(limit_val_batches=0)
    whole.fit(SegmentationTask(Coarse(), **STILL), loader(samples, 1))
    first, second = SegmentationTask(Coarse(), **STILL), SegmentationTask(Coarse(), **STILL)
    make_trainer(limit_val_batches=0).fit(first, loader(samples[:4], 1))
    for task, part in ((first, samples[:4]), (second, samples[4:])):
        task.trainer = whole
        task.setup("fit")
        for batch in loader(part, 1):
            task.update(task.averages, task.train().compute(task.network, batch), batch)
        if task is first:
            checkpoint: dict[str, Any] = {}
            task.on_save_checkpoint(checkpoint)
            second.trainer = whole
            second.setup("fit")
            second.on_load_checkpoint(checkpoint)
    found = second.averages["confusion"].compute()
    assert {f"train/{name}": value.item() for name, value in found.items()} == {
        name: value.item() for name, value in whole.callback_metrics.items() if name.removeprefix("train/") in found
    }


def test_the_forward_with_an_auxiliary_head_is_compiled(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: None)
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(SegmentationTask(Coarse(auxiliary=True), compile=True), loader(training_scenes(4)))
    assert compiled == [{"dynamic": False}]
