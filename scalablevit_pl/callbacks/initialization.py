"""Start a run from trained weights."""

import logging
from typing import Any

import lightning.pytorch as pl
import torch

from scalablevit_pl.models.loading import load_tensors
from scalablevit_pl.run_folder import differences
from scalablevit_pl.text import listed
from scalablevit_pl.weights.stored import CLASSIFICATION, StoredModel, same_classes

logger = logging.getLogger(__name__)

# Arguments of a backbone that belong to a training, not to its weights.
TRAINING_ARGUMENTS = ("drop_path_rate", "drop_rate", "attn_drop_rate")


class StartFromWeights(pl.Callback):
    """Load trained weights into the network before the first step, strictly.

    The whole network is loaded if task and classes are the same; all but the last layer for other classes; the backbone
    alone for another task. The rest is new and random, which is logged.
    """

    def __init__(self, stored: StoredModel, source: str) -> None:
        self.stored = stored
        self.source = source

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load the weights."""
        network: Any = pl_module.network
        names = list(trainer.datamodule.class_names)  # type: ignore[attr-defined]
        if self.stored.description.task != getattr(network, "task", CLASSIFICATION):
            self._load_backbone(network, stage)
            self._compare_normalization(trainer.datamodule.preprocessing)  # type: ignore[attr-defined]
        elif same_classes(self.stored.class_names, names):
            load_tensors(network, self.stored.tensors, self.source)
        else:
            self._load_features(network, names)
        del self.stored  # a second copy of the weights

    def _load_backbone(self, network: Any, stage: str) -> None:
        task = self.stored.description.task
        if stage != "fit":
            raise ValueError(f"{self.source!r} is for {task}, so the head would be random: train it with fit first")
        own, theirs = (_backbone_config(config) for config in (network.config, self.stored.description.config))
        differing = differences(theirs, own)
        if differing:
            raise ValueError(
                f"the backbone of {self.source!r} is not the network's: {'; '.join(differing[:3])}: use the same "
                "arguments for both"
            )
        load_tensors(network.backbone, self.stored.tensors, self.source, prefix="backbone.")
        logger.info("%s is for %s: its backbone is used, the head is new and random", self.source, task)

    def _compare_normalization(self, preprocessing: Any) -> None:
        for name in ("mean", "std"):
            own, theirs = (list(getattr(each, name, None) or ()) for each in (preprocessing, self.stored.preprocessing))
            if own and theirs and own != theirs:
                text = "the data has %s %s and %s was trained with %s: set --data.preprocessing.%s to the same values"
                logger.warning(text, name, own, self.source, theirs, name)

    def _load_features(self, network: Any, names: list[str]) -> None:
        load_tensors(network, self.stored.tensors, self.source, except_for=network.last_layers)
        before, now = (f"{len(each)} classes ({listed(each, 3)})" for each in (self.stored.class_names, names))
        text = "%s: the last layer (%s) is new and random, for %s instead of %s"
        logger.info(text, self.source, ", ".join(network.last_layers), now, before)


def _backbone_config(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config["backbone"].items() if name not in TRAINING_ARGUMENTS}


class SameStart(pl.Callback):
    """Check that all processes start from the same weights or checkpoint.

    Each process that `torchrun` or a cluster starts resolves them itself: a branch on the Hub may move in between, and
    a run folder may be on a disk that only one node has.
    """

    def __init__(self, source: str | None, step: int | None) -> None:
        self.start = (source, step)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compare the starts of all processes."""
        if trainer.world_size == 1:
            return
        starts: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(starts, self.start)
        for rank, start in enumerate(starts):
            if start != starts[0]:
                raise ValueError(
                    f"process 0 starts from {_named(*starts[0])} and process {rank} from {_named(*start)}: give "
                    "weights with their commit, OWNER/NAME@COMMIT, and a run folder that all nodes share"
                )


def _named(source: str | None, step: int | None) -> str:
    if source is None:
        return "random weights"
    return repr(source) if step is None else f"{source!r} at step {step}"
