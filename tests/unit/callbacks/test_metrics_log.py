from pathlib import Path

import pytest

from scalablevit_pl.callbacks.metrics_log import MetricsLog, curve, read_metrics


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_all_values_of_a_step_are_one_row(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.csv")
    log.log_metrics({"train/step_loss": 2.0, "epoch": 0}, step=9)
    log.log_metrics({"train/step_loss": 1.5, "epoch": 0}, step=19)
    log.log_metrics({"val/top1": 0.5, "epoch": 0}, step=19)
    log.log_metrics({"a": 4.0})
    log.save()
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "step,epoch,a,train/step_loss,val/top1",
        "0,,4.0,,",
        "9,0,,2.0,",
        "19,0,,1.5,0.5",
    ]
    assert names_in(tmp_path) == ["metrics.csv"]


def test_the_file_is_read_back_to_the_last_digit(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.csv")
    rows = {3: {"loss": 1 / 3, "epoch": 0.0}, 7: {"loss": 1e-300, "lr": float("inf"), "zero": 0.0}, 8: {"lr": -0.1}}
    for step, row in rows.items():
        log.log_metrics(row, step)
    log.save()
    assert read_metrics(tmp_path / "metrics.csv") == rows


def test_rows_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.csv")
    for step in (100, 20, 3):
        log.log_metrics({"loss": 1.0}, step)
    log.finalize("success")
    assert list(read_metrics(tmp_path / "metrics.csv")) == [3, 20, 100]


def test_a_log_without_numbers_writes_no_file(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.csv")
    log.log_hyperparams({"lr": 0.1})
    log.finalize("failed")
    assert names_in(tmp_path) == []


def test_a_resumed_run_keeps_what_it_does_not_repeat(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = MetricsLog(path)
    for step in range(6):
        first.log_metrics({"loss": float(step)}, step)
    first.save()
    second = MetricsLog(path)
    second.continue_from(4)
    assert list(second.rows) == [0, 1, 2, 3]
    second.log_metrics({"loss": 40.0, "new": 1.0}, 4)
    second.save()
    assert read_metrics(path) == {step: {"loss": float(step)} for step in range(4)} | {4: {"loss": 40.0, "new": 1.0}}


def test_a_new_run_begins_with_nothing(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.csv")
    log.continue_from(0)
    assert log.rows == {}
    log.log_metrics({"loss": 1.0}, 0)
    log.save()
    log.continue_from(0)
    assert log.rows == {}


def test_a_failing_write_leaves_the_earlier_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.csv"
    log = MetricsLog(path)
    log.log_metrics({"loss": 1.0}, 0)
    log.save()
    before = path.read_text()
    log.log_metrics({"loss": 2.0}, 1)

    def fail(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("csv.DictWriter.writerows", fail)
    with pytest.raises(OSError, match="no space"):
        log.save()
    assert path.read_text() == before


def test_the_run_is_named_by_its_folder(tmp_path: Path) -> None:
    assert MetricsLog(tmp_path / "first" / "metrics.csv").name == "first"


def test_a_curve_is_one_metric_over_the_epochs() -> None:
    rows = {4: {"loss": 2.0}, 9: {"loss": 1.0, "top1": 0.5}, 14: {"lr": 0.1}, 19: {"top1": 0.75}}
    assert curve(rows, "loss", 10) == ((0.5, 1.0), (2.0, 1.0))
    assert curve(rows, "top1", 10) == ((1.0, 2.0), (0.5, 0.75))
    assert curve(rows, "unknown", 10) == ((), ())
    assert curve({}, "loss", 10) == ((), ())


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"loss\n1.0\n", b"step,loss\nfoo,1\n"])
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read '.*metrics\.csv' .*move it away"):
        read_metrics(tmp_path / "metrics.csv")
