import functools
import json
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import numpy as np
import pytest
import timm
import torch
from integration.conftest import QUICK, Run
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo

from scalablevit_pl.experiment.invocation import CONFIG_FOLDERS, Invocation, find_config
from scalablevit_pl.experiment.parsing import ParsedExperiment
from scalablevit_pl.experiment.run import run_experiment
from scalablevit_pl.preprocessing import Preprocessing

RECIPES = sorted(path.name for path in (CONFIG_FOLDERS[1] / "recipes").glob("*.yaml"))
SIZES = {
    "quickstart.yaml": 2_761_378,
    "fashion_mnist.yaml": 2_761_378,
    "photos.yaml": 2_761_378,
    "imagenet_scalablevit_s.yaml": 32_000_472,
    "imagenet_scalablevit_b.yaml": 81_881_624,
    "imagenet_scalablevit_l.yaml": 109_288_840,
    "imagenet_swin_t.yaml": 28_288_354,
    "imagenet_twins_svt_s.yaml": 24_060_776,
    "quickstart_segmentation.yaml": 3_040_098,
    "finetune_segmentation.yaml": 3_040_098,
    "ade20k_semantic_fpn_s.yaml": 30_043_270 + 1_920,  # with the norms of the backbone's maps
    "ade20k_semantic_fpn_b.yaml": 78_998_214 + 2_880,
    "ade20k_semantic_fpn_l.yaml": 105_479_222 + 3_840,
    "ade20k_semantic_fpn_swin_t.yaml": 31_893_840,
    "ade20k_semantic_fpn_twins_svt_s.yaml": 27_798_934,
    "ade20k_upernet_s.yaml": 56_100_636 + 1_920,
    "ade20k_upernet_b.yaml": 107_046_236 + 2_880,
    "ade20k_upernet_l.yaml": 135_517_900 + 3_840,
    "ade20k_upernet_swin_t.yaml": 59_941_862,
    "ade20k_upernet_twins_svt_s.yaml": 53_856_300,
}
IMAGENET = {  # with the drop path rate of the network's last block in its paper
    "imagenet_scalablevit_s.yaml": 0.2,
    "imagenet_scalablevit_b.yaml": 0.5,
    "imagenet_scalablevit_l.yaml": 0.5,
    "imagenet_swin_t.yaml": 0.2,
    "imagenet_twins_svt_s.yaml": 0.2,
}
ADE20K = {name: 0.3 if name.endswith("_l.yaml") else 0.2 for name in SIZES if name.startswith("ade20k")}
# Their network is that of the weights; tests/integration/test_weights.py runs them.
FROM_WEIGHTS = {"finetune.yaml", "linear_probe.yaml"}
# In single precision, since some CPUs take minutes for what a GPU does in bfloat16.
ONE_CPU = ["--trainer.precision=32-true", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto"]


@functools.cache
def parse(recipe: str) -> tuple[dict[str, Any], pl.LightningModule]:
    """Return a recipe's configuration, in plain values, and its task."""
    invocation = Invocation("fit", (str(find_config(f"recipes/{recipe}")),), "some_run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ParsedExperiment, "_set_seed", lambda parsed: None)
        parsed = ParsedExperiment(invocation)
    parsed.set_classes(10)
    with torch.device("meta"):
        return parsed.config.as_dict(), parsed.build("model").model


def test_every_recipe_is_known() -> None:
    assert set(RECIPES) == set(SIZES) | FROM_WEIGHTS
    assert {name for name in RECIPES if name.startswith("imagenet")} == set(IMAGENET)


@pytest.mark.parametrize("recipe", SIZES)
def test_a_recipe_builds_the_size_it_claims(recipe: str) -> None:
    _, task = parse(recipe)
    assert sum(parameter.numel() for parameter in task.network.parameters()) == SIZES[recipe]


def test_the_imagenet_recipe_matches_the_paper() -> None:
    config, _ = parse("imagenet_scalablevit_s.yaml")
    task, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    assert task["optimizer"]["class_path"] == "torch.optim.AdamW"
    optimizer, schedule = task["optimizer"]["init_args"], task["schedule"]["init_args"]
    assert (optimizer["lr"], optimizer["weight_decay"]) == (5e-4, 0.05)
    assert (tuple(optimizer["betas"]), optimizer["eps"]) == ((0.9, 0.999), 1e-8)
    assert (schedule["warmup_epochs"], schedule["warmup_lr"], schedule["min_lr"]) == (5, 1e-6, 1e-5)
    assert (task["base_batch_size"], task["label_smoothing"]) == (512, 0.1)
    assert (trainer["max_epochs"], trainer["gradient_clip_val"], trainer["precision"]) == (300, 5.0, "bf16-mixed")
    assert (data["dataset"], data["val_split"], data["batch_size"]) == ("ILSVRC/imagenet-1k", "validation", 128)
    assert (data["revision"], data["class_order"]) == ("49e2ee26f3810fb5a7536bbf732a7b07389a47b5", "imagenet")
    assert data["split_sizes"] == {"train": 1_281_167, "validation": 50_000}
    augmentation, preprocessing = data["augmentation"], data["preprocessing"]
    mixing = {"mixup": 0.8, "cutmix": 1, "mix_prob": 1, "switch_prob": 0.5}
    assert mixing.items() <= augmentation.items()
    assert (augmentation["auto_augment"], augmentation["random_erasing"]) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (tuple(augmentation["scale"]), tuple(augmentation["ratio"])) == ((0.08, 1.0), (0.75, 4 / 3))
    assert {"input_size": 224, "crop_pct": 0.875, "interpolation": "bicubic"}.items() <= preprocessing.items()


@pytest.mark.parametrize(("options", "size"), [([], 224), (["--data.preprocessing.input_size=64"], 64)])
def test_photos_are_normalized_as_imagenet(options: list[str], size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ParsedExperiment, "_set_seed", lambda parsed: None)
    words = ["fit", "--config", str(find_config("recipes/photos.yaml")), "--run=x", *options]
    data = ParsedExperiment(Invocation.parse(words)).build("data").data
    assert data.preprocessing == Preprocessing(size)
    assert (data.preprocessing.mean, data.preprocessing.std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


@pytest.mark.parametrize(
    ("head", "optimizer", "schedule", "steps"),
    [
        ("semantic_fpn", (1e-4, 1e-4), {"power": 0.9, "min_lr": 1e-6, "warmup_steps": 0}, 80_000),
        ("upernet", (6e-5, 0.01), {"power": 1.0, "warmup_steps": 1500, "warmup_factor": 1e-6}, 160_000),
    ],
)
def test_the_ade20k_recipes_are_those_of_twins(
    head: str, optimizer: tuple[float, float], schedule: dict[str, float], steps: int
) -> None:
    config, task = parse(f"ade20k_{head}_s.yaml")
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    assert task.network.config["head"] == head
    assert (task.network.head.auxiliary is not None) == (head == "upernet")
    given = model["optimizer"]["init_args"]
    assert (given["lr"], given["weight_decay"]) == optimizer
    assert model["schedule"]["class_path"] == "scalablevit_pl.optim.PolynomialSchedule"
    assert schedule.items() <= model["schedule"]["init_args"].items()
    assert (trainer["max_steps"], trainer["sync_batchnorm"], model["base_batch_size"]) == (steps, True, 16)
    assert (data["batch_size"], len(data["class_names"]), data["reduce_zero_label"]) == (2, 150, True)
    assert {"short_side": 512, "long_side": 2048}.items() <= data["preprocessing"].items()
    augmentation = {"crop_size": 512, "cat_max_ratio": 0.75, "hflip": 0.5, "distortion": 0.5}
    assert augmentation.items() <= data["augmentation"].items()
    assert tuple(data["augmentation"]["scale"]) == (0.5, 2.0)


@pytest.mark.parametrize("recipe", [*IMAGENET, *ADE20K])
def test_the_recipes_of_a_comparison_differ_only_in_the_network(recipe: str) -> None:
    shared = []
    first = "imagenet_scalablevit_s.yaml" if recipe in IMAGENET else f"{recipe[: recipe.index('_', 12)]}_s.yaml"
    for name in (recipe, first.replace("semantic_s", "semantic_fpn_s")):
        config, _ = parse(name)
        model = {key: value for key, value in config["model"]["init_args"].items() if key != "network"}
        shared.append({**config, "model": {**config["model"], "init_args": model}, "config": None})
    assert shared[0] == shared[1]
    assert shared[0]["model"]["init_args"].keys() > {"optimizer", "schedule", "base_batch_size"}


@pytest.mark.parametrize("recipe", [*IMAGENET, *ADE20K])
def test_the_networks_use_the_drop_path_rates_of_their_papers(recipe: str) -> None:
    _, task = parse(recipe)
    paths = [module for module in task.network.modules() if type(module).__name__ == "DropPath"]
    rates = [getattr(path, "rate", getattr(path, "drop_prob", None)) for path in paths]  # our name, and timm's
    assert rates[-1] == pytest.approx((IMAGENET | ADE20K)[recipe])
    assert rates == sorted(rates)


@pytest.mark.parametrize(
    ("recipe", "name"),
    [("imagenet_swin_t.yaml", "swin_tiny_patch4_window7_224"), ("imagenet_twins_svt_s.yaml", "twins_svt_small")],
)
def test_the_networks_for_comparison_are_those_of_timm(recipe: str, name: str) -> None:
    _, task = parse(recipe)
    with torch.device("meta"):
        theirs = timm.create_model(name)
    assert type(task.network) is type(theirs)
    shapes = [{key: value.shape for key, value in network.state_dict().items()} for network in (task.network, theirs)]
    assert shapes[0] == shapes[1]


@pytest.fixture(scope="session")
def fake_imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagenet")
    names = datasets.ClassLabel(names=ImageNetInfo().label_names())
    features = datasets.Features({"image": datasets.Image(), "label": names})
    rows = {
        "image": [Image.new("RGB", (300, 260), (index * 30, 90, 40)) for index in range(4)],
        "label": [0, 1, 7, 999],
    }
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
    return folder


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[pytest.mark.slow] * name.endswith("_l.yaml")) for name in IMAGENET]
)
def test_an_imagenet_recipe_trains(
    recipe: str, fake_imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # restored after the test
    words = [f"--data.dataset={fake_imagenet}", "--run=x", *QUICK, *ONE_CPU, "--data.batch_size=2"]
    words += ["--trainer.max_steps=2", "--trainer.limit_val_batches=0", "--trainer.enable_checkpointing=false"]
    # The two large networks take seconds with small images.
    few = ["--data.preprocessing.input_size=64"] if recipe.endswith(("_b.yaml", "_l.yaml")) else []
    words.append("--data.split_sizes=null")
    invocation = Invocation.parse(["fit", "--config", f"recipes/{recipe}", *words, *few])
    assert run_experiment(invocation.resolve()).global_step == 2
    resolved = json.loads((tmp_path / "runs/x/resolved.json").read_text())
    assert resolved["lr"] == pytest.approx(5e-4 * 2 / 512)
    assert resolved["parameters"] == resolved["trainable_parameters"] == SIZES[recipe]
    assert sum(group["parameters"] for group in resolved["parameter_groups"]) == SIZES[recipe]


def test_an_ade20k_recipe_trains_on_a_local_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.RandomState(0)
    for split in ("training", "validation"):
        for folder, suffix in (("images", "jpg"), ("annotations", "png")):
            (tmp_path / "ade" / folder / split).mkdir(parents=True)
            for index in range(2):
                shape = (48, 72, 3) if folder == "images" else (48, 72)
                values = random.randint(0, 256 if folder == "images" else 151, shape).astype(np.uint8)
                Image.fromarray(values).save(tmp_path / "ade" / folder / split / f"{index}.{suffix}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # restored after the test
    small = ["--data.augmentation.crop_size=64", "--data.preprocessing.short_side=64", "--data.num_workers=0"]
    words = ["--data.dataset=ade", "--data.revision=null", "--data.split_sizes=null", "--run=x", *small, *ONE_CPU]
    words += ["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--trainer.sync_batchnorm=false"]
    invocation = Invocation.parse(["fit", "--config", "recipes/ade20k_semantic_fpn_s.yaml", *words])
    trainer = run_experiment(invocation.resolve())
    assert trainer.global_step == 2
    assert trainer.callback_metrics["val/samples"] == 2
    resolved = json.loads((tmp_path / "runs/x/resolved.json").read_text())
    assert resolved["lr"] == pytest.approx(1e-4 * 2 / 16)
    assert resolved["parameters"] == SIZES["ade20k_semantic_fpn_s.yaml"]


def test_the_debugging_configurations_follow_a_recipe(scalablevit: Run, tmp_path: Path) -> None:
    recipe = ["fit", "--config", "recipes/quickstart.yaml", "--run=x", "--data.num_workers=0"]
    fewer = ["--trainer.max_epochs=10", "--trainer.overfit_batches=1", "--data.batch_size=8"]
    done = scalablevit(*recipe, "--config", "debug/overfit.yaml", *fewer, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "runs/x/metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/top1")
    top1 = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert top1[-1] == 1.0
    assert not (tmp_path / "runs/x/checkpoints").exists()
    done = scalablevit(*recipe[:-2], "--run=y", "--config", "debug/fast_dev_run.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "runs/y/checkpoints").exists()
