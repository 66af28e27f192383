"""Where a run's weights come from, if it does not begin with random ones."""

import logging
from typing import Any

import lightning.pytorch as pl
import torch

from scalablevit_pl.weights.checkpoint import TrainedClassifier, same_classes

logger = logging.getLogger(__name__)


class StartFromWeights(pl.Callback):
    """Put trained weights into the network before the first step, strictly.

    A fit on other classes keeps its new last layer, which is said; all else must fit.

    Args:
        trained: The trained classifier.
        source: What to call it.
    """

    def __init__(self, trained: TrainedClassifier, source: str) -> None:
        self.trained = trained
        self.source = source

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load the weights.

        Raises:
            ValueError: If they are not those of the network.
        """
        network: Any = pl_module.network
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        weights = self.trained.network.state_dict()
        classifier: str = network.pretrained_cfg["classifier"]
        last_layer: set[str] = set()
        if not same_classes(self.trained.class_names, datamodule.class_names):
            last_layer = {name for name in weights if name.startswith(f"{classifier}.")}
        own = {name: tensor for name, tensor in network.state_dict().items() if name in last_layer}
        try:
            network.load_state_dict({name: tensor for name, tensor in weights.items() if name not in last_layer} | own)
        except RuntimeError as error:
            raise ValueError(
                f"the weights of {self.source!r} do not fit the network: {' '.join(str(error).split())[:300]}"
            ) from error
        if last_layer:
            logger.info(
                "of %s all but the last layer is used: %s is new and random, for %d classes (%s) instead of %d (%s)",
                self.source,
                classifier,
                len(datamodule.class_names),
                _some(datamodule.class_names),
                len(self.trained.class_names),
                _some(self.trained.class_names),
            )
        del self.trained  # a second copy of the weights


class SameStart(pl.Callback):
    """Refuse to start where the processes have found different weights or checkpoints.

    Each process that `torchrun` or a cluster starts looks for itself: a branch on the Hub may move between two looks,
    and a run folder may lie on a disk that only one node has.

    Args:
        source: Checkpoint or weights that this process starts from; None for random ones.
        step: Optimizer steps that have been made with them.
    """

    def __init__(self, source: str | None, step: int | None) -> None:
        self.start = (source, step)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compare what all processes start from.

        Raises:
            ValueError: If it is not the same; all processes raise it.
        """
        if trainer.world_size == 1:
            return
        starts: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(starts, self.start)
        for rank, start in enumerate(starts):
            if start != starts[0]:
                raise ValueError(
                    f"process 0 starts from {_said(*starts[0])} and process {rank} from {_said(*start)}: give weights "
                    "with their commit, OWNER/NAME@COMMIT, and a run folder that all nodes share"
                )


def _said(source: str | None, step: int | None) -> str:
    if source is None:
        return "random weights"
    return repr(source) if step is None else f"{source!r} at step {step}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
