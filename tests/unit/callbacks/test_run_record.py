import json
import logging
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from scalablevit_pl.callbacks import run_record
from scalablevit_pl.callbacks.metrics_log import MetricsLog
from scalablevit_pl.callbacks.run_record import RunRecord, metric_record
from scalablevit_pl.models import PretrainedNetwork, create_model
from scalablevit_pl.preprocessing import Preprocessing
from scalablevit_pl.tasks import ClassificationTask, MetricInfo

NAMES = ["cat", "dog"]
SMALL = Preprocessing(28, 1.0)
STORED = {"class_names": NAMES, "preprocessing": json.loads(json.dumps(SMALL.to_dict())), "global_batch": 8}
TIMM = {"class_path": "timm.create_model", "init_args": {"model_name": "resnet18", "num_classes": 2}}
RESOLVED = {
    "parameters": 10,
    "trainable_parameters": 9,
    "global_batch": 8,
    "lr": 0.1,
    "total_steps": 20,
    "warmup_steps": 5,
    "steps_per_epoch": 10,
    "samples_per_epoch": 80,
}


def make_trainer(names: list[str] = NAMES, preprocessing: Preprocessing = SMALL, **values: Any) -> Any:
    datamodule = SimpleNamespace(
        class_names=names, preprocessing=preprocessing, state_dict=lambda: {"epoch": 2, "batch": 3}
    )
    return SimpleNamespace(datamodule=datamodule, **{"num_training_batches": 10} | values)


def make_module(num_classes: int | None = 2, network: nn.Module | None = None, **values: Any) -> Any:
    described = {"iou": MetricInfo("mean IoU", "mean_iou", True, "mixed"), "loss": MetricInfo("loss", "loss")}
    declared = {"monitor": "iou", "mode": "max", "described": described}
    return SimpleNamespace(num_classes=num_classes, network=network, resolved=RESOLVED, **declared | values)


METRICS = {
    "monitor": "iou",
    "mode": "max",
    "described": {
        "iou": {"label": "mean IoU", "hub_type": "mean_iou", "plotted": True, "training": "mixed"},
        "loss": {"label": "loss", "hub_type": "loss", "plotted": False, "training": "training"},
    },
}


@pytest.mark.parametrize("num_classes", [1, 3, 1000])
def test_another_number_of_classes_is_refused(num_classes: int, tmp_path: Path) -> None:
    message = f"the data has 2 classes but the network has num_classes={num_classes}: set --model.network.num_classes=2"
    with pytest.raises(ValueError, match=message):
        RunRecord(tmp_path, {}).setup(make_trainer(), make_module(num_classes), "fit")
    with pytest.raises(ValueError, match=r"set --other=2$"):
        RunRecord(tmp_path, {}, option="--other").setup(make_trainer(), make_module(num_classes), "fit")


def test_data_with_a_single_class_is_refused_where_classes_count(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the data has the classes .*: at least two are needed"):
        RunRecord(tmp_path, {}).setup(make_trainer(["cat"]), make_module(1), "fit")
    RunRecord(tmp_path, {}).setup(make_trainer(["cat"]), make_module(None), "fit")


@pytest.mark.parametrize("stored", [None, STORED])
def test_data_that_agrees_is_accepted(stored: dict[str, Any] | None, tmp_path: Path) -> None:
    RunRecord(tmp_path, {}, stored).setup(make_trainer(), make_module(), "test")


@pytest.mark.parametrize(
    ("names", "difference"),
    [(["dog", "cat"], "class_names[0] was 'cat'"), (["cat", "owl"], "[1] was 'dog' and is 'owl'")],
)
def test_other_class_names_than_the_stored_ones_are_refused(names: list[str], difference: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=f"the data differs from what the weights were trained with.*{re.escape(difference)}"
    ):
        RunRecord(tmp_path, {}, STORED).setup(make_trainer(names), make_module(), "test")


@pytest.mark.parametrize(
    "values",
    [{"input_size": 32}, {"crop_pct": 0.9}, {"interpolation": "bilinear"}, {"mean": (0.1,) * 3}, {"std": (0.1,) * 3}],
    ids=str,
)
def test_another_preprocessing_than_the_stored_one_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    other = Preprocessing(**{"input_size": 28, "crop_pct": 1.0} | values)
    with pytest.raises(ValueError, match=f"trained with: preprocessing.{next(iter(values))}"):
        RunRecord(tmp_path, {}, STORED).setup(make_trainer(preprocessing=other), make_module(), "test")


def test_checkpoints_carry_what_it_takes_to_use_the_network(tmp_path: Path) -> None:
    network, config = create_model("scalablevit_nano", 2), {"seed_everything": 0}
    checkpoint: dict[str, Any] = {"state_dict": {}}
    record = RunRecord(tmp_path, config, command="scalablevit fit")
    record.on_save_checkpoint(make_trainer(), make_module(network=network), checkpoint)
    own = {"schema": 1, "network": network.config, "config": config, "command": "scalablevit fit"}
    own |= {"batch": 3, "batches_per_epoch": 10, "metrics": METRICS}
    own |= {"task": "image-classification", "network_class": None, "multi_label": False}
    assert checkpoint["scalablevit_pl"] == STORED | own
    torch.save(checkpoint, tmp_path / "x.ckpt")
    assert torch.load(tmp_path / "x.ckpt", weights_only=True) == checkpoint


class Segmenter(PretrainedNetwork):
    task = "semantic-segmentation"
    config = {"num_classes": 2}  # noqa: RUF012


def test_checkpoints_name_task_and_class_of_a_network_outside_the_package(tmp_path: Path) -> None:
    checkpoint: dict[str, Any] = {}
    RunRecord(tmp_path, {}).on_save_checkpoint(make_trainer(), make_module(network=Segmenter()), checkpoint)
    record = checkpoint["scalablevit_pl"]
    assert (record["task"], record["network_class"]) == ("semantic-segmentation", f"{__name__}.Segmenter")
    assert record["network"] == {"num_classes": 2}


def test_metrics_are_recorded_in_plain_values() -> None:
    record = metric_record(ClassificationTask)
    assert json.loads(json.dumps(record)) == record
    assert (record["monitor"], record["mode"]) == ("top1", "max")
    top5 = {"label": "top-5 accuracy", "hub_type": "accuracy", "plotted": False, "training": "training"}
    assert record["described"]["top5"] == top5
    assert metric_record(make_module()) == METRICS


def test_a_network_without_a_description_is_recorded_by_its_section(tmp_path: Path) -> None:
    for config, expected in (({"model": {"init_args": {"network": TIMM}}}, TIMM), ({"model": {}}, None)):
        checkpoint: dict[str, Any] = {}
        record = RunRecord(tmp_path, config)
        record.on_save_checkpoint(make_trainer(), make_module(network=nn.Linear(1, 2)), checkpoint)
        assert checkpoint["scalablevit_pl"]["network"] == expected


def test_a_resumed_run_starts_with_resolved_settings_and_continues_its_metrics(tmp_path: Path) -> None:
    earlier = MetricsLog(tmp_path / "metrics.csv")
    for step in range(4):
        earlier.log_metrics({"train/loss": 1.0}, step)
    earlier.save()
    log = MetricsLog(tmp_path / "metrics.csv")
    trainer = make_trainer(is_global_zero=True, global_step=3, loggers=[log], fast_dev_run=0)
    RunRecord(tmp_path, {}).on_train_start(trainer, make_module())
    origin = {"command": "", "weights": None, "metrics": METRICS}
    assert json.loads((tmp_path / "resolved.json").read_text()) == RESOLVED | origin
    assert list(log.rows) == [0, 1, 2]


def test_a_trial_of_a_few_batches_leaves_the_name_free(tmp_path: Path) -> None:
    trainer = make_trainer(is_global_zero=True, fast_dev_run=1)
    RunRecord(tmp_path, {}).on_train_start(trainer, make_module())
    assert not list(tmp_path.iterdir())


def test_a_resume_with_another_global_batch_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(is_global_zero=True, fast_dev_run=0)
    with pytest.raises(ValueError, match="had a global batch of 16 and would continue with 8"):
        RunRecord(tmp_path, {}, STORED | {"global_batch": 16}).on_train_start(trainer, make_module())


@pytest.mark.parametrize(("batch", "batches", "refused"), [(3, 20, True), (0, 20, False), (3, 10, False)])
def test_resuming_within_an_epoch_of_other_batches_is_an_error(
    batch: int, batches: int, refused: bool, tmp_path: Path
) -> None:
    trainer = make_trainer(is_global_zero=False, fast_dev_run=0)
    record = RunRecord(tmp_path, {}, STORED | {"batch": batch, "batches_per_epoch": batches})
    expected = pytest.raises(ValueError, match="an epoch of 20 batches per process, and there would be 10 now")
    with expected if refused else nullcontext():
        record.on_train_start(trainer, make_module())


def test_the_plotted_metrics_are_drawn_once_an_epoch_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, drawn = MetricsLog(tmp_path / "metrics.csv"), []
    log.log_metrics({"train/loss": 1.0, "val/iou": 0.5, "val/loss": 2.0}, 9)
    monkeypatch.setattr(run_record, "draw_curves", lambda *given: drawn.append(given))
    trainer = make_trainer(is_global_zero=True, loggers=[log])
    RunRecord(tmp_path, {}).on_train_epoch_start(trainer, make_module())
    ((curves, labels, *_, training),) = drawn
    assert labels == {"iou": "mean IoU"}
    assert training == {"iou": "mixed"}
    assert curves.keys() == {"train/iou", "val/iou", "val_ema/iou", "train/lr"}
    assert curves["val/iou"] == ((1.0,), (0.5,))
    monkeypatch.undo()
    RunRecord(tmp_path, {}).on_train_epoch_start(trainer, make_module())
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize(("trial", "message"), [(0, "results are in "), (1, "the trial run has ended: it leaves no")])
def test_only_a_run_that_leaves_results_names_them(
    trial: int, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    trainer = make_trainer(is_global_zero=True, loggers=[], fast_dev_run=trial)
    RunRecord(tmp_path, {}).on_train_end(trainer, make_module())
    assert [text.startswith(message) for text in caplog.messages] == [True]
