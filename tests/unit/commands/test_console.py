import logging
from types import SimpleNamespace

import pytest

from scalablevit_pl.commands import console
from scalablevit_pl.commands.console import Console, fail, show_log

OURS, LIGHTNING = "scalablevit_pl.callbacks.run_record", "lightning.pytorch.utilities.rank_zero"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log as a command does."""
    for name in ("", "lightning.pytorch", "lightning.fabric"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        monkeypatch.setattr(logging.getLogger(name), "level", logging.INFO)
    monkeypatch.setattr(console, "os", SimpleNamespace(environ={}))
    monkeypatch.setattr(console, "warnings", SimpleNamespace(filterwarnings=lambda *given: None))
    for _ in range(2):
        show_log()


@pytest.mark.usefixtures("shown")
def test_messages_are_written_once_and_repetitions_not_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger(OURS).info("train: 3 images")
    for text in ("GPU available: False, used: False", "Restored all states from the checkpoint at x", "Time limit"):
        logging.getLogger(LIGHTNING).info(text)
    logging.getLogger("lightning.fabric.utilities.seed").info("Seed set to 0")
    assert capsys.readouterr().err == "train: 3 images\nTime limit\n"


@pytest.mark.usefixtures("shown")
@pytest.mark.parametrize("name", ["RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"])
def test_only_the_first_process_writes_messages_but_all_write_errors(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console.os.environ[name] = "1"
    logging.getLogger(OURS).warning("an image is unreadable")
    logging.getLogger(OURS).error("out of disk space")
    assert capsys.readouterr().err == "out of disk space\n"


@pytest.mark.parametrize(("terminal", "rank"), [(True, "0"), (True, "1"), (False, "0")])
def test_data_sets_show_bars_in_a_terminal_only(terminal: bool, rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"RANK": rank}
    monkeypatch.setattr(logging.getLogger(), "handlers", [Console()])
    monkeypatch.setattr(console, "os", SimpleNamespace(environ=environment))
    monkeypatch.setattr(console, "sys", SimpleNamespace(stderr=SimpleNamespace(isatty=lambda: terminal)))
    ignored: list[str] = []
    filters = SimpleNamespace(filterwarnings=lambda *given: None, simplefilter=ignored.append)
    monkeypatch.setattr(console, "warnings", filters)
    show_log()
    assert ignored == ([] if rank == "0" else ["ignore"])
    assert ("HF_DATASETS_DISABLE_PROGRESS_BARS" in environment) == (not terminal or rank == "1")


@pytest.mark.usefixtures("shown")
def test_control_characters_of_messages_and_errors_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger(OURS).warning("%s is unreadable", "\x1b[2J.png")
    fail("\x9b31m is not a class")
    assert capsys.readouterr().err == "\\x1b[2J.png is unreadable\nscalablevit: error: \\x9b31m is not a class\n"
