"""The doctor finds every planted fault, and none in a sound fit."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from fake_imagenet import make_images, put_on_hub
from hub_server import HubServer
from huggingface_hub import constants
from PIL import Image

from scalablevit_pl.commands.main import main
from scalablevit_pl.diagnosis import disk, speed

Doctor = Callable[..., tuple[int, str]]
QUICK = ["--images=8", "--seconds=0.1", "--data.num_workers=0", "--data.batch_size=4"]


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Run the command in its own folder, and return its exit status and its table on one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("scalablevit_pl.commands.main.show_log", lambda: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["scalablevit"])
        status = main(["doctor", "--config=recipes/quickstart.yaml", *QUICK, *words])
        table = capsys.readouterr().out
        assert max(map(len, table.splitlines())) <= 80
        return status, " ".join(table.split())

    return run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    pixels = np.random.RandomState(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(12):
            image = Image.fromarray(pixels.randint(0, 255, (20, 24, 3), dtype=np.uint8))
            image.save(tmp_path / "photos" / name / f"{index}.jpg")
    return tmp_path / "photos"


def test_a_sound_fit_has_no_problem_and_leaves_no_files(doctor: Doctor, tmp_path: Path) -> None:
    status, table = doctor()
    assert (status, table.count("FAIL")) == (0, 1)  # in the summary
    assert "0 warn, 0 FAIL" in table
    for row in (
        "ok configuration scalablevit_nano, for the classes of the data",
        "ok network 2,761,378 parameters",
        "ok run disk 333 MB for the run with up to 4 checkpoints",
        "ok splits images: train 9,000, val 1,000",
        "ok train labels 900 images in each of the 10 classes",
        "ok test data 2,000 images of split 'test'",
        "ok train images 8 decoded",
        "ok plan batch of 4 (4 × 1 accumulated × 1 process(es)), learning rate 0.002, 27,000 steps",
        "ok training step",
        "times the training step's",
    ):
        assert row in table
    assert not (tmp_path / "runs").exists()


def test_faults_of_data_and_network_are_found_together(doctor: Doctor, photos: Path, tmp_path: Path) -> None:
    for path in (photos / "cat").glob("*.jpg"):
        path.write_bytes(path.read_bytes()[:200])  # truncated
    (tmp_path / "runs/first").mkdir(parents=True)
    (tmp_path / "runs/first/resolved.json").write_text("{}")
    status, table = doctor(
        f"--data.dataset={photos}", "--run=first", "--data.val_fraction=0.2", "--model.network.num_classes=10"
    )
    assert status == 1
    assert "FAIL run folder runs/first already holds a run → choose another name with --run" in table
    assert (
        "FAIL classes the data has 2 classes but the network has num_classes=10 → set --model.network.num_classes=2"
        in table
    )
    assert "of 8 cannot be read:" in table
    assert "0.jpg" in table
    assert table.count("→ repair or delete") >= 2
    assert "warn test data there is no split 'test' → choose among train" in table
    assert "ok configuration" in table
    assert "ok training step" in table


@pytest.mark.parametrize(
    ("words", "row"),
    [
        (["--trainer.accelerator=gpu"], "→ run on a machine with a GPU"),
        (["--data.split_sizes={train: 7}"], "split 'train' has 10000 images, but --data.split_sizes requires 7"),
        (["--data.class_order=imagenet"], "FAIL data "),
        (["--data.dataset=photoz"], "images were not checked → unset HF_HUB_OFFLINE"),
        (["--data.dataset=./photoz"], "FAIL data there is no folder './photoz' → check the path"),
        (["--data.val_split=nothing"], "there is no split 'nothing' → choose among"),
        (["--data.label_column=nothing"], "FAIL data label_column 'nothing' is not one of the columns"),
        (["--trainer.precision=bf16-mixed"], "warn precision bf16-mixed on cpu may be slower than float32"),
        (["--run", "a/file/run"], "file cannot be written (Not a directory)"),
        (["--trainer.accumulate_grad_batches=7"], "ok plan batch of 28 (4 × 7 accumulated × 1 process(es)), learning"),
        (["--trainer.accumulate_grad_batches=7"], "rate 0.002, 3,864 steps including 322 of warm-up"),
        (["--ema.decay=0.9"], "ok run disk 377 MB for the run"),
        (["--model.base_batch_size=512"], "the recipe's learning rate, for a batch of 512, is scaled by 0.007812"),
        (["--model.label_smoothing=2"], "FAIL configuration label_smoothing must be at least 0 and below 1, got 2.0"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="plants the lack of a GPU")
def test_each_planted_fault_is_found(
    words: list[str], row: str, doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(speed, "time_steps", lambda *_: speed.StepSpeed(100.0, 4, torch.device("cpu")))
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").touch()
    status, table = doctor(*words)
    assert row in table
    assert status == (0 if row.startswith(("ok", "warn")) or "rate" in row else 1)


def test_a_resume_is_checked(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"]
    assert main(["fit", "--config=recipes/quickstart.yaml", "--run=begun", *QUICK[2:], *limits]) == 0
    monkeypatch.setattr(speed, "time_steps", lambda *_: speed.StepSpeed(100.0, 4, torch.device("cpu")))
    status, table = doctor("--run=begun", "--resume=auto")
    assert (status, "ok run folder runs/begun is resumed" in table) == (0, True)
    status, table = doctor("--run=begun", "--resume=auto", "--model.label_smoothing=0.3")
    assert status == 1
    assert "FAIL run folder the run cannot resume with other settings: model.init_args.label_smoothing was" in table


def test_a_batch_too_large_for_memory_fails(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: Any) -> speed.StepSpeed:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(speed, "time_steps", run_out)
    status, table = doctor()
    assert status == 1
    assert (
        "FAIL training step a batch of 4 images does not fit into the GPU's memory → set --data.batch_size 2" in table
    )


def test_warnings_of_a_fit_are_rows(doctor: Doctor) -> None:
    logger = logging.getLogger("scalablevit_pl")
    before = (logger.level, list(logger.handlers))
    _, table = doctor("--model.base_batch_size=5000")
    assert (logger.level, logger.handlers) == before
    assert "warn plan the learning rate 1.6e-06 is below min_lr 1e-05" in table
    assert table.count("below min_lr") == 1  # not of the timed batch


def test_an_unreadable_image_fails(doctor: Doctor, photos: Path) -> None:
    (photos / "dog/3.jpg").write_bytes(b"no image")
    own = [f"--data.dataset={photos}", "--data.val_split=train", "--images=24", "--model.network.num_classes=2"]
    status, table = doctor(*own)
    assert status == 1
    assert "FAIL train images 1 of 24 cannot be read: row " in table
    assert "→ repair or delete them" in table


def test_an_unknown_option_is_the_same_error_as_in_fit(doctor: Doctor, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--config=recipes/quickstart.yaml", "--data.batchsize=3"]) == 2
    assert "unknown option --data.batchsize: did you mean --data.batch_size?" in capsys.readouterr().err
    assert main(["doctor", "--config=recipes/quickstart.yaml", "--images=0"]) == 2
    assert "--images must be at least 1" in capsys.readouterr().err


def test_gated_data_on_the_hub_is_checked_step_by_step(
    doctor: Doctor, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {"train": make_images("train", 1003), "validation": make_images("validation", 41)}
    commit = put_on_hub(hub, "lab/imagenet", splits)
    monkeypatch.setattr(speed, "time_steps", lambda *_: speed.StepSpeed(100.0, 4, torch.device("cpu")))
    own = ["--data.dataset=lab/imagenet", "--data.class_order=imagenet", "--model.network.num_classes=1000"]

    status, table = doctor(*own)
    assert status == 1
    assert "ok Hub token none, which is enough for data that is neither gated nor private" in table
    assert "FAIL Hub access " in table
    assert (
        "FAIL data lab/imagenet is not in the cache, so its images were not checked → fix the access to the Hub"
        in table
    )

    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    status, table = doctor(*own)
    assert status == 1
    assert "FAIL Hub token " in table

    monkeypatch.setenv("HF_TOKEN", "hf_ada")
    status, table = doctor(*own)
    assert status == 0
    assert "ok Hub token of ada" in table
    remedy = f"pin it with --data.revision {commit}"
    row = f"commit {commit}; no revision is given, so later runs may get other data → {remedy}"
    assert row in table.replace(f"{commit[:20]} {commit[20:]}", commit)
    assert "warn data lab/imagenet is not in the cache, so its images were not checked → download and check it" in table
    assert "ok splits" not in table

    own += [f"--data.revision={commit}", "--download"]
    with monkeypatch.context() as small:
        small.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=400e3))
        status, table = doctor(*own)
    assert status == 1
    assert "FAIL data disk " in table
    assert "FAIL data not checked, because it does not fit on the disk → free space first" in table

    status, table = doctor(*own)
    assert status == 0
    assert "ok splits images: train 1,003, val 41" in table
    assert "ok classes 1,000, in imagenet's order" in table
    assert "ok train images 8 decoded" in table
