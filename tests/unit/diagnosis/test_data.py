from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from mask_data import draw_pair, write_pairs
from PIL import Image

from scalablevit_pl.data import ClassificationDataModule, SegmentationDataModule
from scalablevit_pl.data.images import SampleReader, SplitImages
from scalablevit_pl.diagnosis import data
from scalablevit_pl.diagnosis.finding import Finding


def test_files_that_are_left_out_are_a_warning(tmp_path: Path) -> None:
    for name in ("train/cat/1", "train/dog/2", "val/cat/3"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / f"{name}.png")
    (tmp_path / "val/cat/4.heic").write_text("no image")
    examination = data.DataExamination(ClassificationDataModule(str(tmp_path)), SimpleNamespace(download=False))
    splits, files = examination.check_splits(1)
    assert (splits.status, splits.text) == ("ok", "images: train 2, val 1")
    assert (files.status, files.text) == ("warn", "left out: 1 .heic")


@pytest.mark.parametrize(
    ("length", "count", "sample"), [(10, 4, [0, 3, 6, 9]), (3, 4, [0, 1, 2]), (5, 1, [0]), (0, 2, [])]
)
def test_a_sample_is_spread_over_all_images(length: int, count: int, sample: list[int]) -> None:
    rows = datasets.Dataset.from_dict({"image": [b"no image"] * length})
    images = SplitImages(rows, SampleReader("train", "image", lambda image, target: {}), range(100, 100 + length))
    images.row = lambda index: read.append(index - 100) or {"image": b"no image"}  # type: ignore[func-returns-value]
    read = list[int]()
    data.check_images("train", images, count)
    assert read == sample


def test_a_class_without_images_is_a_warning() -> None:
    finding = data.check_histogram("val", [0, 0, 2], ["cat", "dog", "owl"])
    assert (finding.status, finding.text) == ("warn", "1 of 3 classes have no images: dog")
    assert "raise --data.val_fraction" in finding.remedy
    assert "val_fraction" not in data.check_histogram("train", [0, 0, 2], ["cat", "dog", "owl"]).remedy
    finding = data.check_histogram("val", [0, 0, 2, 1], ["cat", "dog", "owl"])
    assert (finding.status, finding.text) == ("ok", "1 to 2 images in each of the 3 classes")


def examine_masks(folder: Path, images: int = 9, **arguments: Any) -> list[Finding]:
    datamodule = SegmentationDataModule(str(folder), class_names=["sky", "ground", "sea"], num_workers=0, **arguments)
    examination = data.DataExamination(datamodule, SimpleNamespace(download=False, images=images))
    return [*examination.check_splits(1), *examination.check_classes(), *examination.check_images()]


def test_the_classes_of_masks_are_counted(tmp_path: Path) -> None:
    pairs = [(f"images/{n}.png", f"masks/{n}.png") for n in range(6)]
    write_pairs(tmp_path / "train", pairs)
    write_pairs(tmp_path / "val", pairs[:2], classes=2)
    findings = examine_masks(tmp_path)
    assert [(finding.status, finding.what) for finding in findings] == [
        *[("ok", "splits"), ("ok", "classes"), ("ok", "train images"), ("ok", "train targets")],
        *[("ok", "val images"), ("warn", "val targets"), ("ok", "val targets")],
    ]
    counts = np.bincount(np.concatenate([np.asarray(draw_pair(n)[1]).ravel() for n in range(6)]))
    shares = sorted(zip(counts / counts.sum(), ["sky", "ground", "sea"], strict=True), reverse=True)
    assert findings[3].text == f"shares of the classes: {', '.join(f'{name} {share:.1%}' for share, name in shares)}"
    assert findings[5].text == "1 of 3 classes are in none of 2 images: sea"


def test_masks_that_ignore_all_and_wrong_masks_are_counted(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_pairs(tmp_path / split, [(f"images/{n}.png", f"masks/{n}.png") for n in range(6)])
    Image.new("L", (9, 9)).save(tmp_path / "val/masks/1.png")
    (tmp_path / "val/masks/4.png").write_bytes(b"no image")
    for number in (0, 2):
        path = tmp_path / f"train/masks/{number}.png"
        Image.new("L", Image.open(path).size, 255).save(path)
    findings = [finding for finding in examine_masks(tmp_path) if "targets" in finding.what]
    assert [finding.status for finding in findings] == ["warn", "ok", "FAIL", "ok"]
    assert findings[0].text == "2 of 6 ignore the whole image"
    assert "2 of 6 are wrong, the first: " in findings[2].text
    assert "val/masks/1.png is a mask of 9×9 pixels for an image of 35×23" in findings[2].text
    assert findings[2].remedy == "store both in the same size"
