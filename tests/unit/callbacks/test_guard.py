import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from forked_command import run_together
from guard_processes import Line, lose, samples
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from scalablevit_pl.callbacks import guard
from scalablevit_pl.callbacks.guard import LossGuard, NonFiniteError, SharedEnd, UnreadableList
from scalablevit_pl.callbacks.preemption import PreemptedError

SCRIPT = Path(__file__).parents[2] / "guard_processes.py"


def fit(folder: Path, module: Line, wrong: dict[int, float], accumulated: int = 1, **settings: Any) -> pl.Trainer:
    checkpoints = ModelCheckpoint(folder / "checkpoints", "last", every_n_train_steps=1, enable_version_counter=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        callbacks=[LossGuard(folder), checkpoints],
        accumulate_grad_batches=accumulated,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, DataLoader(samples(wrong), batch_size=2))
    return trainer


def after(steps: int) -> float:
    """Return the weight after steps of gradient descent on w²."""
    weight = 0.5
    for _ in range(steps):
        weight -= 0.1 * 2.0 * weight
    return weight


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("accumulated", "steps"), [(1, 3), (2, 1), (3, 1), (4, 0)])
def test_a_nan_loss_stops_the_run_before_the_step(value: float, accumulated: int, steps: int, tmp_path: Path) -> None:
    module = Line()
    with pytest.raises(NonFiniteError) as error:
        fit(tmp_path, module, {7: value}, accumulated)
    assert module.weight.item() == pytest.approx(after(steps))
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert json.loads((tmp_path / "nonfinite.json").read_text()) == {
        "epoch": 0,
        "step": steps,
        "batch": 3,
        "rank": 0,
        "lr": 0.1,
        "loss": "nan" if value != value else "inf",  # a square is never -inf
        "last_checkpoint": str(last) if steps else None,
        "index": [6, 7],
        "path": ["6.jpg", "7.jpg"],
    }
    known = f"the last good checkpoint is {last}" if steps else "there is no checkpoint yet"
    for text in (f"at step {steps} of epoch 0", "rate 0.1;", known, str(tmp_path / "nonfinite.json")):
        assert text in str(error.value)


def test_the_newest_checkpoint_that_can_resume_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for written, name in ((1, "step=9"), (2, "step=10"), (3, "best")):
        (tmp_path / f"checkpoints/{name}.ckpt").touch()
        os.utime(tmp_path / f"checkpoints/{name}.ckpt", (written, written))
    with pytest.raises(NonFiniteError, match=r"the last good checkpoint is .*step=10\.ckpt, and .* records the batch"):
        fit(tmp_path, Line(), {0: float("nan")})


def test_a_training_with_finite_losses_is_left_alone(tmp_path: Path) -> None:
    module = Line()
    fit(tmp_path, module, {})
    assert module.weight.item() == pytest.approx(after(6))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_spoilt_weights_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"after 3 steps and were not saved.*checkpoint is .*last.ckpt"):
        fit(tmp_path, Line(spoil_gradient_in=2), {})
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert saved["state_dict"]["weight"].item() == pytest.approx(after(2))


@pytest.mark.slow
def test_no_process_waits_for_the_first_one_that_has_failed(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT)]
    # A process that waits for the other one would do so for half an hour.
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2, done.stderr
    assert (tmp_path / "error.0").read_text() == "only here"


def test_no_process_waits_for_one_with_an_infinite_loss(forkserver: ForkServerContext, tmp_path: Path) -> None:
    run_together(forkserver, lose, 2, tmp_path)
    messages = [(tmp_path / f"error.{rank}").read_text() for rank in range(2)]
    assert messages[0] == messages[1]
    assert "nonfinite.rank1.json records the batch" in messages[0]
    assert not (tmp_path / "nonfinite.rank0.json").exists()
    record = json.loads((tmp_path / "nonfinite.rank1.json").read_text())
    assert (record["index"], record["step"], record["rank"]) == ([5, 7], 1, 1)


@pytest.mark.parametrize(
    ("error", "seconds", "grace", "status"),
    [
        (ValueError(), "600", 0.1, -signal.SIGKILL),
        (ValueError(), "0.2", 600.0, 0),
        (KeyboardInterrupt(), "0.2", 0.0, 0),
        (PreemptedError(signal.SIGTERM, 3), "0.2", 0.0, 0),
    ],
)
def test_an_error_of_the_first_process_ends_those_that_do_not_end_by_themselves(
    error: BaseException, seconds: str, grace: float, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "GRACE", grace)
    with subprocess.Popen(["sleep", seconds]) as other:
        launcher = SimpleNamespace(procs=[other])
        trainer: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=launcher))
        begin = time.monotonic()
        SharedEnd().on_exception(trainer, Line(), error)
        try:
            assert time.monotonic() - begin < 300.0
            assert other.wait(300.0) == status
        finally:
            other.kill()


def test_unreadable_images_are_listed_once_by_all_processes(tmp_path: Path) -> None:
    lists = [UnreadableList(tmp_path) for _ in range(2)]
    trainers: list[Any] = [
        SimpleNamespace(datamodule=SimpleNamespace(unreadable=lines), global_rank=rank)
        for rank, lines in enumerate((["a", "b"], ["b", "c"]))
    ]
    for written, trainer in zip(lists, trainers, strict=True):
        written.on_train_batch_start(trainer, Line(), {}, 0)
    path = tmp_path / "unreadable.txt"
    assert path.read_text() == "a\nb\nc\n"
    path.write_text("b\nc\n")  # as if both had written at once
    trainers[0].datamodule.unreadable.append("d")
    lists[0].on_exception(trainers[0], Line(), ValueError())
    assert path.read_text() == "b\nc\na\nd\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["unreadable.txt"]


def test_a_list_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(path: Path, text: str, **options: Any) -> None:
        path.write_bytes(text[:2].encode())
        raise OSError(28, "No space left on device")

    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(unreadable=["c"]), global_rank=0)
    (tmp_path / "unreadable.txt").write_text("a\nb\n")
    monkeypatch.setattr(Path, "write_text", fill)
    with pytest.raises(OSError, match="No space left"):
        UnreadableList(tmp_path).on_test_end(trainer, Line())
    assert (tmp_path / "unreadable.txt").read_text() == "a\nb\n"


@pytest.mark.parametrize("hook", ["on_validation_end", "on_test_end", "on_train_end"])
def test_unreadable_images_of_an_evaluation_are_listed_at_its_end(hook: str, tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(unreadable=["a"]), global_rank=0)
    getattr(UnreadableList(tmp_path), hook)(trainer, Line())
    assert (tmp_path / "unreadable.txt").read_text() == "a\n"
