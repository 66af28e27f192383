import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datamodules import encoded, indices, make_data, make_trainer
from hub_server import HubServer
from huggingface_hub import constants
from PIL import Image

from scalablevit_pl.data import Augmentation, ClassificationDataModule, Preprocessing
from scalablevit_pl.data.stream import TrainingStream
from scalablevit_pl.data.worker import spare_worker
from scalablevit_pl.preprocessing import UnreadableImageError

SMALL = Preprocessing(8)
ROWS = [12, 8, 8, 8, 8, 8]


def png(row: int) -> bytes:
    return encoded(Image.new("RGB", (8, 8), (row, 255 - row, 0)))


def write(path: Path, rows: range, names: tuple[str, ...] = ("cat", "dog")) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    images = [{"bytes": png(row), "path": f"{row}.png"} for row in rows]
    table = datasets.Dataset.from_dict({"image": images, "label": [row % 2 for row in rows]}, features=features)
    table.to_parquet(str(path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write six files of 52 rows, whose images encode their row, and three validation images."""
    start = 0
    for number, rows in enumerate(ROWS):
        write(tmp_path / f"train-{number:05}-of-{len(ROWS):05}.parquet", range(start, start + rows))
        start += rows
    write(tmp_path / "validation-00000-of-00001.parquet", range(3))
    return tmp_path


def make_stream(dataset: Any, trainer: Any, **arguments: Any) -> ClassificationDataModule:
    values = {"preprocessing": SMALL, "augmentation": None} | arguments
    return make_data(dataset, trainer=trainer, streaming=True, **values)


@pytest.mark.parametrize(("processes", "workers", "batches"), [(1, 0, 12), (2, 0, 6), (3, 2, 4), (1, 2, 12)])
def test_processes_and_workers_share_the_rows_evenly(processes: int, workers: int, batches: int, folder: Path) -> None:
    for epoch in (0, 1):
        seen = []
        for rank in range(processes):
            loader = make_stream(folder, make_trainer(processes, rank, epoch), num_workers=workers).train_dataloader()
            found = list(loader)
            assert len(found) == len(loader) == batches
            assert all(len(batch["label"]) == 4 for batch in found)
            seen += indices(found)
        assert len(seen) == len(set(seen)) == 48  # of 52: the four surplus rows of the longer file are left out
        assert set(seen) <= set(range(52))


def test_each_index_has_its_image_and_label(folder: Path) -> None:
    for batch in make_stream(folder, make_trainer()).train_dataloader():
        for index, label, image, path in zip(
            batch["index"].tolist(), batch["label"].tolist(), batch["image"], batch["path"], strict=True
        ):
            assert label == index % 2
            assert path == f"{index}.png"
            assert torch.equal(image, SMALL.pixels(Image.new("RGB", (8, 8), (index, 255 - index, 0))))


def test_the_order_follows_seed_and_epoch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orders = []
    for seed, epoch, buffer in ((0, 0, 1000), (0, 0, 1000), (0, 1, 1000), (1, 0, 1000), (0, 0, 1)):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        data = make_stream(folder, make_trainer(), shuffle_buffer=buffer)
        loader = data.train_dataloader()
        data.trainer = make_trainer(epoch=epoch)  # read when the iteration starts
        orders.append(indices(loader))
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 4
    steps = [two - one for one, two in zip(orders[4], orders[4][1:], strict=False)]
    assert steps.count(1) >= 40  # with a buffer of one, files are shuffled but not their rows
    assert orders[4] != sorted(orders[4])


def test_rows_of_one_file_are_shuffled_in_each_epoch(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write(tmp_path / f"{split}-00000-of-00001.parquet", range(12))
    orders = [indices(make_stream(tmp_path, make_trainer(epoch=epoch)).train_dataloader()) for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(12))
    assert orders[0] != orders[1]


def test_a_stream_starts_with_the_epoch_of_a_checkpoint(folder: Path) -> None:
    data = make_stream(folder, make_trainer(epoch=2))
    expected = [batch["image"] for batch in data.train_dataloader()]
    resumed = make_stream(folder, make_trainer())
    resumed.load_state_dict({"epoch": 2, "batch": 1})
    loader = resumed.train_dataloader()
    assert all(torch.equal(*pair) for pair in zip(expected, [batch["image"] for batch in loader], strict=True))


def test_files_that_cannot_be_distributed_evenly_are_rejected(folder: Path) -> None:
    message = r"6 parquet files of split 'train' .* 2 process\(es\) × 2 worker\(s\): .*--data.num_workers"
    with pytest.raises(ValueError, match=message):
        make_stream(folder, make_trainer(2), num_workers=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 49}, "do not fill a batch of 49"),
        ({"val_split": "train"}, "cannot be cut off a stream"),
        ({"train_split": "other"}, "there is no split 'other': choose among train, validation"),
        ({"split_sizes": {"train": 50}}, "split 'train' has 52 images, but .* requires 50"),
        ({"shuffle_buffer": 0}, "shuffle_buffer must be at least 1, got 0"),
    ],
)
def test_data_that_cannot_be_streamed_is_rejected(arguments: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_stream(folder, make_trainer(), **arguments)


def test_other_classes_than_those_of_the_validation_split_are_rejected(folder: Path) -> None:
    write(folder / "train-00003-of-00006.parquet", range(8), ("dog", "cat"))
    with pytest.raises(ValueError, match=r"train-00003-of-00006\.parquet' declares other values in the column 'label'"):
        make_stream(folder, make_trainer())


def test_class_folders_cannot_be_streamed(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / "1.png").write_bytes(png(1))
    with pytest.raises(ValueError, match="no parquet files that can be streamed"):
        make_stream(tmp_path, make_trainer())


def test_an_unreadable_image_is_named_by_split_and_row(folder: Path) -> None:
    data = make_stream(folder, make_trainer())
    assert isinstance(data.stream, TrainingStream)
    data.stream.stored_rows = lambda files: iter([(7, {"image": {"bytes": b"no image"}, "label": 0})])
    with pytest.raises(UnreadableImageError, match="row 7 of split 'train'"):
        list(data.train_dataloader())


def test_tolerated_unreadable_images_are_replaced_and_named(folder: Path) -> None:
    data = make_stream(folder, make_trainer(), max_unreadable=10)
    stream = data.stream
    assert isinstance(stream, TrainingStream)
    rows, damaged = stream.stored_rows, range(2, 12)  # more than the four that are left out of an epoch
    stream.stored_rows = lambda files: (
        (index, {"image": {"bytes": b"no image"}, "label": 0} if index in damaged else row)
        for index, row in rows(files)
    )
    batches = list(data.train_dataloader())
    assert len(batches) == 12
    assert set(indices(batches)) == set(range(52)) - set(damaged)
    lines = {line for batch in batches for text in batch["unreadable"] for line in text.splitlines()}
    assert {line.split(" of ")[0] for line in lines} == {f"cannot read row {index}" for index in damaged}
    stream.max_unreadable = 1
    stream._shuffled = lambda files, seed: stream.stored_rows(files)  # in this order ten are consecutive
    with pytest.raises(UnreadableImageError, match="of split 'train'"):
        list(data.train_dataloader())


def test_a_stream_from_the_hub_fetches_only_the_validation_split(folder: Path, hub: HubServer) -> None:
    hub.add_repo("datasets/lab/pets")
    hub.commit("datasets/lab/pets", {f"data/{path.name}": path.read_bytes() for path in folder.glob("*.parquet")})
    data = make_stream("lab/pets", make_trainer())
    cached = {path.name for path in Path(constants.HF_HUB_CACHE).rglob("*.parquet")}
    assert cached == {"validation-00000-of-00001.parquet"}
    assert indices(data.train_dataloader()) == indices(make_stream(folder, make_trainer()).train_dataloader())


def test_augmentation_of_a_stream_is_a_function_of_seed_epoch_and_row(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    augmentation = Augmentation(auto_augment=None, random_erasing=1.0, mixup=0.0, cutmix=0.0)

    def drawn(seed: int, epoch: int, buffer: int) -> dict[int, tuple[Any, ...]]:
        """Return the patch and the jittered pixels of each row."""
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        data = make_stream(folder, make_trainer(epoch=epoch), augmentation=augmentation, shuffle_buffer=buffer)
        return {
            index: (*patch.tolist(), *image.flatten().tolist())
            for batch in data.train_dataloader()
            for index, patch, image in zip(batch["index"].tolist(), batch["patch"], batch["image"], strict=True)
        }

    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    expected = drawn(0, 0, 1000)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]  # noqa: NPY002
    assert len({values[4] for values in expected.values()}) == len(expected)  # each row has its own noise
    same, others = drawn(0, 0, 1), [drawn(1, 0, 1), drawn(0, 1, 1)]
    assert all(same[row] == expected[row] for row in same.keys() & expected.keys())
    for other in others:
        assert not any(other[row] == expected[row] for row in other.keys() & expected.keys())


@pytest.mark.parametrize("gpu", [False, True])
def test_the_loader_of_a_stream_has_the_usual_options(gpu: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_stream(folder, make_trainer(), num_workers=2, worker_timeout=7.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    loader = data.train_dataloader()
    assert loader.pin_memory is gpu
    assert (loader.worker_init_fn, loader.num_workers, loader.timeout) == (spare_worker, 2, 7.0)
    assert make_stream(folder, make_trainer(), worker_timeout=7.0).train_dataloader().timeout == 0.0
