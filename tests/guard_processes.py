"""Train on two processes of which one fails, for tests/unit/callbacks/test_guard.py.

python guard_processes.py
"""

import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from scalablevit_pl.callbacks.guard import LossGuard, SharedEnd


class Line(pl.LightningModule):
    """The loss is (w x)², x the mean of a batch; in one batch the gradient may become NaN."""

    def __init__(self, spoil_gradient_in: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5]))
        self.fixed = nn.Parameter(torch.tensor([1.0]), requires_grad=False)
        self.spoil_gradient_in = spoil_gradient_in

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = (self.weight * batch["value"].mean()).square().sum()
        if batch_idx == self.spoil_gradient_in:
            loss = loss + (0.0 * self.weight).sqrt().sum()  # 0, and 0 · ∞ its derivative
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def samples(wrong: dict[int, float]) -> list[dict[str, Any]]:
    """Return twelve ones, some of them replaced."""
    return [{"value": wrong.get(index, 1.0), "index": index, "path": f"{index}.jpg"} for index in range(12)]


class Failing(Line):
    """Fail on the first process."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if self.global_rank == 0 and batch_idx == 2:
            raise ValueError("only here")
        return super().training_step(batch, batch_idx)


def lose(rank: int, folder: Path) -> None:
    """Train on two processes, of which the second has an infinite loss."""
    os.chdir(folder)
    train(Line(), samples({5: float("inf")}))


def train(module: Line, values: list[dict[str, Any]]) -> bool:
    """Return whether training succeeded, and write the error if it did not."""
    loader = DataLoader(values[int(os.environ.get("LOCAL_RANK", 0)) :: 2], batch_size=2)
    trainer = pl.Trainer(
        use_distributed_sampler=False,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        logger=False,
        callbacks=[LossGuard(Path()), SharedEnd()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(module, loader)
    except ValueError as error:
        Path(f"error.{trainer.global_rank}").write_text(str(error))
        return False
    return True


if __name__ == "__main__":
    sys.exit(0 if train(Failing(), samples({})) else 2)
