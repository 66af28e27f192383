import json
import sys
from pathlib import Path

import datasets
import lightning.pytorch as pl
import pytest
from integration.conftest import QUICK, Run
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningCLI
from PIL import Image

from scalablevit_pl.cli import CONFIG_FOLDERS, find_config

RECIPES = sorted(path.name for path in (CONFIG_FOLDERS[1] / "recipes").glob("*.yaml"))
SIZES = {
    "quickstart.yaml": 2_761_378,
    "fashion_mnist.yaml": 2_761_378,
    "imagenet_scalablevit_s.yaml": 32_000_472,
    "imagenet_scalablevit_b.yaml": 81_881_624,
    "imagenet_scalablevit_l.yaml": 109_288_840,
}


# Their network is that of the weights; tests/integration/test_weights.py runs them.
FROM_WEIGHTS = {"finetune.yaml", "linear_probe.yaml"}


def parse(monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[Namespace, pl.LightningModule]:
    monkeypatch.setattr(sys, "argv", ["scalablevit", *words, "--trainer.accelerator=cpu", "--trainer.strategy=auto"])
    cli = LightningCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        run=False,
        auto_configure_optimizers=False,
    )
    return cli.config, cli.model


def test_every_recipe_is_known() -> None:
    assert set(RECIPES) == set(SIZES) | FROM_WEIGHTS


@pytest.mark.parametrize("recipe", SIZES)
def test_a_recipe_builds_the_size_it_claims(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, task = parse(monkeypatch, "--config", str(find_config(f"recipes/{recipe}")))
    assert sum(parameter.numel() for parameter in task.network.parameters()) == SIZES[recipe]


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name.startswith("imagenet")])
def test_the_imagenet_recipes_are_the_papers(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = parse(monkeypatch, "--config", str(find_config(f"recipes/{recipe}")))
    task, data, trainer = config.model.init_args, config.data.init_args, config.trainer
    assert task.optimizer.class_path == "torch.optim.AdamW"
    assert (task.optimizer.init_args.lr, task.optimizer.init_args.weight_decay) == (5e-4, 0.05)
    assert tuple(task.optimizer.init_args.betas) == (0.9, 0.999)
    assert task.optimizer.init_args.eps == 1e-8
    schedule = task.schedule.init_args
    assert (schedule.warmup_epochs, schedule.warmup_lr, schedule.min_lr) == (5, 1e-6, 1e-5)
    assert (task.base_batch_size, task.label_smoothing) == (512, 0.1)
    assert (trainer.max_epochs, trainer.gradient_clip_val, trainer.precision) == (300, 5.0, "bf16-mixed")
    assert (data.dataset, data.val_split, data.batch_size) == ("ILSVRC/imagenet-1k", "validation", 128)
    augmentation = data.augmentation
    assert (augmentation.mixup, augmentation.cutmix, augmentation.mix_prob, augmentation.switch_prob) == (
        0.8,
        1,
        1,
        0.5,
    )
    assert (augmentation.auto_augment, augmentation.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (tuple(augmentation.scale), tuple(augmentation.ratio)) == ((0.08, 1.0), (0.75, 4 / 3))
    preprocessing = data.preprocessing
    assert (preprocessing.input_size, preprocessing.crop_pct, preprocessing.interpolation) == (224, 0.875, "bicubic")
    drop_path = {"s": 0.2, "b": 0.5, "l": 0.5}[recipe.removesuffix(".yaml")[-1]]
    assert config.model.init_args.network.init_args.drop_path_rate in (None, drop_path)


@pytest.fixture(scope="session")
def fake_imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagenet")
    names = datasets.ClassLabel(names=[f"class {index}" for index in range(1000)])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    rows = {
        "image": [Image.new("RGB", (300, 260), (index * 30, 90, 40)) for index in range(4)],
        "label": [0, 1, 7, 999],
    }
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
    return folder


@pytest.mark.parametrize(
    "size", ["s", pytest.param("b", marks=pytest.mark.slow), pytest.param("l", marks=pytest.mark.slow)]
)
def test_an_imagenet_recipe_trains_a_step(size: str, fake_imagenet: Path, scalablevit: Run, tmp_path: Path) -> None:
    recipe = ["--config", f"recipes/imagenet_scalablevit_{size}.yaml", f"--data.dataset={fake_imagenet}", "--run=x"]
    one_cpu = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto", "--trainer.max_steps=1"]
    done = scalablevit("fit", *recipe, *QUICK, *one_cpu, "--data.batch_size=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    resolved = json.loads((tmp_path / "runs/x/resolved.json").read_text())
    assert resolved["lr"] == pytest.approx(5e-4 * 2 / 512)
    assert resolved["parameters"] == SIZES[f"imagenet_scalablevit_{size}.yaml"]


def test_the_debugging_configurations_go_behind_a_recipe(scalablevit: Run, tmp_path: Path) -> None:
    recipe = ["fit", "--config", "recipes/quickstart.yaml", "--run=x", "--data.num_workers=0"]
    fewer = ["--trainer.max_epochs=20", "--data.batch_size=8", "--trainer.enable_progress_bar=false"]
    done = scalablevit(*recipe, "--config", "debug/overfit.yaml", *fewer, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "runs/x/metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/top1")
    top1 = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert top1[-1] == 1.0
    done = scalablevit(*recipe[:-2], "--run=y", "--config", "debug/fast_dev_run.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "runs/y/checkpoints").exists()
