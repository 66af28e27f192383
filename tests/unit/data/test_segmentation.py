import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datamodules import encoded, make_trainer
from mask_data import draw_pair, write_pairs, write_parquet
from PIL import Image

from scalablevit_pl.data import DensePreprocessing, SegmentationAugmentation, SegmentationDataModule
from scalablevit_pl.data.samplers import Draw
from scalablevit_pl.preprocessing import UnreadableImageError

NAMES = ["sky", "ground", "sea"]
EQUAL = DensePreprocessing(20, 60, 8, "nearest", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CROPS = SegmentationAugmentation(crop_size=16, distortion=0.0)


def make(folder: Path | str, stage: str | None = "fit", **arguments: Any) -> SegmentationDataModule:
    values = {"class_names": NAMES, "batch_size": 4, "num_workers": 0, "preprocessing": EQUAL, "augmentation": CROPS}
    data = SegmentationDataModule(str(folder), **values | arguments)
    if stage is not None:
        data.setup(stage)
    return data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pairs = [(f"images/{n}.png", f"masks/{n}.png") for n in range(8)]
    for split, count in (("train", 8), ("val", 5), ("test", 3)):
        write_pairs(tmp_path / "photos" / split, pairs[:count])
    return tmp_path / "photos"


@pytest.mark.parametrize("kind", ["folder", "parquet", "stream"])
def test_training_batches_are_aligned_crops(kind: str, folder: Path, tmp_path: Path) -> None:
    parquet = write_parquet(tmp_path / "parquet", train=8, validation=5)
    data = make(folder if kind == "folder" else parquet, streaming=kind == "stream")
    batches = list(data.train_dataloader())
    assert len(batches) == 2
    for batch in batches:
        data.on_before_batch_transfer(batch, 0)
        assert batch.keys() == {"image", "mask", "index", "path"}
        assert batch["image"].shape == (4, 3, 16, 16)
        assert batch["mask"].shape == (4, 16, 16)
        assert batch["image"].dtype == batch["mask"].dtype == torch.uint8
        seen = batch["mask"] != 255
        assert torch.equal(batch["image"][:, 0][seen], batch["mask"][seen])


def test_evaluation_batches_have_masks_at_the_size_of_the_files(folder: Path) -> None:
    data = make(folder, "validate", batch_size=5)
    batch = next(iter(data.val_dataloader()))
    largest = [max(sides) for sides in zip(*batch["size"].tolist(), strict=True)]
    assert list(batch["mask"].shape) == [5, *largest]
    assert list(batch["image"].shape[2:]) == [max(sides) for sides in zip(*batch["padded"].tolist(), strict=True)]
    for number in range(5):
        image, mask = draw_pair(number)
        height, width = batch["size"][number].tolist()
        assert (height, width) == (mask.height, mask.width)
        assert np.array_equal(batch["mask"][number, :height, :width], np.asarray(mask))
        batch["mask"][number, :height, :width] = 255
        height, width = batch["padded"][number].tolist()
        assert torch.equal(batch["image"][number, :, :height, :width], EQUAL.pixels(image))
        batch["image"][number, :, :height, :width] = 0
    assert batch["mask"].eq(255).all()
    assert batch["image"].eq(0).all()


def test_prediction_needs_no_masks(folder: Path) -> None:
    data = make(folder, "predict", batch_size=3)
    batch = next(iter(data.predict_dataloader()))
    assert batch.keys() == {"image", "size", "resized", "padded", "index", "path"}
    write_pairs(folder / "other", [("test/images/0.png", ""), ("train/images/0.png", "train/masks/0.png")])
    data = make(folder / "other", "predict")
    assert len(data.images["predict"]) == 1
    with pytest.raises(ValueError, match=r"split 'test' has 1 of 1 images without a mask, the first in row 0: add"):
        make(folder / "other", "test")


def test_training_without_augmentation_sees_whole_images(folder: Path) -> None:
    data = make(folder, augmentation=None, batch_size=8)
    batch = next(iter(data.train_dataloader()))
    assert batch["mask"].shape[1:] == batch["image"].shape[2:]
    for number, index in enumerate(batch["index"].tolist()):
        image, _ = draw_pair(index)
        height, width = EQUAL.resized_size((image.height, image.width))
        expected = np.asarray(image.resize((width, height), Image.Resampling.NEAREST))[:, :, 0]
        assert np.array_equal(batch["mask"][number, :height, :width], expected)
        assert batch["mask"][number, height:].eq(255).all()
        assert batch["mask"][number, :, width:].eq(255).all()


def test_variation_is_a_function_of_seed_epoch_and_sample(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    augmentation = SegmentationAugmentation(crop_size=16)

    def drawn(seed: int, epoch: int, workers: int = 0) -> dict[int, Any]:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        data = make(folder, augmentation=augmentation, num_workers=workers, batch_size=1)
        data.trainer = make_trainer(epoch=epoch)
        return {batch["index"].item(): batch["image"].tolist() for batch in data.train_dataloader()}

    expected = drawn(1, 2)
    assert drawn(1, 2, workers=1) == expected
    assert drawn(1, 3) != expected
    assert drawn(2, 2) != expected
    images = make(folder, augmentation=augmentation).images["train"]
    assert not torch.equal(images[Draw(0, 3, 0)]["image"], images[Draw(0, 3, 1)]["image"])


# Classes


def test_class_names_are_given_or_found(folder: Path, tmp_path: Path) -> None:
    assert make(folder).class_names == NAMES
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    assert make(folder, class_names=str(tmp_path / "names.txt")).class_names == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"photos' does not name its classes: list them in --data\.class_names"):
        make(folder, class_names=None)
    (folder / "data.yaml").write_text("names: [d, e, f]\npalette: [[0, 0, 0], [1, 1, 1], [2, 2, 2]]\n")
    data = make(folder, class_names=None)
    assert (data.class_names, data.palette) == (["d", "e", "f"], [(0, 0, 0), (1, 1, 1), (2, 2, 2)])
    assert SegmentationDataModule(str(folder)).load_class_names("fit") == ["d", "e", "f"]
    with pytest.raises(ValueError, match=r"--data\.class_names names the class 'a' twice"):
        make(folder, class_names=["a", "a", "b"])
    with pytest.raises(ValueError, match=r"--data\.class_names names 256 classes"):
        make(folder, class_names=[str(index) for index in range(256)])


def test_classes_of_a_list_column_are_declared(tmp_path: Path) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "mask": datasets.Image(), "found": datasets.List(datasets.ClassLabel(names=NAMES))}
    )
    image, mask = draw_pair(0)
    rows = {"image": [image] * 4, "mask": [mask] * 4, "found": [[0]] * 4}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    assert make(tmp_path, class_names=None).class_names == NAMES


def test_known_layouts_name_their_classes(tmp_path: Path) -> None:
    write_pairs(tmp_path, [(f"JPEGImages/{n}.png", f"SegmentationClass/{n}.png") for n in range(4)])
    assert make(tmp_path, class_names=None).class_names[-1] == "tvmonitor"


def test_colors_of_masks_are_classes(folder: Path) -> None:
    colors = [(0, 0, 0), (0, 200, 0), (9, 8, 7)]
    for path in folder.rglob("masks/*.png"):
        Image.fromarray(np.array(colors, np.uint8)[np.asarray(Image.open(path))]).save(path)
    data = make(folder, "validate", palette=colors, batch_size=1)
    batch = next(iter(data.val_dataloader()))
    assert np.array_equal(batch["mask"][0], np.asarray(draw_pair(0)[1]))
    data = make(folder, "validate", batch_size=1)
    with pytest.raises(UnreadableImageError, match=r"val/masks/0\.png is a color image"):
        next(iter(data.val_dataloader()))
    with pytest.raises(ValueError, match="the palette has 2 colors for the values 0 to 2 of 3 classes"):
        make(folder, palette=colors[:2])


def test_zero_is_ignored_if_asked(folder: Path) -> None:
    data = make(folder, "validate", class_names=NAMES[1:], reduce_zero_label=True, batch_size=1)
    batch = next(iter(data.val_dataloader()))
    assert np.array_equal(batch["mask"][0], np.asarray(draw_pair(0)[1]) - 1)
    data = make(folder, "validate", ignore_value=1, batch_size=1)
    found, mask = next(iter(data.val_dataloader()))["mask"][0], np.asarray(draw_pair(0)[1])
    assert np.array_equal(found, np.where(mask == 1, 255, mask))


# Columns


@pytest.mark.parametrize("columns", [("image", "annotation"), ("pixel_values", "label"), ("photo", "Masks")])
def test_columns_of_images_and_masks_are_found(columns: tuple[str, str], tmp_path: Path) -> None:
    write_parquet(tmp_path, columns, train=4)
    batch = next(iter(make(tmp_path, batch_size=3).train_dataloader()))
    assert batch["image"][:, 0][batch["mask"] != 255].max() < 3


def test_other_columns_are_named_by_options(tmp_path: Path) -> None:
    write_parquet(tmp_path, ("one", "two"), train=4)
    with pytest.raises(ValueError, match=r"found 2 image columns \(one, two\).*--data\.image_column"):
        make(tmp_path)
    assert len(make(tmp_path, image_column="one").images["train"]) == 3
    with pytest.raises(ValueError, match="mask_column 'three' is not one of the columns one, two: correct the name"):
        make(tmp_path, image_column="one", mask_column="three")
    image, _ = draw_pair(0)
    datasets.Dataset.from_dict({"one": [image]}).to_parquet(str(tmp_path / "train-00000-of-00001.parquet"))
    with pytest.raises(ValueError, match="found no mask column among the columns one"):
        make(tmp_path)


# Errors


def replace_mask(folder: Path, mask: Image.Image | bytes) -> str:
    content = mask if isinstance(mask, bytes) else encoded(mask)
    (folder / "val/masks/2.png").write_bytes(content)
    data = make(folder, "validate")
    with pytest.raises(UnreadableImageError) as caught:
        list(data.val_dataloader())
    return str(caught.value)


def test_errors_in_masks_name_the_file(folder: Path) -> None:
    image, mask = draw_pair(2)
    turned = mask.transpose(Image.Transpose.ROTATE_90)
    message = replace_mask(folder, turned)
    assert "val/masks/2.png is a mask of 26×30 pixels for an image of 30×26, which is turned upright" in message
    assert "2.png is a mask of 29×26 pixels" in replace_mask(folder, mask.crop((0, 0, 29, 26)))
    mask.putpixel((0, 0), 77)
    assert "2.png has 1 pixels of the value 77, but the 3 classes are" in replace_mask(folder, mask)
    assert "2.png is a color image" in replace_mask(folder, image)
    assert "cannot read" in replace_mask(folder, encoded(mask)[:-30])


def test_errors_in_rows_name_the_row(tmp_path: Path) -> None:
    write_parquet(tmp_path, train=4)
    data = make(tmp_path, class_names=NAMES[:2], batch_size=3)
    with pytest.raises(UnreadableImageError, match=r"column 'mask' of row \d of split 'train' has \d+ pixels of the"):
        list(data.train_dataloader())


def test_wrong_masks_are_tolerated_as_unreadable_images_are(folder: Path) -> None:
    (folder / "val/masks/2.png").write_bytes(b"no image")
    data = make(folder, "validate", max_unreadable=1)
    batches = [data.on_before_batch_transfer(batch, 0) for batch in data.val_dataloader()]
    assert sorted(index for batch in batches for index in batch["index"].tolist()) == [-1, 0, 1, 3, 4]
    assert len(data.unreadable) == 1


def test_a_row_without_a_mask_is_an_error(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    image, mask = draw_pair(0)
    rows = {"image": [image] * 4, "mask": [mask, None, mask, None]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(ValueError, match="split 'train' has 2 of 4 images without a mask, the first in row 1"):
        make(tmp_path)


def test_masks_that_ignore_all_are_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (1, 3):
        path = folder / f"train/masks/{number}.png"
        Image.new("L", Image.open(path).size, 255).save(path)
    data = make(folder)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for batch in data.train_dataloader():
                assert "blank" not in data.on_before_batch_transfer(batch, 0)
        data.teardown("fit")
    assert [record.message for record in caplog.records] == [
        f"all pixels of 2 masks are ignored, such as those of {folder / 'train/masks/1.png'}"
    ]


def test_distortion_needs_colors(folder: Path) -> None:
    four = DensePreprocessing(20, 60, mean=(0.5,) * 4, std=(0.5,) * 4)
    with pytest.raises(ValueError, match=r"distortion needs 1 or 3 channels: set --data\.augmentation\.distortion 0"):
        make(folder, None, preprocessing=four, augmentation=SegmentationAugmentation())
    data = make(folder, preprocessing=four)
    assert next(iter(data.train_dataloader()))["image"].shape == (4, 4, 16, 16)


def test_an_example_batch_is_like_a_real_one(folder: Path) -> None:
    data = make(folder)
    real = data.on_before_batch_transfer(next(iter(data.train_dataloader())), 0)
    example = data.example_batch(3)
    assert example.keys() == real.keys()
    for name in ("image", "mask", "index"):
        assert (example[name].shape, example[name].dtype) == (real[name].shape, real[name].dtype)
    assert example["mask"].max() == 2
    assert (
        data.count_classes(data.images["val"].reader.target(0, data.images["val"].row(0)))
        == np.bincount(np.asarray(draw_pair(0)[1]).ravel(), minlength=3).tolist()
    )
