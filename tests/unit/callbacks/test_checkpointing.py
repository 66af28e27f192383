import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from scalablevit_pl.callbacks import checkpointing
from scalablevit_pl.callbacks.checkpointing import RunCheckpoints, WholeCheckpointIO, name_last
from scalablevit_pl.callbacks.metrics_log import MetricsLog, read_metrics
from scalablevit_pl.callbacks.preemption import BY_WEIGHT, PreemptedError
from scalablevit_pl.weights.checkpoint import read_checkpoint

MODULE: Any = SimpleNamespace(device=torch.device("cpu"), monitor="top1", mode="max")


class Saves:
    """The part of a trainer that the callback uses: steps, and a record of saved files."""

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
        for batch in range(batches):
            self.global_step += (batch + 1) % self.accumulated == 0
            callback.on_train_batch_end(self, MODULE, None, None, batch)  # type: ignore[arg-type]
            self.fit_loop.total_batch_idx += 1


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


def test_validations_that_are_counted_over_epochs_come_before_a_checkpoint_too(tmp_path: Path) -> None:
    trainer = Saves(tmp_path, val_check_batch=3)
    trainer.check_val_every_n_epoch, trainer.fit_loop.total_batch_idx = None, 20
    trainer.train(start(trainer, every_steps=1), 5)
    assert trainer.saved == ["step=2.ckpt", "step=3.ckpt", "step=5.ckpt"]


def test_a_trial_of_a_few_batches_saves_nothing(tmp_path: Path) -> None:
    trainer = Saves(tmp_path)
    trainer.fast_dev_run = True
    trainer.callback_metrics = {"val/top1": torch.tensor(0.5)}
    callback: Any = start(trainer, every_steps=1)
    trainer.train(callback, 3)
    callback.on_validation_end(trainer, MODULE)
    callback.on_train_epoch_end(trainer, MODULE)
    assert trainer.saved == []


def test_a_sanity_check_does_not_select_the_best_checkpoint(tmp_path: Path) -> None:
    trainer = Saves(tmp_path)
    trainer.sanity_checking = True
    trainer.callback_metrics = {"val/top1": torch.tensor(1.0)}
    callback: Any = start(trainer)
    callback.on_validation_end(trainer, MODULE)
    assert (trainer.saved, callback.best) == ([], None)


def test_only_the_first_process_names_and_deletes(tmp_path: Path) -> None:
    trainer = Saves(tmp_path)
    trainer.is_global_zero = False
    trainer.train(start(trainer, every_steps=1, keep=1), 3)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step=1.ckpt", "step=2.ckpt", "step=3.ckpt"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_the_run_after_a_step_with_a_checkpoint(signum: int, tmp_path: Path) -> None:
    trainer = Saves(tmp_path, accumulated=2)
    callback = start(trainer)
    callback.signal.received = signum
    with pytest.raises(PreemptedError, match=f"stopped by {signal.Signals(signum).name} after step 1"):
        trainer.train(callback, 4)
    assert trainer.saved == ["step=1.ckpt"]


def test_a_signal_in_an_epochs_validation_stops_the_run_at_the_epochs_end(tmp_path: Path) -> None:
    trainer = Saves(tmp_path)
    callback: Any = start(trainer)
    trainer.global_step, callback.signal.received = 4, signal.SIGTERM
    with pytest.raises(PreemptedError, match="stopped by SIGTERM after step 4"):
        callback.on_train_epoch_end(trainer, MODULE)
    assert trainer.saved == ["step=4.ckpt"]


@pytest.mark.parametrize(
    ("own", "others", "due", "stopped"),
    [
        (None, None, False, None),
        (None, None, True, None),
        (None, signal.SIGTERM, False, signal.SIGTERM),
        (signal.SIGTERM, None, False, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGUSR1, False, signal.SIGUSR1),
        (signal.SIGUSR1, signal.SIGTERM, False, signal.SIGUSR1),
    ],
)
def test_all_processes_save_and_stop_alike(
    own: int | None,
    others: int | None,
    due: bool,
    stopped: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def reduce(values: Tensor, operation: Any) -> None:
        assert operation == torch.distributed.ReduceOp.MAX
        values.copy_(torch.maximum(values, torch.tensor([BY_WEIGHT.index(others or 0), int(due)])))

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    trainer = Saves(tmp_path)
    callback = start(trainer, every_minutes=None)
    callback.signal.received = own
    if stopped is None:
        trainer.train(callback, 1)
    else:
        with pytest.raises(PreemptedError) as caught:
            trainer.train(callback, 1)
        assert caught.value.signum == stopped
    assert trainer.saved == (["step=1.ckpt"] if due or stopped else [])


def test_a_checkpoint_follows_each_so_many_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10_000, 50))
    monkeypatch.setattr(checkpointing.time, "monotonic", lambda: next(now))
    trainer = Saves(tmp_path)
    trainer.train(start(trainer, every_minutes=2.0), 8)
    # A look at the clock takes 50 s here, and another one when a checkpoint is written.
    assert trainer.saved == ["step=3.ckpt", "step=6.ckpt"]


def test_the_averaged_weights_if_any_select_the_best_checkpoint(tmp_path: Path) -> None:
    trainer = Saves(tmp_path)
    callback: Any = start(trainer)
    for raw, averaged in ((0.5, float("nan")), (0.5, 0.4), (0.9, 0.3), (0.1, 0.6), (0.9, 0.6), (0.2, float("nan"))):
        trainer.callback_metrics = {"val/top1": torch.tensor(raw), "val_ema/top1": torch.tensor(averaged)}
        callback.on_validation_end(trainer, MODULE)
    assert trainer.saved == ["best.ckpt", "best.ckpt"]
    resumed = RunCheckpoints()
    resumed.load_state_dict(callback.state_dict())
    assert resumed.best == pytest.approx(0.6)


@pytest.mark.parametrize(("mode", "best", "saved"), [("min", 1.0, 3), ("max", 4.0, 2)])
def test_the_task_s_monitor_and_mode_select_the_best_checkpoint(
    mode: str, best: float, saved: int, tmp_path: Path
) -> None:
    task: Any = SimpleNamespace(monitor="distance", mode=mode)
    trainer = Saves(tmp_path)
    callback: Any = start(trainer)
    for distance in (3.0, 4.0, float("nan"), 2.0, 2.0, float("inf"), float("-inf"), 1.0):
        trainer.callback_metrics = {"val/distance": torch.tensor(distance), "val/top1": torch.tensor(distance)}
        callback.on_validation_end(trainer, task)
    assert (callback.best, trainer.saved) == (best, ["best.ckpt"] * saved)
    trainer.callback_metrics = {"val/top1": torch.tensor(9.0)}  # of another task
    callback.on_validation_end(trainer, task)
    assert len(trainer.saved) == saved


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


def test_leftovers_of_last_ckpt_from_a_killed_run_are_not_written_through(tmp_path: Path) -> None:
    earlier, path = tmp_path / "step=1.ckpt", tmp_path / "step=2.ckpt"
    earlier.write_text("one")
    path.write_text("two")
    os.link(earlier, tmp_path / ".last.ckpt.part")
    name_last(path)
    assert (tmp_path / "last.ckpt").samefile(path)
    assert earlier.read_text() == "one"


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoints/step=1.ckpt"
    synced: list[tuple[int, int]] = []

    def sync(descriptor: int) -> None:
        assert not path.exists()
        status = os.fstat(descriptor)
        synced.append((status.st_ino, status.st_size))

    monkeypatch.setattr(os, "fsync", sync)
    WholeCheckpointIO().save_checkpoint({"a": torch.ones(2)}, path)
    assert synced == [(path.stat().st_ino, path.stat().st_size)]


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
def test_values_logged_after_a_checkpoint_are_in_the_table_before_it(
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


def test_an_epochs_averages_are_in_the_table_before_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Saves(tmp_path)
    trainer.logged_metrics = {"train/loss": torch.tensor(0.5), "train/top1": torch.tensor(0.25), "train/lr": 0.1}
    trainer.loggers = [MetricsLog(tmp_path / "metrics.csv")]
    trainer.fit_loop.epoch_loop._batches_that_stepped = 4
    callback: Any = start(trainer)
    tables = []
    monkeypatch.setattr(callback, "_save", lambda _: tables.append(read_metrics(tmp_path / "metrics.csv")))
    callback.on_train_epoch_end(trainer, MODULE)
    assert tables == [{3: {"epoch": 0, "train/loss": 0.5, "train/top1": 0.25}}]


@pytest.fixture
def handlers() -> Iterator[dict[int, Any]]:
    """The handlers before a training, which are put back after it."""
    before: dict[int, Any] = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1)}
    yield before
    for signum, handler in before.items():
        signal.signal(signum, handler)


class Line(pl.LightningModule):
    """Batches of one number each; at one of them, in the training or the validation before it, a signal comes."""

    monitor, mode = "none", "max"

    def __init__(self, signalled: str = "never") -> None:
        super().__init__()
        self.layer, self.signalled = nn.Linear(1, 1), signalled
        self.ended: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.come(f"training {batch_idx}")
        return self.layer(batch).sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.come("validation before" if self.trainer.sanity_checking else "validation")

    def on_train_epoch_end(self) -> None:
        self.ended.append(self.current_epoch)

    def come(self, place: str) -> None:
        if place == self.signalled:
            os.kill(os.getpid(), signal.SIGTERM)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, module: Line, ckpt_path: Path | None = None, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[RunCheckpoints()],
        plugins=[WholeCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    loader = DataLoader(torch.ones(4, 1))
    trainer.fit(module, loader, loader, ckpt_path=ckpt_path, weights_only=True)
    return trainer


@pytest.mark.parametrize(
    ("signalled", "sanity", "step"),
    [
        ("validation before", 1, 1),
        ("training 0", 1, 1),
        ("training 0", 0, 1),
        ("training 2", 1, 2),
        ("validation", 1, 2),
    ],
)
def test_a_signal_at_any_time_leaves_a_checkpoint(
    signalled: str, sanity: int, step: int, tmp_path: Path, handlers: dict[int, Any]
) -> None:
    with pytest.raises(PreemptedError, match=f"stopped by SIGTERM after step {step}"):
        fit(tmp_path, Line(signalled), max_epochs=2, accumulate_grad_batches=2, num_sanity_val_steps=sanity)
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == step


def test_signals_are_given_back_after_a_training(tmp_path: Path, handlers: dict[int, Any]) -> None:
    fit(tmp_path, Line(), max_epochs=1)
    assert {signum: signal.getsignal(signum) for signum in handlers} == handlers


def test_a_limit_of_steps_holds_in_a_run_resumed_from_the_end_of_an_epoch(tmp_path: Path) -> None:
    fit(tmp_path, Line(), max_epochs=1)
    module = Line()
    trainer = fit(tmp_path, module, tmp_path / "checkpoints/step=4.ckpt", max_steps=7, max_epochs=3)
    assert (trainer.global_step, module.ended) == (7, [1])
