import copy
import io
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, DistributedSampler

from scalablevit_pl.data import Augmentation, ClassificationDataModule
from scalablevit_pl.data.images import DatasetImages, ImageFiles, collate
from scalablevit_pl.data.samplers import Draw, EvaluationSampler, TrainingSampler
from scalablevit_pl.data.transforms import erase
from scalablevit_pl.data.worker import spare_worker
from scalablevit_pl.preprocessing import Preprocessing, UnreadableImageError, decode_image

MakeFiles = Callable[..., Path]
SMALL = Preprocessing(8, 0.8, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
PLAIN = Augmentation(auto_augment=None, random_erasing=0.0, mixup=0.0, cutmix=0.0)
MIXED = Augmentation(auto_augment=None, random_erasing=0.0, mixup=0.8, cutmix=1.0)


def make_data(folder: Path | str, stage: str = "fit", **arguments: Any) -> ClassificationDataModule:
    values = {"batch_size": 4, "num_workers": 0, "preprocessing": SMALL, "augmentation": PLAIN} | arguments
    data = ClassificationDataModule(str(folder), **values)
    data.setup(stage)
    return data


def make_trainer(processes: int = 1, rank: int = 0, epoch: int = 0, batch: int = 0) -> SimpleNamespace:
    """What of a trainer the data asks for: how many processes there are, and how far a training is."""
    epochs = SimpleNamespace(current=SimpleNamespace(ready=epoch + 1, processed=epoch))
    batches = SimpleNamespace(current=SimpleNamespace(ready=batch))
    loop = SimpleNamespace(epoch_progress=epochs, epoch_loop=SimpleNamespace(batch_progress=batches))
    progress = {"fit_loop": loop, "num_training_batches": 1000, "training": True}
    return SimpleNamespace(world_size=processes, global_rank=rank, **progress)


def indices(loader: DataLoader[Any]) -> list[int]:
    return [index for batch in loader for index in batch["index"].tolist()]


def labels(loader: DataLoader[Any]) -> list[int]:
    return [label for batch in loader for label in batch["label"].tolist()]


def finished(data: ClassificationDataModule, batches: Iterable[Any]) -> list[Any]:
    """Do what a trainer has done to batches of a loader before a task gets them."""
    return [data.on_after_batch_transfer(dict(batch), 0) for batch in batches]


def transformed(folder: Path, split: str, rows: Iterable[int]) -> torch.Tensor:
    """Read rows of a parquet file and transform them for evaluation, by the shortest way."""
    table = datasets.load_dataset(str(folder), split=split).cast_column("image", datasets.Image(decode=False))
    return torch.stack([SMALL(decode_image(table[row]["image"]["bytes"])) for row in rows])


@pytest.mark.parametrize("rows", [10, 25, 104])
@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_the_validation_cut_is_disjoint_complete_and_of_the_promised_size(
    rows: int, fraction: float, make_parquet: MakeFiles
) -> None:
    data = make_data(make_parquet({"train": rows}), val_fraction=fraction, augmentation=None, batch_size=1)
    train, val = sorted(indices(data.train_dataloader())), indices(data.val_dataloader())
    assert sorted(train + val) == list(range(rows))
    assert len(val) == round(rows * fraction)
    assert val == sorted(val)


def test_the_validation_cut_depends_on_its_seed_alone(make_parquet: MakeFiles) -> None:
    folder = make_parquet({"train": 100})
    cuts = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        np.random.seed(noise)  # noqa: NPY002
        cuts.append(indices(make_data(folder, val_seed=seed).val_dataloader()))
    assert cuts[0] == cuts[1] != cuts[2]
    assert cuts[0] != list(range(10))
    assert cuts[0] == indices(make_data(folder, "validate").val_dataloader())
    assert cuts[0] == [2, 16, 26, 54, 55, 73, 75, 86, 93, 95]  # the same with every version


def test_a_small_split_leaves_one_image_to_validate_on(make_parquet: MakeFiles) -> None:
    data = make_data(make_parquet({"train": 4}), batch_size=3)
    assert len(indices(data.val_dataloader())) == 1
    assert len(indices(data.train_dataloader())) == 3


@pytest.mark.parametrize("name", ["validation", "val", "valid"])
def test_a_validation_split_is_used_where_there_is_one(name: str, make_parquet: MakeFiles) -> None:
    data = make_data(make_parquet({"train": 12, name: [2, 1, 0, 2, 1]}))
    assert labels(data.val_dataloader()) == [2, 1, 0, 2, 1]
    assert sorted(indices(data.train_dataloader())) == list(range(12))


def test_the_test_split_is_read_in_order_with_its_labels(make_parquet: MakeFiles) -> None:
    expected = [2, 1, 0, 2, 1, 0, 0]
    data = make_data(make_parquet({"train": 4, "test": expected}), "test", batch_size=3)
    assert [len(batch["label"]) for batch in data.test_dataloader()] == [3, 3, 1]
    assert labels(data.test_dataloader()) == expected
    assert indices(data.test_dataloader()) == list(range(7))


def test_other_splits_may_be_chosen(make_parquet: MakeFiles) -> None:
    folder = make_parquet({"test": [0] * 4, "train": [1] * 3, "validation": [2] * 2})
    data = make_data(folder, train_split="test", val_split="train", test_split="validation")
    data.setup("test")
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    assert [labels(loader) for loader in loaders] == [[0] * 4, [1] * 3, [2] * 2]
    with pytest.raises(ValueError, match="no split 'd'"):
        make_data(folder, train_split="d")


def test_an_evaluation_batch_is_what_preprocessing_makes_of_the_rows(make_parquet: MakeFiles) -> None:
    folder = make_parquet({"train": 4, "test": 5})
    data = make_data(folder, "test")
    loaded = list(data.test_dataloader())
    assert {batch["image"].dtype for batch in loaded} == {torch.uint8}
    batches = finished(data, loaded)
    assert [set(batch) for batch in batches] == [{"image", "label", "index", "path"}] * 2
    assert [tuple(batch["image"].shape) for batch in batches] == [(4, 3, 8, 8), (1, 3, 8, 8)]
    assert {batch["image"].dtype for batch in batches} == {torch.float32}
    assert {batch["label"].dtype for batch in batches} == {torch.int64}
    assert [path for batch in batches for path in batch["path"]] == [""] * 5
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), transformed(folder, "test", range(5)))


def test_validation_images_of_the_cut_belong_to_their_index_and_label(make_parquet: MakeFiles) -> None:
    folder = make_parquet({"train": 20})
    data = make_data(folder, val_fraction=0.2)
    (batch,) = finished(data, data.val_dataloader())
    assert batch["label"].tolist() == [index % 3 for index in batch["index"].tolist()]
    assert torch.equal(batch["image"], transformed(folder, "train", batch["index"].tolist()))


def test_without_augmentation_training_sees_the_evaluation_transform(make_parquet: MakeFiles) -> None:
    folder = make_parquet({"train": 10})
    data = make_data(folder, augmentation=None)
    for batch in finished(data, data.train_dataloader()):
        assert torch.equal(batch["image"], transformed(folder, "train", batch["index"].tolist()))


def test_augmentation_varies_training_images_only(make_parquet: MakeFiles) -> None:
    data = make_data(make_parquet({"train": 8, "val": 8}), batch_size=8)
    assert torch.equal(next(iter(data.val_dataloader()))["image"], next(iter(data.val_dataloader()))["image"])
    loader = data.train_dataloader()
    first = next(iter(loader))
    loader.sampler.set_epoch(1)
    second = next(iter(loader))
    first, second = (batch["image"][batch["index"].argsort()] for batch in (first, second))
    assert first.shape == second.shape == (8, 3, 8, 8)
    assert not torch.equal(first, second)


def test_training_is_shuffled_and_leaves_out_the_last_incomplete_batch(make_parquet: MakeFiles) -> None:
    data = make_data(make_parquet({"train": 22, "val": 2}))
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        epochs.append(indices(loader))
    assert [len(epoch) for epoch in epochs] == [20, 20]
    assert len(set(epochs[0])) == 20
    assert epochs[0] != sorted(epochs[0])
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(("batch_size", "processes", "remedy"), [(9, 1, 8), (5, 2, 4)])
def test_too_few_training_images_are_refused(
    batch_size: int, processes: int, remedy: int, make_parquet: MakeFiles
) -> None:
    data = make_data(make_parquet({"train": 8, "val": 1}), batch_size=batch_size)
    data.trainer = make_trainer(processes)
    message = rf"8 training images .* {batch_size} on {processes} process.*--data.batch_size to {remedy} or less"
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


def test_mixing_makes_soft_labels_in_training_only(make_parquet: MakeFiles) -> None:
    data = make_data(make_parquet({"train": 8, "val": 8, "test": 8}), augmentation=MIXED)
    data.setup("test")
    data.trainer = make_trainer()
    batch = next(iter(data.train_dataloader()))
    hard = batch["label"].clone()
    image = batch["image"].clone()
    mixed = data.on_after_batch_transfer(batch, 0)
    assert mixed["label"].shape == (4, 3)
    assert torch.allclose(mixed["label"].sum(1), torch.ones(4))
    assert (mixed["label"][range(4), hard] > 0.0).all()
    assert not torch.equal(mixed["image"], image)
    data.trainer.training = False
    for loader in (data.val_dataloader(), data.test_dataloader()):
        batch = next(iter(loader))
        assert data.on_after_batch_transfer(batch, 0)["label"].shape == (4,)


@pytest.mark.parametrize("augmentation", [None, PLAIN])
def test_without_mixing_labels_stay_hard(augmentation: Augmentation | None, make_parquet: MakeFiles) -> None:
    data = make_data(make_parquet({"train": 8}), augmentation=augmentation)
    data.trainer = make_trainer()
    batch = next(iter(data.train_dataloader()))
    assert data.on_after_batch_transfer(dict(batch), 0)["label"] is batch["label"]


def test_prediction_needs_no_labels(make_parquet: MakeFiles) -> None:
    folder = make_parquet({"train": 4, "test": [-1, -1, -1]})
    data = make_data(folder, "predict")
    (batch,) = finished(data, data.predict_dataloader())
    assert set(batch) == {"image", "index", "path"}
    assert torch.equal(batch["image"], transformed(folder, "test", range(3)))
    with pytest.raises(ValueError, match="split 'test' has no labels"):
        make_data(folder, "test")


def test_images_of_folders_know_their_paths(make_folders: MakeFiles) -> None:
    folder = make_folders("train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "test/dog/4.png")
    data = make_data(folder, "test")
    (batch,) = finished(data, data.test_dataloader())
    assert data.class_names == ["cat", "dog"]
    assert batch["path"] == [str(folder / "test/cat/3.png"), str(folder / "test/dog/4.png")]
    assert batch["label"].tolist() == [0, 1]
    assert torch.equal(batch["image"], torch.stack([SMALL(decode_image(path)) for path in batch["path"]]))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def make_odd(folder: Path, contents: list[bytes | None]) -> Path:
    rows = {
        "image": [content and {"bytes": content, "path": None} for content in contents],
        "label": [0] * len(contents),
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
    return folder


@pytest.mark.parametrize("augmentation", [None, MIXED])
def test_images_of_all_kinds_make_a_batch(augmentation: Augmentation | None, tmp_path: Path) -> None:
    modes = ["L", "RGB", "RGBA", "LA", "P", "1"]
    sizes = [(1, 1), (3, 90), (90, 3), (9, 9), (20, 7), (8, 8)]
    images = [encoded(Image.new(mode, size)) for mode, size in zip(modes, sizes, strict=True)]
    images += [encoded(Image.new("CMYK", (9, 9)), "JPEG"), encoded(Image.new("I;16", (9, 9)))]
    data = make_data(make_odd(tmp_path, images), val_split="test", batch_size=8, augmentation=augmentation)
    (batch,) = finished(data, data.train_dataloader())
    assert batch["image"].shape == (8, 3, 8, 8)
    assert batch["image"].isfinite().all()


@pytest.mark.parametrize("content", [b"no image", b"", None])
def test_an_unreadable_image_names_split_and_row(content: bytes | None, tmp_path: Path) -> None:
    good = encoded(Image.new("RGB", (8, 8)))
    data = make_data(make_odd(tmp_path, [good, good, content, good]), "test")
    with pytest.raises(UnreadableImageError, match="cannot read row 2 of split 'test'"):
        list(data.test_dataloader())


def test_an_unreadable_image_names_its_row_also_in_a_part_of_a_split(tmp_path: Path) -> None:
    rows = datasets.load_dataset(str(make_odd(tmp_path, [b"no image"] * 4)), split="train")
    with pytest.raises(UnreadableImageError, match="row 2 of split 'train'"):
        DatasetImages(rows, "image", "train", SMALL, indices=[3, 2])[1]


def test_an_unreadable_image_of_a_folder_is_named_by_its_file(make_folders: MakeFiles) -> None:
    folder = make_folders("train/cat/1.png", "train/dog/2.png")
    (folder / "train" / "dog" / "2.png").write_bytes(b"no image")
    data = make_data(folder, test_split="train", stage="test")
    with pytest.raises(UnreadableImageError, match=r"dog/2\.png"):
        list(data.test_dataloader())


def test_image_files_are_samples_without_labels(make_folders: MakeFiles) -> None:
    folder = make_folders("1.png", "2.png")
    files = ImageFiles([folder / "2.png", folder / "1.png"], SMALL)
    assert len(files) == 2
    assert [(files[row]["index"], files[row]["path"]) for row in (0, 1)] == [
        (0, str(folder / "2.png")),
        (1, str(folder / "1.png")),
    ]
    assert torch.equal(files[0]["image"], SMALL(decode_image(folder / "2.png")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size ≥ 1 and num_workers ≥ 0, got 0 and 0"),
        ({"num_workers": -1}, "num_workers ≥ 0, got 4 and -1"),
        ({"repeats": 0}, "repeats must be at least 1, .* got 0"),
        ({"val_fraction": 0.0}, "val_fraction must be between 0 and 1, got 0.0"),
        ({"val_fraction": 1.0}, "val_fraction must be between 0 and 1, got 1.0"),
    ],
)
def test_a_number_out_of_range_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_data("fashion_mnist_sample", **arguments)


def test_the_shipped_sample_is_cut_into_nine_and_one_thousand() -> None:
    data = make_data("fashion_mnist_sample", batch_size=100)
    assert (len(data.images["train"]), len(data.images["val"])) == (9_000, 1_000)
    assert len(data.class_names) == 10
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape == (100, 3, 8, 8)
    assert len(batch["label"].unique()) == 10


@pytest.mark.parametrize("samples", [0, 1, 2, 5, 6, 7, 40])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_the_evaluation_sampler_gives_each_sample_exactly_once(samples: int, processes: int) -> None:
    samplers = [EvaluationSampler(range(samples), processes, rank) for rank in range(processes)]
    assert {len(list(sampler)) for sampler in samplers} == {len(samplers[0])} == {math.ceil(samples / processes)}
    assert sorted(index for sampler in samplers for index in sampler if index >= 0) == list(range(samples))
    assert all(index == -1 for sampler in samplers for index in sampler if index < 0)
    assert isinstance(samplers[0], DistributedSampler)  # else Lightning would put a padding one in its place


def test_a_filler_is_the_first_sample_by_another_number(make_parquet: MakeFiles) -> None:
    data = make_data(make_parquet({"train": 20}), batch_size=1)
    data.setup("validate")
    images = data.images["val"]
    first, filler = images[0], images[-1]
    assert first["index"] >= 0
    assert filler["index"] == -1
    assert torch.equal(filler["image"], first["image"])
    assert (filler["label"], filler["path"]) == (first["label"], first["path"])


def test_the_order_over_processes_follows_the_seed(make_parquet: MakeFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data(make_parquet({"train": 20, "val": 7}), batch_size=1)
    orders = []
    for seed in ("0", "0", "7"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        data.trainer = make_trainer(2)
        orders.append(list(data.train_dataloader().sampler))
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_a_global_batch_is_the_same_however_it_is_shared_out(repeats: int) -> None:
    whole = TrainingSampler(50, batch_size=12, seed=3, repeats=repeats)
    batches = [list(whole)[start : start + 12] for start in (0, 12, 24, 36)]
    for processes in (2, 3, 6):
        samplers = [TrainingSampler(50, 12 // processes, processes, rank, 3, repeats) for rank in range(processes)]
        assert all(isinstance(sampler, DistributedSampler) for sampler in samplers)
        size = 12 // processes
        for number, batch in enumerate(batches):
            parts = [list(sampler)[number * size : (number + 1) * size] for sampler in samplers]
            assert sorted(draw for part in parts for draw in part) == sorted(batch)


def test_an_epoch_is_a_shuffle_of_its_own_and_follows_seed_and_epoch_alone() -> None:
    orders = {}
    for seed in (0, 1):
        for epoch in (0, 1, 5):
            torch.manual_seed(epoch)
            sampler = TrainingSampler(40, batch_size=40, seed=seed)
            sampler.set_epoch(epoch)
            draws = list(sampler)
            assert sorted(draw.position for draw in draws) == list(range(40))
            assert {(draw.epoch, draw.repeat) for draw in draws} == {(epoch, 0)}
            orders[seed, epoch] = tuple(draw.position for draw in draws)
            assert draws == list(sampler)
    assert len(set(orders.values())) == 6


def test_an_epoch_begins_in_its_middle_where_a_run_was_interrupted() -> None:
    sampler, resumed = TrainingSampler(43, 5, 2, 1, seed=4), TrainingSampler(43, 5, 2, 1, seed=4, epoch=3, batch=2)
    sampler.set_epoch(3)
    assert len(resumed) == len(sampler) == 20
    assert list(resumed) == list(sampler)[10:]
    for each in (sampler, resumed):
        each.set_epoch(4)
    assert list(resumed) == list(sampler)


def test_repeats_draw_each_of_fewer_images_that_often() -> None:
    draws = list(TrainingSampler(30, batch_size=6, repeats=3))
    assert len(draws) == 30
    assert {draw.repeat for draw in draws} == {0, 1, 2}
    positions = [draw.position for draw in draws]
    assert all(positions.count(position) == 3 for position in set(positions))
    assert len(set(draws)) == 30


def test_augmentation_is_a_function_of_seed_epoch_image_and_repeat(make_parquet: MakeFiles) -> None:
    images = make_data(make_parquet({"train": 6, "val": 1}), augmentation=Augmentation(scale=(0.1, 0.9))).images[
        "train"
    ]
    draw = Draw(epoch=2, position=3, repeat=0)
    expected = images[draw]["image"]
    images[Draw(0, 1, 0)], torch.rand(1), np.random.rand()  # noqa: NPY002
    assert torch.equal(images[draw]["image"], expected)
    others = [draw._replace(epoch=1), draw._replace(repeat=1), draw._replace(position=2)]
    assert not any(torch.equal(images[other]["image"], expected) for other in others)
    images.seed = 1
    assert not torch.equal(images[draw]["image"], expected)


def test_a_draw_leaves_the_global_random_numbers_alone(make_parquet: MakeFiles) -> None:
    images = make_data(make_parquet({"train": 2, "val": 1})).images["train"]
    numbers = []
    for drawn in (False, True):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
        if drawn:
            images[Draw(0, 1, 0)]
        numbers.append((random.random(), np.random.rand(), torch.rand(1).item()))  # noqa: NPY002
    assert numbers[0] == numbers[1]


def test_batches_are_the_same_with_any_number_of_workers(make_parquet: MakeFiles) -> None:
    folder = make_parquet({"train": 23, "val": 1})
    drawn = []
    for workers in (0, 1, 2):
        data = make_data(folder, num_workers=workers, augmentation=Augmentation())
        drawn.append(torch.stack([batch["image"] for batch in finished(data, data.train_dataloader())]))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_a_trainer_gives_normalized_images_in_its_precision(make_parquet: MakeFiles, tmp_path: Path) -> None:
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

    augmentation = Augmentation(auto_augment=None, random_erasing=1.0)
    data = ClassificationDataModule(
        str(folder), batch_size=4, num_workers=0, preprocessing=SMALL, augmentation=augmentation
    )
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


def test_what_is_erased_is_a_function_of_seed_epoch_image_and_repeat(make_parquet: MakeFiles) -> None:
    erased = Augmentation(auto_augment=None, random_erasing=1.0, mixup=0.0, cutmix=0.0)
    data = make_data(make_parquet({"train": 6, "val": 1}), augmentation=erased)
    draws = [Draw(epoch=1, position=position, repeat=0) for position in (3, 0, 5)]

    def batch(draws: list[Draw]) -> torch.Tensor:
        images = collate(data.images["train"].__getitems__(draws))
        return data.on_after_batch_transfer(images, 0)["image"]

    expected = batch(draws)
    torch.rand(1)
    assert torch.equal(batch(draws[::-1]), expected.flip(0))  # neither of the batch nor of its order
    again = batch([draw._replace(repeat=1) for draw in draws])
    assert not any(torch.equal(*pair) for pair in zip(again, expected, strict=True))


def test_patches_stay_on_the_host(make_parquet: MakeFiles) -> None:
    data = make_data(make_parquet({"train": 6, "val": 1}), augmentation=Augmentation(random_erasing=1.0))
    batch = next(iter(data.train_dataloader()))
    moved = data.transfer_batch_to_device(dict(batch), torch.device("meta"), 0)
    assert moved["image"].device.type == "meta"
    assert moved["patch"] is batch["patch"]


def test_loader_processes_of_training_alone_outlast_an_epoch(make_parquet: MakeFiles) -> None:
    data = make_data(make_parquet({"train": 8, "val": 4}), num_workers=1)
    assert data.train_dataloader().persistent_workers
    assert not data.val_dataloader().persistent_workers


def test_a_mixture_is_a_function_of_seed_epoch_batch_and_process(
    make_parquet: MakeFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    data = make_data(make_parquet({"train": 8, "val": 8}), augmentation=MIXED)
    images, classes = torch.rand(8, 3, 8, 8), torch.arange(8) % 3

    def mix(**arguments: int) -> torch.Tensor:
        data.trainer = make_trainer(**arguments)
        return data.on_after_batch_transfer({"image": images.clone(), "label": classes}, 0)["image"]

    expected = mix(epoch=1, batch=2)
    np.random.rand()  # noqa: NPY002
    assert torch.equal(mix(epoch=1, batch=2), expected)
    for other in ({"epoch": 0, "batch": 2}, {"epoch": 1, "batch": 3}, {"epoch": 1, "batch": 2, "rank": 1}):
        assert not torch.equal(mix(**other), expected)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert not torch.equal(mix(epoch=1, batch=2), expected)


@pytest.mark.parametrize(
    ("ready", "processed", "batches", "expected"),
    [
        (0, 0, 0, (0, 0)),  # before the first epoch
        (1, 0, 0, (0, 0)),
        (3, 2, 7, (2, 7)),  # within the third
        (3, 2, 1000, (3, 0)),  # its last batch is done, and it is validated on
        (3, 3, 1000, (3, 0)),  # at its end
    ],
)
def test_a_checkpoint_holds_the_batch_that_comes_next(
    ready: int, processed: int, batches: int, expected: tuple[int, int]
) -> None:
    data = ClassificationDataModule("fashion_mnist_sample")
    data.trainer = make_trainer(batch=batches)
    data.trainer.fit_loop.epoch_progress.current = SimpleNamespace(ready=ready, processed=processed)
    assert data.state_dict() == dict(zip(("epoch", "batch"), expected, strict=True))


def test_the_loader_begins_where_a_checkpoint_says(make_parquet: MakeFiles) -> None:
    data = make_data(make_parquet({"train": 23, "val": 1}))
    loader = data.train_dataloader()
    loader.sampler.set_epoch(2)
    expected = indices(loader)
    data.load_state_dict({"epoch": 2, "batch": 3})
    assert indices(data.train_dataloader()) == expected[3 * 4 :]
    data.trainer = make_trainer(epoch=2)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(2)
    assert indices(loader) == expected  # a later fit begins anew


def test_rows_name_no_files_outside_their_folder(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    for name in ("inside/a.png", "outside.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    names = [str(tmp_path / "inside/a.png"), str(tmp_path / "inside/../outside.png")]
    rows = datasets.Dataset.from_dict({"image": names}, features=datasets.Features({"image": datasets.Image()}))
    images = DatasetImages(rows, "image", "train", Preprocessing(4, 1.0), root=tmp_path / "inside")
    assert images[0]["image"].shape == (3, 4, 4)
    with pytest.raises(UnreadableImageError, match=r"row 1 of split 'train' names .* outside the data set"):
        images[1]
    with pytest.raises(UnreadableImageError, match="outside the data set"):
        DatasetImages(rows, "image", "train", Preprocessing(4, 1.0))[0]


def test_the_time_to_wait_for_a_loader_process_is_limited(make_parquet: MakeFiles) -> None:
    folder = make_parquet({"train": 8, "val": 4})
    data = make_data(folder, num_workers=1, worker_timeout=7.0)
    assert [loader.timeout for loader in (data.train_dataloader(), data.val_dataloader())] == [7.0, 7.0]
    assert make_data(folder, num_workers=0).train_dataloader().timeout == 0
    assert make_data(folder, num_workers=1).train_dataloader().timeout == 600
    with pytest.raises(ValueError, match="at least 0 seconds, got -1"):
        make_data(folder, worker_timeout=-1.0)


def damaged(make_folders: MakeFiles, wrong: Iterable[int]) -> Path:
    """Make six images of cats, row 0 to 5, some of them damaged, and one of a dog."""
    folder = make_folders(*(f"cat/{index}.png" for index in range(6)), "dog/9.png")
    for index in wrong:
        (folder / f"cat/{index}.png").write_bytes(b"no image")
    return folder


def images_of(folder: Path, wrong_allowed: int, replace: bool) -> DatasetImages:
    data = make_data(folder, "fit", max_unreadable=wrong_allowed, val_fraction=0.2, batch_size=1)
    rows = data.images["train"]
    images = DatasetImages(
        datasets.Dataset.from_dict({"image": [str(path) for path in sorted(folder.glob("*/*.png"))]}).cast_column(
            "image", datasets.Image()
        ),
        "image",
        "train",
        SMALL,
        [0] * 6 + [1],
        None,
        folder,
        max_unreadable=wrong_allowed,
        replace=replace,
    )
    assert (rows.max_unreadable, rows.replace) == (wrong_allowed, True)
    assert (data.images["val"].max_unreadable, data.images["val"].replace) == (wrong_allowed, False)
    return images


def test_the_next_readable_image_takes_the_place_in_training(make_folders: MakeFiles) -> None:
    images = images_of(damaged(make_folders, [2, 3, 5]), 3, replace=True)
    samples = [images[position] for position in range(7)]
    assert [sample["index"] for sample in samples] == [0, 1, 4, 4, 4, 6, 6]
    assert [sample["label"] for sample in samples] == [0, 0, 0, 0, 0, 1, 1]
    assert [len(sample["unreadable"].splitlines()) for sample in samples] == [0, 0, 2, 1, 0, 1, 0]
    assert [name in samples[2]["unreadable"] for name in ("cat/2.png", "cat/3.png", "cat/5.png")] == [True, True, False]
    assert torch.equal(samples[2]["image"], samples[4]["image"])
    images.max_unreadable = 1  # and there are two in a row
    with pytest.raises(UnreadableImageError, match=r"cat/2\.png"):
        images[2]


def test_an_unreadable_image_is_not_counted_in_evaluation(make_folders: MakeFiles) -> None:
    images = images_of(damaged(make_folders, [2]), 1, replace=False)
    sample = images[2]
    assert (sample["index"], sample["label"], sample["path"]) == (-1, 0, "")
    assert torch.equal(sample["image"], torch.zeros(3, 8, 8, dtype=torch.uint8))
    assert "cat/2.png" in sample["unreadable"]
    assert [images[position]["index"] for position in (1, 3)] == [1, 3]


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_counted_once_and_stop_past_their_limit(
    workers: int, make_folders: MakeFiles, caplog: pytest.LogCaptureFixture
) -> None:
    data = make_data(damaged(make_folders, []), max_unreadable=2, num_workers=workers, batch_size=3)
    data.images["train"] = images_of(damaged_again(data), 2, replace=True)
    for _ in range(2):
        for batch in data.train_dataloader():
            assert "unreadable" not in data.on_before_batch_transfer(batch, 0)
    assert sorted(line.split(".png")[0][-5:] for line in data.unreadable) == ["cat/1", "cat/4"]
    assert sum("unreadable image" in record.message for record in caplog.records) == 2
    with pytest.raises(UnreadableImageError, match=r"3 images cannot be read and max_unreadable=2.*row 7"):
        data.on_before_batch_transfer({"unreadable": ["", "cannot read row 7"]}, 0)


def damaged_again(data: ClassificationDataModule) -> Path:
    """Damage two images after they were found."""
    folder = Path(data.dataset)
    for index in (1, 4):
        (folder / f"cat/{index}.png").write_bytes(b"no image")
    return folder


def test_predict_reads_every_image_or_stops(make_folders: MakeFiles) -> None:
    data = make_data(damaged(make_folders, [2]), "predict", max_unreadable=5, test_split="train")
    with pytest.raises(UnreadableImageError, match=r"cat/2\.png"):
        list(data.predict_dataloader())


def test_the_datamodule_erases_the_patches_of_a_batch_after_normalizing_it() -> None:
    preprocessing = Preprocessing(input_size=8)
    datamodule = ClassificationDataModule("fashion_mnist_sample", preprocessing=preprocessing)
    pixels = torch.full((2, 3, 8, 8), 90, dtype=torch.uint8)
    batch = datamodule.on_after_batch_transfer(
        {"image": pixels.clone(), "patch": torch.tensor([[1, 2, 3, 4, 7], [0] * 5])}, 0
    )
    erased = torch.zeros(2, 8, 8, dtype=torch.bool)
    erased[0, 1:4, 2:6] = True
    assert torch.equal((batch["image"] != preprocessing.normalize(pixels)).all(1), erased)
    assert set(batch) == {"image"}


def test_what_is_erased_is_mixed_too(make_parquet: MakeFiles) -> None:
    augmentation = Augmentation(auto_augment=None, random_erasing=1.0, mixup=0.8, cutmix=0.0)
    data = make_data(make_parquet({"train": 4, "val": 1}), augmentation=augmentation)
    data.trainer = make_trainer()
    pixels, patches = torch.full((2, 3, 8, 8), 90, dtype=torch.uint8), torch.tensor([[1, 2, 3, 4, 7], [5, 0, 2, 8, 9]])
    erased = SMALL.normalize(pixels)
    erase(erased, patches)
    batch = data.on_after_batch_transfer({"image": pixels, "label": torch.tensor([0, 1]), "patch": patches}, 0)
    for own, other in ((0, 1), (1, 0)):
        share = batch["label"][own, own].item()
        assert 0.0 < share < 1.0
        expected = share * erased[own] + (1.0 - share) * erased[other]
        assert torch.allclose(batch["image"][own], expected, atol=1e-6)


def test_a_batch_has_each_sample_as_it_lies_in_memory() -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    samples = [
        {
            "image": torch.from_numpy(image).permute(2, 0, 1),
            "label": 2 - number,
            "index": number,
            "path": f"{number}.png",
        }
        for number, image in enumerate(pixels)
    ]
    batch = collate(samples)
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(batch["image"].numpy(), pixels.transpose(0, 3, 1, 2))
    assert (batch["label"].tolist(), batch["index"].tolist()) == ([2, 1, 0], [0, 1, 2])
    assert batch["path"] == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize("gpu", [False, True])
def test_loaders_pin_memory_for_a_gpu_and_outlive_a_signal(
    gpu: bool, make_parquet: MakeFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(make_parquet({"train": 8, "val": 4}), num_workers=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert loader.pin_memory is gpu
        assert loader.worker_init_fn is spare_worker


def test_rows_that_were_shuffled_and_chosen_are_read_in_their_order(make_parquet: MakeFiles) -> None:
    rows = datasets.load_dataset(str(make_parquet({"train": 12})), split="train").shuffle(seed=0).select([5, 2, 7])
    images = DatasetImages(rows, "image", "train", SMALL)
    for position, row in enumerate(rows):
        assert torch.equal(images[position]["image"], SMALL(row["image"]))


def test_augmentation_follows_the_row_and_not_its_place(make_parquet: MakeFiles) -> None:
    images = make_data(make_parquet({"train": 6, "val": 1})).images["train"]
    turned = copy.copy(images)
    turned.indices = images.indices[::-1]
    for position in range(6):
        one, other = images[Draw(1, position, 0)], turned[Draw(1, 5 - position, 0)]
        assert torch.equal(one["image"], other["image"])
