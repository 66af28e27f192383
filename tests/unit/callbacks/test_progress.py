import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scalablevit_pl.callbacks.progress import LineEnd, TrainingBar, duration
from scalablevit_pl.callbacks.throughput import Throughput

MODULE: Any = SimpleNamespace(shown=("iou", "dice"), monitor="iou")


def make_bar(metrics: dict[str, Any]) -> tuple[TrainingBar, Any]:
    throughput = Throughput()
    throughput.speed = {
        "speed/images_per_second": 12345.6,
        "speed/data_wait": 0.034,
        "speed/eta_hours": 50.4,
        "speed/steps_per_second": 1.0,
    }
    trainer = SimpleNamespace(
        sanity_checking=False, progress_bar_metrics=metrics, state=SimpleNamespace(fn="fit"), loggers=[]
    )
    return TrainingBar(throughput), trainer


def test_the_bar_shows_loss_and_shown_metrics_in_80_columns() -> None:
    metrics = {"train/loss": 6.91234, "val/iou": 0.5, "val_ema/iou": 0.75, "val/dice": 0.25, "val_ema/dice": 0.1}
    bar, trainer = make_bar({name: torch.tensor(value) for name, value in metrics.items()} | {"v_num": 3, "val/x": 1.0})
    bar._read_metrics(trainer, MODULE)
    shown = bar.get_metrics(trainer, MODULE)
    assert shown == {
        "loss": "6.91",
        "iou": "0.500",
        "dice": "0.250",
        "ema": "0.750",
        "img/s": "12346",
        "wait": "3%",
        "eta": "2d02h",
    }
    del shown["dice"], shown["ema"]  # tasks of this package show one metric
    line = "Epoch 299: ███ 1000/1251, " + ", ".join(f"{name}={value}" for name, value in shown.items())
    assert len(line) <= 80


def test_the_bar_shows_no_metrics_of_a_sanity_check_and_no_speed_before_it_is_measured() -> None:
    bar, trainer = make_bar({"val/iou": torch.tensor(0.5)})
    trainer.sanity_checking, bar.throughput.speed = True, {}
    bar._read_metrics(trainer, MODULE)
    assert bar.get_metrics(trainer, MODULE) == {}


@pytest.mark.parametrize(
    ("hours", "expected"),
    [(0.0, "0s"), (59 / 3600, "59s"), (59.6 / 3600, "1m00s"), (2.2, "2h12m"), (23.999999, "1d00h"), (103.0, "4d07h")],
)
def test_durations_have_two_units(hours: float, expected: str) -> None:
    assert duration(hours) == expected


@pytest.mark.parametrize(("bar", "written"), [(None, ""), (SimpleNamespace(is_enabled=False), ""), (object(), "\n")])
def test_an_error_message_starts_on_a_line_of_its_own(
    bar: Any, written: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer: Any = SimpleNamespace(progress_bar_callback=bar)
    LineEnd().on_exception(trainer, MODULE, ValueError())
    sys.stderr.flush()
    assert capsys.readouterr().err == written
