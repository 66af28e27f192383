"""Masks, tables and pictures of a segmenter's report."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_tasks import SCENE, evaluation_scenes
from torch import Tensor

from scalablevit_pl.data.images import collate
from scalablevit_pl.plotting import class_colors
from scalablevit_pl.tasks import segmentation_report
from scalablevit_pl.tasks.metrics.confusion import ConfusionMatrix
from scalablevit_pl.tasks.report import ReportData
from scalablevit_pl.tasks.segmentation_report import SHOWN, SegmentationReport, unique_names

NAMES = ["sky", "=tree", 'a "road"', "Kröte", "car", "sea", "never"]


def make_batch(*indices: int) -> dict[str, Any]:
    scenes = evaluation_scenes(max(indices) + 1)
    return collate([scenes[index] for index in indices])


def predict(batch: dict[str, Any]) -> list[Tensor]:
    """Return the true classes, ignored pixels as class 2, and every fifth row as class 4."""
    found = []
    for mask, (height, width) in zip(batch["mask"], batch["size"].tolist(), strict=True):
        classes = mask[:height, :width].clone()
        classes[classes == 255] = 2
        classes[::5] = 4
        found.append(classes)
    return found


def make_report(samples: int = 3) -> SegmentationReport:
    return SegmentationReport(ReportData(NAMES, samples, SCENE))


def write_masks(out: Path, *batches: tuple[int, ...], pictures: bool = False) -> dict[int, Tensor]:
    report, predicted = make_report(), {}
    report.begin(out, pictures)
    for indices in batches:
        batch = make_batch(*indices)
        del batch["mask"]
        found = predict(make_batch(*indices))
        report.add(batch, found)
        predicted |= dict(zip(indices, found, strict=True))
    report.gather()
    report.write_predictions(out)
    return predicted


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_masks_are_palette_pngs_of_the_original_size(tmp_path: Path) -> None:
    predicted = write_masks(tmp_path / "masks", (2, 0), (1,))
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["0.png", "1.png", "2.png", "shares.csv"]
    assert [path.name for path in tmp_path.iterdir()] == ["masks"]
    for index, classes in predicted.items():
        with Image.open(tmp_path / f"masks/{index}.png") as picture:
            assert picture.mode == "P"
            assert np.array_equal(np.asarray(picture), classes.numpy())
            assert np.array_equal(np.asarray(picture.convert("RGB")), class_colors()[classes.numpy()])


def test_shares_are_the_fractions_of_the_pixels(tmp_path: Path) -> None:
    predicted = write_masks(tmp_path / "masks", (2, 0), (1,))
    rows = read_rows(tmp_path / "masks/shares.csv")
    assert [(row["index"], row["path"], row["mask"]) for row in rows] == [
        (str(index), f"{index}.jpg", f"{index}.png") for index in range(3)
    ]
    for row, index in zip(rows, range(3), strict=True):
        shares = [float(row[name if name != "=tree" else "'=tree"]) for name in NAMES]
        expected = [(predicted[index] == name).double().mean().item() for name in range(len(NAMES))]
        assert shares == pytest.approx(expected, abs=1e-6)
        assert sum(shares) == pytest.approx(1.0, abs=1e-5)


def test_overlays_blend_image_and_colors(tmp_path: Path) -> None:
    predicted = write_masks(tmp_path / "masks", (0, 1), pictures=True)
    for index, classes in predicted.items():
        with Image.open(tmp_path / f"masks/{index}_overlay.jpg") as picture:
            assert picture.size == (classes.shape[1], classes.shape[0])
            overlay = np.asarray(picture).astype(float)
        sample = evaluation_scenes(index + 1)[index]
        height, width = sample["resized"].tolist()
        pixels = SCENE.denormalize(sample["image"])[:, :height, :width].permute(1, 2, 0).numpy()
        image = np.asarray(Image.fromarray(pixels).resize((classes.shape[1], classes.shape[0]), 2)).astype(float)
        assert np.abs(overlay - (image + class_colors()[classes.numpy()]) / 2).mean() < 12.0


def test_masks_look_incomplete_until_they_are_complete(tmp_path: Path) -> None:
    report = make_report()
    report.begin(tmp_path / "masks")
    report.add(make_batch(0), predict(make_batch(0)))
    assert [path.name for path in tmp_path.iterdir()] == [".masks.part"]
    assert [path.name for path in (tmp_path / ".masks.part").iterdir()] == ["0.png"]
    report.discard()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_prediction_does_not_add_to_the_next(tmp_path: Path) -> None:
    report = make_report()
    report.begin(tmp_path / "masks")
    report.add(make_batch(3), predict(make_batch(3)))  # and then its process is killed
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/notes.txt").write_text("kept")
    write_masks(tmp_path / "masks", (0,))
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["0.png", "notes.txt", "shares.csv"]
    assert [path.name for path in tmp_path.iterdir()] == ["masks"]


def test_masks_of_all_processes_are_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make_report(), make_report()
    for report, index in ((first, 0), (second, 1)):
        report.begin(tmp_path / "masks")
        report.add(make_batch(index), predict(make_batch(index)))
    monkeypatch.setattr(segmentation_report, "gather_by_index", lambda rows: rows and {**first.rows, **second.rows})
    first.gather()
    first.write_predictions(tmp_path / "masks")
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["0.png", "1.png", "shares.csv"]


def test_masks_need_a_folder() -> None:
    with pytest.raises(ValueError, match=r"the predictions are masks, .* name a folder for them with --out"):
        make_report().begin(io.StringIO())


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/1.jpg", "b/1.jpg", "2.png"], ["1", "1_2", "2"]),
        (["a/1.jpg", "b/1.jpg", "1_2.jpg", "c/1.png"], ["1", "1_3", "1_2", "1_4"]),
        (["A.jpg", "a.jpg", "a.tar.gz"], ["A", "a_2", "a.tar"]),
        ([], []),
    ],
)
def test_images_of_the_same_name_get_numbers(paths: list[str], names: list[str]) -> None:
    assert unique_names(paths) == names


def test_images_without_a_path_are_named_by_their_index(tmp_path: Path) -> None:
    report, batch = make_report(), make_batch(0, 1)
    report.begin(tmp_path / "masks")
    report.add(batch | {"path": ["", "x/image_0.png"]}, predict(batch))
    report.gather()
    report.write_predictions(tmp_path / "masks")
    assert [row["mask"] for row in read_rows(tmp_path / "masks/shares.csv")] == ["image_0.png", "image_0_2.png"]


def test_a_test_writes_table_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    for name in ("draw_bars", "draw_confusion", "draw_segmentations"):
        monkeypatch.setattr(segmentation_report, name, lambda *given, name=name: drawn.update({name: given}))
    confusion, samples = ConfusionMatrix(len(NAMES)), 20
    report = SegmentationReport(ReportData(NAMES, samples, SCENE), confusion)
    for indices in (range(8), range(8, samples)):
        batch = make_batch(*indices)
        found = predict(batch)
        report.add(batch, found)
        for classes, mask in zip(found, batch["mask"], strict=True):
            confusion.update(classes, mask[: classes.shape[0], : classes.shape[1]])
    report.gather()
    report.write(tmp_path, "a title")
    assert [path.name for path in tmp_path.iterdir()] == ["iou.csv"]
    rows = read_rows(tmp_path / "iou.csv")
    assert [row["class"].removeprefix("'") for row in rows] == NAMES
    assert (rows[6]["iou"], rows[6]["accuracy"], rows[6]["pixels"]) == ("", "", "0")
    matrix = confusion.matrix.numpy()
    for index in range(6):
        hits = matrix[index, index]
        assert float(rows[index]["iou"]) == pytest.approx(
            hits / (matrix[index].sum() + matrix[:, index].sum() - hits), abs=1e-6
        )
        assert float(rows[index]["accuracy"]) == pytest.approx(hits / matrix[index].sum(), abs=1e-6)
        assert int(rows[index]["pixels"]) == matrix[index].sum()
    cells, names, path, title = drawn["draw_confusion"]
    assert (names, path, title) == (NAMES, tmp_path / "confusion.png", "a title")
    assert cells == {(i, j): int(matrix[i, j]) for i in range(7) for j in range(7) if matrix[i, j]}
    images, names, path, _ = drawn["draw_segmentations"]
    assert (names, path) == (NAMES, tmp_path / "predictions.png")
    assert len(images) == 7 <= SHOWN
    for (image, truth, predicted), index in zip(images, range(0, samples, 3), strict=True):
        sample = evaluation_scenes(index + 1)[index]
        assert image.shape == (*sample["resized"].tolist(), 3)
        assert np.array_equal(truth, sample["mask"].numpy())
        assert np.array_equal(predicted, predict(collate([sample]))[0].numpy())


def test_large_images_are_shown_small() -> None:
    report = SegmentationReport(ReportData(NAMES, 1, SCENE), ConfusionMatrix(7))
    batch = make_batch(0) | {"mask": torch.zeros(1, 900, 1300, dtype=torch.uint8)}
    report.add(batch, [torch.zeros(900, 1300, dtype=torch.uint8)])
    assert [tuple(part.shape) for part in report.images[0][1:]] == [(180, 260)] * 2
