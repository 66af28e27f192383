from pathlib import Path

import datasets
import numpy as np
import pytest
from mask_data import draw_pair, write_pairs
from PIL import Image

from scalablevit_pl.data.mask_folders import CITYSCAPES, VOC, known_classes, load_mask_folder

Pairs = dict[str, list[tuple[str, str]]]

ADE20K: Pairs = {
    "train": [
        ("images/training/ADE_train_1.jpg", "annotations/training/ADE_train_1.png"),
        ("images/training/ADE_train_2.jpg", "annotations/training/ADE_train_2.png"),
    ],
    "validation": [("images/validation/ADE_val_1.jpg", "annotations/validation/ADE_val_1.png")],
    "test": [("images/testing/ADE_test_1.jpg", "")],
}
STREETS: Pairs = {
    split: [
        (
            f"leftImg8bit/{name}/{town}/{town}_1_leftImg8bit.png",
            f"gtFine/{name}/{town}/{town}_1_gtFine_labelTrainIds.png",
        )
        for town in ("ulm", "bonn")
    ]
    for split, name in (("train", "train"), ("validation", "val"))
}
LAYOUTS: dict[str, Pairs] = {
    "ADE20K": ADE20K,
    "Cityscapes": STREETS,
    "no splits": {"train": [("images/a.jpg", "masks/a.png"), ("images/b.c.png", "masks/b.c.png")]},
    "splits above": {
        "train": [("Train/imgs/a.jpg", "Train/labels/a.png")],
        "validation": [("valid/imgs/a.jpg", "valid/labels/a.png")],
        "test": [("test_set/imgs/x/b.jpg", "test_set/labels/x/b.tif")],
    },
    "splits below": {
        "train": [("images/train/a.jpg", "masks/training/a.png")],
        "validation": [("images/val/a.jpg", "masks/validation/a.png")],
    },
    "ends of names": {
        "train": [
            ("images/a.jpg", "masks/a_mask.png"),
            ("images/b_image.jpg", "masks/b_mask.png"),
            ("images/c_mask.jpg", "masks/c_mask.png"),
            ("images/d_image.jpg", "masks/d_image.png"),
        ]
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_images_are_paired_with_their_masks(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    for pairs in layout.values():
        write_pairs(tmp_path, pairs)
    splits, left_out = load_mask_folder(tmp_path)
    assert left_out == ""
    found = {}
    for split, rows in splits.items():
        table = rows.with_format("arrow")[:].to_pylist()
        masks = [row["mask"] and row["mask"]["path"] for row in table]
        found[split] = list(zip([row["image"]["path"] for row in table], masks, strict=True))
    expected = {}
    for split, pairs in layout.items():
        expected[split] = sorted(
            (str(tmp_path / image), str(tmp_path / mask) if mask else None) for image, mask in pairs
        )
    assert {split: sorted(pairs) for split, pairs in found.items()} == expected
    assert all(feature == datasets.Image() for feature in splits["train"].features.values())


def test_the_lists_of_voc_are_the_splits(tmp_path: Path) -> None:
    write_pairs(tmp_path, [(f"JPEGImages/{n}.jpg", f"SegmentationClass/{n}.png" if n < 4 else "") for n in range(7)])
    lists = {"train": [0, 2], "val": [1, 3], "trainval": [0, 2, 1, 3], "test": [5, 6]}
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    for split, numbers in lists.items():
        (tmp_path / f"ImageSets/Segmentation/{split}.txt").write_text("".join(f"{number}\n" for number in numbers))
    splits, _ = load_mask_folder(tmp_path)
    found = {
        split: [int(Path(row["image"]["path"]).stem) for row in rows.with_format("arrow")[:].to_pylist()]
        for split, rows in splits.items()
    }
    assert found == {"train": [0, 2], "validation": [1, 3], "trainval": [0, 2, 1, 3], "test": [5, 6]}
    assert splits["test"].data.column("mask").null_count == 2
    image = np.asarray(splits["validation"][0]["mask"])
    assert np.array_equal(image, np.asarray(draw_pair(1)[1]))
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("0\n8\n9\n")
    with pytest.raises(ValueError, match=r"train\.txt' lists 2 images that do not exist, the first '8'"):
        load_mask_folder(tmp_path)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("0\n4\n")
    with pytest.raises(ValueError, match=r"1 images of split 'train' have no mask, the first '.*/JPEGImages/4\.jpg'"):
        load_mask_folder(tmp_path)


def test_other_files_of_cityscapes_and_stray_files_are_left_out(tmp_path: Path) -> None:
    for pairs in STREETS.values():
        write_pairs(tmp_path, pairs)
    for end in ("color", "labelIds", "instanceIds"):
        Image.new("L", (9, 9)).save(tmp_path / f"gtFine/train/ulm/1_gtFine_{end}.png")
    (tmp_path / "gtFine/train/ulm/1_gtFine_polygons.json").write_text("{}")
    (tmp_path / "leftImg8bit/train_extra").mkdir()
    (tmp_path / "leftImg8bit/stray.png").write_bytes(b"")
    splits, left_out = load_mask_folder(tmp_path)
    assert [len(rows) for rows in splits.values()] == [2, 2]
    assert left_out == "1 folder 'train_extra', 1 loose .png, 1 .json"
    for path in tmp_path.rglob("*labelTrainIds.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"gtFine' has no files \*_gtFine_labelTrainIds\.png: run csCreateTrainId"):
        load_mask_folder(tmp_path)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("a/1.jpg", "b/1.png")], r"contains neither parquet files nor images and masks in folders of these names"),
        (
            [("images/1.jpg", "masks/1.png"), ("images/2.jpg", ""), ("images/3.jpg", "")],
            r"2 images of split 'train' have no mask, the first '.*images/2\.jpg': add",
        ),
        (
            [("images/1.jpg", "masks/1.png"), ("", "masks/2.png")],
            r"1 masks of split 'train' have no image, the first '.*masks/2\.png': add",
        ),
        ([("val/images/1.jpg", "val/masks/1.png"), ("", "test/masks/2.png")], "1 masks of split 'test' have no image"),
        ([("images/1.jpg", "masks/1.png"), ("images/1.png", "")], r"1\.jpg' and '.*1\.png' have the same name"),
        ([("images/1.jpg", "masks/1.png"), ("", "masks/1_mask.png")], r"masks/1\.png' and .* are masks of the same"),
    ],
)
def test_files_without_a_partner_are_errors(pairs: list[tuple[str, str]], message: str, tmp_path: Path) -> None:
    write_pairs(tmp_path, pairs)
    with pytest.raises(ValueError, match=message):
        load_mask_folder(tmp_path)


def test_an_empty_split_is_an_error(tmp_path: Path) -> None:
    write_pairs(tmp_path, [("train/images/1.jpg", "train/masks/1.png")])
    for name in ("images", "masks"):
        (tmp_path / "val" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"split 'validation' of '.*' has no images: add some, or delete"):
        load_mask_folder(tmp_path)


def test_classes_of_known_layouts(tmp_path: Path) -> None:
    assert known_classes(tmp_path) is None
    (tmp_path / "gtFine").mkdir()
    assert known_classes(tmp_path) == list(CITYSCAPES)
    (tmp_path / "SegmentationClass").mkdir()
    assert known_classes(tmp_path) == list(VOC)
    assert (len(VOC), len(CITYSCAPES)) == (21, 19)
