"""What a fit does before anything is built: it takes its folder, and finds what it goes on with."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only

from scalablevit_pl.commands.main import settle
from scalablevit_pl.experiment.cli import ExperimentCLI
from scalablevit_pl.models import create_model
from scalablevit_pl.run_folder import locked_folder

Begin = Callable[..., ExperimentCLI]
FIT = ("--config", "recipes/quickstart.yaml")
FINETUNE = ("--config", "recipes/finetune.yaml", "--weights", "model")


class BegunError(Exception):
    """Raised in the place of all that comes after the folder is taken."""


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Begin:
    """Begin a fit called `first`, up to where it would build its data and its network."""

    def stop(experiment: ExperimentCLI) -> None:
        place = experiment.folder, getattr(rank_zero_only, "rank", 0), 0.0
        with pytest.raises(ValueError, match="another process trains in"), locked_folder(*place):
            pass
        raise BegunError(experiment)

    def begun(*words: str) -> ExperimentCLI:
        monkeypatch.setattr(sys, "argv", ["scalablevit", "fit", *settle("fit", ["--run", "first", *words])])
        with pytest.raises(BegunError) as caught:
            ExperimentCLI()
        experiment: ExperimentCLI = caught.value.args[0]
        return experiment

    monkeypatch.setattr(ExperimentCLI, "_set_seed", lambda experiment: None)
    monkeypatch.setattr(ExperimentCLI, "instantiate_classes", stop)
    monkeypatch.chdir(tmp_path)
    return begun


def save(folder: Path, step: int) -> Path:
    path = folder / f"checkpoints/step={step}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    config = yaml.safe_load((folder / "config.yaml").read_text()) if (folder / "config.yaml").is_file() else {}
    record = {"schema": 1, "config": config}
    torch.save({"scalablevit_pl": record, "state_dict": {}, "global_step": step}, path)
    return path


@pytest.mark.parametrize("words", [FIT, FINETUNE])
def test_a_run_that_ended_before_its_first_checkpoint_begins_again(words: tuple[str, ...], begin: Begin) -> None:
    create_model("scalablevit_nano", num_classes=10).save_pretrained("model")
    folder = begin(*words).folder
    (folder / "resolved.json").write_text("{}")
    with pytest.raises(ValueError, match="'runs/first' already holds a run"):
        begin(*words)
    experiment = begin(*words, "--resume=auto", "--trainer.max_epochs=7")
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_epochs"] == 7
    assert (experiment.trained is not None) == (words is FINETUNE)
    board: Any = experiment._loggers(None)[1]
    assert board._kwargs["purge_step"] == 0


@pytest.mark.parametrize("words", [FIT, FINETUNE])
def test_a_run_that_left_a_checkpoint_goes_on_with_it(words: tuple[str, ...], begin: Begin) -> None:
    create_model("scalablevit_nano", num_classes=10).save_pretrained("model")
    folder = begin(*words).folder
    (folder / "resolved.json").write_text("{}")
    path = save(folder, 5)
    experiment = begin(*words, "--resume=auto")
    assert (experiment.config.fit.ckpt_path, experiment.step, experiment.trained) == (str(path), 5, None)
    board: Any = experiment._loggers(None)[1]
    assert board._kwargs["purge_step"] == 5


def test_a_new_run_keeps_what_it_shows_of_itself(begin: Begin) -> None:
    board: Any = begin(*FIT)._loggers(None)[1]
    assert "purge_step" not in board._kwargs


def test_only_the_first_process_writes_the_configuration(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begin(*FIT).folder
    (folder / "config.yaml").unlink()
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    begin(*FIT)
    assert not (folder / "config.yaml").exists()


def test_the_newest_whole_checkpoint_is_gone_on_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    experiment = ExperimentCLI.__new__(ExperimentCLI)
    experiment.folder = tmp_path
    assert experiment._newest_checkpoint("fit") == (None, None)
    paths = [save(tmp_path, step) for step in (1, 2, 3)]
    paths[2].write_bytes(b"no checkpoint")
    path, checkpoint = experiment._newest_checkpoint("fit")
    assert (path, (checkpoint or {})["global_step"]) == (paths[1], 2)
    assert "step=3.ckpt' as a checkpoint" in caplog.text
    for path in paths:
        path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"none of the 3 checkpoints in .* can be read: choose another name"):
        experiment._newest_checkpoint("fit")
    with pytest.raises(ValueError, match="auto is for going on with a fit"):
        experiment._newest_checkpoint("validate")
