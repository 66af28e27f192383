import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from loading_data import make_images
from PIL import Image

from scalablevit_pl.commands import main as cli
from scalablevit_pl.commands import profile_data
from scalablevit_pl.commands.profile_data import read_options
from scalablevit_pl.profiling.loader import STAGES

QUICK = ["--config", "recipes/quickstart.yaml", "--workers=0", "--seconds=0.05", "--rounds=2", "--data.batch_size=4"]


@pytest.fixture(autouse=True)
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr(sys, "argv", ["scalablevit"])
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(*words: str) -> int:
    return cli.run("profile", ["data", *QUICK, *words])


@pytest.mark.parametrize("streamed", [False, True])
def test_the_record_holds_rates_and_stages(streamed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    folder = make_images(tmp_path / "data", streamed)
    more = [f"--data.dataset={folder}", f"--data.streaming={str(streamed).lower()}", "--images=12"]
    assert run(*more, "--json", "out.json") == 0
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 80
    assert all(stage in table for stage in STAGES)
    record: dict[str, Any] = json.loads(Path("out.json").read_text())
    assert set(record) >= {"schema", "date", "versions", "machine", "settings", "images_per_second"}
    assert record["settings"]["images"] == 12
    (rates,) = record["images_per_second"]
    assert rates["workers"] == 0
    for way in ("ours", "theirs", "ratio"):
        assert 0.0 < rates[way]["minimum"] <= rates[way]["median"] <= rates[way]["maximum"]
    assert set(record["seconds_per_image"]) == set(STAGES)
    assert all(0.0 < spread["median"] < 1.0 for spread in record["seconds_per_image"].values())
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("runs")) == []


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--workers=1,x", "'x' is not a whole number from 0 to 256"),
        ("--workers=22222", "'22222' is not a whole number from 0 to 256"),
        ("--worker=2", "unknown option --worker: did you mean --workers"),
        ("--jsn", "unknown option --jsn: did you mean --json"),
        ("--seconds=0", "--seconds must be above 0"),
        ("--rounds=0", "--rounds and --images must be at least 1, got 0 and 1024"),
        ("--json=missing/out.json", "'missing/out.json' must be the name of a file in a folder that exists and"),
        ("--json=.", "must be the name of a file"),
    ],
)
def test_options_out_of_range_are_refused(option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_options([option])


def test_a_mistake_in_the_recipe_is_the_same_error_as_in_a_fit() -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        run("--data.dataset=./missing")


@pytest.mark.parametrize("streamed", [False, True])
def test_loading_errors_come_before_any_measurement(
    streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_data, "compare", lambda *_: pytest.fail("measured"))
    (tmp_path / "data").mkdir()
    more = [f"--data.dataset={make_images(tmp_path / 'data', streamed)}", f"--data.streaming={str(streamed).lower()}"]
    with pytest.raises(ValueError, match=r"do not fill (one|a) batch of 64"):
        run(*more, "--data.batch_size=64")
    if streamed:
        with pytest.raises(ValueError, match=r"1 parquet files .* × 2 worker.*: choose --workers and "):
            run(*more, "--workers=0,1,2")


@pytest.mark.parametrize("streamed", [False, True])
def test_an_unreadable_image_is_named_as_in_a_fit(streamed: bool, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "save", lambda _, path: path.write_bytes(b"no image"))
        folder = make_images(tmp_path / "data", streamed)
    name = "row 0 of split 'train'" if streamed else r"data/train/class0/\d+\.png"
    with pytest.raises(
        ValueError, match=f"cannot read .*{name}: it is not an image of a known format; repair or delete it"
    ):
        run(f"--data.dataset={folder}", f"--data.streaming={str(streamed).lower()}")


def test_measurements_use_one_thread_and_sigterm_removes_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    folder, temporary = make_images(tmp_path / "data", False), tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = signal.getsignal(signal.SIGTERM)
    torch.set_num_threads(2)

    def stopped(*_: Any) -> None:
        assert list(temporary.iterdir()) != []
        assert torch.get_num_threads() == 1
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(profile_data, "compare", stopped)
    with pytest.raises(SystemExit) as caught:
        run(f"--data.dataset={folder}")
    assert caught.value.code == 128 + signal.SIGTERM
    assert list(temporary.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before
