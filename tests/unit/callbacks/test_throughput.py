import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import PassThroughProfiler, SimpleProfiler
from torch import Tensor, nn

from scalablevit_pl.callbacks.throughput import Throughput

FETCH, TRAIN, VALIDATE, SAVE = 3.0, 1.0, 100.0, 20.0


class Clock:
    """A clock that goes on as it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Batches:
    """Batches of two images each, for each of which the clock goes on."""

    def __init__(self, clock: Clock, count: int, seconds: float) -> None:
        self.clock, self.count, self.seconds = clock, count, seconds

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for _ in range(self.count):
            self.clock.now += self.seconds
            yield {"image": torch.ones(2, 1)}


class Module(pl.LightningModule):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.layer, self.clock = nn.Linear(1, 1), clock

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.clock.now += TRAIN
        return self.layer(batch["image"]).sum()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.clock.now += VALIDATE

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Saves(pl.Callback):
    """Save a checkpoint after the third batch of an epoch, which takes time."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if args[-1] == 2:
            trainer.save_checkpoint(trainer.default_root_dir + "/x.ckpt")

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        pl_module.clock.now += SAVE


class Log(Logger):
    """Remember what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    name = version = "log"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step not in self.rows
        self.rows[step or 0] = metrics


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("profiler", [None, "simple"])
def test_only_training_is_counted(accumulated: int, profiler: str | None, tmp_path: Any) -> None:
    clock, log = Clock(), Log()
    throughput = Throughput(clock)
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=3,
        logger=log,
        log_every_n_steps=2,
        accumulate_grad_batches=accumulated,
        callbacks=[throughput, Saves()],
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        profiler=profiler,
    )
    module, steps = Module(clock), 8 // accumulated
    trainer.fit(module, Batches(clock, 8, FETCH), Batches(clock, 2, 0.0))
    batch = FETCH + TRAIN
    logged = [step for step in range(3 * steps) if step % 2]
    assert sorted(log.rows) == logged
    for step in logged:
        speed = log.rows[step]
        assert speed["speed/steps_per_second"] == pytest.approx(1.0 / batch / accumulated)
        assert speed["speed/images_per_second"] == pytest.approx(2.0 / batch)
        assert speed["speed/data_wait"] == pytest.approx(FETCH / batch)
        assert "speed/gpu_memory_gb" not in speed
        assert all(name.startswith("speed/") for name in speed)
    # In the third epoch it is known what an epoch takes in all: two validation batches and a checkpoint besides.
    last = logged[-2]
    pauses = 2 * (2 * VALIDATE + SAVE) + SAVE
    when = 2 * steps + (3 // accumulated if accumulated == 1 else 1)  # steps at the latest pause
    left = (3 * steps - 1 - last) * (batch * accumulated + pauses / when)
    assert log.rows[last]["speed/eta_hours"] == pytest.approx(left / 3600.0)
    if profiler:
        assert isinstance(copy.copy(trainer.profiler).inner, SimpleProfiler)
        assert "run_training_batch" in trainer.profiler.summary()


def begin(clock: Clock, throughput: Throughput, **settings: Any) -> tuple[Any, Callable[[float], None]]:
    """Start a training that knows nothing but a trainer's settings; return the trainer, and how to train a batch."""
    values = {"world_size": 1, "accumulate_grad_batches": 1, "log_every_n_steps": 10, "loggers": [], "global_step": 0}
    values |= {"estimated_stepping_batches": 10, "profiler": PassThroughProfiler()} | settings
    trainer: Any = SimpleNamespace(**values)
    module: Any = SimpleNamespace(device=torch.device("cpu"))
    throughput.on_train_start(trainer, module)

    def train(seconds: float) -> None:
        clock.now += FETCH
        throughput.on_fetch(clock.now - FETCH, clock.now)
        clock.now += seconds
        trainer.global_step += 1
        throughput.on_train_batch_end(trainer, module, None, {"image": torch.ones(2, 1)}, 0)

    return trainer, train


@pytest.mark.parametrize("pause", ["on_validation_start", "on_train_epoch_end"])
def test_a_resumed_training_of_three_processes_counts_its_own_steps_and_all_images(pause: str) -> None:
    clock = Clock()
    throughput = Throughput(clock)
    trainer, train = begin(clock, throughput, world_size=3, global_step=100, estimated_stepping_batches=110)
    for batch in range(4):
        train(TRAIN)
        if batch == 1:
            getattr(throughput, pause)(trainer, None)
            clock.now += VALIDATE
    assert throughput.speed["speed/images_per_second"] == pytest.approx(3 * 2 / (FETCH + TRAIN))
    # The pause came after two steps, and six are left.
    assert throughput.speed["speed/eta_hours"] * 3600.0 == pytest.approx(6 * (FETCH + TRAIN + VALIDATE / 2))


@pytest.mark.parametrize(("every", "seconds"), [(1, 7.0), (2, 7.0 + 5.0), (10, 7.0 + 5.0 + 2.0)])
def test_the_speed_is_that_since_the_log_before(every: int, seconds: float) -> None:
    clock = Clock()
    throughput = Throughput(clock)
    _, train = begin(clock, throughput, log_every_n_steps=every)
    for each in (1.0, 2.0, 5.0, 7.0):
        train(each)
    steps = min(every, 3)  # the first one begins the window
    assert throughput.speed["speed/steps_per_second"] == pytest.approx(steps / (steps * FETCH + seconds))
