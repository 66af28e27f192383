"""Stop a run that has failed: NaN losses, non-finite weights, orphaned processes."""

import logging
import subprocess
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from scalablevit_pl.callbacks.preemption import PreemptedError
from scalablevit_pl.run_folder import resumable_checkpoints
from scalablevit_pl.storage import save_json

logger = logging.getLogger(__name__)
SHARED_ENDS = (KeyboardInterrupt, PreemptedError, SIGTERMException)  # these reach all processes
GRACE = 10.0  # seconds for other processes to end by themselves


class NonFiniteError(ValueError):
    """The loss or the weights became NaN or infinite; raised by all processes."""

    raised_by_all = True


class LossGuard(pl.Callback):
    """Stop a training whose loss is NaN or infinite, before the optimizer sees it, on all processes at once.

    The losses are compared over the processes before the backward pass and read after it, when the answer has arrived
    long ago, so a GPU never waits for it. Gradients that overflow in half precision are left to the scaler; non-finite
    weights are never written into checkpoints, so the newest one is good.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.batch: dict[str, Any] = {}
        self.asked: tuple[Tensor, Tensor, torch.cuda.Event | None] | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the samples of the batch."""
        self.batch = {name: batch[name] for name in ("index", "path") if name in batch} | {"batch": batch_idx}

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Find the processes with a non-finite loss, without waiting for the answer."""
        loss = loss.detach()
        spoilt = torch.zeros(trainer.world_size, device=loss.device)
        spoilt[trainer.global_rank] = ~loss.isfinite().all()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(spoilt)
        event = None
        if loss.is_cuda:
            spoilt = spoilt.to("cpu", non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self.asked = (spoilt, loss, event)

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Stop before the step that would make the weights non-finite, and also at a batch without a step."""
        if self.asked is None:
            return
        (spoilt, loss, event), self.asked = self.asked, None
        if event is not None:
            event.synchronize()
        ranks = [rank for rank, count in enumerate(spoilt.tolist()) if count]
        if ranks:
            self._stop(trainer, ranks, loss)

    on_train_batch_end = on_before_optimizer_step

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to save non-finite weights."""
        # The sum of a tensor is non-finite if an element is; one transfer covers all tensors.
        sums = [parameter.detach().sum(dtype=torch.float32) for parameter in pl_module.parameters()]
        if sums and not torch.stack(sums).isfinite().all():
            raise NonFiniteError(
                f"the weights became NaN or infinite after {trainer.global_step} steps and were not saved; "
                f"{_named(self._last_checkpoint())}: start with a smaller --model.optimizer.lr, with "
                "--trainer.gradient_clip_val or with --trainer.precision 32-true"
            )

    def _stop(self, trainer: pl.Trainer, ranks: list[int], loss: Tensor) -> None:
        """Record the batch of this process if its loss is non-finite, and raise on all processes."""
        rank, rate = trainer.global_rank, max(group["lr"] for group in trainer.optimizers[0].param_groups)
        last = self._last_checkpoint()
        if rank in ranks:
            record = {
                "epoch": trainer.current_epoch,
                "step": trainer.global_step,
                "batch": self.batch.pop("batch"),
                "rank": rank,
                "lr": rate,
                "loss": str(loss.item()),  # JSON has no NaN
                "last_checkpoint": str(last) if last else None,
            }
            for name, values in self.batch.items():
                record[name] = values.tolist() if isinstance(values, Tensor) else list(values)
            save_json(record, self._record(trainer, rank))
        if trainer.world_size > 1:
            torch.distributed.barrier()  # the first to raise ends the others, which must have written their records
        files = " and ".join(str(self._record(trainer, rank)) for rank in ranks)
        raise NonFiniteError(
            f"the loss became NaN or infinite at step {trainer.global_step} of epoch {trainer.current_epoch} with "
            f"learning rate {rate:.3g}; {_named(last)}, and {files} records the batch: check its images, or start with "
            "a smaller --model.optimizer.lr"
        )

    def _record(self, trainer: pl.Trainer, rank: int) -> Path:
        return self.folder / ("nonfinite.json" if trainer.world_size == 1 else f"nonfinite.rank{rank}.json")

    def _last_checkpoint(self) -> Path | None:
        return next(iter(resumable_checkpoints(self.folder)), None)  # non-finite weights are never written


def _named(checkpoint: Path | None) -> str:
    return f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"


class UnreadableList(pl.Callback):
    """Maintain `unreadable.txt`, which names each image that a process of the run could not read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written = 0

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Write new entries."""
        if len(_unreadable(trainer)) > self.written:
            self.on_validation_end(trainer)

    def on_validation_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Append missing lines.

        When two processes write at once, lines of one are lost: each appends all of its lines again the next time.
        """
        lines = _unreadable(trainer)
        path = self.folder / "unreadable.txt"
        there = path.read_text(encoding="utf-8").splitlines() if lines and path.is_file() else []
        missing = [line for line in lines if line not in there]
        if missing:
            aside = path.with_name(f".{path.name}.{trainer.global_rank}.part")
            aside.write_text("".join(f"{line}\n" for line in [*there, *missing]), encoding="utf-8")
            aside.replace(path)
        self.written = len(lines)

    # Too many unreadable images are a common reason of an exception.
    on_test_end = on_train_end = on_exception = on_validation_end


def _unreadable(trainer: pl.Trainer) -> list[str]:
    """Return the unreadable images that the datamodule has met; a user's own may not track them."""
    return list(getattr(trainer.datamodule, "unreadable", []))  # type: ignore[attr-defined]


class SharedEnd(pl.Callback):
    """End the processes that this one has started when an error ends it.

    Lightning ends all processes when one that it started fails. If the first one fails, the others would wait for it in
    the next exchange of gradients, on GPUs indefinitely.
    """

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Wait for the other processes to end, then kill them."""
        started: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
        if not started or isinstance(exception, SHARED_ENDS):
            return
        # Lightning watches the same list and would end this process before it can report the error.
        processes = list(started)
        started.clear()
        deadline = time.monotonic() + GRACE
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
