import csv
import json
import math
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from finished_runs import read_csv, wait_for
from integration.conftest import QUICK, Run, Start
from PIL import Image

from scalablevit_pl.models.factory import build_stored
from scalablevit_pl.weights.source import load_weights

EVALUATION = ["--trainer.enable_progress_bar=false", "--data.batch_size=50"]
ALL_OF_VAL = "--trainer.limit_val_batches=1.0"
PNG = b"\x89PNG"


def test_fit_writes_the_documented_files(trained: Path) -> None:
    run = trained / "runs" / "first"
    names = {
        str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and "tensorboard" not in path.parts
    }
    assert names == {
        "config.yaml",
        "resolved.json",
        "metrics.csv",
        "curves.png",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "checkpoints/step=3.ckpt",
        ".lock-0",
    }
    assert list(run.glob("tensorboard/events.*"))
    assert (run / "curves.png").read_bytes().startswith(PNG)
    resolved = json.loads((run / "resolved.json").read_text())
    assert resolved["global_batch"] == 16
    assert resolved["total_steps"] == 3
    assert resolved["parameters"] == 2_761_378
    metrics = read_csv(run / "metrics.csv")
    for part in ("train", "val"):
        assert all(any(row[f"{part}/{name}"] for row in metrics) for name in ("loss", "top1", "top5"))


def test_checkpoints_hold_plain_values_only(trained: Path) -> None:
    for name in ("best", "last"):
        path = trained / "runs/first/checkpoints" / f"{name}.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        record = checkpoint["scalablevit_pl"]
        assert "hyper_parameters" not in checkpoint
        assert record["network"]["name"] == "scalablevit_nano"
        assert record["class_names"][0] == "T-shirt/top"
        assert record["preprocessing"]["input_size"] == 28
        assert json.loads(json.dumps(record)) == record


def test_the_configuration_of_a_run_repeats_it_exactly(trained: Path, scalablevit: Run) -> None:
    done = scalablevit("fit", "--config", "runs/first/config.yaml", "--run", "again", cwd=trained)
    assert done.returncode == 0, done.stderr
    weights = [load_weights(trained / "runs" / run).tensors for run in ("first", "again")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_test_writes_metrics_table_and_pictures(trained: Path, scalablevit: Run) -> None:
    done = scalablevit("test", "--run", "first", *EVALUATION, cwd=trained)
    assert done.returncode == 0, done.stderr
    run = trained / "runs" / "first"
    result = json.loads((run / "test.json").read_text())
    rows = read_csv(run / "predictions.csv")
    assert result["test/samples"] == len(rows) == 100
    right = sum(row["label"] == row["label_1"] for row in rows)
    in_five = sum(row["label"] in [row[f"label_{rank}"] for rank in range(1, 6)] for row in rows)
    assert result["test/top1"] == pytest.approx(right / 100, abs=1e-6)
    assert result["test/top5"] == pytest.approx(in_five / 100, abs=1e-6)
    assert result["checkpoint"].endswith("best.ckpt")
    assert [int(row["index"]) for row in rows] == list(range(100))
    for name in ("predictions.png", "confusion.png"):
        with Image.open(run / name) as picture:
            assert min(picture.size) > 400
    assert (run / "metrics.csv").is_file()


def test_validate_and_predict_write_into_the_run(trained: Path, scalablevit: Run) -> None:
    shutil.copytree(trained / "runs/first", trained / "runs/copy")
    done = scalablevit("validate", "--run", "copy", "--ckpt_path", "last", *EVALUATION, ALL_OF_VAL, cwd=trained)
    assert done.returncode == 0, done.stderr
    result = json.loads((trained / "runs/copy/val.json").read_text())
    assert result["val/samples"] == 30
    assert result["checkpoint"].endswith("last.ckpt")
    done = scalablevit("predict", "--run", "runs/copy", *EVALUATION, cwd=trained)
    assert done.returncode == 0, done.stderr
    assert len(read_csv(trained / "runs/copy/predictions.csv")) == 100


def test_predict_classifies_image_files(trained: Path, scalablevit: Run, photos: Path) -> None:
    words = ["predict", "--weights", "runs/first", str(photos), str(photos / "cat" / "test_0.jpg"), "--out", "x.csv"]
    done = scalablevit(*words, cwd=trained)
    assert done.returncode == 0, done.stderr
    rows = read_csv(trained / "x.csv")
    assert [Path(row["path"]).name for row in rows[:4]] == [f"test_{index}.jpg" for index in range(4)]
    assert len(rows) == 9
    stored = load_weights(trained / "runs/first")
    with Image.open(rows[5]["path"]) as image, torch.inference_mode():
        probabilities = build_stored(stored).eval()(stored.preprocessing(image)[None]).softmax(1)[0]
    assert float(rows[5]["probability_1"]) == pytest.approx(probabilities.max().item(), abs=1e-5)
    assert rows[5]["label_1"] == stored.class_names[probabilities.argmax()]


def test_predict_writes_to_the_screen_without_out(trained: Path, scalablevit: Run, photos: Path) -> None:
    done = scalablevit("predict", "--weights", "runs/first", str(photos / "cat"), cwd=trained)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert len(rows) == 4
    assert list(rows[0])[:4] == ["index", "path", "label", "label_1"]


def test_training_on_a_folder_of_classes(trained: Path, scalablevit: Run, photos: Path) -> None:
    words = ["fit", "--config", "recipes/quickstart.yaml", "--run", "own", f"--data.dataset={photos}"]
    own = ["--data.batch_size=2", "--data.val_fraction=0.25", "--model.network.num_classes=2"]
    done = scalablevit(*words, *QUICK, *own, cwd=trained)
    assert done.returncode == 0, done.stderr
    assert load_weights(trained / "runs/own").class_names == ["cat", "dog"]


def test_resume_continues_where_the_run_stopped(trained: Path, scalablevit: Run) -> None:
    shutil.copytree(trained / "runs/first", trained / "runs/longer")
    words = ["fit", "--run", "longer", "--resume", "last", "--trainer.max_epochs=2"]
    done = scalablevit(*words, cwd=trained)
    assert done.returncode == 0, done.stderr
    steps = [int(row["step"]) for row in read_csv(trained / "runs/longer/metrics.csv")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 5
    first = read_csv(trained / "runs/first/metrics.csv")
    kept = {row["step"]: row for row in read_csv(trained / "runs/longer/metrics.csv")}
    assert all(kept[row["step"]]["train/step_loss"] == row["train/step_loss"] for row in first)
    assert yaml.safe_load((trained / "runs/longer/config.yaml").read_text())["trainer"]["max_epochs"] == 2
    # The schedule is that of six steps, three of them warm-up.
    rates = {step: float(row["train/lr"]) for step, row in kept.items() if row["train/lr"]}
    for step in (3, 4, 5):
        expected = 1e-5 + (2e-3 - 1e-5) * (1 + math.cos(math.pi * step / 6)) / 2
        assert rates[str(step)] == pytest.approx(expected, rel=1e-6)


def test_a_configured_logger_is_used_in_addition_to_the_record(trained: Path, scalablevit: Run) -> None:
    own = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]
    done = scalablevit("fit", "--config", "recipes/quickstart.yaml", "--run=logged", *QUICK, *own, cwd=trained)
    assert done.returncode == 0, done.stderr
    assert (trained / "runs/logged/metrics.csv").is_file()
    assert not (trained / "runs/logged/tensorboard").exists()
    assert list((trained / "logs").rglob("metrics.csv"))


def test_hyperparameters_in_a_checkpoint_are_ignored(trained: Path, scalablevit: Run) -> None:
    checkpoint = torch.load(trained / "runs/first/checkpoints/best.ckpt", weights_only=True)
    checkpoint["hyper_parameters"] = {
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "_class_path": "this.Zen",
        "label_smoothing": 0.9,
    }
    torch.save(checkpoint, trained / "strange.ckpt")
    done = scalablevit("test", "--run", "first", "--ckpt_path", "strange.ckpt", *EVALUATION, cwd=trained)
    assert done.returncode == 0, done.stderr
    assert "Zen of Python" not in done.stdout


def test_a_terminated_fit_says_how_to_continue(trained: Path, start: Start) -> None:
    words = ["fit", "--config=recipes/quickstart.yaml", "--run=ended", "--checkpoint.every_steps=1"]
    process = start(*words, "--data.num_workers=0", cwd=trained)
    wait_for(trained / "runs/ended", 1, process)
    process.send_signal(signal.SIGTERM)
    done = process.wait()
    assert done.returncode == 143
    assert re.search(r"scalablevit: error: stopped by SIGTERM after step \d+: continue with --resume auto", done.stderr)


def test_an_interrupted_fit_has_the_status_of_an_interruption(trained: Path, start: Start) -> None:
    words = ["fit", "--config=recipes/quickstart.yaml", "--run=interrupted", "--checkpoint.every_steps=1"]
    process = start(*words, "--data.num_workers=0", cwd=trained)
    wait_for(trained / "runs/interrupted", 1, process)
    process.send_signal(signal.SIGINT)
    done = process.wait()
    assert done.returncode == 130
    assert done.stderr.endswith("scalablevit: interrupted\n")
    assert "Traceback" not in done.stderr
