import io
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
from datamodules import PLAIN, SMALL, encoded, finished, indices, make_data, make_trainer, transformed
from fake_imagenet import FakeImage, make_images, put_on_hub, write_folders, write_parquet
from hub_server import HubServer
from PIL import Image, ImageOps

from scalablevit_pl.data import Augmentation, ClassificationDataModule, Preprocessing
from scalablevit_pl.data.imagenet import imagenet_names, imagenet_synsets
from scalablevit_pl.data.images import collate
from scalablevit_pl.data.samplers import Draw
from scalablevit_pl.data.transforms import erase
from scalablevit_pl.preprocessing import UnreadableImageError, decode_image

MakeFiles = Callable[..., Path]
MIXED = Augmentation(auto_augment=None, random_erasing=0.0, mixup=0.8, cutmix=1.0)
ERASED = Augmentation(auto_augment=None, random_erasing=1.0, mixup=0.0, cutmix=0.0)


# Labels and classes


def test_validation_images_keep_their_index_and_label(make_parquet: MakeFiles) -> None:
    folder = make_parquet({"train": 20})
    data = make_data(folder, val_fraction=0.2)
    (batch,) = finished(data, data.val_dataloader())
    assert batch["label"].dtype == torch.int64
    assert batch["label"].tolist() == [index % 3 for index in batch["index"].tolist()]
    assert torch.equal(batch["image"], transformed(folder, "train", batch["index"].tolist()))
    assert data.labels["train"].tolist() == [row % 3 for row in range(20)]


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_classes_without_a_declaration_come_from_the_training_split(stage: str, tmp_path: Path) -> None:
    image = encoded(Image.new("RGB", (9, 9)))
    for split, names in (("train", ["owl", "cat", "dog", "cat"]), ("test", ["dog", "cat"])):
        rows = {"image": [image] * len(names), "label": names}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"{split}.parquet"))
    data = make_data(tmp_path, stage, val_split="train", batch_size=4)
    assert data.class_names == ["cat", "dog", "owl"]
    loader = data.val_dataloader() if stage == "fit" else data.test_dataloader()
    expected = [2, 0, 1, 0] if stage == "fit" else [1, 0]
    assert [label for batch in loader for label in batch["label"].tolist()] == expected


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("struct", "labels", "names"),
    [(True, [0, 1, 1, 0], ["0", "1"]), (False, pandas.Categorical(list("abba")), ["a", "b"])],
    ids=["structs and numbers", "bytes and categories"],
)
def test_parquet_files_of_pandas_are_read(
    struct: bool, labels: Any, names: list[str], streaming: bool, tmp_path: Path
) -> None:
    images = [encoded(Image.new("RGB", (9, 9), (shade, shade, shade))) for shade in (0, 85, 170, 255)]
    rows = [{"bytes": content, "path": None} for content in images] if struct else images
    for split in ("train", "validation"):
        pandas.DataFrame({"image": rows, "label": labels}).to_parquet(tmp_path / f"{split}.parquet")
    data = make_data(tmp_path, streaming=streaming, batch_size=4, augmentation=None)
    assert data.class_names == names
    for loader in (data.train_dataloader(), data.val_dataloader()):
        (batch,) = loader
        found = zip(batch["image"][:, 0, 0, 0].tolist(), batch["label"].tolist(), strict=True)
        assert sorted(found) == [(0, 0), (85, 1), (170, 1), (255, 0)]


def test_a_balanced_sampler_draws_each_class_equally_often(make_parquet: MakeFiles) -> None:
    labels = [0] * 16 + [1] * 8 + [2] * 4
    data = make_data(make_parquet({"train": labels}), val_fraction=0.25, sampler="balanced", batch_size=21)
    (sampler, images) = data.train_dataloader().sampler, data.images["train"]
    kept = [labels[index] for index in images.indices]
    assert [kept.count(label) for label in range(3)] == [12, 6, 3]
    assert sampler.weights.tolist() == [1 / kept.count(label) for label in kept]
    drawn = []
    for epoch in range(40):
        sampler.set_epoch(epoch)
        drawn += [kept[draw.position] for draw in sampler]
    assert [drawn.count(label) / len(drawn) for label in range(3)] == pytest.approx([1 / 3] * 3, abs=0.05)
    (batch,) = data.train_dataloader()
    assert batch["label"].tolist() == [labels[index] for index in batch["index"].tolist()]


def write_tags(folder: Path, rows: int = 12) -> Path:
    """Write images with lists of two of four classes, one of which has no images."""
    names = datasets.ClassLabel(names=["fog", "owl", "sea", "sun"])
    features = datasets.Features({"image": datasets.Image(), "tags": datasets.List(names)})
    images = [Image.new("RGB", (9, 9), (20 * row, 0, 0)) for row in range(rows)]
    table = datasets.Dataset.from_dict({"image": images, "tags": [[[], [3], [2, 0]][row % 3] for row in range(rows)]})
    for split in ("train", "test"):
        table.cast(features).to_parquet(folder / f"{split}.parquet")
    return folder


def test_lists_of_labels_become_zeros_and_ones(tmp_path: Path) -> None:
    data = make_data(write_tags(tmp_path), val_split="test")
    assert data.class_names == ["fog", "owl", "sea", "sun"]
    (first, *_) = data.val_dataloader()
    assert first["label"].tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert first["label"].dtype == torch.float32
    assert data.example_batch(4, multi_label=True)["label"].sum(1).tolist() == [1.0] * 4


def test_lists_of_labels_are_streamed_and_mixed(tmp_path: Path) -> None:
    mixing = Augmentation(auto_augment=None, random_erasing=0.0, cutmix=0.0)
    options = {"val_split": "test", "streaming": True, "augmentation": mixing, "trainer": make_trainer()}
    data = make_data(write_tags(tmp_path), **options)
    batch = next(iter(data.train_dataloader()))
    labels = batch["label"].clone()
    mixed = data.on_after_batch_transfer(batch, 0)["label"]
    share = (mixed - labels.flip(0)).norm() / (labels - labels.flip(0)).norm()
    torch.testing.assert_close(mixed, share * labels + (1 - share) * labels.flip(0))


def test_lists_of_labels_cannot_be_balanced(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="balanced only with one label for each image"):
        make_data(write_tags(tmp_path), sampler="balanced").train_dataloader()


def test_a_balanced_sampler_of_a_stream_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sampler='balanced' needs all labels, .*: set --data.streaming false"):
        ClassificationDataModule("photos", sampler="balanced", streaming=True)


def test_a_table_labels_the_images_of_a_folder(make_folders: MakeFiles, tmp_path: Path) -> None:
    folder = make_folders("1.jpg", "2.jpg", "3.jpg", "4.jpg")
    (tmp_path / "mine.csv").write_text("file_name,label\n3.jpg,cat\n1.jpg,dog\n2.jpg,cat\n")
    data = make_data(folder, "predict", labels=str(tmp_path / "mine.csv"), test_split="train")
    assert (data.class_names, data.left_out) == (["cat", "dog"], "1 unlabelled image")
    (batch,) = data.predict_dataloader()
    assert [Path(path).name for path in batch["path"]] == ["3.jpg", "1.jpg", "2.jpg"]


def test_a_table_for_data_with_labels_is_rejected(make_parquet: MakeFiles, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"parquet' has labels of its own: remove --data\.labels"):
        make_data(make_parquet({"train": 4}), labels=str(tmp_path / "mine.csv"))


def test_files_that_are_left_out_are_logged_once(make_folders: MakeFiles, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_folders("train/cat/1.jpg", "val/cat/2.jpg")
    (folder / "val/cat/3.heic").write_text("no image")
    data = make_data(folder, batch_size=1)
    data.setup("fit")
    assert [message for message in caplog.messages if "left out" in message] == [f"left out of {folder}: 1 .heic"]


def test_prediction_needs_no_labels(make_parquet: MakeFiles) -> None:
    folder = make_parquet({"train": 4, "test": [-1, -1, -1]})
    data = make_data(folder, "predict")
    (batch,) = finished(data, data.predict_dataloader())
    assert set(batch) == {"image", "index", "path"}
    assert torch.equal(batch["image"], transformed(folder, "test", range(3)))
    with pytest.raises(ValueError, match=r"split 'test' has no labels \(all 3 are -1.*test_split"):
        make_data(folder, "test")


def test_images_of_folders_have_paths(make_folders: MakeFiles) -> None:
    folder = make_folders("train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "test/dog/4.png")
    data = make_data(folder, "test")
    (batch,) = finished(data, data.test_dataloader())
    assert data.class_names == ["cat", "dog"]
    assert batch["path"] == [str(folder / "test/cat/3.png"), str(folder / "test/dog/4.png")]
    assert batch["label"].tolist() == [0, 1]
    assert torch.equal(batch["image"], torch.stack([SMALL(decode_image(path)) for path in batch["path"]]))


def test_an_unreadable_image_of_a_folder_is_named_by_its_file(make_folders: MakeFiles) -> None:
    folder = make_folders("train/cat/1.png", "train/dog/2.png")
    (folder / "train" / "dog" / "2.png").write_bytes(b"no image")
    data = make_data(folder, test_split="train", stage="test")
    with pytest.raises(UnreadableImageError, match=r"dog/2\.png"):
        list(data.test_dataloader())


def test_the_shipped_sample_is_cut_into_nine_thousand_and_one_thousand() -> None:
    data = make_data("fashion_mnist_sample", batch_size=100)
    assert (len(data.images["train"]), len(data.images["val"])) == (9_000, 1_000)
    assert len(data.class_names) == 10
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape == (100, 3, 8, 8)
    assert len(batch["label"].unique()) == 10


# Augmentation


def test_without_augmentation_training_uses_the_evaluation_transform(make_parquet: MakeFiles) -> None:
    folder = make_parquet({"train": 10})
    data = make_data(folder, augmentation=None)
    for batch in finished(data, data.train_dataloader()):
        assert torch.equal(batch["image"], transformed(folder, "train", batch["index"].tolist()))


def test_only_training_images_are_augmented(make_parquet: MakeFiles) -> None:
    data = make_data(make_parquet({"train": 8, "val": 8}), batch_size=8)
    assert torch.equal(next(iter(data.val_dataloader()))["image"], next(iter(data.val_dataloader()))["image"])
    loader = data.train_dataloader()
    first = next(iter(loader))
    loader.sampler.set_epoch(1)
    second = next(iter(loader))
    first, second = (batch["image"][batch["index"].argsort()] for batch in (first, second))
    assert first.shape == second.shape == (8, 3, 8, 8)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("augmentation", [None, MIXED])
def test_images_of_all_modes_form_a_batch(augmentation: Augmentation | None, tmp_path: Path) -> None:
    modes = ["L", "RGB", "RGBA", "LA", "P", "1"]
    sizes = [(1, 1), (3, 90), (90, 3), (9, 9), (20, 7), (8, 8)]
    contents = [encoded(Image.new(mode, size)) for mode, size in zip(modes, sizes, strict=True)]
    contents += [encoded(Image.new("CMYK", (9, 9)), "JPEG"), encoded(Image.new("I;16", (9, 9)))]
    rows = {"image": [{"bytes": content, "path": None} for content in contents], "label": [0] * 8}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"{split}.parquet"))
    data = make_data(tmp_path, val_split="test", batch_size=8, augmentation=augmentation)
    (batch,) = finished(data, data.train_dataloader())
    assert batch["image"].shape == (8, 3, 8, 8)
    assert batch["image"].isfinite().all()


@pytest.mark.parametrize("channels", [1, 4])
def test_images_have_the_channels_of_the_preprocessing(channels: int, tmp_path: Path) -> None:
    images = [Image.new(mode, (9, 7), 99) for mode in ("L", "RGB", "RGBA", "I;16")]
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for number, image in enumerate(images):
            image.save(tmp_path / label / f"{number}.png")
    preprocessing = Preprocessing(8, mean=(0.5,) * channels, std=(0.5,) * channels)
    augmentation = Augmentation(auto_augment=None, mixup=0.0, cutmix=0.0, random_erasing=1.0)
    data = make_data(tmp_path, preprocessing=preprocessing, augmentation=augmentation, val_fraction=0.5, batch_size=2)
    batches = finished(data, [*data.train_dataloader(), *data.val_dataloader(), data.example_batch(2)])
    assert {batch["image"].shape for batch in batches} == {(2, channels, 8, 8)}
    assert all(batch["image"].isfinite().all() for batch in batches)


def test_automatic_augmentation_of_four_channels_is_refused() -> None:
    preprocessing = Preprocessing(mean=(0.5,) * 4, std=(0.5,) * 4)
    with pytest.raises(
        ValueError, match=r"auto_augment needs 1 or 3 channels: set --data\.augmentation\.auto_augment ''"
    ):
        ClassificationDataModule("x", preprocessing=preprocessing)
    ClassificationDataModule("x", preprocessing=preprocessing, augmentation=None)


def test_mixing_softens_labels_in_training_only(make_parquet: MakeFiles) -> None:
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
def test_labels_stay_hard_without_mixing(augmentation: Augmentation | None, make_parquet: MakeFiles) -> None:
    data = make_data(make_parquet({"train": 8}), augmentation=augmentation, trainer=make_trainer())
    batch = next(iter(data.train_dataloader()))
    assert data.on_after_batch_transfer(dict(batch), 0)["label"] is batch["label"]


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


def test_erasing_is_a_function_of_seed_epoch_image_and_repeat(make_parquet: MakeFiles) -> None:
    data = make_data(make_parquet({"train": 6, "val": 1}), augmentation=ERASED)
    draws = [Draw(epoch=1, position=position, repeat=0) for position in (3, 0, 5)]

    def batch(draws: list[Draw]) -> torch.Tensor:
        return data.finish(collate(data.images["train"].__getitems__(draws)), training=True)["image"]

    expected = batch(draws)
    torch.rand(1)
    assert torch.equal(batch(draws[::-1]), expected.flip(0))  # not of the batch or its order
    again = batch([draw._replace(repeat=1) for draw in draws])
    assert not any(torch.equal(*pair) for pair in zip(again, expected, strict=True))


def test_patches_stay_on_the_host(make_parquet: MakeFiles) -> None:
    data = make_data(make_parquet({"train": 6, "val": 1}), augmentation=ERASED)
    batch = next(iter(data.train_dataloader()))
    moved = data.transfer_batch_to_device(dict(batch), torch.device("meta"), 0)
    assert moved["image"].device.type == "meta"
    assert moved["patch"] is batch["patch"]


def test_patches_are_erased_after_normalization() -> None:
    data = make_data("fashion_mnist_sample", stage=None)
    pixels = torch.full((2, 3, 8, 8), 90, dtype=torch.uint8)
    patches = torch.tensor([[1, 2, 3, 4, 7], [0] * 5])
    batch = data.finish({"image": pixels.clone(), "patch": patches}, training=True)
    erased = torch.zeros(2, 8, 8, dtype=torch.bool)
    erased[0, 1:4, 2:6] = True
    assert torch.equal((batch["image"] != SMALL.normalize(pixels)).all(1), erased)
    assert set(batch) == {"image"}


def test_images_are_mixed_after_erasing(make_parquet: MakeFiles) -> None:
    augmentation = Augmentation(auto_augment=None, random_erasing=1.0, mixup=0.8, cutmix=0.0)
    data = make_data(make_parquet({"train": 4, "val": 1}), augmentation=augmentation, trainer=make_trainer())
    pixels, patches = torch.full((2, 3, 8, 8), 90, dtype=torch.uint8), torch.tensor([[1, 2, 3, 4, 7], [5, 0, 2, 8, 9]])
    erased = SMALL.normalize(pixels)
    erase(erased, patches)
    batch = data.on_after_batch_transfer({"image": pixels, "label": torch.tensor([0, 1]), "patch": patches}, 0)
    for own, other in ((0, 1), (1, 0)):
        share = batch["label"][own, own].item()
        assert 0.0 < share < 1.0
        expected = share * erased[own] + (1.0 - share) * erased[other]
        assert torch.allclose(batch["image"][own], expected, atol=1e-6)


# ImageNet


def test_imagenets_classes_get_the_packages_names(make_parquet: MakeFiles) -> None:
    folder = make_parquet({"train": [999, 0, 517], "test": [517, 1]}, imagenet_synsets())
    data = make_data(folder, "test", class_order="imagenet")
    assert data.class_names == list(imagenet_names())
    assert [label for batch in data.test_dataloader() for label in batch["label"].tolist()] == [517, 1]


def test_other_classes_than_imagenets_are_rejected(make_parquet: MakeFiles) -> None:
    with pytest.raises(ValueError, match="3 classes where ImageNet has 1000"):
        make_data(make_parquet({"train": 4}), class_order="imagenet")


SPLITS = {"train": make_images("train", 1003), "validation": make_images("validation", 41)}
LARGER = Preprocessing(16)


def make_imagenet(dataset: str, split: str) -> ClassificationDataModule:
    sizes = {name: len(images) for name, images in SPLITS.items()}
    values = {"batch_size": 64, "preprocessing": LARGER, "class_order": "imagenet", "split_sizes": sizes}
    data = make_data(dataset, stage=None, test_split=split, **values)
    data.prepare("test")
    data.setup("test")
    return data


def expected_pixels(images: list[FakeImage]) -> torch.Tensor:
    """Decode and transform without the datamodule."""
    opened = [ImageOps.exif_transpose(Image.open(io.BytesIO(image.content))).convert("RGB") for image in images]
    return torch.stack([LARGER(image) for image in opened])


def test_parquet_folders_and_the_hub_give_the_same_batches(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ada")
    put_on_hub(hub, "lab/imagenet", SPLITS)
    sources = [
        str(write_parquet(tmp_path / "parquet", SPLITS)),
        str(write_folders(tmp_path / "folders", SPLITS)),
        "lab/imagenet",
    ]
    for split, images in SPLITS.items():
        images = images[: 3 * 64]
        pixels = expected_pixels(images)
        for source in sources:
            data = make_imagenet(source, split)
            found: list[Any] = list(islice(data.test_dataloader(), 3))
            assert data.class_names == list(imagenet_names())
            assert [label for batch in found for label in batch["label"].tolist()] == [image.label for image in images]
            assert indices(found) == list(range(len(images)))
            assert torch.equal(LARGER.normalize(torch.cat([batch["image"] for batch in found])), pixels)


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    splits = SPLITS | {"train": make_images("train", 1003, truncated=True)}
    data = make_imagenet(str(write_folders(tmp_path / "folders", splits)), "train")
    with pytest.raises(UnreadableImageError, match=splits["train"][3].name):
        list(data.test_dataloader())
