import copy
import dataclasses
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datamodules import SMALL, encoded, make_data
from PIL import Image

from scalablevit_pl.data import Augmentation, DensePreprocessing, Preprocessing
from scalablevit_pl.data.images import ImageFiles, Row, Sample, SampleReader, SplitImages, Targets, collate
from scalablevit_pl.data.samplers import FILLER, Draw
from scalablevit_pl.preprocessing import UnreadableImageError, decode_image

MakeFiles = Callable[..., Path]


def pixels(image: Image.Image, target: Any) -> Sample:
    return {"image": SMALL.pixels(image)} | ({} if target is None else {"label": target})


def reader(**values: Any) -> SampleReader:
    return SampleReader(**({"split": "train", "image_column": "image", "transform": pixels} | values))


def label_of(row: Row) -> int:
    return row["label"]


def rows_of(contents: list[bytes | None], **columns: Any) -> datasets.Dataset:
    images = [content and {"bytes": content, "path": None} for content in contents]
    features = {"image": datasets.Image()} | dict.fromkeys(columns, datasets.Value("int64"))
    return datasets.Dataset.from_dict({"image": images} | columns, features=datasets.Features(features))


def noise(count: int) -> list[bytes]:
    state = np.random.RandomState(0)
    return [encoded(Image.fromarray(state.randint(0, 256, (9, 11, 3), dtype=np.uint8))) for _ in range(count)]


def test_shuffled_and_selected_rows_are_read_in_their_order(make_parquet: MakeFiles) -> None:
    rows = datasets.load_dataset(str(make_parquet({"train": 12})), split="train").shuffle(seed=0).select([5, 2, 7])
    images = SplitImages(rows, reader())
    for position, row in enumerate(rows):
        assert torch.equal(images[position]["image"], SMALL.pixels(row["image"]))


def test_encoded_bytes_without_an_image_type_are_images() -> None:
    contents = noise(2)
    images = SplitImages(datasets.Dataset.from_dict({"image": contents}), reader())
    assert torch.equal(images[1]["image"], SMALL.pixels(decode_image(contents[1])))


def test_a_sample_has_its_row_and_target() -> None:
    rows = rows_of(noise(4), label=[10, 11, 12, 13], other=[0] * 4)
    images = SplitImages(rows, reader(targets=Targets(["label"], label_of)), indices=[3, 1])
    assert [(sample["index"], sample["label"]) for sample in (images[0], images[1])] == [(3, 13), (1, 11)]
    assert [index for index, _ in images.stored_rows()] == [3, 1]
    assert set(images.row(3)) == {"image", "label"}


def test_an_image_among_the_targets_arrives_as_stored(tmp_path: Path) -> None:
    mask = encoded(Image.new("L", (3, 2)))
    (tmp_path / "mask.png").write_bytes(mask)
    path = str(tmp_path / "mask.png")
    read = reader(targets=Targets(["mask"], lambda row: row["mask"]), root=tmp_path)
    inside = read.target(0, {"mask": {"bytes": mask, "path": "x.png"}})
    assert (inside.read(), inside.path, inside.name) == (mask, "x.png", "column 'mask' of row 0 of split 'train'")
    assert read.target(0, {"mask": mask}).read() == mask
    file = read.target(0, {"mask": {"bytes": None, "path": path}})
    assert (file.read(), file.path, file.name) == (mask, path, path)
    with pytest.raises(UnreadableImageError, match=r"column 'mask' of row 7 of split 'train' names '/etc/passwd' out"):
        read.target(7, {"mask": {"bytes": None, "path": "/etc/passwd"}})


def test_augmentation_follows_the_row_and_not_its_position(make_parquet: MakeFiles) -> None:
    images = make_data(make_parquet({"train": 6, "val": 1})).images["train"]
    reversed_images = copy.copy(images)
    reversed_images.indices = images.indices[::-1]
    for position in range(6):
        one, other = images[Draw(1, position, 0)], reversed_images[Draw(1, 5 - position, 0)]
        assert torch.equal(one["image"], other["image"])


def test_augmentation_is_a_function_of_seed_epoch_image_and_repeat(make_parquet: MakeFiles) -> None:
    data = make_data(make_parquet({"train": 6, "val": 1}), augmentation=Augmentation(scale=(0.1, 0.9)))
    images = data.images["train"]
    draw = Draw(epoch=2, position=3, repeat=0)
    expected = images[draw]["image"]
    images[Draw(0, 1, 0)], torch.rand(1), np.random.rand()  # noqa: NPY002
    assert torch.equal(images[draw]["image"], expected)
    others = [draw._replace(epoch=1), draw._replace(repeat=1), draw._replace(position=2)]
    assert not any(torch.equal(images[other]["image"], expected) for other in others)
    images.reader = dataclasses.replace(images.reader, seed=1)
    assert not torch.equal(images[draw]["image"], expected)


def test_a_draw_leaves_the_global_generators_unchanged(make_parquet: MakeFiles) -> None:
    images = make_data(make_parquet({"train": 2, "val": 1})).images["train"]
    numbers = []
    for drawn in (False, True):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
        if drawn:
            images[Draw(0, 1, 0)]
        numbers.append((random.random(), np.random.rand(), torch.rand(1).item()))  # noqa: NPY002
    assert numbers[0] == numbers[1]


def test_a_filler_is_the_first_sample_with_a_negative_index() -> None:
    rows = rows_of(noise(5), label=[0, 1, 2, 3, 4])
    images = SplitImages(rows, reader(targets=Targets(["label"], label_of)), indices=[3, 1])
    first, filler = images[0], images[-1]
    assert (first["index"], filler["index"]) == (3, -1)
    assert torch.equal(filler["image"], first["image"])
    assert (filler["label"], filler["path"]) == (first["label"], first["path"])


@pytest.mark.parametrize("content", [b"no image", b"", None])
def test_an_unreadable_image_is_named_by_split_and_row(content: bytes | None) -> None:
    images = SplitImages(rows_of([*noise(2), content, *noise(1)]), reader(split="test"), indices=[3, 2])
    assert images[0]["index"] == 3
    with pytest.raises(UnreadableImageError, match="cannot read row 2 of split 'test'"):
        images[1]


def test_rows_cannot_name_files_outside_their_folder(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    for name in ("inside/a.png", "outside.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    names = [str(tmp_path / "inside/a.png"), str(tmp_path / "inside/../outside.png")]
    rows = datasets.Dataset.from_dict({"image": names}, features=datasets.Features({"image": datasets.Image()}))
    images = SplitImages(rows, reader(root=tmp_path / "inside"))
    assert images[0]["path"] == names[0]
    with pytest.raises(UnreadableImageError, match=r"row 1 of split 'train' names .* outside the data set"):
        images[1]
    with pytest.raises(UnreadableImageError, match="outside the data set"):
        SplitImages(rows, reader())[0]


def damaged(wrong: Iterable[int], attempts: int) -> SplitImages:
    """Make seven images with their rows as labels, some of them damaged."""
    contents = [b"no image" if row in wrong else content for row, content in enumerate(noise(7))]
    read = reader(targets=Targets(["label"], label_of))
    return SplitImages(rows_of(contents, label=list(range(7))), read, attempts=attempts)


def named(sample: Sample) -> list[int]:
    """Return the rows that a sample lists as unreadable."""
    return [int(line.split()[3]) for line in sample["unreadable"].splitlines()]


def test_the_next_readable_image_replaces_an_unreadable_one_in_training() -> None:
    images = damaged([2, 3, 5], attempts=4)
    samples = [images[Draw(0, position, 0)] for position in range(7)]
    assert [sample["index"] for sample in samples] == [0, 1, 4, 4, 4, 6, 6]
    assert [sample["label"] for sample in samples] == [0, 1, 4, 4, 4, 6, 6]
    assert [named(sample) for sample in samples] == [[], [], [2, 3], [3], [], [5], []]
    assert torch.equal(samples[2]["image"], samples[4]["image"])
    with pytest.raises(UnreadableImageError, match="row 2 of"):
        damaged([2, 3], attempts=2)[Draw(0, 2, 0)]


def test_an_unreadable_image_becomes_a_filler_in_evaluation() -> None:
    images = damaged([0, 2, 3, 6], attempts=5)
    samples = [images[position] for position in (*range(7), -1)]
    assert [sample["index"] for sample in samples] == [-1, 1, -1, -1, 4, 5, -1, -1]
    assert [named(sample) for sample in samples] == [[0], [], [2], [3], [], [], [6], []]  # each at its own position
    assert [sample["label"] for sample in samples] == [1, 1, 4, 4, 4, 5, 1, 1]  # of the next readable image


def test_a_batch_keeps_the_memory_layout_of_its_samples() -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    samples = [
        {"image": torch.from_numpy(image).permute(2, 0, 1), "label": 2 - row, "index": row, "path": f"{row}.png"}
        for row, image in enumerate(pixels)
    ]
    batch = collate(samples)
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(batch["image"].numpy(), pixels.transpose(0, 3, 1, 2))
    assert (batch["label"].tolist(), batch["index"].tolist()) == ([2, 1, 0], [0, 1, 2])
    assert batch["path"] == ["0.png", "1.png", "2.png"]


def test_a_batch_is_padded_to_its_largest_image_and_mask() -> None:
    state = np.random.RandomState(0)
    samples, expected = [], []
    for index, (height, width) in enumerate([(2, 5), (4, 3), (4, 5)]):
        image, mask = state.randint(1, 255, (height, width, 3)), state.randint(0, 9, (2 * height, 3 * width))
        padded = np.zeros((3, 4, 5)), np.full((8, 15), 255)
        for row in range(height):
            for column in range(width):
                padded[0][:, row, column] = image[row, column]
        for row in range(2 * height):
            for column in range(3 * width):
                padded[1][row, column] = mask[row, column]
        expected.append(padded)
        pixels = torch.from_numpy(image.astype(np.uint8)).permute(2, 0, 1)
        samples.append({"image": pixels, "mask": torch.from_numpy(mask.astype(np.uint8)), "index": index})
    batch = collate([dict(sample) for sample in samples])
    planes = collate([sample | {"image": sample["image"].contiguous().float()} for sample in samples])
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert planes["image"].is_contiguous()
    for found in (batch, planes):
        assert np.array_equal(found["image"].numpy(), np.stack([image for image, _ in expected]))
        assert np.array_equal(found["mask"].numpy(), np.stack([mask for _, mask in expected]))
    assert [batch["image"].dtype, batch["mask"].dtype, planes["image"].dtype] == [torch.uint8] * 2 + [torch.float32]


def test_image_files_are_samples_without_targets(make_folders: MakeFiles) -> None:
    folder = make_folders("1.png", "2.png")
    preprocessing = Preprocessing(4)
    files = ImageFiles([folder / "2.png", folder / "1.png"], preprocessing)
    assert len(files) == 2
    assert [(files[row]["index"], files[row]["path"]) for row in (0, 1)] == [
        (0, str(folder / "2.png")),
        (1, str(folder / "1.png")),
    ]
    assert torch.equal(files[0]["image"], preprocessing(decode_image(folder / "2.png")))
    assert [files[row]["unreadable"] for row in (0, 1)] == ["", ""]


def test_image_files_of_dense_tasks_are_samples_with_their_sizes(make_folders: MakeFiles) -> None:
    folder = make_folders("1.png", "2.png", "3.png")  # 9, 10 and 11 pixels wide, 12 high
    preprocessing = DensePreprocessing(18, 30, 4)
    files = ImageFiles([folder / "1.png", folder / "3.png"], preprocessing)
    batch = collate([files[0], files[1]])
    assert batch["size"].tolist() == [[12, 9], [12, 11]]
    assert batch["resized"].tolist() == [[24, 18], [19, 18]]
    assert batch["padded"].tolist() == [[24, 20], [20, 20]]
    assert batch["image"].shape == (2, 3, 24, 20)
    assert torch.equal(batch["image"][0], preprocessing(decode_image(folder / "1.png")))
    assert torch.equal(batch["image"][1, :, :20], preprocessing(decode_image(folder / "3.png")))
    assert batch["image"][1, :, 20:].eq(0.0).all()


def test_image_files_have_the_channels_of_the_preprocessing(make_folders: MakeFiles) -> None:
    folder = make_folders("1.png", "2.png")
    (folder / "2.png").write_bytes(b"no image")
    preprocessing = Preprocessing(4, mean=(0.5,), std=(0.5,))
    files = ImageFiles([folder / "1.png", folder / "2.png"], preprocessing, strict=False)
    assert torch.equal(files[0]["image"], preprocessing(decode_image(folder / "1.png", channels=1)))
    assert files[1]["image"].shape == (1, 4, 4)


def test_an_unreadable_image_file_is_a_filler_with_its_error_or_raises_it(make_folders: MakeFiles) -> None:
    folder = make_folders("1.png", "2.png")
    (folder / "2.png").write_bytes(b"no image")
    files = ImageFiles([folder / "1.png", folder / "2.png"], Preprocessing(4), strict=False)
    batch = collate([files[0], files[1]])
    assert batch["index"].tolist() == [0, FILLER]
    assert batch["unreadable"][0] == ""
    assert re.match(r"cannot read .*2\.png: it is not an image", batch["unreadable"][1])
    with pytest.raises(UnreadableImageError, match=r"2\.png"):
        ImageFiles([folder / "2.png"], Preprocessing(4))[0]
