import logging
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import filelock
import pytest
import yaml

from scalablevit_pl.run_folder import (
    check_resumable,
    claim_folder,
    differences,
    existing_run,
    locked_folder,
    removed_if_unused,
    resumable_checkpoints,
    run_folder,
)

CONFIG: dict[str, Any] = {
    "seed_everything": 0,
    "model": {"class_path": "Task", "init_args": {"label_smoothing": 0.1, "network": {"name": "nano"}}},
    "data": {"init_args": {"mean": [0.5, 0.5], "augmentation": None, "dataset": "Schmetterlinge ü"}},
    "trainer": {"max_epochs": 1},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """Return the configuration with another value at a dotted path."""
    name, _, rest = path.partition(".")

    def put(section: dict[str, Any], name: str, rest: str) -> dict[str, Any]:
        inner, _, further = rest.partition(".")
        return section | {name: put(section[name], inner, further) if rest else value}

    return put(CONFIG, name, rest)


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Capture the package's messages, even after a command has run in this process."""
    caplog.set_level(logging.INFO, "scalablevit_pl")
    return caplog


def start(*names: str) -> None:
    for name in names:
        claim_folder(run_folder(name), CONFIG, resume=False)


@pytest.mark.parametrize(
    ("run", "folder"),
    [
        ("first", "runs/first"),
        ("a.b c", "runs/a.b c"),
        ("runs/first", "runs/first"),
        ("./first", "first"),
        ("/some/first", "/some/first"),
    ],
)
def test_a_name_is_below_runs_and_a_path_is_kept(run: str, folder: str) -> None:
    assert run_folder(run) == Path(folder)


def test_a_run_is_found_by_name_and_path(work: Path) -> None:
    start("first")
    for run in ("first", "runs/first", "./runs/first", "runs/first/", str(work / "runs/first")):
        assert existing_run(run).resolve() == work / "runs/first"


@pytest.mark.parametrize("run", ["frist", "runs/frist", "elsewhere/first"])
def test_a_missing_run_lists_the_existing_ones(run: str) -> None:
    start("first", "other")
    with pytest.raises(ValueError, match=f"no run in '.*{run}': runs/ has (first, other|other, first)$"):
        existing_run(run)


def test_of_many_runs_the_newest_are_listed() -> None:
    for number in range(12):
        start(f"run{number}")
        os.utime(f"runs/run{number}/config.yaml", (number, number))
    with pytest.raises(ValueError, match=r": runs/ has run11, run10, .*, run2 and 2 more$"):
        existing_run("run")


def test_a_missing_run_without_others_says_what_to_give() -> None:
    Path("runs/first").mkdir(parents=True)  # a folder without a configuration is not a run
    with pytest.raises(ValueError, match=r"no run in 'runs/first': give its path"):
        existing_run("first")


def test_a_new_run_writes_its_configuration() -> None:
    folder = Path("deep/below/first")
    claim_folder(folder, CONFIG, resume=False)
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == CONFIG
    assert list(yaml.safe_load(text)) == list(CONFIG)
    assert "Schmetterlinge ü" in text


def test_a_folder_without_a_run_can_be_used() -> None:
    Path("runs/first/notes").mkdir(parents=True)
    start("first")


def test_a_second_run_in_the_folder_is_refused() -> None:
    start("first")
    Path("runs/first/resolved.json").write_text("{}")  # training has started
    before = Path("runs/first/config.yaml").read_bytes()
    with pytest.raises(ValueError, match=r"'runs/first' already holds a run: .*--run.*--resume auto"):
        claim_folder(run_folder("first"), changed("trainer.max_epochs", 9), resume=False)
    assert Path("runs/first/config.yaml").read_bytes() == before


def test_a_run_that_never_trained_is_replaced() -> None:
    start("first")
    claim_folder(run_folder("first"), changed("model.init_args.label_smoothing", 0.2), resume=False)
    assert yaml.safe_load(Path("runs/first/config.yaml").read_text())["model"]["init_args"]["label_smoothing"] == 0.2


def test_a_resumed_run_writes_its_configuration() -> None:
    start("first")
    Path("runs/first/resolved.json").write_text("{}")
    claim_folder(run_folder("first"), changed("trainer.max_epochs", 9), resume=True)
    assert yaml.safe_load(Path("runs/first/config.yaml").read_text()) == changed("trainer.max_epochs", 9)


def test_a_failed_write_keeps_the_previous_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(path: Path, text: str, **options: Any) -> None:
        path.write_bytes(text[:9].encode())
        raise OSError(28, "No space left on device")

    start("first")
    monkeypatch.setattr(Path, "write_text", fill)
    with pytest.raises(OSError, match="No space left"):
        claim_folder(run_folder("first"), changed("trainer.max_epochs", 9), resume=True)
    assert yaml.safe_load(Path("runs/first/config.yaml").read_bytes()) == CONFIG
    assert [path.name for path in Path("runs/first").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("trainer.max_epochs", 9),
        ("data.init_args.num_workers", 7),
        ("data.init_args.batch_size", 64),
        ("data.init_args.worker_timeout", 60.0),
        ("data.init_args.max_unreadable", 3),
        ("model.init_args.compile", True),
        ("model.init_args.channels_last", True),
        ("model.init_args.grad_checkpointing", True),
    ],
)
def test_a_resumed_run_may_change_its_length_and_how_it_computes(path: str, value: float) -> None:
    check_resumable(CONFIG, changed(path, value))


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("model.init_args.label_smoothing", 0.2, "model.init_args.label_smoothing was 0.1 and is 0.2"),
        ("model.init_args.network", {"name": "s"}, "model.init_args.network.name was 'nano' and is 's'"),
        ("model.init_args.network.more", 3, "model.init_args.network.more was None and is 3"),
        ("data.init_args.mean", [0.5, 0.4], "data.init_args.mean[1] was 0.5 and is 0.4"),
        ("data.init_args.augmentation", {"mixup": 1}, "data.init_args.augmentation was None and is {'mixup': 1}"),
        ("data.init_args", None, "data.init_args was {"),
    ],
)
def test_a_resumed_run_must_not_change_model_or_data(path: str, value: Any, line: str) -> None:
    with pytest.raises(ValueError, match="cannot resume with other settings") as caught:
        check_resumable(CONFIG, changed(path, value))
    assert line in str(caught.value)


def test_a_run_can_continue_in_a_new_folder() -> None:
    claim_folder(run_folder("branch"), CONFIG, resume=True)
    assert existing_run("branch") == Path("runs/branch")


def test_differences_are_listed_with_their_keys() -> None:
    earlier = {"a": 1, "b": {"c": [1, 2], "d": {"e": None}}, "gone": True}
    assert differences(earlier, earlier) == []
    assert differences(earlier, earlier | {"more": 1}) == ["more was None and is 1"]
    assert differences({"list": [1, 2]}, {"list": [1]}) == ["list had 2 entries and has 1"]
    assert differences(earlier, {"a": 2, "b": {"c": [1, 3], "d": {"e": 0}}}) == [
        "a was 1 and is 2",
        "b.c[1] was 2 and is 3",
        "b.d.e was None and is 0",
        "gone was True and is None",
    ]


@pytest.mark.parametrize(
    ("path", "value"), [("seed_everything", 1), ("trainer.gradient_clip_val", 1.0), ("weights", "runs/other")]
)
def test_a_resumed_run_must_not_change_seed_clipping_or_initial_weights(path: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{path} was .* and is {value!r}"):
        check_resumable(CONFIG, changed(path, value))


def test_a_folder_is_locked_against_another_process(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from scalablevit_pl.run_folder import locked_folder\n"
    code += "with locked_folder(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="another process is training in"), locked_folder(tmp_path, patience=0.1):
            pass
        with locked_folder(tmp_path, process=1, patience=0.0):  # another process of the same run
            pass
        other.kill()
    with locked_folder(tmp_path, patience=5.0):
        pass


def test_a_run_waits_for_a_lock_that_is_released_soon(tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    begun, ended = threading.Event(), threading.Event()

    def train() -> None:
        with locked_folder(tmp_path):
            begun.set()
            time.sleep(0.3)
            ended.set()

    with locked_folder(tmp_path):
        assert "waiting" not in messages.text
    with ThreadPoolExecutor(1) as other:
        other.submit(train)
        assert begun.wait(5.0)
        with locked_folder(tmp_path, patience=5.0):
            assert ended.is_set()
    assert "waiting for another process that is training in" in messages.text


@pytest.mark.parametrize("error", [OSError(95, "Operation not supported"), NotImplementedError("no locks here")])
def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with locked_folder(tmp_path):
        pass
    assert f"cannot be locked ({error}): make sure that no other run writes into it" in messages.text


def test_resumable_checkpoints_are_listed_newest_first(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for age, name in enumerate(("step=30", "step=4", "best", "step=20")):
        (folder / f"{name}.ckpt").touch()
        os.utime(folder / f"{name}.ckpt", (100 - age, 100 - age))
    assert [path.stem for path in resumable_checkpoints(tmp_path)] == ["step=30", "step=4", "step=20"]
    os.link(folder / "step=4.ckpt", folder / "last.ckpt")  # a second name of one file
    assert [path.stem for path in resumable_checkpoints(tmp_path)] == ["step=30", "step=4", "step=20"]
    (folder / "last.ckpt").unlink()
    (folder / "last.ckpt").touch()
    assert [path.stem for path in resumable_checkpoints(tmp_path)] == ["last", "step=30", "step=4", "step=20"]
    os.utime(folder / "last.ckpt", (98, 98))  # an old copy
    assert [path.stem for path in resumable_checkpoints(tmp_path)] == ["step=30", "step=4", "last", "step=20"]


@pytest.mark.parametrize("name", ["", " ", ".", ".."])
def test_an_invalid_run_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not a valid run name: choose another"):
        run_folder(name)


def test_a_resumed_run_must_not_start_end_or_change_its_average() -> None:
    on, off = {"ema": {"decay": 0.9999, "warmup": True}}, {"ema": {"decay": None, "warmup": True}}
    check_resumable(on, on)
    check_resumable({}, off)  # a run of a version without averages
    for earlier, now in ((on, off), (off, on), ({}, on), (on, {"ema": {"decay": 0.9999, "warmup": False}})):
        with pytest.raises(ValueError, match=r"the run cannot resume with other settings: ema\.(decay|warmup) was"):
            check_resumable(earlier, now)


@pytest.mark.parametrize("names", [[], ["config.yaml", ".lock-0"], ["config.yaml", "tensorboard"]])
@pytest.mark.parametrize("failure", [None, ValueError("of the start")])
def test_a_new_folder_that_was_not_used_is_removed(names: list[str], failure: Exception | None, work: Path) -> None:
    with suppress(ValueError), removed_if_unused(work / "runs/new"):
        for name in names:
            (work / "runs/new").mkdir(parents=True, exist_ok=True)
            (work / "runs/new" / name).touch()
        if failure:
            raise failure
    assert not (work / "runs/new").exists()


@pytest.mark.parametrize(("existed", "name"), [(True, "config.yaml"), (False, "resolved.json"), (False, "notes.txt")])
def test_an_older_folder_and_one_with_results_stay(existed: bool, name: str, work: Path) -> None:
    if existed:
        (work / "run").mkdir()
    with removed_if_unused(work / "run"):
        (work / "run").mkdir(exist_ok=True)
        (work / "run" / name).touch()
    assert (work / "run" / name).exists()
