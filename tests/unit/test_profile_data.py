import json
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from scalablevit_pl import cli
from scalablevit_pl.profile_data import read_options
from scalablevit_pl.profiling.loader import STAGES

QUICK = ["--config", "recipes/quickstart.yaml", "--workers=0", "--seconds=0.05", "--rounds=2", "--data.batch_size=4"]


@pytest.fixture(autouse=True)
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr(sys, "argv", ["scalablevit"])


def run(*words: str) -> int:
    return cli.run("profile", ["data", *QUICK, *words])


def make_images(folder: Path, streamed: bool) -> Path:
    pixels, rows = np.random.RandomState(0), []
    for number in range(24):
        path = folder / ("train" if not streamed else "files") / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.randint(0, 255, (20, 24, 3), dtype=np.uint8)).save(path)
        rows.append({"bytes": path.read_bytes(), "path": None})
    if not streamed:
        return folder
    names = datasets.ClassLabel(names=["class0", "class1"])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    table = datasets.Dataset.from_dict({"image": rows, "label": [number % 2 for number in range(24)]}, features)
    (folder / "parquet").mkdir()
    for split in ("train", "validation"):
        table.to_parquet(str(folder / "parquet" / f"{split}.parquet"))
    return folder / "parquet"


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
        assert 0.0 < rates[way]["least"] <= rates[way]["median"] <= rates[way]["most"]
    assert set(record["seconds_per_image"]) == set(STAGES)
    assert all(0.0 < spread["median"] < 1.0 for spread in record["seconds_per_image"].values())
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("runs")) == []


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--workers=1,x", "'1,x' is no list of whole numbers"),
        ("--seconds=0", "--seconds must be above 0"),
        ("--rounds=0", "--rounds and --images must be at least 1, got 0 and 1024"),
        ("--json=missing/out.json", "'missing/out.json' must be the name of a file in a folder that exists and"),
        ("--json=.", "must be the name of a file"),
    ],
)
def test_options_out_of_range_are_refused(option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_options([option])


def test_a_mistake_in_the_recipe_is_raised_as_in_a_fit() -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        run("--data.dataset=./missing")
