from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from PIL import Image

from scalablevit_pl.data import ClassificationDataModule
from scalablevit_pl.data.images import SampleReader, SplitImages
from scalablevit_pl.diagnosis import data


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
