"""A task, network and data that a user wrote outside the package run like those of the package."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import assert_equal_runs, metrics, read_csv, wait_for
from integration.conftest import Run, Start
from PIL import Image
from safetensors.torch import load_file
from toy_segmentation import CLASSES, ToySegmenter, write_shapes

from scalablevit_pl import from_pretrained
from scalablevit_pl.callbacks.metrics_log import curve, read_metrics
from scalablevit_pl.plotting import draw_curves

ROOT = Path(__file__).parents[2]
RELEASED = ROOT / "checkpoints/scalablevit_nano.fashion_mnist"
FIT = ["fit", f"--config={ROOT / 'tests/toy_segmentation.yaml'}"]
EPOCHS, EPOCH, TRAIN, VAL, TEST = 3, 3, 24, 7, 5
AVERAGED = "--ema.decay=0.5"
ALONE = "--data.batch_size=1"  # an output rounds differently in another company
TWO = ["--trainer.devices=2", "--trainer.accelerator=cpu", "--trainer.strategy=ddp"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data set `shapes`, whose evaluated parts two processes cannot share equally."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "shapes").mkdir()
    write_shapes(folder / "shapes", train=TRAIN, validation=VAL, test=TEST)
    return folder


@pytest.fixture(scope="module")
def run(work: Path, scalablevit: Run) -> Path:
    """The folder of a run with averaged weights, that was validated and tested."""
    done = scalablevit(*FIT, AVERAGED, "--run=whole", cwd=work)
    assert done.returncode == 0, done.stderr
    for command in ("validate", "test"):
        done = scalablevit(command, "--run=whole", ALONE, cwd=work)
        assert done.returncode == 0, done.stderr
    return work / "runs/whole"


@pytest.fixture(scope="module")
def exported(run: Path, scalablevit: Run) -> Path:
    """The folder `shapes.segmenter` of the run's averaged weights."""
    done = scalablevit("export", "runs/whole", "shapes.segmenter", "--license=mit", cwd=run.parents[1])
    assert done.returncode == 0, done.stderr
    return run.parents[1] / "shapes.segmenter"


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def test_a_fit_learns_and_logs_the_metrics_of_the_task(run: Path) -> None:
    epochs = [row for row in metrics(run) if row["val/miou"]]
    assert len(epochs) == EPOCHS
    assert all(float(row["val/samples"]) == VAL for row in epochs)
    assert float(epochs[-1]["val/miou"]) > float(epochs[0]["val/miou"])
    assert float(epochs[-1]["train/miou"]) > float(epochs[0]["train/miou"])


def test_the_best_checkpoint_has_the_highest_metric_of_the_task(run: Path) -> None:
    best = max((row for row in metrics(run) if row["val/miou"]), key=lambda row: float(row["val_ema/miou"]))
    assert torch.load(run / "checkpoints/best.ckpt", weights_only=True)["global_step"] == int(best["step"]) + 1


def test_the_best_checkpoint_has_the_lowest_metric_if_the_task_says_so(work: Path, scalablevit: Run) -> None:
    done = scalablevit(*FIT, "--model=toy_segmentation.LowestTask", "--run=lowest", cwd=work)
    assert done.returncode == 0, done.stderr
    rows = [row for row in metrics(work / "runs/lowest") if row["val/miou"]]
    lowest = min(rows, key=lambda row: float(row["val/miou"]))
    best = torch.load(work / "runs/lowest/checkpoints/best.ckpt", weights_only=True)
    assert best["global_step"] == int(lowest["step"]) + 1 < EPOCHS * EPOCH


def test_the_curves_are_those_of_the_described_metrics(run: Path, tmp_path: Path) -> None:
    rows = read_metrics(run / "metrics.csv")
    parts = [f"{part}/{name}" for name in ("loss", "miou") for part in ("train", "val", "val_ema")]
    curves = {name: curve(rows, name, EPOCH) for name in (*parts, "train/lr")}
    assert all(len(curves[name][0]) == EPOCHS for name in parts)
    draw_curves(curves, {"loss": "cross-entropy", "miou": "mean IoU"}, tmp_path / "curves.png", "whole")
    assert (run / "curves.png").read_bytes() == (tmp_path / "curves.png").read_bytes()


def test_validate_and_test_record_the_metrics_of_the_task(run: Path) -> None:
    validated, tested = read_json(run / "val.json"), read_json(run / "test.json")
    assert (validated["val/samples"], tested["test/samples"]) == (VAL, TEST)
    best = max(float(row["val_ema/miou"]) for row in metrics(run) if row["val/miou"])
    assert validated["val_ema/miou"] == pytest.approx(best, abs=1e-3)
    assert 0.3 < tested["test_ema/miou"] <= 1.0
    rows = read_csv(run / "predictions.csv")
    assert [int(row["index"]) for row in rows] == list(range(TEST))
    assert all(float(row["accuracy"]) > 0.5 for row in rows)
    assert Image.open(run / "predictions.png").size == (3 * 64, TEST * 64)


def test_two_processes_evaluate_each_image_once(run: Path, scalablevit: Run) -> None:
    table, alone = read_csv(run / "predictions.csv"), read_json(run / "test.json")
    done = scalablevit("test", "--run=whole", ALONE, *TWO, cwd=run.parents[1])
    assert done.returncode == 0, done.stderr
    shared = read_json(run / "test.json")
    assert (shared["processes"], shared["test/samples"]) == (2, TEST)
    for name in ("test/miou", "test_ema/miou"):
        assert shared[name] == alone[name]
    assert shared["test_ema/loss"] == pytest.approx(alone["test_ema/loss"], rel=1e-6)
    assert read_csv(run / "predictions.csv") == table


@pytest.mark.slow
def test_two_processes_train_and_validate_each_image_once(work: Path, scalablevit: Run) -> None:
    words = ["--data.batch_size=4", "--trainer.max_epochs=1", "--run=two"]
    done = scalablevit(*FIT, *words, *TWO, cwd=work)
    assert done.returncode == 0, done.stderr
    (row,) = [row for row in metrics(work / "runs/two") if row["val/miou"]]
    assert (int(row["step"]) + 1, float(row["val/samples"])) == (EPOCH, VAL)
    done = scalablevit("validate", "--run=two", "--data.batch_size=4", cwd=work)
    assert done.returncode == 0, done.stderr
    assert read_json(work / "runs/two/val.json")["val/miou"] == pytest.approx(float(row["val/miou"]), abs=1e-4)


def test_predict_writes_the_report_without_masks(run: Path, scalablevit: Run) -> None:
    done = scalablevit("predict", "--run=whole", cwd=run.parents[1])
    assert done.returncode == 0, done.stderr
    rows = read_csv(run / "predictions.csv")
    assert [int(row["index"]) for row in rows] == list(range(TEST))
    for row in rows:
        assert row["accuracy"] == ""
        assert sum(float(row[name]) for name in CLASSES) == pytest.approx(1.0, abs=1e-5)


def test_a_killed_run_resumes_and_ends_bit_equal(run: Path, start: Start, scalablevit: Run) -> None:
    words = [*FIT, AVERAGED, "--checkpoint.every_steps=1", "--data.num_workers=1", "--run=killed"]
    killed, work = run.parent / "killed", run.parents[1]
    process = start(*words, cwd=work)
    wait_for(killed, 2, process)
    process.kill()
    process.wait()
    done = scalablevit("fit", "--run=killed", "--resume=auto", "--data.num_workers=0", cwd=work)
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stderr
    assert_equal_runs(killed, run, EPOCH * EPOCHS)


def test_weights_of_a_classifier_start_the_backbone(work: Path, scalablevit: Run) -> None:
    still = ["--model.optimizer.lr=0", "--model.schedule.min_lr=0", "--model.schedule.warmup_lr=0"]
    limits = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    done = scalablevit(*FIT, "--run=started", f"--weights={RELEASED}", *still, *limits, cwd=work)
    assert done.returncode == 0, done.stderr
    started = torch.load(work / "runs/started/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    released = {
        name: tensor for name, tensor in load_file(RELEASED / "model.safetensors").items() if "backbone." in name
    }
    assert len(released) > 100
    assert all(torch.equal(started[f"network.{name}"], tensor) for name, tensor in released.items())
    assert {name for name in started if name.startswith("network.backbone.")} == {
        f"network.{name}" for name in released
    }
    log = [line for line in done.stderr.splitlines() if "the head is new and random" in line]
    assert log == [f"{RELEASED} is for image-classification: its backbone is used, the head is new and random"]


def test_an_exported_network_is_the_one_of_the_run(run: Path, exported: Path) -> None:
    averaged = torch.load(run / "checkpoints/best.ckpt", weights_only=True)["ema_state_dict"]
    expected, loaded = ToySegmenter(num_classes=len(CLASSES)).eval(), ToySegmenter.from_pretrained(exported)
    expected.load_state_dict({name.removeprefix("network."): tensor for name, tensor in averaged.items()})
    images = torch.randn(2, 3, 64, 50)
    assert torch.equal(loaded(images), expected(images))
    assert loaded.class_names == CLASSES
    assert loaded.preprocessing.input_size == 64
    assert loaded.predict([Image.new("RGB", (80, 70))])[0].shape == (64, 64)


def test_an_exported_network_has_a_card_and_info(run: Path, exported: Path, scalablevit: Run) -> None:
    card, tested = (exported / "README.md").read_text(), read_json(run / "test.json")
    assert "pipeline_tag: image-segmentation" in card
    assert "from toy_segmentation import ToySegmenter" in card
    assert 'model = ToySegmenter.from_pretrained("shapes.segmenter")' in card
    assert "| data | images | mean IoU | cross-entropy |" in card
    assert f"| shapes, split `test` | {TEST} | {tested['test_ema/miou']:.4f} |" in card
    done = scalablevit("info", str(exported), cwd=exported.parent)
    assert done.returncode == 0, done.stderr
    rows = {line[:16].strip(): line[16:] for line in done.stdout.splitlines() if line[:1].strip()}
    assert rows["task"] == "semantic-segmentation"
    assert rows["model"] == "toy_segmentation.ToySegmenter"
    assert rows["labels"] == f"4: {', '.join(CLASSES)}"
    parameters = sum(parameter.numel() for parameter in ToySegmenter(num_classes=4).parameters())
    assert rows["parameters"] == f"{parameters:,}"
    assert f"Mean IoU on {VAL} images of shapes (validation): " in " ".join(done.stdout.split())


def test_an_exported_network_evaluates_like_its_run(run: Path, exported: Path, scalablevit: Run) -> None:
    words = ["validate", *FIT[1:], "--run=again", "--weights=shapes.segmenter", ALONE]
    done = scalablevit(*words, cwd=exported.parent)
    assert done.returncode == 0, done.stderr
    again, before = read_json(run.parent / "again/val.json"), read_json(run / "val.json")
    assert again["val/miou"] == before["val_ema/miou"]


def test_the_package_names_the_class_that_loads_the_network(exported: Path, scalablevit: Run) -> None:
    sentence = "load it with ToySegmenter.from_pretrained"
    with pytest.raises(ValueError, match=sentence):
        from_pretrained(exported)
    done = scalablevit("predict", "--weights", "shapes.segmenter", str(exported / "curves.png"), cwd=exported.parent)
    assert done.returncode == 2
    assert "holds a network for semantic-segmentation that is not part of this package" in done.stderr
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


def test_doctor_finds_nothing_wrong(work: Path, scalablevit: Run) -> None:
    done = scalablevit("doctor", *FIT[1:], "--seconds=0.1", cwd=work)
    assert done.returncode == 0, done.stdout
    assert "0 warn, 0 FAIL" in done.stdout
    for what in ("configuration", "data", "classes", "plan", "training step", "loader"):
        assert f"\nok    {what} " in done.stdout, what


def test_plot_compares_the_metrics_of_the_task(run: Path, scalablevit: Run) -> None:
    done = scalablevit("plot", "runs/whole", "runs/whole", cwd=run.parents[1])
    assert done.returncode == 0, done.stderr
    head, row = (line.split() for line in done.stdout.splitlines())
    assert head == ["run", "epochs", "miou", "at", "ema", "at", "loss", "img/s"]
    best = max(float(row["val/miou"]) for row in metrics(run) if row["val/miou"])
    assert row[:3] == ["whole", str(EPOCHS), f"{best:.4f}"]
    assert (run.parents[1] / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_shows_the_module_and_its_recipe(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/extending.md").read_text().partition("## A task of your own")[2]
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    *code, use = [block for language, block in blocks if language == "python"]
    (recipe,) = [block for language, block in blocks if language == "yaml"]
    assert len(code) >= 4
    assert all(block in (ROOT / "tests/toy_segmentation.py").read_text() for block in code)
    assert (ROOT / "tests/toy_segmentation.yaml").read_text().endswith(recipe)
    monkeypatch.chdir(exported.parent)
    for name in ("1.png", "2.png"):
        Image.new("RGB", (80, 70)).save(name)
    names: dict[str, Any] = {}
    exec(use, names)
    assert [mask.shape for mask in names["masks"]] == [(64, 64)] * 2
