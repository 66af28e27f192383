"""What a fit does before anything is built: it takes its folder and writes its configuration."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from scalablevit_pl.data import ClassificationDataModule
from scalablevit_pl.experiment import run
from scalablevit_pl.experiment.adoption import class_arguments
from scalablevit_pl.experiment.invocation import Invocation
from scalablevit_pl.experiment.parsing import ParsedExperiment
from scalablevit_pl.experiment.start import StartingPoint
from scalablevit_pl.experiment.trainer import loggers
from scalablevit_pl.models import create_model
from scalablevit_pl.run_folder import locked_folder

Begin = Callable[..., tuple[ParsedExperiment, StartingPoint]]
FIT = ("--config", "recipes/quickstart.yaml")
FINETUNE = ("--config", "recipes/finetune.yaml", "--weights", "model")


class BegunError(Exception):
    """Raised instead of everything after the folder is taken."""


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Begin]:
    """Begin a fit called `first`, up to where it would build its data and its network."""
    seen: dict[str, Any] = {}
    prepare, build = run.prepare_folder, ParsedExperiment.build

    def noted(parsed: ParsedExperiment, start: StartingPoint) -> None:
        seen.update(start=start)
        prepare(parsed, start)

    def stop(parsed: ParsedExperiment, *parts: str) -> Any:
        if "model" not in parts:
            return build(parsed, *parts)
        place = parsed.folder, getattr(rank_zero_only, "rank", 0), 0.0
        with pytest.raises(ValueError, match="another process is training in"), locked_folder(*place):
            pass
        raise BegunError(parsed)

    def begun(*words: str) -> tuple[ParsedExperiment, StartingPoint]:
        with pytest.raises(BegunError) as caught:
            run.run_experiment(Invocation.parse(["fit", "--run", "first", *words]).resolve())
        return caught.value.args[0], seen.get("start", StartingPoint())

    monkeypatch.setattr(run, "prepare_folder", noted)
    monkeypatch.setattr("lightning.pytorch.seed_everything", lambda *_, **__: None)
    monkeypatch.setattr(ParsedExperiment, "_set_seed", lambda parsed: None)
    monkeypatch.setattr(ParsedExperiment, "build", stop)
    monkeypatch.chdir(tmp_path)
    yield begun
    with locked_folder(tmp_path / "runs/first", patience=0.0):  # free once the command has ended
        pass


def save(folder: Path, step: int) -> Path:
    path = folder / f"checkpoints/step={step}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"schema": 1, "config": yaml.safe_load((folder / "config.yaml").read_text())}
    torch.save({"scalablevit_pl": record, "state_dict": {}, "global_step": step}, path)
    return path


def purge_step(start: StartingPoint, folder: Path) -> int | None:
    board: Any = loggers(folder, start, None)[1]  # type: ignore[index]
    return board._kwargs.get("purge_step")


@pytest.mark.parametrize("words", [FIT, FINETUNE])
def test_a_run_that_ended_before_its_first_checkpoint_starts_again(words: tuple[str, ...], begin: Begin) -> None:
    create_model("scalablevit_nano", num_classes=10).save_pretrained("model")
    folder = begin(*words)[0].folder
    (folder / "resolved.json").write_text("{}")
    with pytest.raises(ValueError, match="'runs/first' already holds a run"):
        run.run_experiment(Invocation.parse(["fit", "--run", "first", *words]).resolve())
    _, start = begin(*words, "--resume=auto", "--trainer.max_epochs=7")
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_epochs"] == 7
    assert (start.weights is not None) == (words is FINETUNE)
    assert purge_step(start, folder) == 0


@pytest.mark.parametrize("words", [FIT, FINETUNE])
def test_a_run_that_left_a_checkpoint_resumes_from_it(words: tuple[str, ...], begin: Begin) -> None:
    create_model("scalablevit_nano", num_classes=10).save_pretrained("model")
    folder = begin(*words)[0].folder
    (folder / "resolved.json").write_text("{}")
    path = save(folder, 5)
    parsed, start = begin(*words, "--resume=auto")
    assert (parsed.config.ckpt_path, start.step, start.weights) == (str(path), 5, None)
    assert purge_step(start, folder) == 5


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("cat/1.png", "dog/1.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def classes_of(folder: Path) -> Any:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return class_arguments(config)[0]["num_classes"]


@pytest.mark.parametrize("words", [[], ["--model.network=timm.create_model", "--model.network.model_name=test_resnet"]])
def test_the_number_of_classes_is_that_of_the_data_and_is_recorded(
    words: list[str], begin: Begin, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begin(*FIT, f"--data.dataset={photos}", *words)[0].folder
    assert classes_of(folder) == 2
    save(folder, 5)
    monkeypatch.setattr(ClassificationDataModule, "load_class_names", lambda *_: pytest.fail("the run states it"))
    begin(*FIT, f"--data.dataset={photos}", *words, "--resume=auto")
    assert classes_of(folder) == 2


def test_a_number_of_classes_that_is_set_needs_no_data(begin: Begin) -> None:
    folder = begin(*FIT, "--data.dataset=nowhere/at/all", "--model.network.num_classes=7")[0].folder
    assert classes_of(folder) == 7


def test_weights_of_other_classes_get_the_number_of_the_data(begin: Begin, photos: Path) -> None:
    create_model("scalablevit_nano", num_classes=10).save_pretrained("model")
    assert classes_of(begin(*FINETUNE, f"--data.dataset={photos}")[0].folder) == 2


def test_a_run_with_other_settings_is_not_resumed(begin: Begin) -> None:
    folder = begin(*FIT)[0].folder
    save(folder, 5)
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match=r"label_smoothing was 0.1 and is 0.3"):
        run.run_experiment(
            Invocation.parse(["fit", "--run=first", "--resume=auto", "--model.label_smoothing=0.3"]).resolve()
        )
    assert (folder / "config.yaml").read_bytes() == before


def test_a_new_run_hides_nothing_of_its_curves(begin: Begin) -> None:
    parsed, start = begin(*FIT)
    assert purge_step(start, parsed.folder) is None


def test_only_the_first_process_writes_the_configuration(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begin(*FIT)[0].folder
    (folder / "config.yaml").unlink()
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    begin(*FIT)
    assert not (folder / "config.yaml").exists()


def test_a_failed_start_with_an_automatic_name_leaves_no_folder(begin: Begin, tmp_path: Path) -> None:
    begin(*FIT)
    with pytest.raises(BegunError):
        run.run_experiment(Invocation.parse(["fit", *FIT]).resolve())
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["first"]
