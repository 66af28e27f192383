"""The record of a run: what was resolved, what its checkpoints need to be used alone, and its curves."""

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from scalablevit_pl.callbacks.metrics_log import MetricsLog, curve
from scalablevit_pl.plotting import draw_curves
from scalablevit_pl.run_folder import RESOLVED, differences
from scalablevit_pl.storage import save_json
from scalablevit_pl.weights.checkpoint import RECORD_KEY, SCHEMA, describe_network, same_classes

logger = logging.getLogger(__name__)
CURVES = ("train/loss", "val/loss", "val_ema/loss", "train/top1", "val/top1", "val_ema/top1", "train/lr")


class RunRecord(pl.Callback):
    """Compare data and network before the first step, write the record into checkpoints, `resolved.json`, `curves.png`.

    Args:
        folder: The run folder.
        config: The run's configuration in plain values.
        stored: The record of the checkpoint that the weights come from, if any; the data must agree with it.
        command: The command as it was typed, for the record.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], stored: dict[str, Any] | None = None, command: str = ""
    ) -> None:
        self.folder = folder
        self.config = config
        earlier = (stored or {}).get("command")
        self.command = f"{earlier}\n{command}" if earlier else command
        self.stored = stored

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that network, data and stored weights speak of the same classes and images.

        Raises:
            ValueError: If they do not.
        """
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        classes, outputs = len(datamodule.class_names), pl_module.num_classes
        if classes < 2:
            raise ValueError(f"the data has the classes {datamodule.class_names}: at least two are needed")
        if classes != outputs:
            raise ValueError(
                f"the data has {classes} classes but the network has num_classes={outputs}: set "
                f"--model.network.num_classes={classes}, for a timm network --model.network.dict_kwargs.num_classes, "
                "for one that started from weights --model.network.config.num_classes"
            )
        if self.stored is not None:
            self._compare_with_stored(datamodule)

    def _compare_with_stored(self, datamodule: Any) -> None:
        current = {"class_names": datamodule.class_names, "preprocessing": datamodule.preprocessing.to_dict()}
        stored = {key: self.stored[key] for key in current} if self.stored else current
        if same_classes(stored["class_names"], current["class_names"]):
            current["class_names"] = stored["class_names"]
        changed = differences(stored, current)
        if changed:
            raise ValueError(
                f"the data is not what the weights were trained with: {'; '.join(changed[:3])}: use the same data and "
                "preprocessing"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say and save what was resolved; go on with the metrics of an earlier part of the run.

        Raises:
            ValueError: If a resumed run would train with another global batch than before, or goes on in the middle of
                an epoch that is cut into batches in another way now.
        """
        self._compare_with_trained(trainer, pl_module)
        resolved: dict[str, Any] = pl_module.resolved  # type: ignore[assignment]
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        origin = {"command": self.command, "weights": self.config.get("weights")}
        save_json(resolved | origin, self.folder / RESOLVED)
        logger.info(
            "%(parameters)s parameters, %(trainable_parameters)s of them trainable; global batch %(global_batch)s, "
            "learning rate %(lr).3g, %(total_steps)s steps of which %(warmup_steps)s warm-up, "
            "%(steps_per_epoch)s steps and %(samples_per_epoch)s samples an epoch",
            {key: f"{value:,}" if isinstance(value, int) else value for key, value in resolved.items()},
        )
        for log in self._metrics_logs(trainer):
            log.continue_from(trainer.global_step)

    def _compare_with_trained(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        resolved: dict[str, Any] = pl_module.resolved  # type: ignore[assignment]
        stored = self.stored or {}
        earlier = stored.get("global_batch", resolved["global_batch"])
        if resolved["global_batch"] != earlier:
            raise ValueError(
                f"the run had a global batch of {earlier} and would go on with one of {resolved['global_batch']}: "
                "choose batch size, devices and accumulation so that it stays the same"
            )
        batches = stored.get("batches_per_epoch", trainer.num_training_batches)
        if stored.get("batch", 0) > 0 and batches != trainer.num_training_batches:
            raise ValueError(
                f"the checkpoint is from the middle of an epoch of {batches} batches a process, of which there would "
                f"be {trainer.num_training_batches} now: keep batch size and number of processes, or go on from a "
                "checkpoint of an epoch's end"
            )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what it takes to rebuild and use the network without this run's configuration."""
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        checkpoint[RECORD_KEY] = {
            "schema": SCHEMA,
            "network": describe_network(pl_module.network, _network_section(self.config)),  # type: ignore[arg-type]
            "class_names": list(datamodule.class_names),
            "preprocessing": datamodule.preprocessing.to_dict(),
            "config": self.config,
            "command": self.command,
            "global_batch": pl_module.resolved["global_batch"],  # type: ignore[index]
            "batches_per_epoch": trainer.num_training_batches,
            "batch": datamodule.state_dict().get("batch", 0),
        }

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the numbers so far; those of an epoch are logged after its last hook."""
        for log in self._metrics_logs(trainer):
            if trainer.is_global_zero and log.rows:
                resolved: Any = pl_module.resolved
                curves = {name: curve(log.rows, name, resolved["steps_per_epoch"]) for name in CURVES}
                draw_curves(curves, self.folder / "curves.png", self.folder.name)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the curves to their end, and say where everything is."""
        self.on_train_epoch_start(trainer, pl_module)
        logger.info("results are in %s", self.folder)

    @staticmethod
    def _metrics_logs(trainer: pl.Trainer) -> list[MetricsLog]:
        return [log for log in trainer.loggers if isinstance(log, MetricsLog)]


def _network_section(config: dict[str, Any]) -> dict[str, Any] | None:
    section = config.get("model", {}).get("init_args", {}).get("network")
    return section if isinstance(section, dict) else None
