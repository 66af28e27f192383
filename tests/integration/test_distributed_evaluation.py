"""Evaluation in one, two and three processes against loops over the samples."""

import csv
import json
from multiprocessing.context import ForkServerContext
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from evaluation_processes import BATCHES, CLASSES, COUNTS, SIDE, WORLDS, Pixels, evaluate
from forked_command import run_together
from PIL import Image
from scene_data import write_scenes
from small_tasks import Coarse, calibration_error, evaluation_scenes, mean_average_precision
from torch.nn import functional

SCENES = 7
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def tags_of(count: int) -> list[list[int]]:
    """List the classes of each image: none, one or several; the last class has no images."""
    return [[tag for tag in range(CLASSES - 1) if (index * index + tag) % 3 == 1] for index in range(count)]


def make_split(count: int) -> tuple[list[Image.Image], list[int]]:
    random = np.random.RandomState(count)
    pixels = random.randint(0, 255, (count, SIDE, SIDE, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels], random.randint(0, CLASSES, count).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, forkserver: ForkServerContext) -> Path:
    """Results of all processes, next to the data."""
    folder = tmp_path_factory.mktemp("evaluation")
    names = [f"class {index}" for index in range(CLASSES)]
    label = datasets.ClassLabel(names=names)
    features = datasets.Features({"image": datasets.Image(), "label": label, "tags": datasets.List(label)})
    for count in COUNTS:
        images, labels = make_split(count)
        (folder / f"data_{count}").mkdir()
        for split in ("train", "test"):
            columns = {"image": images, "label": labels, "tags": tags_of(count)}
            rows = datasets.Dataset.from_dict(columns, features=features)
            rows.to_parquet(folder / f"data_{count}" / f"{split}-00000-of-00001.parquet")
    write_scenes(folder / "scenes", test=SCENES)
    for world in WORLDS:
        run_together(forkserver, evaluate, world, world, folder)
    return folder


def logits_of(count: int) -> tuple[torch.Tensor, list[int]]:
    images, labels = make_split(count)
    weight = Pixels().weight.detach().double()
    rows = []
    for image in images:
        pixels = (np.asarray(image) / 255.0 - MEAN) / STD
        rows.append(weight @ torch.from_numpy(pixels.transpose(2, 0, 1).copy()).flatten())
    return torch.stack(rows), labels


@pytest.mark.parametrize("count", COUNTS)
def test_metrics_are_those_of_a_loop_on_any_number_of_processes(count: int, folder: Path) -> None:
    logits, labels = logits_of(count)
    probabilities = logits.softmax(1)
    losses, places = [], []
    for row, label in zip(probabilities.tolist(), labels, strict=True):
        losses.append(-np.log(row[label]))
        places.append(sorted(row, reverse=True).index(row[label]))
    expected = {
        "val/loss": pytest.approx(sum(losses) / count, rel=1e-6),
        "val/ece": pytest.approx(calibration_error(probabilities, labels), rel=1e-6),
        "val/top1": pytest.approx(sum(place < 1 for place in places) / count, rel=1e-7),
        "val/top5": pytest.approx(sum(place < 5 for place in places) / count, rel=1e-7),
        "val/samples": count,
    }
    for world in WORLDS:
        for rank in range(world):
            result = json.loads((folder / f"result_{world}_{rank}.json").read_text())
            for batch_size in BATCHES:
                assert result[f"validate {count} {batch_size}"] == expected, (world, rank, batch_size)


@pytest.mark.parametrize("count", COUNTS)
def test_metrics_of_several_labels_are_those_of_loops_on_any_number_of_processes(count: int, folder: Path) -> None:
    logits, _ = logits_of(count)
    truth = [[tag in tags for tag in range(CLASSES)] for tags in tags_of(count)]
    losses, scores = [], []
    for row, present in zip(logits.tolist(), truth, strict=True):
        losses += [np.log1p(np.exp(-value if there else value)) for value, there in zip(row, present, strict=True)]
    for place in range(CLASSES):
        found, real = [row[place] > 0.0 for row in logits.tolist()], [row[place] for row in truth]
        both = sum(a and b for a, b in zip(found, real, strict=True))
        scores.append(2 * both / max(sum(found) + sum(real), 1))
    expected = {
        "val/loss": pytest.approx(sum(losses) / len(losses), rel=1e-6),
        "val/map": pytest.approx(mean_average_precision(logits.tolist(), truth), rel=1e-6),
        "val/f1": pytest.approx(sum(scores) / CLASSES, rel=1e-6),
        "val/samples": count,
    }
    for world in WORLDS:
        for rank in range(world):
            result = json.loads((folder / f"result_{world}_{rank}.json").read_text())
            assert result[f"tags {count}"] == expected, (world, rank)


def test_a_fit_with_batch_norm_validates_on_all_processes(folder: Path) -> None:
    for world in WORLDS:
        results = [json.loads((folder / f"result_{world}_{rank}.json").read_text())["fit"] for rank in range(world)]
        for result in results:
            assert result["val/samples"] == 11
            assert result["val/loss"] == results[0]["val/loss"]
            assert result["val_ema/samples"] == 11


@pytest.mark.parametrize("world", WORLDS)
def test_the_averaged_weights_are_the_same_on_all_processes(world: int, folder: Path) -> None:
    averages = [torch.load(folder / f"average_{world}_{rank}.pt", weights_only=True) for rank in range(world)]
    for average in averages[1:]:
        assert all(torch.equal(value, average[name]) for name, value in averages[0].items())


@pytest.mark.parametrize("world", WORLDS)
def test_tables_and_records_hold_each_sample_once(world: int, folder: Path) -> None:
    # Two samples: with three processes one of them has only a filler.
    report = json.loads((folder / f"report_{world}/test.json").read_text())
    assert (report["test/samples"], report["split_samples"], report["processes"]) == (2, 2, world)
    for path, count in ((folder / f"report_{world}/predictions.csv", 2), (folder / f"predicted_{world}.csv", 5)):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["index"]) for row in rows] == list(range(count))
        logits, _ = logits_of(count)
        assert [row["label_1"] for row in rows] == [f"class {index}" for index in logits.argmax(1).tolist()]


def test_pixels_are_counted_once_on_any_number_of_processes(folder: Path) -> None:
    network, hits, counted, losses = Coarse(), 0, 0, 0.0
    for sample in evaluation_scenes(SCENES):
        height, width = sample["resized"].tolist()
        with torch.no_grad():
            logits = network(sample["image"][None])
        padded = tuple(sample["image"].shape[-2:])
        logits = functional.interpolate(logits, padded, mode="bilinear")[:, :, :height, :width]
        logits, truth = functional.interpolate(logits, tuple(sample["size"]), mode="bilinear"), sample["mask"].long()
        hits += int((logits[0].argmax(0) == truth)[truth != 255].sum())
        counted += int((truth != 255).sum())
        losses += functional.cross_entropy(logits.double(), truth[None], ignore_index=255, reduction="sum").item()
    results = [
        json.loads((folder / f"result_{world}_{rank}.json").read_text())[f"scenes {batch_size}"]
        for world in WORLDS
        for rank in range(world)
        for batch_size in BATCHES
    ]
    assert len(results) == 18
    for result in results:
        assert result["val/pixels"] == counted
        assert round(result["val/aacc"] * counted) == hits
        assert result["val/loss"] == pytest.approx(losses / counted, rel=1e-6)
        assert {name: result[name] for name in ("val/miou", "val/macc", "val/samples")} == {
            name: results[0][name] for name in ("val/miou", "val/macc", "val/samples")
        }


def test_tables_and_masks_are_the_same_on_any_number_of_processes(folder: Path) -> None:
    one = folder / "processes_1/scenes"
    names = sorted(path.name for path in (one / "predictions").iterdir())
    assert names == [*(f"image_{index}.png" for index in range(SCENES)), "shares.csv"]
    for world in WORLDS[1:]:
        other = folder / f"processes_{world}/scenes"
        assert sorted(path.name for path in (other / "predictions").iterdir()) == names
        for name in ("iou.csv", "predictions.png", "confusion.png", *(f"predictions/{name}" for name in names)):
            assert (one / name).read_bytes() == (other / name).read_bytes(), (world, name)
