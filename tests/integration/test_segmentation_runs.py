"""Segmentation from the command line: training by steps, exact resume, results and masks."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from finished_runs import assert_equal_runs, metrics, wait_for
from integration.conftest import Run, Start
from PIL import Image
from scene_data import write_scenes
from small_tasks import CLASSES, make_scene

STEPS, EPOCH, EVERY, VAL, TEST = 16, 6, 5, 7, 5
CONFIG = {
    "seed_everything": 0,
    "trainer": {
        "max_steps": STEPS,
        "max_epochs": -1,
        "val_check_interval": EVERY,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
    },
    "model": {
        "class_path": "scalablevit_pl.tasks.SegmentationTask",
        "init_args": {
            "network": {"class_path": "small_tasks.Coarse", "init_args": {"num_classes": CLASSES, "auxiliary": True}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            "schedule": {"class_path": "scalablevit_pl.optim.PolynomialSchedule", "init_args": {"warmup_steps": 3}},
            "base_batch_size": None,
        },
    },
    "data": {
        "class_path": "scene_data.SceneDataModule",
        "init_args": {"dataset": "scenes", "batch_size": 4, "num_workers": 1},
    },
    "ema": {"decay": 0.5},
    "checkpoint": {"every_steps": 1},
}
FIT = ["fit", "--config=scenes.yaml"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, scalablevit: Run) -> Path:
    """A folder with a data set and an undisturbed run called `whole`."""
    folder = tmp_path_factory.mktemp("segmentation")
    write_scenes(folder / "scenes", train=EPOCH * 4, validation=VAL, test=TEST)
    (folder / "scenes.yaml").write_text(yaml.safe_dump(CONFIG))
    done = scalablevit(*FIT, "--run=whole", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_training_by_steps_is_validated_every_few_steps(work: Path) -> None:
    rows = metrics(work / "runs/whole")
    assert [int(row["step"]) + 1 for row in rows if row["val/miou"]] == list(range(EVERY, STEPS + 1, EVERY))
    assert {row["val/samples"] for row in rows if row["val/miou"]} == {str(float(VAL))}
    pixels = sum(int((make_scene(index)[1] != 255).sum()) for index in range(VAL))
    assert {float(row["val/pixels"]) for row in rows if row["val/miou"]} == {pixels}
    assert float(rows[-1]["train/lr"]) == pytest.approx(1e-6 + (0.01 - 1e-6) * (1 / STEPS) ** 0.9)
    assert (work / "runs/whole/curves.png").is_file()


def test_a_killed_run_resumes_exactly(work: Path, start: Start, scalablevit: Run) -> None:
    run = work / "runs/killed"
    process = start(*FIT, "--run=killed", cwd=work)
    wait_for(run, EPOCH + 2, process)
    process.kill()
    process.wait()
    done = scalablevit("fit", "--run=killed", "--resume=auto", "--data.num_workers=0", cwd=work)
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stderr
    assert_equal_runs(run, work / "runs/whole", STEPS)


def test_a_test_and_a_prediction_leave_pictures_tables_and_masks(work: Path, scalablevit: Run) -> None:
    run = work / "runs/whole"
    for words in (["test", "--data.batch_size=2"], ["predict"]):
        done = scalablevit(*words, "--run=whole", cwd=work)
        assert done.returncode == 0, done.stderr
    for name in ("predictions.png", "confusion.png", "iou.png"):
        with Image.open(run / name) as picture:
            picture.verify()
    report = json.loads((run / "test.json").read_text())
    with (run / "iou.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["pixels"]) for row in rows) == report["test_ema/pixels"] == report["test/pixels"]
    ious = [float(row["iou"]) for row in rows if row["iou"]]
    assert sum(ious) / len(ious) == pytest.approx(report["test_ema/miou"], abs=1e-6)
    masks = sorted(path.name for path in (run / "predictions").iterdir())
    assert masks == [*(f"image_{index}.png" for index in range(TEST)), "shares.csv"]
    confusion = np.zeros((CLASSES, CLASSES), dtype=int)
    for index in range(TEST):
        truth = make_scene(index)[1].numpy()
        with Image.open(run / f"predictions/image_{index}.png") as mask:
            np.add.at(confusion, (truth[truth != 255], np.asarray(mask)[truth != 255]), 1)
    assert confusion.diagonal().sum() / confusion.sum() == pytest.approx(report["test_ema/aacc"], abs=1e-12)
