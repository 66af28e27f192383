"""The code of docs/extending.md runs: parts of a user's own, by recipe and in Python."""

import csv
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from small_tasks import mean_average_precision

from scalablevit_pl import from_pretrained
from scalablevit_pl.commands.main import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/extending.md").read_text().partition("## A task of your own")[0]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
*PARTS, LIGHTNING, GRAD_CAM, CAPTUM = [block for language, block in BLOCKS if language == "python"]
RECIPE, TAGGED = [block for language, block in BLOCKS if language == "yaml"]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Work in a folder with the page's module, recipes and data."""
    folder = tmp_path_factory.mktemp("work")
    for name, text in (("my_parts.py", "\n\n".join(PARTS)), ("my_recipe.yaml", RECIPE), ("tagged.yaml", TAGGED)):
        (folder / name).write_text(text)
    images = [Image.new("RGB", (80, 70), (30 * index, 90, 200)) for index in range(8)]
    images[0].save(folder / "photo.jpg")
    (folder / "photos.model").symlink_to(ROOT / "checkpoints/scalablevit_nano.fashion_mnist")
    for index, image in enumerate(images):
        for split in ("train", "val"):
            path = folder / "photos" / split / ("cat", "dog")[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    rows = {"image": images, "labels": [[], ["sun"], ["sea", "sun"], ["fog"]] * 2}
    features = datasets.Features({"image": datasets.Image(), "labels": datasets.List(datasets.Value("string"))})
    (folder / "tagged").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        for split in ("train", "validation", "test"):
            datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "tagged" / f"{split}.parquet")
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        yield folder
    sys.modules.pop("my_parts", None)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_part_by_class_path(work: Path) -> None:
    assert main(["fit", "--config", "my_recipe.yaml", "--run", "mine", *QUIET]) == 0
    rows = read_csv(work / "runs/mine/metrics.csv")
    norms = [float(row["train/gradient_norm"]) for row in rows if row["train/gradient_norm"]]
    assert len(norms) == 4
    assert min(norms) > 0.0
    rates = [float(row["train/lr"]) for row in rows if row["train/lr"]]
    assert rates == pytest.approx([0.001 * 8 / 512 * 4 / 8 * (1 - step / 4) for step in range(4)], rel=1e-5)
    lines = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    assert any("val/top1" in line for line in lines)
    assert main(["test", "--run", "mine", "--data.test_split", "validation", *QUIET]) == 0
    assert len(read_csv(work / "runs/mine/predictions.csv")) == 8


def test_several_labels_for_an_image(work: Path) -> None:
    assert main(["fit", "--config", "tagged.yaml", "--run", "tagged", *QUIET]) == 0
    assert main(["test", "--run", "tagged", *QUIET]) == 0
    tested = json.loads((work / "runs/tagged/test.json").read_text())
    checkpoint = torch.load(work / "runs/tagged/checkpoints/best.ckpt", weights_only=True)
    assert checkpoint["scalablevit_pl"]["class_names"] == ["fog", "sea", "sun"]
    rows = read_csv(work / "runs/tagged/predictions.csv")
    probabilities = [[float(row[f"probability_{rank}"]) for rank in (1, 2, 3)] for row in rows]
    names = [[row[f"label_{rank}"] for rank in (1, 2, 3)] for row in rows]
    truth = [[], ["sun"], ["sea", "sun"], ["fog"]] * 2
    assert [json.loads(row["label"]) for row in rows] == truth
    classes = ("fog", "sea", "sun")
    scores = [[row[order.index(name)] for name in classes] for row, order in zip(probabilities, names, strict=True)]
    expected = mean_average_precision(scores, [[name in labels for name in classes] for labels in truth])
    assert tested["test/map"] == pytest.approx(expected, abs=1e-5)
    assert main(["export", "runs/tagged", "tagged.model"]) == 0
    assert json.loads((work / "tagged.model/config.json").read_text())["problem_type"] == "multi_label_classification"
    image = datasets.load_dataset("tagged", split="test")[1]["image"]
    image.save(work / "second.png")
    ((*found,),) = from_pretrained("tagged.model").predict("second.png")
    own = dict(zip(names[1], probabilities[1], strict=True))
    assert dict(found) == pytest.approx(own, abs=1e-5)
    for weights in ("runs/tagged", "tagged.model"):
        out = work / "second.csv"
        assert main(["predict", "second.png", "--weights", weights, "--out", str(out), "--accelerator", "cpu"]) == 0
        (row,) = read_csv(out)
        assert {row[f"label_{rank}"]: float(row[f"probability_{rank}"]) for rank in (1, 2, 3)} == pytest.approx(
            own, abs=1e-5
        )
    assert main(["predict", "--run", "tagged", *QUIET]) == 0
    assert main(["doctor", "--config", "tagged.yaml", "--seconds", "0.1"]) == 0
    assert main(["fit", "--config", "tagged.yaml", "--model", "scalablevit_pl.tasks.ClassificationTask", *QUIET]) == 2


@pytest.mark.filterwarnings("ignore")
def test_plain_lightning_and_explanations() -> None:
    names: dict[str, Any] = {}
    exec(LIGHTNING, names)
    assert names["trainer"].callback_metrics["val/samples"] == 8
    exec(GRAD_CAM, names)
    assert names["heat"].shape == (1, 2, 2)
    assert names["heat"].isfinite().all()
    if importlib.util.find_spec("captum"):
        exec(CAPTUM, names)
        assert names["pixels"].shape == (1, 3, 56, 56)
