"""The help pages agree with the parsers."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace

from scalablevit_pl.commands.main import main
from scalablevit_pl.commands.pages import read_page
from scalablevit_pl.commands.predict import _parse
from scalablevit_pl.experiment.invocation import Invocation
from scalablevit_pl.experiment.parsing import ParsedExperiment
from scalablevit_pl.models import create_model

Parse = Callable[..., Namespace]
QUICKSTART = "recipes/quickstart.yaml"
# A value for each kind of value that the pages name, and for an option whose kind does not tell it.
VALUES = {
    "BOOL": "true",
    "INT": "1",
    "FLOAT": "0.5",
    "NAME": "some_name",
    "FILE": QUICKSTART,
    "RUN": "first",
    "PATH": "runs/first",
}
OTHER_VALUES = {
    "--model.network.name": "scalablevit_s",
    "--model.schedule": "torch.optim.lr_scheduler.ConstantLR",
    "--model.loss": "torch.nn.CrossEntropyLoss",
    "--model.class_weights": "[1.0, 2.0]",
}
# Answered by `main`, or by leaving once they are parsed.
NOT_PARSED = {"--traceback", "--help-all", "--help", "--print_config"}
# Not together with --resume; tests/integration/test_weights.py uses it.
NOT_WITH_OTHERS = {"--weights"}


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Parse:
    """Parse a command, in a folder with a run called `first`, and return the configuration."""
    (tmp_path / "runs/first").mkdir(parents=True)
    (tmp_path / "runs/first/config.yaml").write_text("seed_everything: 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ParsedExperiment, "_set_seed", lambda parsed: None)
    return lambda *words: ParsedExperiment(Invocation.parse(words).resolve()).config


def described(page: str) -> dict[str, list[str]]:
    """Return each option that a help page names, with the values that it may have."""
    kinds: dict[str, str] = {}
    for option, kind in re.findall(
        r"(?<![\w-])(--[a-z][\w.-]*)(?: ([A-Z]{2,}|[\w-]+(?:\|[\w-]+)+|[a-z]+(?=  )))?", page
    ):
        kinds[option] = kind or kinds.get(option, "")
    return {
        option: [OTHER_VALUES.get(option) or VALUES.get(value, value) for value in kind.split("|")]
        for option, kind in kinds.items()
        if option not in NOT_PARSED
    }


def words_of(options: dict[str, list[str]], turn: int) -> list[str]:
    """Give each option its value of that turn."""
    return [word for option, values in options.items() for word in (option, values[turn % len(values)]) if word]


def value_in(config: Namespace, option: str) -> Any:
    """Return the parsed value of an option."""
    value: Any = config
    for name in option.removeprefix("--").split("."):
        value = getattr(value.init_args if "init_args" in value else value, name)
    return value


@pytest.mark.parametrize("turn", range(3))
@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_every_option_of_a_page_is_parsed_to_its_value(command: str, turn: int, parse: Parse) -> None:
    options = {name: values for name, values in described(read_page(command)).items() if name not in NOT_WITH_OTHERS}
    assert {"--config", "--run", "--data.batch_size", "--trainer.accelerator"} <= set(options)
    words = words_of({"--config": [QUICKSTART], "--run": ["first"]}, 0) + words_of(options | {"--run": ["first"]}, turn)
    config = parse(command, *words)
    for option, values in options.items():
        if "." in option:
            value = value_in(config, option)
            value = value.class_path if isinstance(value, Namespace) else value
            assert str(value).replace("None", "null").replace("True", "true") == values[turn % len(values)]


def test_every_option_of_the_page_for_prediction_is_an_option(parse: Parse) -> None:
    files, run = read_page("predict").split("\ntest images of a run\n")
    options = described(files.split("\nimage files\n")[1])
    assert set(options) >= {"--weights", "--out", "--batch_size"}
    for turn in range(3):
        arguments = vars(_parse([*words_of(options, turn), "x.jpg"]))
        assert {f"--{name}" for name in arguments} == {*options, "--images"}
    options = described(run)
    assert set(options) == {"--run", "--ckpt_path", "--model.tta"}
    for turn in range(3):
        parse("predict", "--config", QUICKSTART, *words_of(options | {"--run": ["first"]}, turn))


def test_the_names_that_the_pages_abbreviate_are_names() -> None:
    assert "scalablevit_nano, _s, _b, _l" in read_page("fit")
    for size in ("nano", "s", "b", "l"):
        assert f"scalablevit_{size}" in create_model.__globals__["MODELS"]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["fit", "--config", QUICKSTART, "--print_config"], "class_path: scalablevit_pl.tasks.ClassificationTask"),
        (["fit", "--help-all"], "--trainer.max_epochs"),
        (["predict", "--help-all"], "--trainer.max_epochs"),
        (["fit", "--data.help", "scalablevit_pl.data.ClassificationDataModule"], "--data.batch_size BATCH_SIZE"),
    ],
)
def test_print_config_and_all_help_options_show_and_exit(
    words: list[str], shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scalablevit_pl.commands.main.show_log", lambda: None)
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    assert shown in capsys.readouterr().out
