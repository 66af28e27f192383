import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lightning.pytorch as pl
import pytest
import torch
from loading_data import make_scenes
from segmentation_data import SegmentationDataModule
from torch import nn
from torch.nn import functional as F

import scalablevit_pl.data
from scalablevit_pl.data import SegmentationAugmentation
from scalablevit_pl.diagnosis.examination import Examination
from scalablevit_pl.diagnosis.finding import Finding


class Segmentation(pl.LightningModule):
    """A task that knows masks and no labels."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Conv2d(3, 2, 1)
        self.num_classes = 2
        self.shapes: set[tuple[int, ...]] = set()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.shapes.add(tuple(batch["image"].shape))
        return F.cross_entropy(self.network(batch["image"]), batch["mask"], ignore_index=255)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.network.parameters(), lr=0.0)


def examine(**parts: Any) -> Examination:
    classes = {"classes_open": False, "classes_option": ""}
    fit = SimpleNamespace(config=SimpleNamespace(), build_parts=lambda: (parts, {}), **classes)
    options = SimpleNamespace(images=2, seconds=0.05, download=False, traceback=False)
    return Examination(fit, SimpleNamespace(record=None), options)


@pytest.fixture
def scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SegmentationDataModule:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "scenes").mkdir()
    folder = make_scenes(tmp_path / "scenes")
    return SegmentationDataModule(str(folder), classes=["no", "yes"], batch_size=4, num_workers=0)


def test_data_without_labels_is_examined_and_timed_on_a_real_batch(scenes: SegmentationDataModule) -> None:
    task = Segmentation()
    examination = examine(model=task, data=scenes)
    data = examination.data
    check_splits = partial(data.check_splits, 1)
    checks = (check_splits, examination.compare_classes, data.check_classes, data.check_test_split, data.check_images)
    findings = [finding for check in checks for finding in check()]
    assert {finding.status for finding in findings} == {"ok"}
    assert [finding.what for finding in findings] == [
        *("splits", "classes", "test data"),
        *("train images", "val images", "test images"),
    ]
    assert not [*examination.load_batch()]
    assert examination.batch is not None
    size = examination.batch["image"].shape[2:]
    assert examination.batch["mask"].shape == (4, *size)
    [step] = examination.check_step()
    assert (step.status, step.what) == ("ok", "training step")
    assert task.shapes <= {(2, 3, *size), (4, 3, *size)}
    [loader] = examination.check_loader()
    assert "times the training step's" in loader.text


def test_without_data_a_batch_of_masks_is_not_timed(scenes: SegmentationDataModule) -> None:
    examination = examine(model=Segmentation(), data=scenes)
    assert not [*examination.load_batch(), *examination.check_step(), *examination.check_loader()]
    [plan] = examination.check_plan()
    assert (plan.status, plan.remedy) == ("warn", "fix the problems above")


def test_exceptions_and_warnings_of_a_check_become_findings(capsys: pytest.CaptureFixture[str]) -> None:
    def check() -> Iterator[Finding]:
        logging.getLogger("scalablevit_pl.somewhere").warning("this is odd: change it")
        yield Finding("ok", "part", "well")
        raise KeyError("bug")

    examination = examine()
    expected = [
        Finding("ok", "part", "well"),
        Finding("FAIL", "part", "KeyError: 'bug'", "see its origin with --traceback"),
        Finding("warn", "part", "this is odd", "change it"),
    ]
    assert [*examination.run_check("part", check)] == expected
    assert capsys.readouterr().err == ""
    examination.options.traceback = True
    assert [*examination.run_check("part", check)] == expected
    assert 'raise KeyError("bug")' in capsys.readouterr().err


def test_a_batch_of_masks_is_made_up_without_data() -> None:
    augmentation = SegmentationAugmentation(crop_size=16)
    masks = scalablevit_pl.data.SegmentationDataModule("missing", augmentation=augmentation, batch_size=3)
    examination = examine(model=Segmentation(), data=masks)
    list(examination.load_batch())
    assert examination.batch is not None
    assert {name: tuple(examination.batch[name].shape) for name in ("image", "mask")} == {
        "image": (3, 3, 16, 16),
        "mask": (3, 16, 16),
    }
