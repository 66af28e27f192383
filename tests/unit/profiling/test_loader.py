from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datamodules import make_data
from loading_data import make_images, make_scenes
from PIL import Image
from segmentation_data import SegmentationDataModule
from torch.utils.data import RandomSampler

from scalablevit_pl.data import Augmentation, ClassificationDataModule, Preprocessing
from scalablevit_pl.data.transforms import BatchMix, PatchDraw, reference_transform
from scalablevit_pl.data.worker import spare_worker
from scalablevit_pl.profiling import loader
from scalablevit_pl.profiling.loader import STAGES, compare, loader_builders, report, take_images, time_stages
from scalablevit_pl.profiling.timing import Spread
from scalablevit_pl.randomness import seed_generators

SPREAD = {"median": 2.0, "minimum": 1.0, "maximum": 3.0}


@pytest.fixture(autouse=True)
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for folder in ("data", "tree"):
        (tmp_path / folder).mkdir()


def images_of(folder: Path, augmentation: Augmentation | None) -> ClassificationDataModule:
    return make_data(make_images(folder / "data"), augmentation=augmentation)


def spy(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, seen: list[str], what: str) -> None:
    inner = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *values: (seen.append(what), inner(*values))[1])


def test_stages_are_timed_image_by_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage has its own time; their sum is that of the loader."""
    data = images_of(tmp_path, Augmentation(auto_augment=None))
    take_images(data, 12)
    seen, clock = list[str](), iter(range(10**6))
    spy(monkeypatch, loader, "decode_image", seen, "decode")
    spy(monkeypatch, BatchMix, "__call__", seen, "mix")
    spy(monkeypatch, Preprocessing, "normalize", seen, "normalize")
    spy(monkeypatch, PatchDraw, "__call__", seen, "patch")
    spy(monkeypatch, ClassificationDataModule, "collate", seen, "collate")
    monkeypatch.setattr(loader.time, "perf_counter", lambda: float(next(clock)))
    stages = time_stages(data, 1)
    assert seen == [*["decode", "patch"] * 12, "collate", "normalize", "mix"] * 2  # the first is discarded
    # Readings of the clock for each image: one after read, decode, crop and collate, four for augment.
    expected = {"read": 1, "decode": 1, "crop": 1, "augment": 4, "collate": 13 / 12, "transfer": 1 / 12}
    assert {stage: spread.median for stage, spread in stages.items()} == pytest.approx(expected)


def test_a_transform_without_steps_is_one_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(loader.time, "perf_counter", lambda: float(next(clock)))
    stages = time_stages(images_of(tmp_path, None), 1)
    expected = {"read": 1, "decode": 1, "crop": 1, "augment": 1, "collate": 1 / 22, "transfer": 1 / 22}
    assert {stage: spread.median for stage, spread in stages.items()} == pytest.approx(expected)


def test_ratios_are_of_one_round_and_the_order_alternates(monkeypatch: pytest.MonkeyPatch) -> None:
    builders: Any = {way: lambda workers, way=way: (way, workers) for way in ("ours", "theirs")}
    seen, rates = list[Any](), iter([10.0, 30.0, 80.0, 20.0, 50.0, 100.0])
    monkeypatch.setattr(
        loader, "measure_throughput", lambda made, seconds: (seen.append((*made, seconds)), next(rates))[1]
    )
    found = compare(builders, 3, 3, 0.5)
    order = ["theirs", "ours", "ours", "theirs", "theirs", "ours"]
    assert seen == [(way, 3, 0.5) for way in order]
    assert (found["ours"], found["theirs"]) == (Spread.of([30.0, 80.0, 100.0]), Spread.of([10.0, 20.0, 50.0]))
    assert found["ratio"] == Spread.of([2.0, 3.0, 4.0])


def test_both_loaders_use_the_same_images_and_augmentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = images_of(tmp_path, Augmentation(random_erasing=0.0))
    images = data.images["train"]
    assert len(images) == 22  # a tenth is validated on
    chosen = [images.reader.stored_image(index, row).path for index, row in list(images.stored_rows())[:20:2]]
    taken = take_images(data, 10)
    builders = loader_builders(data, taken, tmp_path / "tree")
    files = [(int(path.parent.name), path.read_bytes()) for path in sorted((tmp_path / "tree").glob("*/*"))]
    expected = sorted((int("class1" in path), Path(path).read_bytes()) for path in chosen)
    assert sorted(files) == expected == sorted((label, stored.read()) for stored, label in taken)
    samples = [sample for batch in builders["ours"](0) for sample in batch["path"]]
    assert len(set(samples)) == 8  # of two whole batches of four
    assert set(samples) <= set(chosen)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for made in (builders["ours"](2), builders["theirs"](2)):
        assert (made.num_workers, made.batch_size, made.drop_last, made.pin_memory) == (2, 4, True, True)
        assert made.worker_init_fn is spare_worker
    theirs: Any = builders["theirs"](0)
    assert isinstance(theirs.sampler, RandomSampler)
    image = Image.open(chosen[0])
    seed_generators(1)
    augmented = theirs.dataset.transform(image)
    seed_generators(1)
    assert torch.equal(augmented, reference_transform(data.preprocessing, data.augmentation)(image))
    data.augmentation = None
    theirs = loader_builders(data, taken, tmp_path / "tree")["theirs"](0)
    assert torch.equal(theirs.dataset.transform(image), data.preprocessing(image))


def test_at_least_one_batch_is_used(tmp_path: Path) -> None:
    assert len(take_images(images_of(tmp_path, None), 1)) == 4


def test_any_datamodule_is_measured_without_a_reference(tmp_path: Path) -> None:
    data = SegmentationDataModule(
        str(make_scenes(tmp_path / "data")), classes=["no", "yes"], batch_size=4, num_workers=0
    )
    data.setup("fit")
    builders = loader_builders(data, take_images(data, 8), tmp_path / "tree")
    assert {*compare(builders, 0, 2, 0.01)} == {"ours"}
    stages = time_stages(data, 1)
    assert all(stages[stage].median > 0.0 for stage in STAGES)


def test_the_first_round_is_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_time_batch", lambda _, number: dict.fromkeys(STAGES, float(number)))
    stages = time_stages(None, 3)  # type: ignore[arg-type]
    assert stages == dict.fromkeys(STAGES, Spread.of([1.0, 2.0, 3.0]))


def lines_of(rates: dict[str, Any]) -> list[str]:
    """Return the rows of the table, with single spaces."""
    record = {
        "date": "2026-11-26T00:00:00",
        "machine": {"cores": 2, "processor": "P", "device": "cpu"},
        "versions": dict.fromkeys(("torch", "torchvision", "timm", "pillow"), "1"),
        "settings": {"images": 1024, "mean_bytes": 31_450.0, "batch_size": 64, "rounds": 5},
        "images_per_second": [{"workers": 2, **rates}],
        "seconds_per_image": {stage: {name: value / 1e3 for name, value in SPREAD.items()} for stage in STAGES},
    }
    return [" ".join(line.split()) for line in report(record).splitlines()]


def test_the_table_has_images_per_second_and_milliseconds() -> None:
    ours = {"median": 1200.4, "minimum": 900.0, "maximum": 1300.0}
    lines = lines_of({"ours": ours, "theirs": SPREAD, "ratio": SPREAD})
    assert "1,024 images of 31.4 kB, batches of 64, 5 interleaved rounds" in lines
    assert "2 1,200 (900-1,300) 2 (1-3) 2.00 (1.00-3.00)" in lines
    assert "decode 2.00 (1.00-3.00)" in lines
    assert "all but transfer 10.00" in lines  # five stages


def test_a_missing_reference_is_a_dash() -> None:
    assert "2 2 (1-3) - -" in lines_of({"ours": SPREAD})
