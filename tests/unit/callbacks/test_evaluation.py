import io
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import pytest
import torch

from scalablevit_pl.callbacks.evaluation import EvaluationReport, PredictionWriter, check_count, table
from scalablevit_pl.preprocessing import Preprocessing
from scalablevit_pl.tasks import MetricInfo, Report, ReportData

METRICS = {"test/iou": 0.5, "test/samples": 3.0, "test_ema/iou": 0.75, "val/iou": 0.25, "val/samples": 3.0, "x": 1.0}


class Notes(Report):
    """A report that writes what it was given."""

    def __init__(self, data: ReportData, predict: bool) -> None:
        super().__init__(data)
        self.predict, self.rows, self.gathered = predict, list[Any](), False

    def add(self, batch: dict[str, Any], predictions: Any) -> None:
        self.rows.append((batch["index"].tolist(), predictions))

    def gather(self) -> None:
        self.gathered = True

    def write(self, folder: Path, title: str) -> None:
        assert self.gathered
        (folder / "notes.json").write_text(json.dumps([title, self.rows]))

    def write_predictions(self, out: Path | TextIO) -> None:
        text = json.dumps([self.data.class_names, self.rows])
        out.write_text(text) if isinstance(out, Path) else out.write(text)


def make_task(reported: str | None = None) -> Any:
    return SimpleNamespace(
        report=lambda data, predict=False: Notes(data, predict),
        reported=reported,
        tta="flip",
        monitor="iou",
        described={"iou": MetricInfo("mean IoU", "mean_iou")},
        device="cpu",
    )


def make_trainer(rank: int = 0, samples: int = 3, **values: Any) -> Any:
    images = type("Images", (list,), {"split": "validation"})(range(samples))
    datamodule = SimpleNamespace(
        images=dict.fromkeys(("val", "test", "predict"), images),
        class_names=["from", "the", "data"],
        preprocessing=Preprocessing(),
        dataset="lab/data",
        commit="abc",
        revision="main",
        max_unreadable=0,
    )
    given = {"limit_test_batches": 1.0, "limit_val_batches": 1.0, "world_size": 1, "is_global_zero": rank == 0}
    given |= {"callback_metrics": {name: torch.tensor(value) for name, value in METRICS.items()}}
    return SimpleNamespace(datamodule=datamodule, state=SimpleNamespace(fn="validate"), **given | values)


def evaluate(callback: Any, trainer: Any, task: Any) -> None:
    kind = "test" if isinstance(callback, EvaluationReport) else "predict"
    getattr(callback, f"on_{kind}_start")(trainer, task)
    for indices, outputs in (([0, -1, 1], [5, 6]), ([-1], None), ([2], [7])):
        getattr(callback, f"on_{kind}_batch_end")(trainer, task, outputs, {"index": torch.tensor(indices)}, 0)
    if kind == "test":
        callback.on_test_epoch_end(trainer, task)
    getattr(callback, f"on_{kind}_end")(trainer, task)


@pytest.mark.parametrize(("reported", "score"), [(None, "0.5000"), ("ema", "0.7500")])
def test_a_test_leaves_the_task_s_report_and_its_metrics(reported: str | None, score: str, tmp_path: Path) -> None:
    evaluate(EvaluationReport(tmp_path, {"checkpoint": "a.ckpt"}), make_trainer(), make_task(reported))
    title, rows = json.loads((tmp_path / "notes.json").read_text())
    assert title == f"{tmp_path.name}: mean IoU {score} on 3 images of split 'validation'"
    assert rows == [[[0, 1], [5, 6]], [[2], [7]]]  # without fillers
    assert json.loads((tmp_path / "test.json").read_text()) == {
        "test/iou": 0.5,
        "test/samples": 3.0,
        "test_ema/iou": 0.75,
        "average": reported or "none",
        "tta": "flip",
        "checkpoint": "a.ckpt",
        "dataset": "lab/data",
        "revision": "abc",
        "split": "validation",
        "split_samples": 3,
        "preprocessing": Preprocessing().to_dict(),
        "processes": 1,
    }


def test_a_test_with_windows_states_their_size(tmp_path: Path) -> None:
    task = make_task()
    task.window, task.stride = 512, 341
    evaluate(EvaluationReport(tmp_path, {}), make_trainer(), task)
    record = json.loads((tmp_path / "test.json").read_text())
    assert (record["window"], record["stride"]) == (512, 341)


def test_a_validation_leaves_its_metrics_and_that_of_a_fit_nothing(tmp_path: Path) -> None:
    callback = EvaluationReport(tmp_path, {})
    fitting = make_trainer()
    fitting.state.fn = "fit"
    callback.on_validation_end(fitting, make_task())
    assert list(tmp_path.iterdir()) == []
    callback.on_validation_end(make_trainer(), make_task())
    record = json.loads((tmp_path / "val.json").read_text())
    assert (record["val/iou"], record["split_samples"], "average" in record) == (0.25, 3, False)
    assert record["tta"] == "flip"


@pytest.mark.parametrize("make", [lambda folder: EvaluationReport(folder, {}), lambda f: PredictionWriter(f / "x")])
def test_only_the_first_process_writes(make: Any, tmp_path: Path) -> None:
    evaluate(make(tmp_path), make_trainer(rank=1), make_task())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [None, ReportData(["given", "by", "name"], 3, None)])
def test_the_writer_uses_the_given_data_or_the_datamodule_s(given: ReportData | None, tmp_path: Path) -> None:
    writer = PredictionWriter(tmp_path / "x.json", given)
    for _ in range(2):  # the second prediction begins again
        evaluate(writer, make_trainer(), make_task())
        names, rows = json.loads((tmp_path / "x.json").read_text())
        assert names == (["from", "the", "data"] if given is None else ["given", "by", "name"])
        assert rows == [[[0, 1], [5, 6]], [[2], [7]]]
    assert writer.report.predict


def predict_batches(writer: PredictionWriter, *batches: tuple[list[int], list[str], Any]) -> None:
    trainer, task = make_trainer(), make_task()
    writer.on_predict_start(trainer, task)
    for indices, unreadable, outputs in batches:
        batch = {"index": torch.tensor(indices), "unreadable": unreadable}
        writer.on_predict_batch_end(trainer, task, outputs, batch, 0)
    writer.on_predict_end(trainer, task)


def test_the_writer_lists_unreadable_images_and_writes_the_others() -> None:
    out = io.StringIO()
    writer = PredictionWriter(out)
    predict_batches(writer, ([0, -1], ["", "cannot read b"], [5]), ([-1], ["cannot read c"], None))
    assert writer.unreadable == ["cannot read b", "cannot read c"]
    assert json.loads(out.getvalue())[1] == [[[0], [5]]]


def test_nothing_is_written_if_no_image_can_be_read() -> None:
    out = io.StringIO()
    with pytest.raises(ValueError, match=r"^cannot read b$"):
        predict_batches(PredictionWriter(out), ([-1, -1], ["cannot read b", "cannot read c"], None))
    assert out.getvalue() == ""


def test_the_writer_writes_to_an_open_file() -> None:
    out = io.StringIO()
    evaluate(PredictionWriter(out), make_trainer(), make_task())
    assert json.loads(out.getvalue())[0] == ["from", "the", "data"]


def test_a_table_has_four_digits_and_whole_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table({"test/iou": 0.123456, "test_ema/samples": 10000.0, "val/pixels": 5e6}) == (
        "test/iou             0.1235\ntest_ema/samples     10,000\nval/pixels        5,000,000\n"
    )
    evaluate(EvaluationReport(tmp_path, {}), make_trainer(), make_task())
    assert capsys.readouterr().out == "test/iou      0.5000\ntest/samples       3\ntest_ema/iou  0.7500\n"


def count_trainer(counted: int, limit: float, max_unreadable: int = 0) -> Any:
    metrics = {f"{part}/samples": torch.tensor(counted) for part in ("val", "test")}
    limits = {"limit_test_batches": limit, "limit_val_batches": limit}
    trainer = make_trainer(samples=1500, world_size=2, callback_metrics=metrics, **limits)
    trainer.datamodule.max_unreadable = max_unreadable
    return trainer


@pytest.mark.parametrize("part", ["val", "test"])
@pytest.mark.parametrize("counted", [1499, 1501, 0])
def test_a_count_other_than_that_of_the_split_is_an_error(part: str, counted: int) -> None:
    message = f"^{counted:,} samples were evaluated but split 'validation' has 1,500, so the metrics are not"
    with pytest.raises(ValueError, match=message):
        check_count(part, count_trainer(counted, 1.0))


@pytest.mark.parametrize(("counted", "limit"), [(1500, 1.0), (16, 1), (750, 0.5), (32, 2)])
def test_a_full_count_and_limited_ones_are_accepted(counted: int, limit: float) -> None:
    check_count("test", count_trainer(counted, limit))


@pytest.mark.parametrize(("counted", "accepted"), [(1500, True), (1494, True), (1493, False), (1501, False)])
def test_tolerated_unreadable_images_may_be_missing_from_the_count(counted: int, accepted: bool) -> None:
    with nullcontext() if accepted else pytest.raises(ValueError, match="were evaluated"):
        check_count("test", count_trainer(counted, 1.0, max_unreadable=3))


class Files(Notes):
    """A report that writes a folder as the predictions come."""

    folder = "predicted"

    def begin(self, out: Path | TextIO, pictures: bool = False) -> None:
        self.out, self.pictures, self.discarded = out, pictures, False

    def write_predictions(self, out: Path | TextIO) -> None:
        assert self.gathered
        assert out == self.out

    def discard(self) -> None:
        self.discarded = True


@pytest.mark.parametrize("pictures", [False, True])
def test_a_report_of_many_files_knows_its_folder_before_the_first_batch(pictures: bool, tmp_path: Path) -> None:
    given = ReportData(["a"], 3, None)
    for data, folder in ((None, tmp_path / "predicted"), (given, tmp_path)):
        writer, task = PredictionWriter(tmp_path, data, pictures), make_task()
        task.report = lambda data, predict: Files(data, predict)
        for _ in range(2):
            evaluate(writer, make_trainer(), task)
            assert (writer.report.out, writer.report.pictures) == (folder, pictures)
            assert not writer.report.discarded


def test_incomplete_predictions_are_removed(tmp_path: Path) -> None:
    writer, trainer, task = PredictionWriter(tmp_path), make_trainer(), make_task()
    task.report = lambda data, predict: Files(data, predict)
    writer.on_exception(trainer, task, KeyboardInterrupt())  # before there is anything
    writer.on_predict_start(trainer, task)
    writer.on_exception(trainer, task, KeyboardInterrupt())
    assert writer.report.discarded
    writer.on_predict_start(trainer, task)
    writer.on_predict_batch_end(trainer, task, None, {"index": torch.tensor([-1]), "unreadable": ["cannot read b"]}, 0)
    with pytest.raises(ValueError, match="cannot read b"):
        writer.on_predict_end(trainer, task)
    assert writer.report.discarded
