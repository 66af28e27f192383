"""The table of predictions, the confusion matrix and the pictures of a classifier's report."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from scalablevit_pl.preprocessing import Preprocessing
from scalablevit_pl.tasks import classification_report
from scalablevit_pl.tasks.classification_report import SHOWN, ClassificationReport
from scalablevit_pl.tasks.report import ReportData, gather_by_index

TEN = [f"class {index}" for index in range(10)]
STRANGE = ["a, b", 'said "no"', "two\nlines", "Ärger ☃", "", " ; "]


def make_report(names: list[str], samples: int = 10, predict: bool = True) -> ClassificationReport:
    return ClassificationReport(ReportData(names, samples, Preprocessing(4)), predict)


def make_batch(indices: list[int], labels: list[int] | None = None) -> dict[str, Any]:
    batch: dict[str, Any] = {"index": torch.tensor(indices), "path": [f"{index}.jpg" for index in indices]}
    return batch if labels is None else batch | {"label": torch.tensor(labels)}


def test_several_labels_are_a_list_in_json() -> None:
    report = make_report(STRANGE)
    batch = make_batch([0, 1]) | {"label": torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 0.0], [0.0] * 6])}
    report.add(batch, random_probabilities(2, 6))
    assert [json.loads(row["label"]) for row in table(report)] == [[STRANGE[1], STRANGE[3]], []]


def random_probabilities(count: int, classes: int = 10) -> Tensor:
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(count)).softmax(1)


def table(report: ClassificationReport) -> list[dict[str, str]]:
    out = io.StringIO()
    report.gather()
    report.write_predictions(out)
    return list(csv.DictReader(io.StringIO(out.getvalue(), newline="")))


def test_a_row_names_the_most_probable_classes_in_order() -> None:
    probabilities, report = random_probabilities(7), make_report(TEN)
    report.add(make_batch(list(range(7)), [3, 1, 4, 1, 5, 9, 2]), probabilities)
    rows = table(report)
    assert [row["label"] for row in rows] == [f"class {label}" for label in (3, 1, 4, 1, 5, 9, 2)]
    for row, values in zip(rows, probabilities, strict=True):
        order = sorted(range(10), key=lambda index: -values[index].item())[:5]
        assert [row[f"label_{rank}"] for rank in range(1, 6)] == [TEN[index] for index in order]
        expected = [values[index].item() for index in order]
        assert [float(row[f"probability_{rank}"]) for rank in range(1, 6)] == pytest.approx(expected, abs=5e-7)


def test_rows_are_in_the_order_of_the_images_whatever_the_batches() -> None:
    report = make_report(TEN)
    for indices in ([7, 3], [10], [0, 2]):
        report.add(make_batch(indices), random_probabilities(len(indices)))
    rows = table(report)
    assert [row["index"] for row in rows] == ["0", "2", "3", "7", "10"]
    assert [row["path"] for row in rows] == ["0.jpg", "2.jpg", "3.jpg", "7.jpg", "10.jpg"]


def test_an_unknown_label_is_left_empty() -> None:
    report = make_report(TEN)
    report.add(make_batch([0]), random_probabilities(1))
    report.add(make_batch([1], [0]), random_probabilities(1))
    assert [row["label"] for row in table(report)] == ["", "class 0"]


@pytest.mark.parametrize("classes", [2, 4, 5, 6])
def test_columns_are_five_or_all_classes(classes: int) -> None:
    report = make_report(TEN[:classes])
    report.add(make_batch([0]), random_probabilities(1, classes))
    ranked = [f"{name}_{rank}" for rank in range(1, min(classes, 5) + 1) for name in ("label", "probability")]
    (row,) = table(report)
    assert list(row) == ["index", "path", "label", *ranked]
    assert all(row[name] for name in ranked)


def test_a_table_without_rows_has_its_header(tmp_path: Path) -> None:
    report = make_report(["cat", "dog"])
    report.gather()
    report.write_predictions(tmp_path / "x.csv")
    header = "index,path,label,label_1,probability_1,label_2,probability_2"
    assert (tmp_path / "x.csv").read_text().strip() == header


def test_names_and_paths_survive_the_file(tmp_path: Path) -> None:
    report = make_report(STRANGE)
    batch = make_batch(list(range(6)), list(range(6))) | {"path": [f"{name}/1,2.jpg" for name in STRANGE]}
    report.add(batch, torch.eye(6))
    for out in (tmp_path, tmp_path / "x.csv"):  # a folder, in which the report names the file, or a path
        report.write_predictions(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions.csv", "x.csv"]
    assert (tmp_path / "x.csv").read_bytes() == (tmp_path / "predictions.csv").read_bytes()
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == [row["label_1"] for row in rows] == STRANGE
    assert [row["path"] for row in rows] == batch["path"]


def test_formulas_are_quoted_and_odd_file_names_are_escaped(tmp_path: Path) -> None:
    names = ["=1+1", "-1"]
    report = make_report(names)
    report.add(make_batch([0, 1], [0, 1]) | {"path": ["@x.jpg", "\udcff.jpg"]}, torch.eye(2))
    report.write_predictions(tmp_path / "x.csv")
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == ["'@x.jpg", r"\udcff.jpg"]
    assert [row["label"] for row in rows] == ["'=1+1", "'-1"]
    assert [row["label_1"].removeprefix("'") for row in rows] == names


@pytest.mark.parametrize("channels", [1, 4])
def test_pictures_show_images_of_any_channels(channels: int, tmp_path: Path) -> None:
    preprocessing = Preprocessing(4, mean=(0.5,) * channels, std=(0.5,) * channels)
    report = ClassificationReport(ReportData(["cat", "dog"], 1, preprocessing), predict=False)
    pixels = torch.arange(channels * 16, dtype=torch.uint8).view(1, channels, 4, 4)
    report.add(make_batch([0], [1]) | {"image": preprocessing.normalize(pixels)}, torch.tensor([[0.25, 0.75]]))
    shown = torch.cat([pixels[0]] * 3)[:3]
    assert torch.equal(report.images[0], shown.permute(1, 2, 0))


def test_a_failing_write_leaves_the_earlier_file_alone(tmp_path: Path) -> None:
    path, report = tmp_path / "x.csv", make_report(TEN)
    path.write_text("earlier")
    report.rows = {0: {"unknown": 1}}
    with pytest.raises(ValueError, match="fields not in fieldnames"):
        report.write_predictions(path)
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_items_of_all_processes_are_merged_by_index(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gather_by_index({3: "d", 1: "b"}) == {1: "b", 3: "d"}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    def gather(found: list[Any], own: dict[int, str]) -> None:
        found[:] = [own, {2: "c", 0: "a"}]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    merged = gather_by_index({3: "d", 1: "b"})
    assert list(merged.items()) == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]


def test_a_confusion_takes_no_memory_for_pairs_that_do_not_occur(tmp_path: Path) -> None:
    report = make_report([str(index) for index in range(10**5)], predict=False)
    images = torch.zeros(2, 3, 4, 4)
    report.add(make_batch([0, 1], [0, 99_999]) | {"image": images}, torch.eye(2, 10**5))
    report.gather()
    report.write(tmp_path, "a title")  # a matrix would have 10¹⁰ cells
    assert (tmp_path / "confusion.png").is_file()


def test_a_test_writes_table_confusion_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, tuple[Any, ...]] = {}
    for name in ("draw_confusion", "draw_predictions"):
        monkeypatch.setattr(classification_report, name, lambda *given, name=name: drawn.update({name: given}))
    report, count = make_report(["cat", "dog"], samples=100, predict=False), 100
    probabilities = torch.tensor([[0.75, 0.25], [0.25, 0.75]])[torch.arange(count) % 3 % 2]
    labels = [index % 2 for index in range(count)]
    for part in torch.arange(count).flip(0).split(7):
        images = report.data.preprocessing.normalize(part[:, None, None, None].to(torch.uint8).expand(-1, 3, 4, 4))
        batch = make_batch(part.tolist(), [labels[index] for index in part]) | {"image": images}
        report.add(batch, probabilities[part])
    report.gather()
    report.write(tmp_path, "a title")

    pairs, names, path, title = drawn["draw_confusion"]
    answers = probabilities.argmax(1).tolist()
    expected = multiclass_confusion_matrix(torch.tensor(answers), torch.tensor(labels), 2).numpy()
    assert (pairs, names) == ({pair: count for pair, count in np.ndenumerate(expected) if count}, ["cat", "dog"])
    assert (path, title) == (tmp_path / "confusion.png", "a title")

    images, shown_labels, shown_answers, shares, path, title = drawn["draw_predictions"]
    shown = list(range(0, count, 3))
    assert len(shown) <= SHOWN
    assert [image[0, 0].tolist() for image in images] == [[index] * 3 for index in shown]
    assert shown_labels == [["cat", "dog"][labels[index]] for index in shown]
    assert shown_answers == [["cat", "dog"][answers[index]] for index in shown]
    assert shares == [0.75] * len(shown)
    assert (path, title) == (tmp_path / "predictions.png", "a title")
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 1 + count
