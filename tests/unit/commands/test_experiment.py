import sys
from pathlib import Path

import pytest

from scalablevit_pl.commands import experiment
from scalablevit_pl.commands.main import main
from scalablevit_pl.experiment.invocation import Invocation


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Invocation, str, list[str]]]:
    """Record each run: its invocation, its command line and what `sys.argv` is meanwhile."""
    seen: list[tuple[Invocation, str, list[str]]] = []

    def run(invocation: Invocation, command_line: str) -> None:
        seen.append((invocation, command_line, list(sys.argv)))

    monkeypatch.setattr("scalablevit_pl.commands.main.show_log", lambda: None)
    monkeypatch.setattr(experiment, "run_experiment", run)
    monkeypatch.setattr(sys, "argv", ["scalablevit"])
    (tmp_path / "runs/first").mkdir(parents=True)
    (tmp_path / "runs/first/config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    return seen


def test_child_processes_get_the_resolved_words(runs: list[tuple[Invocation, str, list[str]]]) -> None:
    assert main(["test", "--run", "first", "--traceback", "--data.dataset", "my photos"]) == 0
    [(invocation, command_line, words)] = runs
    assert words == ["scalablevit", *invocation.render()]
    assert Invocation.parse(words[1:]).resolve() == invocation
    assert command_line == "scalablevit test --run first --data.dataset 'my photos'"


def test_a_command_called_from_python_leaves_sys_argv_alone(
    runs: list[tuple[Invocation, str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(invocation: Invocation, command_line: str) -> None:
        raise OSError(2, "No such file", "x")

    before = sys.argv
    assert main(["test", "--run", "first"]) == 0
    monkeypatch.setattr(experiment, "run_experiment", fail)
    assert main(["test", "--run", "first"]) == 2
    assert sys.argv is before
    assert before == ["scalablevit"]


@pytest.mark.parametrize(
    ("options", "form"),
    [
        (["--weights", "x", "y.jpg"], "files"),
        (["--run", "first"], "run"),
        (["--run=first"], "run"),
        (["-c=recipes/quickstart.yaml", "--run=first"], "run"),
        (["--help-all"], "run"),
    ],
)
def test_predict_has_two_forms(
    options: list[str],
    form: str,
    runs: list[tuple[Invocation, str, list[str]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files: list[list[str]] = []
    monkeypatch.setattr("scalablevit_pl.commands.predict.predict_files", files.append)
    assert main(["predict", *options]) == 0
    assert (len(files), len(runs)) == ((1, 0) if form == "files" else (0, 1))
    assert files in ([], [options])
