"""Exponential moving average of the weights, kept besides the trained ones."""

import copy
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from scalablevit_pl.text import one_line
from scalablevit_pl.weights.checkpoint import AVERAGED

PREFIX = "network."
EMA = "ema"


class WeightAverage(pl.Callback):
    """Average the network's weights over the optimizer steps, and evaluate both sets in one pass over the data.

    The average is a copy of the network in eval mode, which nothing else trains, wraps or saves; the trained network
    never holds other weights than its own. Checkpoints hold it as `ema_state_dict`, and its metrics are logged as
    `val_ema/…` and `test_ema/…`.

    Buffers, such as batch norm's statistics, are copied: they are counters or moving averages themselves, of far fewer
    steps. A step that the loss scaler of float16 skips counts as a step with the same weights, since the average
    follows the number of steps, which a resumed run knows.

    Args:
        decay: Fraction of the average that is kept at a step; typically 0.9999. None disables averaging.
        warmup: Keep less at the first steps, at most (1 + t) / (10 + t) at step t, so that the initial weights never
            dominate.

    Attributes:
        network: The averaged network, once there is one.
        reported: Whether a test reports the predictions of the averaged weights, if there are any, or of the raw ones.

    Raises:
        ValueError: If the decay is out of range.
    """

    def __init__(self, decay: float | None = None, warmup: bool = True) -> None:
        if decay is not None and not 0.0 <= decay < 1.0:
            raise ValueError(f"ema.decay must be at least 0 and below 1, or null to disable averaging, got {decay}")
        self.decay = decay
        self.warmup = warmup
        self.network: nn.Module | None = None
        self.reported = True
        self._stored: Mapping[str, Tensor] | None = None
        self._step = 0

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Read averaged weights from a checkpoint."""
        self._stored = checkpoint.get(AVERAGED)
        if trainer.state.fn != "fit":
            return
        if self.decay is None and self._stored is not None:
            raise ValueError(
                "the checkpoint holds averaged weights, which the resumed run would drop: set --ema.decay to the run's"
            )
        if self.decay is not None and self._stored is None:
            raise ValueError(
                f"the checkpoint holds no averaged weights to continue with ema.decay={self.decay}: set it to null, or "
                "start from its weights with --weights"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Initialize the average with the current weights, or continue that of the checkpoint."""
        if self.decay is None:
            return
        for name, parameter in pl_module.network.named_parameters():  # type: ignore[union-attr]
            if parameter.dtype in (torch.float16, torch.bfloat16):
                raise ValueError(
                    f"{name} is stored as {parameter.dtype}, too coarse for a moving average: train with "
                    "--trainer.precision=bf16-mixed, or set --ema.decay null"
                )
        self._begin(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count steps from where the training starts or resumes."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Update the average if the batch completed an optimizer step."""
        if self.network is not None and self.decay is not None and trainer.global_step != self._step:
            self._step = trainer.global_step
            self._update(pl_module.network, self.decay_at(self._step - 1))  # type: ignore[arg-type]

    def decay_at(self, step: int) -> float:
        """Return the fraction of the average that is kept at an optimizer step, counted from 0."""
        decay = self.decay or 0.0
        return min(decay, (1 + step) / (10 + step)) if self.warmup else decay

    @torch.no_grad()
    def _update(self, trained: nn.Module, decay: float) -> None:
        network: Any = self.network
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # one kernel for many tensors
        average(list(network.parameters()), list(trained.parameters()), 0)
        for copied, buffer in zip(network.buffers(), trained.buffers(), strict=True):
            copied.copy_(buffer)

    def _begin(self, pl_module: pl.LightningModule) -> None:
        """Build the averaged network and let the task evaluate it."""
        # A copy of a network that was compiled in place is not compiled.
        network: Any = copy.deepcopy(pl_module.network)
        network.eval().requires_grad_(False)
        if self._stored is not None:
            try:
                network.load_state_dict({name.removeprefix(PREFIX): value for name, value in self._stored.items()})
            except RuntimeError as error:
                raise ValueError(f"the averaged weights do not fit the network: {one_line(error)}") from error
            self._stored = None  # a further copy of the weights
        self.network = network
        task: Any = pl_module
        task.add_network(EMA, network, reported=self.reported)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Broadcast the buffers of the first process, as DDP does with those of the trained network."""
        if self._stored is not None:
            self._begin(pl_module)
        if self.network is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
            for buffer in self.network.buffers():
                torch.distributed.broadcast(buffer, 0)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Use the averaged weights of the checkpoint, if it holds any."""
        if self._stored is not None:
            self._begin(pl_module)

    on_predict_start = on_test_start

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the averaged weights under the names of the raw ones."""
        if self.network is not None:
            checkpoint[AVERAGED] = {f"{PREFIX}{name}": value for name, value in self.network.state_dict().items()}
