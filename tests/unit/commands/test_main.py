import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from scalablevit_pl import __version__
from scalablevit_pl.commands import main as command
from scalablevit_pl.commands.main import COMMANDS, main
from scalablevit_pl.commands.pages import list_pages


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the process's logging and warnings as they are."""
    monkeypatch.setattr(command, "show_log", lambda: None)


def raise_on_run(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: str, options: list[str]) -> int:
        raise error

    monkeypatch.setattr(command, "run", run)


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["help"], ["--version"]])
def test_the_first_page_and_the_version(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"scalablevit_pl {__version__}\n" if words == ["--version"] else "usage: scalablevit ")


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("name", list_pages())
def test_every_command_has_a_page(name: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--config", "missing.yaml", option]) == 0
    assert capsys.readouterr().out.startswith(f"usage: scalablevit {name} ")
    main([])
    assert f"\n  {name} " in capsys.readouterr().out


@pytest.mark.parametrize("place", COMMANDS.values())
def test_every_command_has_a_function(place: str) -> None:
    module, _, function = place.partition(":")
    assert callable(getattr(importlib.import_module(f"scalablevit_pl.commands.{module}"), function))


def test_options_reach_the_function_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[str]]] = []

    def fake(name: str) -> SimpleNamespace:
        functions = {place.partition(":")[2] for place in COMMANDS.values()}
        record: dict[str, Callable[[list[str]], object]] = {
            function: lambda options, function=function: calls.append((f"{name}:{function}", options))  # type: ignore[misc]
            for function in functions
        }
        return SimpleNamespace(**record)

    monkeypatch.setattr(importlib, "import_module", fake)
    assert main(["profile", "a", "--traceback", "--json=-"]) == 0
    assert main(["profile", "data", "--rounds=3"]) == 0
    assert main(["doctor", "--traceback"]) == 0
    place = "scalablevit_pl.commands."
    assert calls == [
        (f"{place}profile:profile", ["a", "--json=-"]),
        (f"{place}profile_data:profile_data", ["--rounds=3"]),
        (f"{place}doctor:diagnose", ["--traceback"]),
    ]


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


def test_the_words_of_the_process_are_the_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["scalablevit", "--version"])
    assert main() == 0
    assert __version__ in capsys.readouterr().out


def test_an_error_of_the_user_is_one_line_unless_its_traceback_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs/first").mkdir(parents=True)
    (tmp_path / "runs/first/config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert main(["test", "--run", "frist"]) == 2
    assert capsys.readouterr().err == "scalablevit: error: there is no run in 'runs/frist': runs/ has first\n"
    with pytest.raises(ValueError, match="no run in 'runs/frist'"):
        main(["test", "--run", "frist", "--traceback"])


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_an_error_of_all_processes_is_reported_once(
    rank: str, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = OSError(2, "No such file", "x")
    error.raised_by_all = True  # type: ignore[attr-defined]
    raise_on_run(error, monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert main(["fit"]) == 2
    assert capsys.readouterr().err.count("No such file: 'x'") == lines


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    raise_on_run(ZeroDivisionError(), monkeypatch)
    with pytest.raises(ZeroDivisionError):
        main(["fit"])


def test_an_interruption_is_not_a_bug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raise_on_run(KeyboardInterrupt(), monkeypatch)
    assert main(["plot"]) == 130
    assert capsys.readouterr().err == "scalablevit: interrupted\n"
    with pytest.raises(KeyboardInterrupt):
        main(["plot", "--traceback"])


def test_an_interruption_that_lightning_has_caught_has_the_same_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(command: str, options: list[str]) -> int:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.setattr("scalablevit_pl.commands.main.run", interrupted)
    assert main(["fit"]) == 130
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["predict"]) == 130
    assert capsys.readouterr().err == "scalablevit: interrupted\n"  # once, by the first process


def test_another_exit_keeps_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    raise_on_run(SystemExit(3), monkeypatch)
    with pytest.raises(SystemExit, match="3"):
        main(["fit"])


def test_every_page_belongs_to_a_command() -> None:
    assert {*list_pages(), "profile data"} == set(COMMANDS)
