"""A run of version 0.1.0 resumes, is evaluated, predicts, is exported and plotted."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from integration.conftest import Run
from safetensors.torch import load_file

OLD = Path(__file__).parent / "data" / "run_0.1.0"
# What version 0.1.0 itself gave after a second epoch, and in a test.
RESUMED = {"train/loss": 2.303071618080139, "val/loss": 2.284797988831997, "val_ema/loss": 2.285302020609379}
TESTED = {"test/loss": 2.3123885045448938, "test_ema/loss": 2.3129554092884064}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with the run `old`."""
    shutil.copytree(OLD, tmp_path / "runs/old")
    return tmp_path


def test_the_run_resumes_with_the_same_numbers(folder: Path, scalablevit: Run) -> None:
    done = scalablevit("fit", "--run", "old", "--resume", "auto", "--trainer.max_epochs", "2", cwd=folder)
    assert done.returncode == 0, done.stderr
    with (folder / "runs/old/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (OLD / "metrics.csv").open(newline="") as file:
        assert [row["train/step_loss"] for row in rows[:4]] == [row["train/step_loss"] for row in csv.DictReader(file)]
    assert [row["step"] for row in rows] == [str(step) for step in range(8)]
    assert {name: float(rows[7][name]) for name in RESUMED} == pytest.approx(RESUMED, abs=1e-5)


def test_the_run_is_evaluated_with_the_same_numbers(folder: Path, scalablevit: Run) -> None:
    before = json.loads((OLD / "test.json").read_text())
    done = scalablevit("test", "--run", "old", cwd=folder)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "runs/old/test.json").read_text())
    assert {name: report[name] for name in TESTED} == pytest.approx(TESTED, abs=1e-5)
    same = {key: value for key, value in before.items() if key != "command" and not key.endswith(("loss", "ece"))}
    assert same.items() <= report.items()
    done = scalablevit("validate", "--run", "old", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "runs/old/val.json").read_text())["val/samples"] == 64


def test_the_run_predicts_and_is_plotted(folder: Path, scalablevit: Run, photos: Path) -> None:
    done = scalablevit("predict", "--weights", "runs/old", str(photos), "--out", "table.csv", cwd=folder)
    assert done.returncode == 0, done.stderr
    with (folder / "table.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 8
    done = scalablevit("plot", "old", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "old" in done.stdout
    assert (folder / "comparison.png").is_file()


def test_the_run_is_exported_with_its_results(folder: Path, scalablevit: Run) -> None:
    done = scalablevit("export", "runs/old", "model", "--license", "mit", cwd=folder)
    assert done.returncode == 0, done.stderr
    averaged = torch.load(OLD / "checkpoints/best.ckpt", weights_only=True)["ema_state_dict"]
    exported = load_file(folder / "model/model.safetensors")
    assert all(torch.equal(tensor, averaged[f"network.{name}"]) for name, tensor in exported.items())
    assert len(exported) == len(averaged)
    card = (folder / "model/README.md").read_text()
    assert "| 48 | 0.1250 |" in card  # of test.json, which names the checkpoint by its path
