"""Learning rates of a resumed training on one or two processes, for tests/unit/tasks/test_fit.py.

Each of two processes imports this file, so it imports only what those are forked with.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

from scalablevit_pl.optim import WarmupCosineSchedule
from scalablevit_pl.tasks import ClassificationTask

CLASSES = 7
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


class Rates(pl.Callback):
    """Record the optimizer's rate in each batch, and stop after an epoch if asked to."""

    def __init__(self, stop_after: int | None) -> None:
        self.seen: list[float] = []
        self.stop_after = stop_after

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.seen += [group["lr"] for group in trainer.optimizers[0].param_groups][:1]

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 == self.stop_after


def tiny_task() -> ClassificationTask:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES))
    network.num_classes = CLASSES
    return ClassificationTask(network, partial(AdamW, lr=5e-3), partial(WarmupCosineSchedule, warmup_epochs=1), 16)


def trace(folder: Path, processes: int) -> dict[str, Any]:
    """Train four epochs of 20 samples, resumed after two of them, without accumulation and with."""
    images = torch.randn(20, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    samples = [{"image": image, "label": index % CLASSES} for index, image in enumerate(images)]
    found: dict[str, Any] = {}
    for accumulated in (1, 4):
        checkpoint, rates = folder / f"{accumulated}.ckpt", []
        for stop_after, start in ((2, None), (None, checkpoint)):
            recorder, task = Rates(stop_after), tiny_task()
            trainer = pl.Trainer(
                **QUIET,
                accelerator="cpu",
                devices=processes,
                strategy="ddp" if processes > 1 else "auto",
                max_epochs=4,
                accumulate_grad_batches=accumulated,
                callbacks=[recorder],
                default_root_dir=folder,
            )
            trainer.fit(task, DataLoader(samples, batch_size=2), ckpt_path=start)
            if start is None:
                trainer.save_checkpoint(checkpoint)
            rates.append(recorder.seen)
        found[str(accumulated)] = {"rates": rates, "resolved": task.resolved, "steps": trainer.global_step}
    return found


def in_a_process(rank: int, folder: Path) -> None:
    """Train as one of two processes that torchrun would have started."""
    (folder / f"{rank}.json").write_text(json.dumps(trace(folder, 2)))
    torch.distributed.destroy_process_group()
