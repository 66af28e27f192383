import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scalablevit_pl.callbacks import checkpoints
from scalablevit_pl.callbacks.checkpoints import RunCheckpoints, WholeCheckpointIO, name_last
from scalablevit_pl.callbacks.metrics_log import MetricsLog, read_metrics
from scalablevit_pl.checkpoint import read_checkpoint


class Saves:
    """What of a trainer the callback uses: steps, and a record of what was saved."""

    def __init__(self, folder: Path, accumulated: int = 1, batches: int = 20, val_check_batch: Any = 20) -> None:
        self.default_root_dir, self.accumulated, self.num_training_batches = str(folder), accumulated, batches
        self.val_check_batch, self.check_val_every_n_epoch = val_check_batch, 1
        self.fast_dev_run = self.sanity_checking = False
        self.is_global_zero, self.is_last_batch, self.global_step = True, False, 0
        self.callback_metrics: dict[str, Any] = {}
        self.logged_metrics: dict[str, Any] = {}
        self.loggers: list[Any] = []
        self.max_steps = -1
        loop = SimpleNamespace(max_steps=-1, _batches_that_stepped=0)
        self.fit_loop = SimpleNamespace(epoch_loop=loop, total_batch_idx=0)
        self.log_every_n_steps, self.current_epoch = 1, 0
        self.saved: list[str] = []

    def save_checkpoint(self, path: Path, weights_only: bool) -> None:
        self.saved.append(path.name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(str(self.global_step))

    def train(self, callback: RunCheckpoints, batches: int) -> None:
        module: Any = SimpleNamespace(device=torch.device("cpu"))
        for batch in range(batches):
            self.global_step += (batch + 1) % self.accumulated == 0
            callback.on_train_batch_end(self, module, None, None, batch)  # type: ignore[arg-type]


def start(trainer: Saves, **arguments: Any) -> RunCheckpoints:
    callback = RunCheckpoints(**arguments)
    module: Any = None
    callback.setup(trainer, module, "fit")  # type: ignore[arg-type]
    callback.on_fit_start(trainer, module)  # type: ignore[arg-type]
    callback.on_train_start(trainer, module)  # type: ignore[arg-type]
    callback.signal.restore()
    return callback


def test_a_checkpoint_follows_each_so_many_optimizer_steps(tmp_path: Path) -> None:
    trainer = Saves(tmp_path, accumulated=2)
    trainer.train(start(trainer, every_steps=3, every_minutes=None), 18)
    assert trainer.saved == ["step=3.ckpt", "step=6.ckpt", "step=9.ckpt"]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["last.ckpt", "step=6.ckpt", "step=9.ckpt"]
    assert (tmp_path / "checkpoints/last.ckpt").read_text() == "9"


@pytest.mark.parametrize(("batches", "val_check_batch", "skipped"), [(4, 4, 4), (20, 3, 3), (20, 20, None)])
def test_no_checkpoint_comes_between_a_batch_and_its_validation(
    batches: int, val_check_batch: int, skipped: int | None, tmp_path: Path
) -> None:
    trainer = Saves(tmp_path, batches=batches, val_check_batch=val_check_batch)
    trainer.train(start(trainer, every_steps=1), 4)
    assert trainer.saved == [f"step={step}.ckpt" for step in range(1, 5) if step != skipped]


def test_a_checkpoint_follows_each_so_many_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10_000, 50))
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: next(now))
    trainer = Saves(tmp_path)
    trainer.train(start(trainer, every_minutes=2.0), 8)
    # A look at the clock takes 50 s here, and another one when a checkpoint is written.
    assert trainer.saved == ["step=3.ckpt", "step=6.ckpt"]


def test_the_best_is_by_the_averaged_weights_where_there_are_any(tmp_path: Path) -> None:
    trainer = Saves(tmp_path)
    callback = start(trainer)
    for raw, averaged in ((0.5, float("nan")), (0.5, 0.4), (0.9, 0.3), (0.1, 0.6), (0.2, float("nan"))):
        trainer.callback_metrics = {"val/top1": torch.tensor(raw), "val_ema/top1": torch.tensor(averaged)}
        callback.on_validation_end(trainer, None)  # type: ignore[arg-type]
    assert trainer.saved == ["best.ckpt", "best.ckpt"]
    resumed = RunCheckpoints()
    resumed.load_state_dict(callback.state_dict())
    assert resumed.best == pytest.approx(0.6)


@pytest.mark.parametrize("arguments", [{"every_minutes": 0.0}, {"every_steps": 0}, {"keep": 0}])
def test_numbers_out_of_range_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"checkpoint.{next(iter(arguments))} must be .* got 0"):
        RunCheckpoints(**arguments)


def test_the_last_is_a_second_name_or_else_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, last = tmp_path / "step=1.ckpt", tmp_path / "last.ckpt"
    path.write_text("one")
    name_last(path)
    assert last.samefile(path)

    def refuse(*args: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    name_last(path)
    assert last.read_text() == "one"
    assert not last.samefile(path)
    assert len(list(tmp_path.iterdir())) == 2


class Unwilling:
    def __reduce__(self) -> Any:
        raise OSError(28, "No space left on device")


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"cannot write the checkpoint .*No space left.*--resume auto"):
        WholeCheckpointIO().save_checkpoint({"a": torch.zeros(2), "b": Unwilling()}, path)
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.ones(2))
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    record = {"scalablevit_pl": {"schema": 1}, "state_dict": {"a": torch.ones(1000)}}
    torch.save(record, path)
    assert read_checkpoint(path)["state_dict"]["a"].sum() == 1000
    content = bytearray(path.read_bytes())
    content[content.index(torch.ones(4).numpy().tobytes()) + 1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        read_checkpoint(path)


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3]), (2, [1, 3])])
def test_what_is_logged_after_a_checkpoint_stands_in_the_table_before_it(
    every: int, expected: list[int], tmp_path: Path
) -> None:
    trainer = Saves(tmp_path)
    trainer.log_every_n_steps = every
    trainer.logged_metrics = {"train/step_loss": torch.tensor(0.5), "train/lr": torch.tensor(0.1), "val/top1": 1.0}
    log = MetricsLog(tmp_path / "metrics.csv")
    trainer.loggers = [log]
    callback = start(trainer, every_steps=1)
    for step in range(4):
        trainer.fit_loop.epoch_loop._batches_that_stepped = step
        trainer.train(callback, 1)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert list(rows) == expected
    assert all(row == {"epoch": 0, "train/step_loss": 0.5, "train/lr": pytest.approx(0.1)} for row in rows.values())
