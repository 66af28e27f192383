import logging
import shutil
import sys
from pathlib import Path

import pytest
from integration.conftest import QUICK, Run
from PIL import Image

from scalablevit_pl.commands.main import main

FIT = ["fit", "--config", "recipes/quickstart.yaml", *QUICK]


def assert_one_line(status: int, stderr: str, *expected: str) -> None:
    lines = [line for line in stderr.splitlines() if line.startswith("scalablevit: error: ")]
    assert status == 2, stderr
    assert len(lines) == 1
    assert "Traceback" not in stderr
    for text in expected:
        assert text in lines[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fti"], ["'fti'", "fit"]),
        ([*FIT, "--trainer.max_epoch=3"], ["--trainer.max_epoch", "--trainer.max_epochs"]),
        ([*FIT, "--max_epochs=3"], ["--max_epochs", "--trainer.max_epochs"]),
        ([*FIT, "--model.network.num_clases=3"], ["--model.network.num_clases", "--model.network.num_classes"]),
        ([*FIT, "--data.batch_size=many"], ["--data.batch_size", "int", "'many'"]),
        ([*FIT, "--data.augmentation.mixp=1"], ["--data.augmentation.mixup"]),
        ([*FIT, "--model.network.name=scalablevit_x"], ["'scalablevit_x'", "there are scalablevit_nano"]),
        ([*FIT, "--model.network.num_classes=11"], ["10 classes", "num_classes=11"]),
        ([*FIT, "--data.dataset=./missing"], ["'./missing'"]),
        ([*FIT, "--run=first"], ["runs/first", "already holds a run", "--run"]),
        (["fit", "--config", "recipes/quikstart.yaml"], ["recipes/quickstart.yaml"]),
        (["fit", "--run", "first", "--resume", "http://127.0.0.1/x.ckpt"], ["URL"]),
        (["fit", "--run=first", "--resume=last", "--model.label_smoothing=0.3"], ["label_smoothing", "0.1", "0.3"]),
        (
            ["fit", "--config=runs/first/config.yaml", "--run=first", "--resume=runs/other/checkpoints/last.ckpt"],
            ["runs/first", "already holds a run"],
        ),
        (["test", "--run", "frist"], ["runs/frist", "first"]),
        (["test", "--config", "recipes/quickstart.yaml"], ["checkpoint"]),
        (["test", "--run", "first", "--data.preprocessing.input_size=32"], ["input_size", "28", "32"]),
        (["test", "--run", "first", "--ckpt_path", "broken.ckpt"], ["broken.ckpt"]),
        (["predict", "--weights", "runs/first"], ["images"]),
        (["predict", "--weights", "runs/first", "missing.jpg"], ["missing.jpg"]),
        (["predict", "--weights", "runs/first", "broken.jpg"], ["broken.jpg"]),
        (["predict", "--weights", "nowhere", "broken.jpg"], ["nowhere"]),
        (["predict", "--weights", "runs/first", "--uot", "x.csv", "broken.jpg"], ["--uot", "--out"]),
        (["predict", "--weights", "runs/first", "broken.jpg", "--out", "missing/x.csv"], ["missing/x.csv"]),
    ],
    ids=lambda value: "_".join(value)[-60:] if isinstance(value, list) else str(value),
)
def test_an_error_of_the_user_is_one_line(
    trained: Path,
    words: list[str],
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("broken.jpg", "broken.ckpt"):
        (trained / name).write_bytes(b"not what it says")
    shutil.copytree(trained / "runs/first/checkpoints", trained / "runs/other/checkpoints", dirs_exist_ok=True)
    monkeypatch.chdir(trained)
    monkeypatch.setattr(sys, "argv", ["scalablevit"])
    monkeypatch.setattr(logging, "raiseExceptions", False)  # handlers of other tests hold closed streams
    assert_one_line(main(words), capsys.readouterr().err, *expected)


def test_an_unreadable_training_image_is_named(trained: Path, scalablevit: Run, photos: Path) -> None:
    (photos / "cat" / "test_0.jpg").write_bytes(b"no image")
    own = [f"--data.dataset={photos}", "--data.batch_size=2", "--model.network.num_classes=2", "--data.num_workers=1"]
    done = scalablevit(*FIT, "--run", "unreadable", *own, "--trainer.limit_train_batches=1.0", cwd=trained)
    assert_one_line(done.returncode, done.stderr, "cat/test_0.jpg")


def test_a_label_outside_the_classes_is_named(trained: Path, scalablevit: Run, tmp_path: Path) -> None:
    import datasets

    rows = {"image": [Image.new("RGB", (8, 8))] * 4, "label": [0, 1, -1, 0]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    own = [f"--data.dataset={tmp_path}", "--data.batch_size=2", "--model.network.num_classes=2"]
    done = scalablevit(*FIT, "--run", "labels", *own, cwd=trained)
    assert_one_line(done.returncode, done.stderr, "-1", "row 2", "'train'")


def test_a_failed_prediction_keeps_the_previous_table(trained: Path, scalablevit: Run) -> None:
    (trained / "bad.jpg").write_bytes(b"no image")
    (trained / "earlier.csv").write_text("mine\n")
    done = scalablevit("predict", "--weights", "runs/first", "bad.jpg", "--out", "earlier.csv", cwd=trained)
    assert done.returncode == 2
    assert (trained / "earlier.csv").read_text() == "mine\n"


def test_traceback_shows_where_an_error_came_from(trained: Path, scalablevit: Run) -> None:
    done = scalablevit("predict", "--weights", "runs/first", "missing.jpg", "--traceback", cwd=trained)
    assert "Traceback" in done.stderr
    assert done.returncode != 0
