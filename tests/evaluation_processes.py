"""Evaluate in one to three processes, for tests/integration/test_distributed_evaluation.py."""

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
from scene_data import SceneDataModule
from small_tasks import Coarse
from torch import Tensor, nn
from torch.optim import SGD

from scalablevit_pl.callbacks.averaging import WeightAverage
from scalablevit_pl.callbacks.evaluation import EvaluationReport, PredictionWriter
from scalablevit_pl.data import ClassificationDataModule
from scalablevit_pl.preprocessing import Preprocessing
from scalablevit_pl.tasks import ClassificationTask, MultiLabelTask, SegmentationTask

WORLDS = (1, 2, 3)
COUNTS = (2, 5, 11)
BATCHES = (1, 2, 4)
CLASSES = 7
SIDE = 8


class Pixels(nn.Module):
    """Logits that are weighted sums of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = CLASSES
        weight = torch.randn(CLASSES, 3 * SIDE * SIDE, generator=torch.Generator().manual_seed(0))
        self.weight = nn.Parameter(weight / 8)

    def forward(self, image: Tensor) -> Tensor:
        return image.flatten(1) @ self.weight.T


def make_data(folder: Path, count: int, batch_size: int, side: int = SIDE, **options: Any) -> ClassificationDataModule:
    return ClassificationDataModule(
        str(folder / f"data_{count}"),
        val_split="test",
        batch_size=batch_size,
        num_workers=0,
        preprocessing=Preprocessing(input_size=side, crop_pct=1.0),
        augmentation=None,
        **options,
    )


def make_scenes(folder: Path, batch_size: int) -> SceneDataModule:
    return SceneDataModule(str(folder / "scenes"), val_split="test", batch_size=batch_size, num_workers=0)


def make_trainer(world: int, **options: Any) -> pl.Trainer:
    strategy = "ddp" if world > 1 else "auto"
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(accelerator="cpu", devices=world, strategy=strategy, max_epochs=1, **quiet, **options)


def evaluate(rank: int, world: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for count in COUNTS:
        for batch_size in BATCHES:
            trainer = make_trainer(world)
            trainer.validate(ClassificationTask(Pixels()), datamodule=make_data(folder, count, batch_size))
            metrics = trainer.callback_metrics
            results[f"validate {count} {batch_size}"] = {name: value.item() for name, value in metrics.items()}
        trainer = make_trainer(world)
        trainer.validate(MultiLabelTask(Pixels()), datamodule=make_data(folder, count, 2, label_column="tags"))
        results[f"tags {count}"] = {name: value.item() for name, value in trainer.callback_metrics.items()}
    report = folder / f"report_{world}"
    report.mkdir(exist_ok=True)
    trainer = make_trainer(world, callbacks=[EvaluationReport(report, {})])
    trainer.test(ClassificationTask(Pixels()), datamodule=make_data(folder, 2, 1))
    trainer = make_trainer(world, callbacks=[PredictionWriter(folder / f"predicted_{world}.csv")])
    trainer.predict(ClassificationTask(Pixels()), datamodule=make_data(folder, 5, 1), return_predictions=False)
    for batch_size in BATCHES:
        trainer = make_trainer(world)
        trainer.validate(SegmentationTask(Coarse()), datamodule=make_scenes(folder, batch_size))
        results[f"scenes {batch_size}"] = {name: value.item() for name, value in trainer.callback_metrics.items()}
    report = folder / f"processes_{world}/scenes"
    report.mkdir(parents=True, exist_ok=True)
    trainer = make_trainer(world, callbacks=[EvaluationReport(report, {})])
    trainer.test(SegmentationTask(Coarse(), tta="flip"), datamodule=make_scenes(folder, 2))
    trainer = make_trainer(world, callbacks=[PredictionWriter(report)])
    trainer.predict(SegmentationTask(Coarse()), datamodule=make_scenes(folder, 2), return_predictions=False)
    # DDP sends batch norm's statistics from the first process to the others before each batch.
    network = timm.create_model("test_resnet.r160_in1k", num_classes=CLASSES)
    average = WeightAverage(0.9)
    trainer = make_trainer(world, limit_train_batches=2, callbacks=[average])
    trainer.fit(ClassificationTask(network, partial(SGD, lr=0.01)), datamodule=make_data(folder, 11, 1, side=64))
    results["fit"] = {name: value.item() for name, value in trainer.callback_metrics.items()}
    torch.save(average.network.state_dict(), folder / f"average_{world}_{rank}.pt")
    (folder / f"result_{world}_{rank}.json").write_text(json.dumps(results))
