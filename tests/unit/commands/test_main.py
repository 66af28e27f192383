import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningCLI

from scalablevit_pl import __version__
from scalablevit_pl.commands import main as cli
from scalablevit_pl.commands.main import (
    default_run,
    find_config,
    has,
    main,
    run_of_checkpoint,
    settle,
    split_values,
    value_of,
)
from scalablevit_pl.commands.pages import COMMANDS, EXPERIMENTS, help_page
from scalablevit_pl.commands.predict import _parse
from scalablevit_pl.experiment.cli import ExperimentCLI
from scalablevit_pl.models import create_model
from scalablevit_pl.run_folder import run_folder

Parse = Callable[..., Namespace]
QUICKSTART = "recipes/quickstart.yaml"
# A value for each kind that the help pages speak of, and for the option whose kind does not say it.
VALUES = {
    "BOOL": "true",
    "INT": "1",
    "FLOAT": "0.5",
    "NAME": "some_name",
    "FILE": QUICKSTART,
    "RUN": "first",
    "PATH": "runs/first",
}
NETWORK = {"--model.network.name": "scalablevit_s"}
# Answered by `main` or, after parsing, by leaving.
NOT_PARSED = {"--traceback", "--help-all", "--help", "--print_config"}
# Not beside --resume; tests/integration/test_weights.py gives it.
NOT_WITH_OTHERS = {"--weights"}


class ParsedError(Exception):
    """Raised in the place of all that comes after parsing."""


def stop(experiment: ExperimentCLI) -> None:
    raise ParsedError(experiment.config[experiment.config.subcommand])


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, work: Path) -> Parse:
    """Parse words as the command does, up to where the run folder is made, and return the configuration."""
    monkeypatch.setattr(ExperimentCLI, "_set_seed", lambda experiment: None)
    monkeypatch.setattr(ExperimentCLI, "before_instantiate_classes", stop)
    monkeypatch.setattr("scalablevit_pl.experiment.cli.find_checkpoint", lambda path, names: path)
    monkeypatch.setattr("scalablevit_pl.experiment.cli.read_checkpoint", lambda path: {"scalablevit_pl": {}})

    def parsed(command: str, *options: str) -> Namespace:
        monkeypatch.setattr(sys, "argv", ["scalablevit", command, *settle(command, list(options))])
        with pytest.raises(ParsedError) as caught:
            ExperimentCLI()
        return caught.value.args[0]

    return parsed


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a run called `first`."""
    (tmp_path / "runs" / "first" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "config.yaml").write_text("seed_everything: 0\n")
    torch.save({}, tmp_path / "runs" / "first" / "checkpoints" / "last.ckpt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the process's logging and warnings as they are."""
    monkeypatch.setattr(cli, "show_log", lambda: None)
    monkeypatch.setattr("time.strftime", {"%Y%m%d-%H%M%S": "20260102-030405"}.__getitem__)


def described(page: str) -> dict[str, list[str]]:
    """Return each option that a help page names, with the values that it may have."""
    kinds: dict[str, str] = {}
    for option, kind in re.findall(r"(?<![\w-])(--[a-z][\w.-]*)(?: ([A-Z]{2,}|[\w-]+(?:\|[\w-]+)+))?", page):
        kinds[option] = kind or kinds.get(option, "")
    return {
        option: [NETWORK.get(option) or VALUES.get(value, value) for value in kind.split("|")]
        for option, kind in kinds.items()
        if option not in NOT_PARSED
    }


def words_of(options: dict[str, list[str]], turn: int) -> list[str]:
    """Give each option its value of that turn."""
    return [word for option, values in options.items() for word in (option, values[turn % len(values)])]


def value_in(config: Namespace, option: str) -> Any:
    """Return what an option has become."""
    value: Any = config
    for name in option.removeprefix("--").split("."):
        value = getattr(value.init_args if "init_args" in value else value, name)
    return value


@pytest.mark.parametrize("turn", range(3))
@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_every_option_of_a_help_page_is_an_option(command: str, turn: int, parse: Parse) -> None:
    options = {name: values for name, values in described(help_page(command)).items() if name not in NOT_WITH_OTHERS}
    assert {"--config", "--run", "--data.batch_size", "--trainer.accelerator"} <= set(options)
    given = {"--run": ["first"]} | ({"--average": ["none"]} if "--average" in options else {})  # the run has no others
    words = words_of({"--config": [QUICKSTART], "--run": ["first"]}, 0) + words_of(options | given, turn)
    config = parse(command, *words)
    for option, values in options.items():
        if "." in option:
            value = value_in(config, option)
            assert str(value).replace("None", "null").replace("True", "true") == values[turn % len(values)]


def test_every_option_of_the_page_for_prediction_is_an_option(parse: Parse) -> None:
    files, run = help_page("predict").split("\ntest images of a run\n")
    options = described(files.split("\nimage files\n")[1])
    assert set(options) >= {"--weights", "--out", "--batch_size"}
    for turn in range(3):
        arguments = vars(_parse([*words_of(options, turn), "x.jpg"]))
        assert {f"--{name}" for name in arguments} == {*options, "--images"}
    options = described(run)
    assert set(options) == {"--run", "--ckpt_path"}
    for turn in range(3):
        parse("predict", "--config", QUICKSTART, *words_of(options | {"--run": ["first"]}, turn))


def test_the_names_that_the_pages_abbreviate_are_names() -> None:
    assert "scalablevit_nano, _s, _b, _l" in help_page("fit")
    for size in ("nano", "s", "b", "l"):
        assert f"scalablevit_{size}" in create_model.__globals__["MODELS"]


def test_what_is_given_last_wins(parse: Parse, work: Path) -> None:
    (work / "more.yaml").write_text("trainer:\n  max_epochs: 7\ndata:\n  init_args:\n    batch_size: 3\n")
    config = parse("fit", "--config", QUICKSTART, "--config", "more.yaml", "--data.batch_size=5")
    assert config.trainer.max_epochs == 7
    assert config.data.init_args.batch_size == 5
    assert config.data.init_args.preprocessing.input_size == 28


def test_print_config_and_help_all_show_and_stop(
    parse: Parse, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, shown in (
        (["fit", "--config", QUICKSTART, "--print_config"], "class_path: scalablevit_pl.tasks.ClassificationTask"),
        (["fit", "--help-all"], "--trainer.max_epochs"),
        (["predict", "--help-all"], "--trainer.max_epochs"),
    ):
        monkeypatch.setattr(sys, "argv", ["scalablevit"])
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 0
        assert shown in capsys.readouterr().out


def test_no_option_lets_a_checkpoint_run_code(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in EXPERIMENTS:
        with pytest.raises(ValueError, match="unknown option --weights_only"):
            parse(command, "--config", QUICKSTART, "--run", "first", "--weights_only=false")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--config", "a.yaml"], ["--config", "a.yaml"]),
        (["-c", "a.yaml"], ["--config", "a.yaml"]),
        (["-c=a.yaml", "--run=x=y"], ["--config", "a.yaml", "--run", "x=y"]),
        (["--resume=last"], ["--ckpt_path", "last"]),
        (["--resume", "last"], ["--ckpt_path", "last"]),
        (["--ckpt_path=best"], ["--ckpt_path", "best"]),
        (["--data.batch_size=3", "--model.lr", "1"], ["--data.batch_size=3", "--model.lr", "1"]),
        (["--run="], ["--run", ""]),
        ([], []),
    ],
    ids=str,
)
def test_words_are_split_where_they_are_looked_at(options: list[str], words: list[str]) -> None:
    assert split_values(options) == words


def test_the_last_value_of_an_option_counts() -> None:
    assert value_of(["--run", "a", "--x", "--run", "b"], "--run") == "b"
    assert value_of(["--x", "--run"], "--run") is None
    assert value_of([], "--run") is None


def test_an_option_is_seen_in_both_spellings() -> None:
    assert has(["--run", "x"], "--config", "--run")
    assert has(["--run=x"], "--run")
    assert not has(["--runs=x", "run"], "--run")


def test_a_new_run_is_named_by_its_recipe(work: Path) -> None:
    words = ["--config", "some/where/quickstart.yaml", "--config", "debug/overfit.yaml"]
    assert default_run(words) == "quickstart-20260102-030405"
    assert default_run(["--data", "x"]) == "run-20260102-030405"


def test_a_run_is_known_by_its_checkpoint(work: Path) -> None:
    for path in ("runs/first/checkpoints/last.ckpt", str(work / "runs/first/checkpoints/last.ckpt")):
        assert run_of_checkpoint(path) == str(work / "runs/first")
    for path in (None, "last", "somewhere/checkpoints/last.ckpt", "runs/first/last.ckpt"):
        assert run_of_checkpoint(path) is None


@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_checkpoint_alone_brings_its_runs_configuration(command: str, work: Path) -> None:
    words = settle(command, ["--ckpt_path", "runs/first/checkpoints/last.ckpt"])
    assert value_of(words, "--config") == str(work / "runs/first/config.yaml")
    assert value_of(words, "--run") == str(work / "runs/first")


@pytest.mark.parametrize(("command", "remedy"), [("fit", "--config recipes/"), ("validate", "--run")])
def test_a_command_without_anything_to_start_from_says_what_it_needs(command: str, remedy: str, work: Path) -> None:
    for words in ([], ["--data.dataset", "photos", "--model.lr=1"]):
        with pytest.raises(ValueError, match=f"nothing to start from.*{remedy}"):
            settle(command, words)
    assert "--data=a.Class" in settle("fit", ["--data=a.Class"])


@pytest.mark.parametrize("words", [["--config"], ["-c", "--run", "first"], ["--config", "--data.batch_size=2"]])
def test_a_recipe_that_is_not_named_is_asked_for(words: list[str], work: Path) -> None:
    with pytest.raises(ValueError, match="--config has no value: write the name of a recipe behind it"):
        settle("fit", words)


def test_an_interruption_is_no_fault(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupt)
    assert main(["plot"]) == 130
    assert capsys.readouterr().err == "scalablevit: interrupted\n"
    with pytest.raises(KeyboardInterrupt):
        main(["plot", "--traceback"])


def test_a_fit_spells_out_recipe_and_run(work: Path) -> None:
    recipe = str(find_config(QUICKSTART))
    assert settle("fit", ["-c", QUICKSTART]) == ["--config", recipe, "--run", "quickstart-20260102-030405"]
    assert settle("fit", [f"--config={QUICKSTART}", "--run=new"]) == ["--config", recipe, "--run", "new"]


def test_a_resume_reads_the_runs_own_configuration(work: Path) -> None:
    words = settle("fit", ["--run", "first", "--resume", "last", "--trainer.max_epochs=2"])
    own = "runs/first/config.yaml"
    assert words == ["--config", own, "--run", "first", "--ckpt_path", "last", "--trainer.max_epochs=2"]


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_an_evaluation_reads_the_runs_own_configuration(command: str, work: Path) -> None:
    words = settle(command, ["--run", "first"])
    assert words[:2] == ["--config", "runs/first/config.yaml"]
    assert value_of(words, "--run") == "runs/first"
    words = settle(command, ["--run", "runs/first", "--config", QUICKSTART])
    assert words.count("--config") == 1
    assert value_of(words, "--config") == str(find_config(QUICKSTART))
    with pytest.raises(ValueError, match="no run in 'runs/frist': did you mean first"):
        settle(command, ["--run", "frist", "--config", QUICKSTART])


def test_the_whole_help_needs_nothing_else() -> None:
    assert settle("fit", ["--run", "missing", "--help-all"]) == ["--help"]


def test_a_configuration_is_looked_for_here_and_then_in_the_package(work: Path) -> None:
    assert find_config(QUICKSTART).samefile(cli.CONFIG_FOLDERS[-1] / QUICKSTART)
    Path("recipes").mkdir()
    Path(QUICKSTART).write_text("mine")
    assert find_config(QUICKSTART) == Path(QUICKSTART)
    assert find_config(str(work / QUICKSTART)) == work / QUICKSTART


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("recipes/quikstart.yaml", "did you mean recipes/quickstart.yaml"),
        ("quickstart", "did you mean recipes/quickstart.yaml"),
        ("recipes", "did you mean recipes/|there are .*recipes/quickstart.yaml"),
        ("???", "there are recipes/.*, recipes/quickstart.yaml"),
    ],
)
def test_an_unknown_configuration_gets_a_hint(name: str, hint: str, work: Path) -> None:
    with pytest.raises(ValueError, match=f"no configuration '{re.escape(name)}', .*: ({hint})"):
        find_config(name)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["fti"], "did you mean fit?"),
        (["tset", "--run", "x"], "did you mean test?"),
        (["xyz"], "see scalablevit --help"),
    ],
)
def test_an_unknown_command_gets_a_hint(words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"scalablevit: error: unknown command {words[0]!r}: {hint}\n")


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["help"], ["--version"]])
def test_the_first_page_and_the_version(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"scalablevit_pl {__version__}\n" if words == ["--version"] else "usage: scalablevit ")


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_page(command: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--config", "missing.yaml", option]) == 0
    assert capsys.readouterr().out.startswith(f"usage: scalablevit {command} ")
    main([])
    assert f"\n  {command} " in capsys.readouterr().out


def test_the_words_of_the_process_are_taken_by_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["scalablevit", "--version"])
    assert main() == 0
    assert __version__ in capsys.readouterr().out


def test_an_error_that_a_user_can_mend_is_a_sentence_unless_its_trace_is_asked_for(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["test", "--run", "frist"]) == 2
    assert capsys.readouterr().err == "scalablevit: error: there is no run in 'runs/frist': did you mean first?\n"
    with pytest.raises(ValueError, match="no run in 'runs/frist'"):
        main(["test", "--run", "frist", "--traceback"])


def test_a_fault_of_the_program_keeps_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(command: str, options: list[str]) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "run", fault)
    with pytest.raises(ZeroDivisionError):
        main(["fit"])


@pytest.mark.parametrize(
    ("options", "form"),
    [
        (["--weights", "x", "y.jpg"], "files"),
        (["--run", "first"], "run"),
        (["--run=first"], "run"),
        (["-c=x.yaml"], "run"),
        (["--help-all"], "run"),
    ],
)
def test_prediction_has_two_forms(options: list[str], form: str, monkeypatch: pytest.MonkeyPatch, work: Path) -> None:
    seen: list[str] = []
    monkeypatch.setattr("scalablevit_pl.commands.predict.predict_files", lambda options: seen.append("files"))
    monkeypatch.setattr("scalablevit_pl.experiment.cli.ExperimentCLI", lambda typed: seen.append("run"))
    monkeypatch.setattr(cli, "find_config", Path)
    monkeypatch.setattr(sys, "argv", ["scalablevit"])
    assert main(["predict", *options]) == 0
    assert seen == [form]


def test_lightning_reads_checkpoints_as_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LightningCLI, "_prepare_subcommand_kwargs", lambda experiment, command: {"ckpt_path": "x"})
    arguments = ExperimentCLI.__new__(ExperimentCLI)._prepare_subcommand_kwargs("fit")
    assert arguments == {"ckpt_path": "x", "weights_only": True}


def test_asking_for_a_class_is_left_as_it_is(work: Path) -> None:
    for options in (["--data.help", "some.Class"], ["--model.help=some.Class"]):
        assert settle("fit", options) == options


def test_a_run_given_as_a_path_is_not_taken_for_one_below_runs(work: Path) -> None:
    (work / "model").mkdir()
    (work / "model" / "config.yaml").write_text("seed_everything: 1\n")
    words = settle("test", ["--run", "./model"])
    assert run_folder(value_of(words, "--run") or "").resolve() == work / "model"


def test_a_command_line_that_starts_from_weights_also_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w").mkdir()
    words = ["-c", QUICKSTART, "--weights=w", "--run", "x", "--resume", "auto", "--data.batch_size", "8"]
    words += ["--model.network.num_classes", "5", "--model.network.drop_path_rate=0.1", "--model.label_smoothing=0.2"]
    begun = settle("fit", words)
    assert value_of(begun, "--weights") == "w"
    assert str(value_of(begun, "--config")).endswith(QUICKSTART)
    (tmp_path / "runs/x/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/x/config.yaml").touch()
    assert settle("fit", words) == begun  # nothing to go on with yet
    (tmp_path / "runs/x/checkpoints/step=3.ckpt").touch()
    again = settle("fit", words)
    again.remove("--model.label_smoothing=0.2")
    assert again == ["--config", "runs/x/config.yaml", "--run", "x", "--ckpt_path", "auto", "--data.batch_size", "8"]
    with pytest.raises(ValueError, match="--weights starts anew"):
        settle("fit", [*words, "--resume", "last"])
