import csv
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scalablevit_pl.callbacks.prediction import PredictionTable, PredictionWriter
from torch import Tensor

TEN = [f"class {index}" for index in range(10)]
STRANGE = ["a, b", 'said "no"', "two\nlines", "Ärger ☃", "", " ; "]


def make_batch(indices: list[int], labels: list[int] | None = None) -> dict[str, Any]:
    batch: dict[str, Any] = {"index": torch.tensor(indices), "path": [f"{index}.jpg" for index in indices]}
    return batch if labels is None else batch | {"label": torch.tensor(labels)}


def random_probabilities(count: int, classes: int = 10) -> Tensor:
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(count)).softmax(1)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_row_names_the_most_probable_classes_in_order(tmp_path: Path) -> None:
    probabilities = random_probabilities(7)
    table = PredictionTable(TEN)
    table.add(make_batch(list(range(7)), [3, 1, 4, 1, 5, 9, 2]), probabilities)
    table.save(table.gather(), tmp_path / "predictions.csv")
    rows = read(tmp_path / "predictions.csv")
    assert [row["label"] for row in rows] == [f"class {label}" for label in (3, 1, 4, 1, 5, 9, 2)]
    for row, values in zip(rows, probabilities, strict=True):
        order = sorted(range(10), key=lambda index: -values[index].item())[:5]
        assert [row[f"label_{rank}"] for rank in range(1, 6)] == [TEN[index] for index in order]
        expected = [values[index].item() for index in order]
        assert [float(row[f"probability_{rank}"]) for rank in range(1, 6)] == pytest.approx(expected, abs=5e-7)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.csv"]


def test_rows_are_in_the_order_of_the_images_whatever_the_batches(tmp_path: Path) -> None:
    table = PredictionTable(TEN)
    for indices in ([7, 3], [10], [0, 2]):
        table.add(make_batch(indices), random_probabilities(len(indices)))
    rows = table.gather()
    assert [row["index"] for row in rows] == [0, 2, 3, 7, 10]
    assert [row["path"] for row in rows] == ["0.jpg", "2.jpg", "3.jpg", "7.jpg", "10.jpg"]


def test_an_unknown_label_is_left_empty() -> None:
    table = PredictionTable(TEN)
    table.add(make_batch([0]), random_probabilities(1))
    table.add(make_batch([1], [0]), random_probabilities(1))
    assert [row["label"] for row in table.gather()] == ["", "class 0"]


@pytest.mark.parametrize("classes", [2, 4, 5, 6])
def test_columns_are_five_or_all_classes(classes: int, tmp_path: Path) -> None:
    table = PredictionTable(TEN[:classes])
    table.add(make_batch([0]), random_probabilities(1, classes))
    table.save(table.gather(), tmp_path / "x.csv")
    ranked = [f"{name}_{rank}" for rank in range(1, min(classes, 5) + 1) for name in ("label", "probability")]
    (row,) = read(tmp_path / "x.csv")
    assert list(row) == ["index", "path", "label", *ranked]
    assert all(row[name] for name in ranked)


def test_a_table_without_rows_has_its_header(tmp_path: Path) -> None:
    table = PredictionTable(["cat", "dog"])
    table.save(table.gather(), tmp_path / "x.csv")
    header = "index,path,label,label_1,probability_1,label_2,probability_2"
    assert (tmp_path / "x.csv").read_text().strip() == header


def test_names_and_paths_survive_the_file(tmp_path: Path) -> None:
    table = PredictionTable(STRANGE)
    batch = make_batch(list(range(6)), list(range(6))) | {"path": [f"{name}/1,2.jpg" for name in STRANGE]}
    table.add(batch, torch.eye(6))
    table.save(table.gather(), tmp_path / "x.csv")
    rows = read(tmp_path / "x.csv")
    assert [row["label"] for row in rows] == [row["label_1"] for row in rows] == STRANGE
    assert [row["path"] for row in rows] == batch["path"]


def test_a_failing_write_leaves_the_earlier_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("earlier")
    with pytest.raises(ValueError, match="fields not in fieldnames"):
        PredictionTable(TEN).save([{"unknown": 1}], path)
    assert path.read_text() == "earlier"


def predict(writer: PredictionWriter, rank: int = 0) -> None:
    trainer: Any = SimpleNamespace(
        is_global_zero=rank == 0, datamodule=SimpleNamespace(class_names=["from", "the", "data"])
    )
    module: Any = None
    for batches in ([[5, 4, 3]], [[2, 1], [0]]):  # the second prediction begins anew
        writer.on_predict_start(trainer, module)
        for indices in batches:
            probabilities = torch.eye(3)[[index % 3 for index in indices]]
            writer.on_predict_batch_end(trainer, module, probabilities, make_batch(indices), 0)
        writer.on_predict_end(trainer, module)


@pytest.mark.parametrize("names", [None, ["given", "by", "name"]])
def test_the_writer_takes_names_as_given_or_from_the_data(names: list[str] | None, tmp_path: Path) -> None:
    predict(PredictionWriter(tmp_path / "x.csv", names))
    assert [row["label_1"] for row in read(tmp_path / "x.csv")] == (names or ["from", "the", "data"])


def test_the_writer_writes_to_an_open_file() -> None:
    out = io.StringIO()
    predict(PredictionWriter(out, TEN[:3]))
    assert len(out.getvalue().splitlines()) == 2 * 4


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    predict(PredictionWriter(tmp_path / "x.csv"), rank=1)
    assert list(tmp_path.iterdir()) == []
