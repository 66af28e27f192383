"""Averaged weights from the command line to the model's card."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from integration.conftest import QUICK
from safetensors.torch import load_file

from scalablevit_pl.commands.main import main

FIT = ("fit", "--config", "recipes/quickstart.yaml", "--run", "averaged", "--ema.decay=0.5", "--ema.warmup=false")
QUIET = "--trainer.enable_progress_bar=false"


def test_averaged_weights_are_trained_evaluated_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("scalablevit_pl.commands.main.show_log", lambda: None)

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["scalablevit"])
        return main(list(words))

    assert run(*FIT, *QUICK) == 0
    folder = tmp_path / "runs/averaged"
    checkpoint = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)
    averaged, raw = checkpoint["ema_state_dict"], checkpoint["state_dict"]
    assert averaged.keys() == raw.keys()
    with (folder / "metrics.csv").open(newline="") as file:
        (row,) = [row for row in csv.DictReader(file) if row["val_ema/top1"]]
    assert all(row[f"val_ema/{name}"] for name in ("loss", "top1", "top5", "ece", "samples"))
    best = next(state["best"] for state in checkpoint["callbacks"].values() if "best" in state)
    assert best == pytest.approx(float(row["val_ema/top1"]))
    assert row["val_ema/loss"] != row["val/loss"]

    reports, tables = {}, {}
    for average in ("ema", "none"):
        assert run("test", "--run", "averaged", "--average", average, "--trainer.limit_test_batches=2", QUIET) == 0
        reports[average] = json.loads((folder / "test.json").read_text())
        with (folder / "predictions.csv").open(newline="") as file:
            tables[average] = list(csv.DictReader(file))
        assert reports[average]["average"] == average
    for average, part in (("ema", "test_ema"), ("none", "test")):
        rows = tables[average]
        assert reports["ema"][f"{part}/loss"] == reports["none"][f"{part}/loss"]
        right = sum(row["label"] == row["label_1"] for row in rows) / len(rows)
        assert reports[average][f"{part}/top1"] == pytest.approx(right, abs=1e-6)
        assert reports[average][f"{part}/samples"] == len(rows) == 32
    assert [row["probability_1"] for row in tables["ema"]] != [row["probability_1"] for row in tables["none"]]

    for average, weights, part in (("ema", averaged, "test_ema"), ("none", raw, "test")):
        assert run("export", "runs/averaged", average, "--average", average) == 0
        exported = load_file(tmp_path / average / "model.safetensors")
        assert all(torch.equal(value, weights[f"network.{name}"]) for name, value in exported.items())
        card = (tmp_path / average / "README.md").read_text()
        assert f"split `test` | 32 | {reports['none'][f'{part}/top1']:.4f} |" in card

    words = ("--config", "recipes/quickstart.yaml", "--weights", "runs/averaged", "--run", "apart")
    assert run("test", *words, "--average=none", "--trainer.limit_test_batches=2", *QUICK[4:]) == 0
    apart = json.loads((tmp_path / "runs/apart/test.json").read_text())
    assert apart["average"] == "none"
    assert apart["test/loss"] == pytest.approx(reports["ema"]["test/loss"], rel=1e-6)
    assert run("test", "--run", "averaged", "--average=nine") == 2

    assert run("fit", "--run", "averaged", "--resume", "last", "--ema.decay=null") == 2
    assert "ema.decay was 0.5 and is None" in capsys.readouterr().err
