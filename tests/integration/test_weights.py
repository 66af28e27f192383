"""Weights from a run into a folder, and from there into other runs."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from integration.conftest import QUICK, Run
from safetensors.torch import load_file

from scalablevit_pl import from_pretrained
from scalablevit_pl.commands.main import main
from scalablevit_pl.models.factory import build_stored
from scalablevit_pl.weights.checkpoint import read_run

FINETUNE = ("fit", "--config", "recipes/finetune.yaml")
PROBE = ("fit", "--config", "recipes/linear_probe.yaml")


@pytest.fixture(scope="module")
def released(trained: Path, scalablevit: Run) -> Path:
    """Export the folder `released` from a run that was tested."""
    done = scalablevit("test", "--run", "first", "--trainer.limit_test_batches=2", *QUICK[4:], cwd=trained)
    assert done.returncode == 0, done.stderr
    done = scalablevit("export", "runs/first", "released", "--license", "mit", cwd=trained)
    assert done.returncode == 0, done.stderr
    assert "raw weights of runs/first/checkpoints/best.ckpt" in done.stdout
    return trained


def test_an_exported_run_is_the_run(released: Path) -> None:
    folder = released / "released"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "curves.png",
        "model.safetensors",
    ]
    trained, model = read_run(released / "runs/first"), from_pretrained(folder)
    assert model.class_names == trained.class_names
    assert model.preprocessing == trained.preprocessing
    images = torch.randn(2, 3, 28, 28)
    assert torch.equal(model(images), build_stored(trained)(images))
    card = (folder / "README.md").read_text()
    test = json.loads((released / "runs/first/test.json").read_text())
    assert test["test/samples"] == 32
    assert f"| fashion, split `test` | 32 | {test['test/top1']:.4f} |" in card
    assert "scalablevit fit --config recipes/quickstart.yaml --run first" in card
    assert "scalablevit test --run first" in card
    assert "license: mit" in card


def test_results_of_other_weights_stay_out_of_the_card(released: Path, scalablevit: Run, tmp_path: Path) -> None:
    done = scalablevit("export", "runs/first/checkpoints/last.ckpt", str(tmp_path / "last"), cwd=released)
    assert done.returncode == 0, done.stderr
    assert "test.json is from other weights than runs/first/checkpoints/last.ckpt" in done.stderr
    assert "## Results" not in (tmp_path / "last/README.md").read_text()


def test_a_probe_on_other_classes_moves_the_last_layer_alone(
    released: Path, scalablevit: Run, photos: Path, tmp_path: Path
) -> None:
    own = ("--data.dataset", str(photos), "--model.network.num_classes=2", "--data.batch_size=2")
    run = tmp_path / "probe"
    done = scalablevit(*PROBE, "--weights", "released", "--run", str(run), *QUICK, *own, cwd=released)
    assert done.returncode == 0, done.stderr
    assert "is new and random" in done.stderr
    assert "514 of them trainable" in done.stderr  # 256 weights and a bias for each of two classes
    before, after = load_file(released / "released/model.safetensors"), read_run(run)
    assert after.class_names == ["cat", "dog"]
    assert after.preprocessing.input_size == 28
    for name, tensor in after.tensors.items():
        assert ("head.fc" in name) or torch.equal(tensor, before[name]), name
    resolved = json.loads((run / "resolved.json").read_text())
    assert resolved["weights"] == "released"
    # The run is evaluated with its own weights and continues from them without the released folder.
    shutil.move(released / "released", released / "elsewhere")
    try:
        for words in (("validate", "--run", str(run)), ("fit", "--run", str(run), "--resume", "last")):
            epochs = ("--trainer.max_epochs=2",) if words[0] == "fit" else ()
            done = scalablevit(*words, *epochs, "--trainer.enable_progress_bar=false", cwd=released)
            assert done.returncode == 0, done.stderr
    finally:
        shutil.move(released / "elsewhere", released / "released")


@pytest.fixture(scope="module")
def finetuned(released: Path, scalablevit: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on two processes that started from the folder `released`, and the exported model."""
    folder = tmp_path_factory.mktemp("finetuned")
    sizes = ("--data.preprocessing.input_size=32", "--data.preprocessing.crop_pct=1.0")
    two = ("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp")
    words = ("--weights", str(released / "released"), "--run", str(folder / "run"))
    done = scalablevit(*FINETUNE, *words, *QUICK, *sizes, *two, cwd=released)
    assert done.returncode == 0, done.stderr
    assert "preprocessing.input_size was 28 and is 32, as configured" in done.stderr
    assert "is new" not in done.stderr
    done = scalablevit("export", str(folder / "run"), str(folder / "model"), cwd=released)
    assert done.returncode == 0, done.stderr
    return folder


def test_finetuning_on_the_same_classes_moves_everything_a_little(released: Path, finetuned: Path) -> None:
    resolved = json.loads((finetuned / "run/resolved.json").read_text())
    assert resolved["global_batch"] == 32
    before, after = load_file(released / "released/model.safetensors"), read_run(finetuned / "run")
    assert after.preprocessing.input_size == 32
    assert list(after.preprocessing.mean) == [0.286, 0.286, 0.286]
    for name, tensor in after.tensors.items():
        assert not torch.equal(tensor, before[name]), name
        assert torch.allclose(tensor, before[name], atol=5e-3), name
    exported = load_file(finetuned / "model/model.safetensors")
    assert all(torch.equal(tensor, exported[name]) for name, tensor in after.tensors.items())
    scales = [group.get("lr_scale", 1.0) for group in resolved["parameter_groups"]]
    assert min(scales) < 0.1 < max(scales)


def test_a_run_from_weights_is_evaluated_and_not_what_it_started_from(
    released: Path, finetuned: Path, scalablevit: Run
) -> None:
    run = finetuned / "run"
    words = ("--config", str(run / "config.yaml"), "--run", str(run), "--trainer.limit_test_batches=1", *QUICK[4:])
    done = scalablevit("test", *words, "--trainer.devices=1", "--trainer.strategy=auto", cwd=released)
    assert done.returncode == 0, done.stderr
    report = json.loads((run / "test.json").read_text())
    assert report["checkpoint"] == str(run / "checkpoints/best.ckpt")
    assert report["preprocessing"]["input_size"] == 32
    assert report["preprocessing"]["mean"] == [0.286, 0.286, 0.286]
    card = (finetuned / "model/README.md").read_text()
    assert str(finetuned) not in card
    assert str(released) not in card
    assert "--weights released" in card


def test_a_folder_is_tested_and_predicts_like_its_run(
    released: Path, scalablevit: Run, photos: Path, fashion: Path
) -> None:
    data = (f"--data.dataset={fashion}", "--data.num_workers=0", "--data.batch_size=16")
    recipe = ("--config", "recipes/quickstart.yaml", *data)
    words = ("--weights", "released", "--run", "released_test", "--trainer.limit_test_batches=2")
    done = scalablevit("test", *recipe, *words, "--trainer.enable_progress_bar=false", cwd=released)
    assert done.returncode == 0, done.stderr
    reports = [json.loads((released / "runs" / run / "test.json").read_text()) for run in ("first", "released_test")]
    assert reports[0]["test/loss"] == pytest.approx(reports[1]["test/loss"], abs=1e-6)
    assert reports[1]["weights"] == "released"
    tables = [
        scalablevit("predict", "--weights", weights, str(photos), cwd=released).stdout
        for weights in ("released", "runs/first")
    ]
    assert tables[0] == tables[1]
    assert len(tables[0].splitlines()) == 9


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (FINETUNE, "this recipe starts from weights: name them with --weights"),
        ((*FINETUNE, "--weights", "nowhere"), "'nowhere' is neither a checkpoint nor a run folder"),
        ((*FINETUNE, "--weights", "released", "--resume", "last"), "give only one of them"),
        (
            ("fit", "--config", "recipes/imagenet_scalablevit_s.yaml", "--weights", "released"),
            "name is 'scalablevit_s' in the recipe and 'scalablevit_nano' in the weights",
        ),
        (
            (
                "fit",
                "--config",
                "recipes/quickstart.yaml",
                "--weights",
                "released",
                "--data.preprocessing.mean=[0,0,0]",
            ),
            "preprocessing.mean was (0.286, 0.286, 0.286) and is (0.0, 0.0, 0.0)",
        ),
        (
            (
                "test",
                "--config",
                "recipes/quickstart.yaml",
                "--weights",
                "released",
                "--data.preprocessing.input_size=32",
            ),
            "preprocessing.input_size was 28 and is 32",
        ),
        ((*PROBE, "--weights", "released", "--model.freeze", "neck"), "'neck'"),
        (("export", "runs/first", "released"), "already holds a model"),
        (("export", "runs/first", "runs"), "already holds files"),
        (("export", "runs/first", "new", "--average", "ema"), "holds no averaged weights"),
        (("export", "runs/first", "runs/first/config.yaml/x"), "is a file: choose another folder"),
        (("info", "runs/first"), "has no config.json"),
        (("push", "released"), "the following arguments are required: repository"),
        (("info", "released", "--revison", "x"), "unknown option --revison: did you mean --revision?"),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(
    words: tuple[str, ...],
    sentence: str,
    released: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(released)
    monkeypatch.setattr("scalablevit_pl.commands.main.show_log", lambda: None)
    monkeypatch.setattr(sys, "argv", ["scalablevit"])
    assert main(list(words)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("scalablevit: error: ")
    assert sentence in last
    assert not (released / "new").exists()


class Exploit:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("owned",)


@pytest.mark.parametrize(
    "words",
    [
        ("export", "evil.ckpt", "out"),
        ("convert", "evil.ckpt", "out", "--model", "scalablevit_s"),
        (*FINETUNE, "--weights", "evil.ckpt"),
        ("predict", "--weights", "evil.ckpt", "."),
    ],
)
def test_a_pickle_that_would_run_code_is_refused(
    words: tuple[str, ...], scalablevit: Run, photos: Path, tmp_path: Path
) -> None:
    torch.save({"model": Exploit(), "state_dict": Exploit()}, tmp_path / "evil.ckpt")
    done = scalablevit(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "holds code or other objects" in done.stderr
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "out").exists()


def test_info_is_a_table_of_80_columns(released: Path, scalablevit: Run) -> None:
    table = scalablevit("info", "released", cwd=released).stdout
    assert max(map(len, table.splitlines())) <= 80
    for value in ("scalablevit_nano", "2,761,378", "10: T-shirt/top", "Top-1 accuracy on 32 images", "mit", "28×28"):
        assert value in " ".join(table.split())
