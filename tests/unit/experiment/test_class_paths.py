"""What the configuration of a run folder may name, if the command line does not."""

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from jsonargparse import Namespace

from scalablevit_pl.experiment.class_paths import check_class_paths
from scalablevit_pl.experiment.invocation import Invocation
from scalablevit_pl.experiment.parsing import ParsedExperiment
from scalablevit_pl.preprocessing import Preprocessing
from scalablevit_pl.tasks import ClassificationTask

ROOT = Path(__file__).parents[3]
OWN = "runs/first/config.yaml"
Parse = Callable[..., ParsedExperiment]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, work: Path) -> Parse:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # so that it is restored after the test
    monkeypatch.syspath_prepend(ROOT / "tests")
    return lambda *words: ParsedExperiment(Invocation.parse(words).resolve())


def write_run(parse: Parse, recipe: str, **model: Any) -> None:
    """Write the configuration of a recipe as that of the run `first`, with other arguments of its task."""
    config = parse("fit", f"--config={recipe}", "--run=new").record()
    config["model"]["init_args"] |= model
    Path(OWN).write_text(yaml.safe_dump(config))


def built_by(class_path: str, **init_args: Any) -> Namespace:
    return Namespace(class_path=class_path, init_args=Namespace(**init_args))


def check(value: Any, kind: type = ClassificationTask, typed: Iterable[str] = ()) -> None:
    check_class_paths(value, kind, "model", Path(OWN), [*typed])


def task(**init_args: Any) -> Namespace:
    return built_by("scalablevit_pl.tasks.ClassificationTask", **init_args)


@pytest.mark.parametrize("recipe", ["recipes/imagenet_swin_t.yaml", str(ROOT / "tests/toy_segmentation.yaml")])
def test_the_configuration_of_a_recipe_is_accepted_from_its_run_folder(recipe: str, parse: Parse) -> None:
    write_run(parse, recipe)
    parsed = parse("validate", "--run=first")
    assert parsed.invocation.own == Path(OWN)
    assert "." in parsed.config.model.class_path


def test_a_run_folder_runs_no_function_unless_its_file_is_named(parse: Parse, work: Path) -> None:
    call = {"class_path": "os.system", "init_args": {"command": "touch ran"}}
    write_run(parse, "recipes/quickstart.yaml", optimizer=call)
    advice = f"'{OWN}' sets optimizer to os.system, .* if you trust the file, give it with --config {OWN}$"
    with pytest.raises(ValueError, match=advice):
        parse("validate", "--run=first")
    assert parse("validate", "--run=first", "--config", OWN).config  # by the user's choice
    assert not (work / "ran").exists()


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (task(optimizer=built_by("torch.nn.init.zeros_")), "optimizer to torch.nn.init.zeros_"),
        (task(optimizer=built_by("timm.create_model")), "optimizer to timm.create_model"),
        (task(optimizer=built_by("torch.nn.Linear")), "optimizer to torch.nn.Linear"),
        (task(schedule=os.system), "schedule to posix.system"),
        (task(network=built_by("tests.small_networks.small")), "network to tests.small_networks.small"),
        (task(network=built_by("torch.hub.load")), "network to torch.hub.load"),
        (task(network=built_by("timm.data.create_dataset")), "network to timm.data.create_dataset"),
        (
            task(network=built_by("scalablevit_pl.models.build_classifier", config={"a": [built_by("shelve.Shelf")]})),
            "a to shelve.Shelf",
        ),
        (built_by("os.system"), "model to os.system"),
        (built_by("collections.OrderedDict"), "model to collections.OrderedDict"),
    ],
)
def test_names_that_do_not_fit_the_annotation_are_refused(value: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"sets {named}, which a run folder cannot name there"):
        check(value)
    check(value, typed=[f"--model.argument={named.split()[-1]}"])


def test_arguments_of_callbacks_are_checked() -> None:
    callback = built_by("lightning.pytorch.callbacks.LambdaCallback", on_fit_start=os.system)
    with pytest.raises(ValueError, match=r"on_fit_start to posix.system"):
        check(Namespace(callbacks=[callback]), pl.Trainer)


@pytest.mark.parametrize(
    "value",
    [
        task(optimizer=built_by("torch.optim.SGD", lr=0.1)),
        task(loss=built_by("torch.nn.CrossEntropyLoss"), schedule=built_by("torch.optim.lr_scheduler.StepLR")),
        task(network=built_by("torchvision.models.resnet18", num_classes=3)),
        task(network=built_by("timm.create_model", model_name="resnet18")),
    ],
)
def test_names_that_fit_the_annotation_are_accepted(value: Namespace) -> None:
    check(value)
    check(Namespace(preprocessing=Namespace(input_size=3)), Preprocessing)
    check(Namespace(logger=[built_by("lightning.pytorch.loggers.CSVLogger", save_dir="logs")]), pl.Trainer)


def test_modules_in_the_run_folder_are_not_imported(parse: Parse, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(work)
    (work / "runs/first/mine.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
    Path(OWN).write_text("model: {class_path: runs.first.mine.Task}\n")
    with pytest.raises(ValueError, match=r"runs\.first\.mine lies in the run folder"):
        parse("validate", "--run=first")
    assert not (work / "ran").exists()
    assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("scalablevit_pl")]
