import logging
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_tasks import STILL, Scores, make_samples
from small_tasks import make_trainer as make_quiet_trainer
from torch.utils.data import DataLoader

from scalablevit_pl.callbacks.progress import Bar, Progress, duration
from scalablevit_pl.callbacks.throughput import Throughput
from scalablevit_pl.commands.console import Console
from scalablevit_pl.tasks import ClassificationTask

SPEED = {
    "speed/images_per_second": 12345.6,
    "speed/data_wait": 0.034,
    "speed/eta_hours": 50.4,
    "speed/steps_per_second": 1.0,
}
METRICS = {"train/loss": 6.91234, "val/loss": 6.5, "val/iou": 0.5, "val_ema/iou": 0.75, "val/other": 0.1}
MODULE: Any = SimpleNamespace(shown=("iou",), monitor="iou")


class Terminal(StringIO):
    """Standard error of a terminal of 80 columns."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """Return the lines as the terminal shows them at the end."""
        lines = []
        for line in self.getvalue().split("\n"):
            shown = ""
            for text in line.split("\r"):
                shown = text + shown[len(text) :]
            lines.append(shown.rstrip())
        return lines


def make_progress() -> Progress:
    throughput = Throughput()
    throughput.speed = dict(SPEED)
    progress = Progress(throughput)
    progress._train_progress_bar = Bar(shown=False)
    progress._val_progress_bar = Bar(shown=False)
    return progress


def make_trainer(metrics: dict[str, float]) -> Any:
    values = {name: torch.tensor(value) for name, value in metrics.items()}
    state = SimpleNamespace(fn="fit")
    return SimpleNamespace(sanity_checking=False, callback_metrics=values, state=state)


def test_an_epoch_is_logged_in_a_line_of_80_columns(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    progress, trainer = make_progress(), make_trainer(METRICS)
    progress.epoch = "29/90"
    progress.on_validation_end(trainer, MODULE)
    progress.on_train_epoch_end(trainer, MODULE)
    assert caplog.messages == []  # the average of the loss follows
    progress.on_train_end(trainer, MODULE)
    (line,) = caplog.messages
    assert line == "epoch 29/90: loss 6.912, val 6.500, iou 0.500, ema 0.750, img/s 12346, eta 2d02h"
    assert len(line) <= 80


def test_an_epoch_without_validation_does_not_repeat_an_earlier_one(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    progress, trainer = make_progress(), make_trainer(METRICS)
    progress.epoch = "29"
    progress.throughput.speed = {}
    for validate in (True, False):
        if validate:
            progress.on_validation_end(trainer, MODULE)
        progress.on_train_epoch_end(trainer, MODULE)
        progress.on_train_end(trainer, MODULE)
    assert caplog.messages == ["epoch 29: loss 6.912, val 6.500, iou 0.500, ema 0.750", "epoch 29: loss 6.912"]


def test_a_sanity_check_and_an_unfinished_epoch_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    progress, trainer = make_progress(), make_trainer(METRICS)
    trainer.sanity_checking = True
    progress.on_validation_end(trainer, MODULE)
    progress.on_train_end(trainer, MODULE)
    assert (progress.validation, caplog.messages) == ({}, [])


def test_the_bar_shows_the_speed_once_it_is_measured() -> None:
    progress, trainer = make_progress(), make_trainer({})
    assert progress.get_metrics(trainer, MODULE) == {"img/s": "12346", "wait": "3%", "eta": "2d02h"}
    progress.throughput.speed = {}
    assert progress.get_metrics(trainer, MODULE) == {}


def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Write messages and bars to a terminal for the rest of a test."""
    handler, root, terminal = Console(), logging.getLogger(), Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(root, "handlers", [handler])
    monkeypatch.setattr(logging.getLogger("scalablevit_pl"), "level", logging.INFO)
    return terminal


def fit(folder: Path, progress: Progress) -> None:
    trainer = make_quiet_trainer(
        folder,
        callbacks=[progress.throughput, progress],
        enable_progress_bar=True,
        max_epochs=2,
        num_sanity_val_steps=1,
    )
    loader = DataLoader(make_samples(6), batch_size=2)
    trainer.fit(ClassificationTask(Scores(), base_batch_size=None, **STILL), loader, loader)
    trainer.test(trainer.lightning_module, loader, verbose=False)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_fit_leaves_one_line_for_each_epoch(terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = open_terminal(monkeypatch)
    monkeypatch.setattr(Terminal, "isatty", lambda self: terminal)
    fit(tmp_path, Progress(Throughput()))
    lines = console.screen()
    assert [line.partition(" loss ")[0] for line in lines] == ["epoch 1/2:", "epoch 2/2:", ""]
    assert ("Epoch 2/2: " in console.getvalue(), "Testing: " in console.getvalue()) == (terminal, terminal)
    assert ("\r" in console.getvalue()) == terminal
    assert "DataLoader" not in console.getvalue()


def test_an_error_message_starts_on_a_line_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = open_terminal(monkeypatch)

    def fail(self: Any, *args: Any) -> None:
        assert console.screen()[-1].startswith("Epoch 1/2")
        raise ValueError("of the step")

    monkeypatch.setattr(ClassificationTask, "on_train_batch_start", fail)
    with pytest.raises(ValueError, match="of the step"):
        fit(tmp_path, Progress(Throughput()))
    assert console.screen() == [""]


@pytest.mark.parametrize(
    ("hours", "expected"),
    [(0.0, "0s"), (59 / 3600, "59s"), (59.6 / 3600, "1m00s"), (2.2, "2h12m"), (23.999999, "1d00h"), (103.0, "4d07h")],
)
def test_durations_have_two_units(hours: float, expected: str) -> None:
    assert duration(hours) == expected
