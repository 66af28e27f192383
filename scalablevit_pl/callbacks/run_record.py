"""The record of a run: resolved settings, what checkpoints need to be used alone, and the curves."""

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from scalablevit_pl.callbacks.metrics_log import MetricsLog, curve
from scalablevit_pl.models.pretrained import PretrainedNetwork, network_class
from scalablevit_pl.plotting import PARTS, draw_curves
from scalablevit_pl.run_folder import RESOLVED, differences
from scalablevit_pl.storage import save_json
from scalablevit_pl.weights.checkpoint import RECORD_KEY, SCHEMA, describe_network
from scalablevit_pl.weights.stored import CLASSIFICATION, same_classes

logger = logging.getLogger(__name__)
CLASSES = "--model.network.num_classes"
Stored = dict[str, Any] | None


class RunRecord(pl.Callback):
    """Check data against network; write the record of checkpoints, `resolved.json` and `curves.png`."""

    def __init__(
        self, folder: Path, config: dict[str, Any], stored: Stored = None, command: str = "", option: str = CLASSES
    ) -> None:
        self.folder = folder
        self.config = config
        earlier = (stored or {}).get("command")
        self.command = f"{earlier}\n{command}" if earlier else command
        self.stored = stored
        self.option = option

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that network, data and stored weights agree on classes and images."""
        check_data(trainer.datamodule, pl_module, self.stored, self.option)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log and save the resolved settings; continue the metrics of an earlier part of the run."""
        task: Any = pl_module
        self._compare_with_trained(trainer, task.resolved)
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        origin = {"command": self.command, "weights": self.config.get("weights"), "metrics": metric_record(task)}
        save_json(task.resolved | origin, self.folder / RESOLVED)
        logger.info(
            "%(parameters)s parameters, %(trainable_parameters)s of them trainable; global batch %(global_batch)s, "
            "learning rate %(lr).3g, %(total_steps)s steps including %(warmup_steps)s of warm-up, "
            "%(steps_per_epoch)s steps and %(samples_per_epoch)s samples per epoch",
            {key: f"{value:,}" if isinstance(value, int) else value for key, value in task.resolved.items()},
        )
        for log in self._metrics_logs(trainer):
            log.continue_from(trainer.global_step)

    def _compare_with_trained(self, trainer: pl.Trainer, resolved: dict[str, Any]) -> None:
        stored = self.stored or {}
        earlier = stored.get("global_batch", resolved["global_batch"])
        if resolved["global_batch"] != earlier:
            raise ValueError(
                f"the run had a global batch of {earlier} and would continue with {resolved['global_batch']}: "
                "choose batch size, devices and accumulation so that it stays the same"
            )
        batches = stored.get("batches_per_epoch", trainer.num_training_batches)
        if stored.get("batch", 0) > 0 and batches != trainer.num_training_batches:
            raise ValueError(
                f"the checkpoint is from the middle of an epoch of {batches} batches per process, and there would be "
                f"{trainer.num_training_batches} now: keep batch size and number of processes, or resume from a "
                "checkpoint at the end of an epoch"
            )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what it takes to rebuild and use the network without this run's configuration."""
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        task: Any = pl_module
        checkpoint[RECORD_KEY] = {
            "schema": SCHEMA,
            "task": getattr(task.network, "task", CLASSIFICATION),
            "network": describe_network(task.network, _network_section(self.config)),
            "network_class": network_class(task.network) if isinstance(task.network, PretrainedNetwork) else None,
            "multi_label": getattr(task.network, "multi_label", False),
            "class_names": list(datamodule.class_names),
            "preprocessing": datamodule.preprocessing.to_dict(),
            "metrics": metric_record(task),
            "config": self.config,
            "command": self.command,
            "global_batch": task.resolved["global_batch"],
            "batches_per_epoch": trainer.num_training_batches,
            "batch": datamodule.state_dict().get("batch", 0),
        }

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the curves so far; an epoch's metrics are logged after its last hook."""
        task: Any = pl_module
        plotted = {name: metric for name, metric in task.described.items() if metric.plotted}
        labels = {name: metric.label for name, metric in plotted.items()}
        training = {name: metric.training for name, metric in plotted.items()}
        names = [f"{part}/{name}" for name in labels for part in PARTS]
        for log in self._metrics_logs(trainer):
            if trainer.is_global_zero and log.rows:
                steps = task.resolved["steps_per_epoch"]
                curves = {name: curve(log.rows, name, steps) for name in (*names, "train/lr")}
                draw_curves(curves, labels, self.folder / "curves.png", self.folder.name, training)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Complete the curves, and log where the results are."""
        self.on_train_epoch_start(trainer, pl_module)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            logger.info("the trial run has ended: it leaves no results")
        else:
            logger.info("results are in %s", self.folder)

    @staticmethod
    def _metrics_logs(trainer: pl.Trainer) -> list[MetricsLog]:
        return [log for log in trainer.loggers if isinstance(log, MetricsLog)]


def check_data(datamodule: Any, task: Any, stored: Stored = None, option: str = CLASSES) -> None:
    """Check that data after its `setup`, network and, if given, class names and preprocessing of weights agree."""
    names, outputs = list(datamodule.class_names), task.num_classes
    if outputs is not None and len(names) < 2:
        raise ValueError(f"the data has the classes {names}: at least two are needed")
    if stored is None:
        if outputs not in (None, len(names)):
            found = f"the data has {len(names)} classes but the network has num_classes={outputs}"
            raise ValueError(f"{found}: set {option}={len(names)}")
        return
    current = {"class_names": names, "preprocessing": datamodule.preprocessing.to_dict()}
    known = {key: stored[key] for key in current}
    if same_classes(known["class_names"], names):
        current["class_names"] = known["class_names"]
    changed = differences(known, current)
    if changed:
        raise ValueError(
            f"the data differs from what the weights were trained with: {'; '.join(changed[:3])}: use the same data "
            "and preprocessing"
        )


def metric_record(task: Any) -> dict[str, Any]:
    """Describe a task's metrics in plain values, for those who read a run without its task."""
    described = {name: dict(metric._asdict()) for name, metric in task.described.items()}
    return {"monitor": task.monitor, "mode": task.mode, "described": described}


def _network_section(config: dict[str, Any]) -> dict[str, Any] | None:
    section = config.get("model", {}).get("init_args", {}).get("network")
    return section if isinstance(section, dict) else None
