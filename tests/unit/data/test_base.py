import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from datamodules import PLAIN, SMALL, encoded, finished, indices, make_data, make_trainer, transformed
from hub_server import HubServer
from huggingface_hub import constants
from PIL import Image
from segmentation_data import SegmentationDataModule

from scalablevit_pl.data import Augmentation, BaseDataModule, ClassificationDataModule, DensePreprocessing
from scalablevit_pl.data.images import Sample
from scalablevit_pl.data.samplers import Draw
from scalablevit_pl.data.worker import spare_worker
from scalablevit_pl.preprocessing import UnreadableImageError

MakeFiles = Callable[..., Path]
# The first four, three and three images of the three classes in the order of RandomState(0).permutation(100).
CUT = [2, 16, 26, 54, 55, 73, 75, 78, 86, 93]


def labels(loader: Any) -> list[int]:
    return [label for batch in loader for label in batch["label"].tolist()]


# Splits


@pytest.mark.parametrize("rows", [10, 25, 104])
@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_the_validation_cut_is_disjoint_complete_and_of_the_requested_size(
    rows: int, fraction: float, make_parquet: MakeFiles
) -> None:
    data = make_data(make_parquet({"train": rows}), val_fraction=fraction, augmentation=None, batch_size=1)
    train, val = sorted(indices(data.train_dataloader())), indices(data.val_dataloader())
    assert sorted(train + val) == list(range(rows))
    assert len(val) == round(rows * fraction)
    assert val == sorted(val)


def test_the_validation_cut_depends_on_its_seed_only(make_parquet: MakeFiles) -> None:
    folder = make_parquet({"train": 100})
    cuts = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        np.random.seed(noise)  # noqa: NPY002
        cuts.append(indices(make_data(folder, val_seed=seed).val_dataloader()))
    assert cuts[0] == cuts[1] != cuts[2]
    assert cuts[0] == indices(make_data(folder, "validate").val_dataloader())
    assert cuts[0] == CUT  # the same with every version


def test_a_checkpoint_of_an_earlier_version_keeps_its_validation_images(make_parquet: MakeFiles) -> None:
    folder, plain = make_parquet({"train": 100}), [2, 16, 26, 54, 55, 73, 75, 86, 93, 95]
    data = make_data(folder, batch_size=1)
    data.load_state_dict({"epoch": 0, "batch": 0})
    assert indices(data.val_dataloader()) == plain
    assert sorted(indices(data.train_dataloader()) + plain) == list(range(100))
    again = make_data(folder)
    again.load_state_dict(data.state_dict())
    assert indices(again.val_dataloader()) == plain
    again.load_state_dict(make_data(folder).state_dict())
    assert indices(again.val_dataloader()) == CUT


def test_a_small_split_leaves_one_image_for_validation(make_parquet: MakeFiles) -> None:
    data = make_data(make_parquet({"train": 4}), batch_size=3)
    assert len(indices(data.val_dataloader())) == 1
    assert len(indices(data.train_dataloader())) == 3


@pytest.mark.parametrize("name", ["validation", "val", "valid"])
def test_an_existing_validation_split_is_used(name: str, make_parquet: MakeFiles) -> None:
    data = make_data(make_parquet({"train": 12, name: [2, 1, 0, 2, 1]}))
    assert labels(data.val_dataloader()) == [2, 1, 0, 2, 1]
    assert sorted(indices(data.train_dataloader())) == list(range(12))


def test_the_test_split_is_read_in_order(make_parquet: MakeFiles) -> None:
    expected = [2, 1, 0, 2, 1, 0, 0]
    data = make_data(make_parquet({"train": 4, "test": expected}), "test", batch_size=3)
    assert [len(batch["label"]) for batch in data.test_dataloader()] == [3, 3, 1]
    assert labels(data.test_dataloader()) == expected
    assert indices(data.test_dataloader()) == list(range(7))


def test_other_splits_can_be_chosen(make_parquet: MakeFiles) -> None:
    folder = make_parquet({"test": [0] * 4, "train": [1] * 3, "validation": [2] * 2})
    data = make_data(folder, train_split="test", val_split="train", test_split="validation")
    data.setup("test")
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    assert [labels(loader) for loader in loaders] == [[0] * 4, [1] * 3, [2] * 2]
    with pytest.raises(ValueError, match="no split 'd'"):
        make_data(folder, train_split="d")


@pytest.mark.parametrize("name", ["validation", "val", "valid"])
def test_required_split_sizes_are_checked(name: str, make_parquet: MakeFiles) -> None:
    folder = make_parquet({"train": 6, name: 3})
    make_data(folder, split_sizes={"train": 6, "validation": 3, "test": 9})
    with pytest.raises(ValueError, match=r"split '\w+' has 3 images, but --data.split_sizes requires 50000: .* null"):
        make_data(folder, split_sizes={"train": 6, "validation": 50_000})
    with pytest.raises(ValueError, match=r"split .train. has 6 images, but .* requires 7"):
        make_data(folder, split_sizes={"train": 7})
    make_data(folder, "validate", split_sizes={"train": 7})


@pytest.mark.parametrize(
    ("stage", "expected"),
    [("fit", {"train", "validation"}), ("validate", {"validation"}), ("test", {"test"}), (None, None)],
)
def test_prepare_fetches_the_splits_of_a_stage_without_a_trainer(
    stage: str | None, expected: set[str] | None, make_parquet: MakeFiles, hub: HubServer
) -> None:
    folder = make_parquet({"train": 3, "validation": 3, "test": 3})
    hub.add_repo("datasets/lab/pets")
    hub.commit(
        "datasets/lab/pets",
        {f"data/{path.stem}-00000-of-00001.parquet": path.read_bytes() for path in folder.glob("*")},
    )
    data = make_data("lab/pets", stage=None)
    data.prepare(stage)
    fetched = {path.stem.partition("-")[0] for path in Path(constants.HF_HUB_CACHE).rglob("*.parquet")}
    assert fetched == (expected or {"train", "validation", "test"})


def test_the_stage_to_prepare_is_the_trainers(make_parquet: MakeFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data(make_parquet({"train": 3}), stage=None)
    stages: list[str | None] = []
    monkeypatch.setattr(data, "prepare", stages.append)
    data.prepare_data()
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn="validate"))
    data.prepare_data()
    assert stages == [None, "validate"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"shuffle_buffer": 0}, "shuffle_buffer must be at least 1, got 0"),
        ({"max_unreadable": -1}, "max_unreadable must be at least 0, got -1"),
        ({"worker_timeout": -1.0}, "worker_timeout must be at least 0, got -1"),
        ({"val_fraction": 0.0}, "val_fraction must be between 0 and 1, got 0.0"),
        ({"val_fraction": 1.0}, "val_fraction must be between 0 and 1, got 1.0"),
        ({"val_seed": -1}, "val_seed must be from 0 to .*, got -1"),
    ],
)
def test_numbers_out_of_range_are_rejected(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassificationDataModule("fashion_mnist_sample", **arguments)


# Loaders


def test_an_evaluation_batch_holds_the_preprocessed_rows(make_parquet: MakeFiles) -> None:
    folder = make_parquet({"train": 4, "test": 5})
    data = make_data(folder, "test")
    loaded = list(data.test_dataloader())
    assert {batch["image"].dtype for batch in loaded} == {torch.uint8}
    batches = finished(data, loaded)
    assert [set(batch) for batch in batches] == [{"image", "label", "index", "path"}] * 2
    assert [tuple(batch["image"].shape) for batch in batches] == [(4, 3, 8, 8), (1, 3, 8, 8)]
    assert {batch["image"].dtype for batch in batches} == {torch.float32}
    assert [path for batch in batches for path in batch["path"]] == [""] * 5
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), transformed(folder, "test", range(5)))


def test_training_is_shuffled_and_leaves_out_an_incomplete_batch(make_parquet: MakeFiles) -> None:
    loader = make_data(make_parquet({"train": 22, "val": 2})).train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        epochs.append(indices(loader))
    assert [len(epoch) for epoch in epochs] == [20, 20]
    assert len(set(epochs[0])) == 20
    assert epochs[0] != sorted(epochs[0])
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(("batch_size", "processes", "remedy"), [(9, 1, 8), (5, 2, 4)])
def test_too_few_training_images_are_rejected(
    batch_size: int, processes: int, remedy: int, make_parquet: MakeFiles
) -> None:
    data = make_data(make_parquet({"train": 8, "val": 1}), batch_size=batch_size)
    message = rf"8 training images .* {batch_size} on {processes} process.*--data.batch_size to {remedy} or less"
    data.processes = processes
    with pytest.raises(ValueError, match=message):
        data.train_dataloader()
    data.processes, data.trainer = 1, make_trainer(processes)
    with pytest.raises(ValueError, match=message):
        data.train_dataloader()


def test_processes_share_the_images(make_parquet: MakeFiles) -> None:
    data = make_data(make_parquet({"train": 20, "val": 7, "test": 5}), batch_size=1)
    data.setup("test")
    parts: dict[str, list[list[int]]] = {"train": [], "val": [], "test": []}
    for rank in range(3):
        data.trainer = make_trainer(3, rank)
        parts["train"].append(indices(data.train_dataloader()))
        parts["val"].append(indices(data.val_dataloader()))
        parts["test"].append(indices(data.test_dataloader()))
    assert parts["val"] == [[0, 3, 6], [1, 4, -1], [2, 5, -1]]
    assert parts["test"] == [[0, 3], [1, 4], [2, -1]]
    assert [len(part) for part in parts["train"]] == [6, 6, 6]
    assert len({index for part in parts["train"] for index in part}) == 18


def test_the_order_over_processes_follows_the_seed(make_parquet: MakeFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data(make_parquet({"train": 20, "val": 7}), batch_size=1)
    orders = []
    for seed in ("0", "0", "7"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        data.trainer = make_trainer(2)
        orders.append(list(data.train_dataloader().sampler))
    assert orders[0] == orders[1] != orders[2]


def test_batches_do_not_depend_on_the_number_of_workers(make_parquet: MakeFiles) -> None:
    folder = make_parquet({"train": 23, "val": 1})
    drawn = []
    for workers in (0, 1, 2):
        data = make_data(folder, num_workers=workers, augmentation=Augmentation(), trainer=make_trainer())
        batches = [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]
        drawn.append(torch.stack([batch["image"] for batch in batches]))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_only_training_keeps_its_loader_processes_between_epochs(make_parquet: MakeFiles) -> None:
    data = make_data(make_parquet({"train": 8, "val": 4}), num_workers=1)
    assert data.train_dataloader().persistent_workers
    assert not data.val_dataloader().persistent_workers


@pytest.mark.parametrize("gpu", [False, True])
def test_loaders_pin_memory_for_a_gpu_and_survive_a_signal(
    gpu: bool, make_parquet: MakeFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(make_parquet({"train": 8, "val": 4}), num_workers=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert loader.pin_memory is gpu
        assert loader.worker_init_fn is spare_worker


def test_the_wait_for_a_loader_process_is_limited(make_parquet: MakeFiles) -> None:
    folder = make_parquet({"train": 8, "val": 4})
    data = make_data(folder, num_workers=1, worker_timeout=7.0)
    assert [loader.timeout for loader in (data.train_dataloader(), data.val_dataloader())] == [7.0, 7.0]
    assert make_data(folder, num_workers=0).train_dataloader().timeout == 0
    assert make_data(folder, num_workers=1).train_dataloader().timeout == 600


# Resuming


@pytest.mark.parametrize(
    ("ready", "processed", "batches", "expected"),
    [
        (0, 0, 0, (0, 0)),  # before the first epoch
        (1, 0, 0, (0, 0)),
        (3, 2, 7, (2, 7)),  # within the third
        (3, 2, 1000, (3, 0)),  # in the validation after its last batch
        (3, 3, 1000, (3, 0)),  # at its end
    ],
)
def test_a_checkpoint_holds_the_next_batch(ready: int, processed: int, batches: int, expected: tuple[int, int]) -> None:
    data = ClassificationDataModule("fashion_mnist_sample")
    data.trainer = make_trainer(batch=batches)
    data.trainer.fit_loop.epoch_progress.current = SimpleNamespace(ready=ready, processed=processed)
    assert data.state_dict() == dict(zip(("epoch", "batch"), expected, strict=True)) | {"stratified": True}


def test_the_loader_starts_where_a_checkpoint_states(make_parquet: MakeFiles) -> None:
    data = make_data(make_parquet({"train": 23, "val": 1}))
    loader = data.train_dataloader()
    loader.sampler.set_epoch(2)
    expected = indices(loader)
    data.load_state_dict({"epoch": 2, "batch": 3})
    assert indices(data.train_dataloader()) == expected[3 * 4 :]
    data.trainer = make_trainer(epoch=2)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(2)
    assert indices(loader) == expected  # a later fit starts from the beginning


# Unreadable images


def make_damaged(make_folders: MakeFiles, wrong: list[int]) -> Path:
    """Make six images of cats, row 0 to 5, some of them damaged, and one of a dog."""
    folder = make_folders(*(f"cat/{row}.png" for row in range(6)), "dog/9.png")
    for row in wrong:
        (folder / f"cat/{row}.png").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_counted_once_and_limited(
    workers: int, make_folders: MakeFiles, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_damaged(make_folders, [1, 4])
    # Images are validated on that are trained on, too: they are counted once.
    data = make_data(folder, max_unreadable=2, num_workers=workers, batch_size=3, val_split="train")
    for loader in (data.train_dataloader(), data.val_dataloader(), data.train_dataloader()):
        for batch in loader:
            assert "unreadable" not in data.on_before_batch_transfer(batch, 0)
    assert sorted(line.split(".png")[0][-5:] for line in data.unreadable) == ["cat/1", "cat/4"]
    assert sum("unreadable image" in record.message for record in caplog.records) == 2
    with pytest.raises(UnreadableImageError, match=r"3 images cannot be read and max_unreadable=2.*row 7"):
        data.on_before_batch_transfer({"unreadable": ["", "cannot read row 7"]}, 0)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_counts_each_unreadable_image_on_one_process(processes: int, make_folders: MakeFiles) -> None:
    folder = make_damaged(make_folders, [0, 1, 2])  # adjacent ones, and the one that fillers would show
    counted, lines = [], []
    for rank in range(processes):
        trainer = make_trainer(processes, rank)
        data = make_data(folder, "test", trainer, test_split="train", max_unreadable=-(-3 // processes), batch_size=2)
        batches = [data.on_before_batch_transfer(batch, 0) for batch in data.test_dataloader()]
        counted += [index for index in indices(batches) if index >= 0]
        lines += data.unreadable
    assert sorted(counted) == [3, 4, 5, 6]
    assert sorted(line.split(".png")[0][-5:] for line in lines) == ["cat/0", "cat/1", "cat/2"]


def test_prediction_reads_every_image_or_stops(make_folders: MakeFiles) -> None:
    data = make_data(make_damaged(make_folders, [2]), "predict", max_unreadable=5, test_split="train")
    with pytest.raises(UnreadableImageError, match=r"cat/2\.png"):
        list(data.predict_dataloader())


# Transfer to the device


def test_a_trainer_gets_normalized_images_in_its_precision(make_parquet: MakeFiles, tmp_path: Path) -> None:
    folder = make_parquet({"train": 8, "val": 4, "test": 4})
    seen: dict[str, Any] = {}

    class Task(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            seen["train"] = batch
            return self.layer(batch["image"].mean().view(1, 1)).sum()

        def validation_step(self, batch: Any, number: int) -> None:
            seen["val"] = batch

        def predict_step(self, batch: Any, number: int) -> None:
            seen["predict"] = batch

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    data = make_data(folder, stage=None, augmentation=Augmentation(auto_augment=None, random_erasing=1.0))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(**quiet, accelerator="cpu", precision="64-true", fast_dev_run=True, default_root_dir=tmp_path)
    trainer.fit(Task(), datamodule=data)
    trainer.predict(Task(), datamodule=data)
    assert {batch["image"].dtype for batch in seen.values()} == {torch.float64}
    assert seen["train"]["label"].dtype == torch.float64  # soft
    assert "patch" not in seen["train"]
    for part, split in (("val", "validation"), ("predict", "test")):
        expected = transformed(folder, split, range(4))
        assert torch.equal(seen[part]["image"], expected.double())


# A datamodule of another task


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Write images of several sizes whose masks are their red channel, and two without a readable image."""
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    state = np.random.RandomState(0)
    for split, count in (("train", 9), ("validation", 5)):
        rows: dict[str, list[Any]] = {"image": [], "mask": []}
        for row in range(count):
            classes = state.randint(0, 2, (20 + 5 * row, 50 - 3 * row), dtype=np.uint8)
            image = np.stack([classes, *state.randint(0, 255, (2, *classes.shape), dtype=np.uint8)], axis=2)
            content = b"no image" if row == 4 else encoded(Image.fromarray(image))
            rows["image"].append({"bytes": content, "path": f"{row}.png"})
            rows["mask"].append({"bytes": encoded(Image.fromarray(classes)), "path": f"{row}.png"})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(
            str(tmp_path / f"{split}-00000-of-00001.parquet")
        )
    return tmp_path


def make_scenes(folder: Path, stage: str = "fit", **arguments: Any) -> SegmentationDataModule:
    values = {"classes": ["ground", "building"], "batch_size": 4, "num_workers": 0, "max_unreadable": 1} | arguments
    values["preprocessing"] = DensePreprocessing(40, 70)
    data = SegmentationDataModule(str(folder), **values)
    data.trainer = values.get("trainer")
    data.setup(stage)
    return data


@pytest.mark.parametrize("streaming", [False, True])
def test_image_and_mask_are_varied_together(streaming: bool, scenes: Path) -> None:
    data = make_scenes(scenes, streaming=streaming)
    batches = list(data.train_dataloader())
    assert [batch["index"].tolist() for batch in batches] != [[0, 1, 2, 3], [4, 5, 6, 7]]
    for batch in batches:
        assert batch["image"].shape == (4, 3, *batch["mask"].shape[1:])
        assert max(batch["mask"].shape[1:]) <= 32
        assert batch["mask"].dtype == torch.int64
        seen = batch["mask"] != 255
        assert torch.equal(batch["image"][:, 0][seen], batch["mask"][seen].to(torch.uint8))
        assert set(batch["image"][:, 0][~seen].tolist()) == {124}  # the mean color


@pytest.mark.parametrize("streaming", [False, True])
def test_variation_of_any_target_is_a_function_of_seed_epoch_and_row(
    streaming: bool, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(seed: int, epoch: int, workers: int) -> dict[int, list[Any]]:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        data = make_scenes(scenes, streaming=streaming, num_workers=workers, batch_size=1)
        data.trainer = make_trainer(epoch=epoch)
        loader = data.train_dataloader()
        if not streaming:
            loader.sampler.set_epoch(epoch)
        return {batch["index"].item(): batch["mask"].tolist() for batch in loader}

    expected = drawn(3, 1, 0)
    assert len(expected) == 8
    assert drawn(3, 1, 1) == expected
    assert drawn(3, 2, 0) != expected
    assert drawn(4, 1, 0) != expected


def test_evaluation_of_any_target_counts_each_image_once(scenes: Path) -> None:
    counted = []
    for rank in range(2):
        data = make_scenes(scenes, "validate", batch_size=2)
        data.trainer = make_trainer(2, rank)
        for batch in data.val_dataloader():
            batch = data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)
            assert batch["image"].dtype == torch.float32
            assert batch["image"].shape == (len(batch["index"]), 3, *batch["mask"].shape[1:])
            assert all(side % 32 == 0 for side in batch["mask"].shape[1:])
            assert batch["image"][:, 0][batch["mask"] == 255].abs().max() < 0.02
            counted += [index for index in batch["index"].tolist() if index >= 0]
    assert sorted(counted) == [0, 1, 2, 3]  # row 4 is unreadable


def test_prediction_reads_no_targets(scenes: Path) -> None:
    data = make_scenes(scenes, "predict", test_split="train", batch_size=3, mask_column="other")
    assert set(next(iter(data.predict_dataloader()))) == {"image", "index", "path"}
    with pytest.raises(ValueError, match="split 'train' has no column 'other'"):
        make_scenes(scenes, "test", test_split="train", mask_column="other")


def test_files_of_a_stream_must_declare_the_same_targets(scenes: Path) -> None:
    rows = datasets.Dataset.from_dict({"image": [b""] * 9, "mask": [b""] * 9})
    rows.to_parquet(str(scenes / "train-00000-of-00001.parquet"))
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.parquet' declares other values in the column 'mask'"):
        make_scenes(scenes, streaming=True)


def test_a_training_batch_is_augmented_after_normalization_by_seeded_draws(
    make_parquet: MakeFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noisy(ClassificationDataModule):
        def augment_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
            return batch | {"image": batch["image"] + torch.rand(1), "draw": float(np.random.rand())}  # noqa: NPY002

    data = Noisy(str(make_parquet({"train": 8})), num_workers=0, preprocessing=SMALL, augmentation=PLAIN)
    pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)

    def finish(**position: int) -> float:
        data.trainer = make_trainer(**position)
        batch = data.on_after_batch_transfer({"image": pixels.clone()}, 0)
        assert not torch.equal(batch["image"], SMALL.normalize(pixels))
        return batch["draw"]

    expected = finish(epoch=1, batch=2)
    assert finish(epoch=1, batch=2) == expected
    draws = [finish(epoch=0, batch=2), finish(epoch=1, batch=3), finish(epoch=1, batch=2, rank=1)]
    assert len({expected, *draws}) == 4
    data.trainer.training = False
    assert torch.equal(data.on_after_batch_transfer({"image": pixels.clone()}, 0)["image"], SMALL.normalize(pixels))


def test_a_datamodule_must_say_what_its_targets_and_transforms_are() -> None:
    class Incomplete(BaseDataModule):
        def targets(self, splits: datasets.DatasetDict, split: str) -> None:
            return None

    with pytest.raises(TypeError, match=r"abstract method.*transform"):
        Incomplete("fashion_mnist_sample", preprocessing=SMALL)


def test_a_folder_without_parquet_files_is_read_by_the_subclass(make_folders: MakeFiles) -> None:
    folder = make_folders("pictures/1.png", "pictures/2.png")

    class Unlabelled(BaseDataModule):
        def targets(self, splits: datasets.DatasetDict, split: str) -> None:
            return None

        def transform(self, training: bool) -> Callable[..., Sample]:
            return lambda image, _: {"image": SMALL.pixels(image)}

    data = Unlabelled(str(folder), preprocessing=SMALL, num_workers=0, batch_size=1, train_split="all")
    with pytest.raises(ValueError, match=r"photos' contains no parquet files"):
        data.setup("fit")
    paths = sorted(map(str, folder.rglob("*.png")))
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": paths}, features=features)
    data.read_folder = lambda folder: datasets.DatasetDict(all=rows)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch["path"][0] in paths


def test_log_names_the_parts(make_parquet: MakeFiles, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "scalablevit_pl")
    make_data(make_parquet({"train": 20}))
    assert [record.message for record in caplog.records if "images of split" in record.message] == [
        "train: 18 images of split 'train'",
        "val: 2 images of split 'train'",
    ]


def test_draws_of_a_training_epoch_reach_the_samples(make_parquet: MakeFiles) -> None:
    data = make_data(make_parquet({"train": 9, "val": 1}), repeats=2, batch_size=8)
    draws = list(data.train_dataloader().sampler)
    assert {type(draw) for draw in draws} == {Draw}
    assert sorted(draw.repeat for draw in draws) == [0] * 4 + [1] * 4
