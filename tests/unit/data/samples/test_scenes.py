"""Scenes that are drawn from the Fashion-MNIST sample."""

import itertools
import os
import subprocess
import sys
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from scalablevit_pl.data.samples import scenes
from scalablevit_pl.data.samples.scenes import CLASSES, Scene, draw_scene, load_scenes

COUNT = 300


@pytest.fixture(scope="module")
def drawn() -> list[Scene]:
    return [draw_scene("train", index) for index in range(COUNT)]


def digest(scene: Scene) -> str:
    return sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in scene)).hexdigest()


def test_a_scene_is_the_same_in_any_order_and_in_another_process(drawn: list[Scene]) -> None:
    backwards = {index: digest(draw_scene("train", index)) for index in reversed(range(0, COUNT, 20))}
    assert backwards == {index: digest(drawn[index]) for index in range(0, COUNT, 20)}
    code = (
        "import sys; from hashlib import sha256; import numpy as np\n"
        "from scalablevit_pl.data.samples.scenes import draw_scene\n"
        "scene = draw_scene('train', 40)\n"
        "sys.stdout.write(sha256(b''.join(np.ascontiguousarray(part).tobytes() for part in scene)).hexdigest())\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout == digest(drawn[40])


def test_a_scene_is_the_same_on_every_machine() -> None:
    scene = draw_scene("test", 3, seed=1, side=40)
    assert digest(scene) == "4aeb7f64cc6f4ed3a43ff24161b842133c6088e35c4ec57393c0f2359ef58d33"


def test_seed_split_index_and_side_change_the_scene() -> None:
    variants = [("train", 1, 0, 96), ("test", 1, 0, 96), ("train", 2, 0, 96), ("train", 1, 1, 96), ("train", 1, 0, 97)]
    assert len({digest(draw_scene(*variant)) for variant in variants}) == len(variants)


def test_masks_instances_and_boxes_agree(drawn: list[Scene]) -> None:
    for scene in drawn[:20]:
        assert scene.image.shape == (96, 96, 3)
        pixels: dict[int, list[tuple[int, int]]] = {}
        for row in range(96):
            for column in range(96):
                number = int(scene.instances[row, column])
                label = 0 if number == 0 else scene.labels[number - 1] + 1
                assert scene.mask[row, column] == label
                pixels.setdefault(number, []).append((column, row))
        assert sorted(pixels) == list(range(len(scene.labels) + 1))
        for number, box in enumerate(scene.boxes.tolist()):
            columns, rows = zip(*pixels[number + 1], strict=True)
            assert box == [min(columns), min(rows), max(columns) + 1, max(rows) + 1]


@pytest.mark.parametrize("side", [28, 41, 56])
def test_garments_are_resized_like_pillow_does(side: int) -> None:
    garments, _ = scenes.load_garments("test")
    for garment in garments[:50]:
        expected = np.asarray(Image.fromarray(garment).resize((side, side), Image.Resampling.BILINEAR), int)
        assert np.abs(scenes._resized(garment, side) - expected).max() <= 8  # positions are multiples of 1 / 64


def test_garments_are_painted_from_the_back_to_the_front(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record what was drawn where, and draw it the other way round."""
    resized: list[np.ndarray] = []
    placed: list[tuple[np.ndarray, int, int]] = []
    resize, find_box = scenes._resized, scenes._box
    monkeypatch.setattr(scenes, "_resized", lambda *options: resized.append(resize(*options)) or resized[-1])
    monkeypatch.setattr(
        scenes, "_box", lambda *options: placed.append((resized[-1], *options[1:])) or find_box(*options)
    )
    for index in range(30):
        placed.clear()
        scene = draw_scene("test", index)
        assert len(placed) == len(scene.labels)
        expected, whole = np.zeros((96, 96), int), []
        for number in range(len(placed), 0, -1):
            garment, left, top = placed[number - 1]
            opaque = garment > scenes.PALE
            expected[top : top + len(garment), left : left + len(garment)][opaque] = number
            whole.append(opaque.sum())
        assert np.array_equal(scene.instances, expected)
        shares = np.bincount(expected.ravel())[1:] / whole[::-1]
        assert shares[0] == 1.0
        assert shares.min() >= 0.25


def test_covered_garments_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "load_garments", lambda split: (np.full((1, 28, 28), 255, np.uint8), np.array([3])))
    monkeypatch.setattr(scenes, "LEAST_VISIBLE", 0.999)  # only garments that are not covered remain
    for index in range(20):
        boxes = draw_scene("train", index).boxes.tolist()
        for (left, top, right, bottom), other in itertools.combinations(boxes, 2):
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_each_split_draws_from_its_own_garments(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = scenes.load_garments(split)
    asked: list[str] = []

    def load(name: str) -> tuple[np.ndarray, np.ndarray]:
        asked.append(name)
        return images, labels

    monkeypatch.setattr(scenes, "load_garments", load)
    draw_scene(split, 0)
    assert asked == [split]
    original = datasets.load_dataset("parquet", data_files=str(scenes.FOLDER / f"{split}.parquet"), split="train")
    assert labels.tolist() == original["label"][:]
    assert np.array_equal(images[::100], np.stack([np.asarray(image) for image in original[::100]["image"]]))


def test_scenes_are_as_varied_as_described(drawn: list[Scene]) -> None:
    counts = Counter(len(scene.labels) for scene in drawn)
    assert set(counts) == {1, 2, 3, 4, 5}
    assert counts[1] < COUNT // 20  # only if the other garments are covered
    sizes = np.concatenate([scene.boxes[:, 2:] - scene.boxes[:, :2] for scene in drawn])
    assert sizes.max() == 64
    shares = np.bincount(np.concatenate([scene.mask.ravel() for scene in drawn]), minlength=len(CLASSES)) / (
        COUNT * 96 * 96
    )
    assert 0.6 < shares[0] < 0.75
    assert shares[1:].min() > 0.01
    occurring = Counter(int(label) for scene in drawn for label in scene.labels)
    assert min(occurring[label] for label in range(10)) > 0.7 * sum(occurring.values()) / 10


def test_color_says_nothing_about_the_class(drawn: list[Scene]) -> None:
    """The mean shares of red, green and blue are those of gray in each class, and vary between its garments."""
    shares: dict[int, list[np.ndarray]] = {}
    for scene in drawn:
        for number, label in enumerate([-1, *scene.labels.tolist()]):
            color = scene.image[scene.instances == number].mean(0)
            shares.setdefault(label, []).append(color / color.sum())
    assert sorted(shares) == list(range(-1, 10))
    for label, found in shares.items():
        deviation = np.std(found, axis=0)
        assert np.abs(np.mean(found, axis=0) - 1 / 3).max() < 4 * deviation.max() / len(found) ** 0.5, label
        assert deviation.min() > 0.05


def test_scenes_are_rows_that_name_their_classes() -> None:
    splits = load_scenes(train=6, test=3, side=40, seed=2)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 6, "test": 3}
    features = splits["train"].features
    assert features["classes"].feature.names == CLASSES
    assert features["objects"]["labels"].feature.names == CLASSES[1:]
    for split, rows in splits.items():
        for index, row in enumerate(rows):
            scene = draw_scene(split, index, seed=2, side=40)
            for name in ("image", "mask", "instances"):
                assert np.array_equal(np.asarray(row[name]), getattr(scene, name))
            assert row["objects"] == {"boxes": scene.boxes.tolist(), "labels": scene.labels.tolist()}
            assert row["classes"] == sorted(set(scene.mask.ravel().tolist()))


def test_scenes_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_scenes(train=2, test=1, side=32)
    monkeypatch.setattr(scenes, "draw_scene", lambda *_: pytest.fail("a scene was drawn again"))
    again = load_scenes(train=2, test=1, side=32)
    assert [rows.cache_files for rows in again.values()] == [rows.cache_files for rows in first.values()]


@pytest.mark.slow
def test_two_processes_may_draw_scenes_at_once(tmp_path: Path) -> None:
    code = (
        "from scalablevit_pl.data.samples.scenes import load_scenes\n"
        "splits = load_scenes(train=200, test=20, side=32)\n"
        "assert [row['mask'].size for rows in splits.values() for row in rows] == [(32, 32)] * 220"
    )
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [process.wait(timeout=600) for process in running] == [0, 0, 0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"split": "val"}, "there is no split 'val' of scenes: choose train or test"),
        ({"split": "test", "side": 31}, "side must be at least 32, got 31"),
    ],
    ids=["split", "side"],
)
def test_invalid_arguments_are_explained(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        draw_scene(index=0, **options)
