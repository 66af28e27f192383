"""What stops a run that has gone wrong: a loss that is no number, weights that are none, processes left alone."""

import logging
import subprocess
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.optim import Optimizer

from scalablevit_pl.callbacks.preemption import PreemptedError
from scalablevit_pl.storage import save_json

logger = logging.getLogger(__name__)
ENDS_OF_ALL = (KeyboardInterrupt, PreemptedError, SIGTERMException)  # which reach all processes
GRACE = 10.0  # seconds that other processes have to end by themselves


class NonFiniteError(ValueError):
    """A training whose loss or weights are no finite numbers any more, raised by all of its processes."""

    raised_by_all = True


class LossGuard(pl.Callback):
    """Stop a training whose loss is NaN or infinite, before the optimizer sees it, on all processes at once.

    What the losses are is asked before the backward pass, which is queued meanwhile, and looked at after it, where the
    answer has long been there: a GPU never waits for it. Gradients that overflow in half precision are the scaler's
    business; weights that are spoilt all the same are not written into checkpoints, so that the newest one is good.

    Args:
        folder: The run folder; the offending batch is recorded in its `nonfinite.json`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.batch: dict[str, Any] = {}
        self.asked: tuple[Tensor, Tensor, torch.cuda.Event | None] | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember which samples these are."""
        self.batch = {name: batch[name] for name in ("index", "path") if name in batch} | {"batch": batch_idx}

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Ask which processes have a loss that is no finite number, without waiting for the answer."""
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

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Stop before the step that would spoil the weights.

        Raises:
            NonFiniteError: If the loss of a process is no finite number.
        """
        self._check(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop at a batch that only adds to the gradients, too.

        Raises:
            NonFiniteError: If the loss of a process is no finite number.
        """
        self._check(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to write weights that are no finite numbers.

        Raises:
            NonFiniteError: If there are some, as after a step with gradients that are none.
        """
        # A sum is no finite number where one of its parts is none; one transfer asks for all.
        sums = [parameter.detach().sum(dtype=torch.float32) for parameter in pl_module.parameters()]
        if sums and not torch.stack(sums).isfinite().all():
            raise NonFiniteError(
                f"the weights are no finite numbers after {trainer.global_step} steps although the loss was one, so "
                f"they are not saved: {_named(self._last_checkpoint())}: start with a smaller --model.optimizer.lr, "
                "with --trainer.gradient_clip_val or with --trainer.precision 32-true"
            )

    def _check(self, trainer: pl.Trainer) -> None:
        if self.asked is None:
            return
        (spoilt, loss, event), self.asked = self.asked, None
        if event is not None:
            event.synchronize()
        ranks = [rank for rank, count in enumerate(spoilt.tolist()) if count]
        if ranks:
            self._stop(trainer, ranks, loss)

    def _stop(self, trainer: pl.Trainer, ranks: list[int], loss: Tensor) -> None:
        """Record the batch where it is this process's, and raise on all.

        Raises:
            NonFiniteError: Always.
        """
        rank, rate = trainer.global_rank, max(group["lr"] for group in trainer.optimizers[0].param_groups)
        last = self._last_checkpoint()
        if rank in ranks:
            record = {
                "epoch": trainer.current_epoch,
                "step": trainer.global_step,
                "batch": self.batch.pop("batch"),
                "rank": rank,
                "lr": rate,
                "loss": str(loss.item()),  # JSON has no word for it
                "last_checkpoint": str(last) if last else None,
                **{name: _plain(values) for name, values in self.batch.items()},
            }
            save_json(record, self._record(trainer, rank))
        if trainer.world_size > 1:
            torch.distributed.barrier()  # whoever raises first takes the others down, who shall have written theirs
        files = " and ".join(str(self._record(trainer, rank)) for rank in ranks)
        raise NonFiniteError(
            f"the loss is no finite number in step {trainer.global_step} of epoch {trainer.current_epoch} at a "
            f"learning rate of {rate:.3g}: {_named(last)}, and the batch is in {files}: look at its images, or start "
            "with a smaller --model.optimizer.lr"
        )

    def _record(self, trainer: pl.Trainer, rank: int) -> Path:
        return self.folder / ("nonfinite.json" if trainer.world_size == 1 else f"nonfinite.rank{rank}.json")

    def _last_checkpoint(self) -> Path | None:
        """Return the newest checkpoint of the run; those with weights that are no numbers are never written."""
        paths = [path for path in (self.folder / "checkpoints").glob("*.ckpt") if not path.name.startswith(".")]
        return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def _named(checkpoint: Path | None) -> str:
    return f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"


def _plain(values: Any) -> list[Any]:
    return list(values.tolist()) if isinstance(values, Tensor) else list(values)


class UnreadableList(pl.Callback):
    """Keep `unreadable.txt`, which names each image that a process of the run could not read, a line each.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write what is new."""
        if len(trainer.datamodule.unreadable) > self.written:  # type: ignore[attr-defined]
            self._write(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what the evaluation has met."""
        self._write(trainer)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what the evaluation has met."""
        self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what another process may have overwritten."""
        self._write(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write all, since one too many is what mostly ends here."""
        self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        """Add lines to those that are there.

        Two processes may do so at once, and lines of one be lost: each adds all of its own again at its next time.
        """
        lines: list[str] = getattr(trainer.datamodule, "unreadable", [])  # type: ignore[attr-defined]
        path = self.folder / "unreadable.txt"
        there = path.read_text(encoding="utf-8").splitlines() if lines and path.is_file() else []
        missing = [line for line in lines if line not in there]
        if missing:
            aside = path.with_name(f".{path.name}.{trainer.global_rank}.part")
            aside.write_text("".join(f"{line}\n" for line in [*there, *missing]), encoding="utf-8")
            aside.replace(path)
        self.written = len(lines)


class SharedEnd(pl.Callback):
    """End the processes that this one has started when an error ends it.

    Lightning ends all when one that it started fails. When the first one fails, the others would wait for it in the
    next exchange of gradients, on GPUs for ever.
    """

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the others some time to end by themselves, then end them."""
        started: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
        if not started or isinstance(exception, ENDS_OF_ALL):
            return
        # Lightning's own watch over the same list would end this process before it can say what happened.
        processes = list(started)
        started.clear()
        deadline = time.monotonic() + GRACE
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
