import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from scalablevit_pl.commands.plot import header, plot_runs, read_run, summarize
from scalablevit_pl.plotting import RUN_COLOURS

MakeRun = Callable[..., Path]
NAMES = ("train/loss", "val/top1", "val_ema/top1", "val/top5", "speed/images_per_second")


@pytest.fixture
def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRun:
    monkeypatch.chdir(tmp_path)

    def make(name: str, steps_per_epoch: Any = 4, **columns: list[float]) -> Path:
        """Write a run with a row at the end of each epoch."""
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("seed_everything: 0\n")
        (folder / "resolved.json").write_text(json.dumps({"steps_per_epoch": steps_per_epoch}))
        values = {key: columns.get(key, [0.5, 0.25]) for key in NAMES if columns.get(key, [0]) != []}
        lines = [f"step,epoch,{','.join(values)}"]
        for epoch, row in enumerate(zip(*values.values(), strict=True)):
            lines.append(f"{(epoch + 1) * (steps_per_epoch or 1) - 1},{epoch},{','.join(map(str, row))}")
        (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
        return folder

    return make


def test_the_table_names_the_best_values_and_their_epochs(make_run: MakeRun) -> None:
    columns: dict[str, list[float]] = {
        "train/loss": [3.0, 2.0, 2.5],
        "val/top1": [float("nan"), 0.7, 0.1],
        "val_ema/top1": [0.2, 0.3, 0.75],
        "val/top5": [0.9, 0.8, 0.7],
        "speed/images_per_second": [1.0, 100.0, 50.0],
    }
    expected = ("a", "3", "0.7000", "2", "0.7500", "3", "0.9000", "2.5000", "50")
    for steps in (4, 10):
        assert summarize(read_run(make_run(f"{steps}/a", steps, **columns))) == expected


def test_missing_values_are_dashes(make_run: MakeRun) -> None:
    run = read_run(make_run("a", **{name: [] for name in NAMES[1:]}))
    assert summarize(run) == ("a", "2", "-", "-", "-", "-", "-", "0.2500", "-")


def test_runs_of_another_task_have_their_own_table_and_best_values(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    described = {
        "loss": {"label": "loss", "hub_type": "loss", "plotted": True},
        "distance": {"label": "mean distance", "hub_type": "mae", "plotted": False},
        "worst": {"label": "greatest distance", "hub_type": "mae", "plotted": False},
    }
    folder = make_run("dense", **{"val/top1": [0.9, 0.4], "val_ema/top1": [], "val/top5": [3.0, 5.0]})
    record = {"steps_per_epoch": 4, "metrics": {"monitor": "distance", "mode": "min", "described": described}}
    (folder / "resolved.json").write_text(json.dumps(record))
    table = (folder / "metrics.csv").read_text().replace("top1", "distance").replace("top5", "worst")
    (folder / "metrics.csv").write_text(table)
    run = read_run(folder)
    assert run.labels == {"loss": "loss"}
    assert header(run) == ("run", "epochs", "distance", "at", "ema", "at", "worst", "loss", "img/s")
    assert summarize(run) == ("dense", "2", "0.4000", "2", "-", "-", "3.0000", "0.2500", "0")
    make_run("a")
    plot_runs(["dense", "a", "--out", "x.png"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["run", "dense", "run", "a"]
    assert (lines[0][2], lines[2][2]) == ("distance", "top1")


def test_runs_are_compared_in_80_columns_and_colours_of_their_own(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"a run with quite a long name whose number is {index}" for index in range(8)]
    for index, name in enumerate(names):
        values = [0.1 * index, 0.1 * index + 0.05]
        make_run(name, 4 + index, **{"val/top1": values, "train/loss": values})
    plot_runs([*names[:7], f"runs/{names[7]}", "--out", "x.png"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert {len(line) for line in lines} <= set(range(60, 81))
    assert [float(re.split(r"  +", line)[2]) for line in lines[1:]] == pytest.approx([0.1 * i + 0.05 for i in range(8)])
    with Image.open(tmp_path / "x.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    for colour in RUN_COLOURS:
        assert (pixels == np.round(np.multiply(to_rgb(colour), 255))).all(axis=2).sum() > 100


def test_an_epoch_is_one_for_runs_with_other_batches(make_run: MakeRun) -> None:
    curves = [read_run(make_run(name, steps)).curve("val/top1") for name, steps in (("a", 5), ("b", 50))]
    assert curves[0] == curves[1] == ((1.0, 2.0), (0.5, 0.25))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["frist"], "no run in 'runs/frist': runs/ has "),
        (["first", "damaged"], "cannot read 'runs/damaged/metrics.csv'"),
        (["empty"], "has no metrics in metrics.csv yet"),
        (["unresolved"], "steps_per_epoch is 0.*omit this run"),
        (["first", "--out", "x.jpg"], "'x.jpg' must be the name of a .png"),
        (["first", "--out", "nowhere/x.png"], "in a folder that exists"),
        ([f"r{index}" for index in range(9)], "one picture cannot distinguish 9 runs: give at most 8"),
        ([], "arguments are required: runs"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(make_run: MakeRun, options: list[str], message: str) -> None:
    make_run("first")
    (make_run("damaged") / "metrics.csv").write_text("step,epoch\nx,y\n")
    (make_run("empty") / "metrics.csv").write_text("step,epoch\n")
    make_run("unresolved", 0)
    with pytest.raises(ValueError, match=message):
        plot_runs(options)
    assert not list(Path().glob("*.png"))


@pytest.mark.parametrize("recorded", [False, True])
def test_the_picture_names_the_training_curves_as_the_run_s_task_did(
    recorded: bool, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = {"top1": {"label": "top-1", "hub_type": "accuracy", "plotted": True}}
    if recorded:
        described["top1"]["training"] = "training, mixed"
    record = {"steps_per_epoch": 4, "metrics": {"monitor": "top1", "mode": "max", "described": described}}
    (make_run("a") / "resolved.json").write_text(json.dumps(record))
    drawn: list[Any] = []
    monkeypatch.setattr("scalablevit_pl.commands.plot.draw_comparison", lambda *given: drawn.append(given))
    plot_runs(["a"])
    assert drawn[0][3:] == (("training, mixed",) if recorded else ())
