import re
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from scalablevit_pl.data import source
from scalablevit_pl.data.samples.scenes import load_scenes
from scalablevit_pl.data.source import _split_of, find_revision, find_stream, load_splits, may_be_hub_id

MakeFiles = Callable[..., Path]


def files(split: datasets.Dataset) -> list[tuple[str, str]]:
    """List class and name of each file of a split."""
    rows = split.cast_column("image", datasets.Image(decode=False))
    return [(split.features["label"].names[row["label"]], Path(row["image"]["path"]).name) for row in rows]


def test_the_shipped_sample_is_found_by_name() -> None:
    splits = load_splits("fashion_mnist_sample")
    assert {name: len(split) for name, split in splits.items()} == {"train": 10_000, "test": 2_000}
    assert splits["train"].features["label"].names[9] == "Ankle boot"


def test_the_drawn_scenes_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "load_scenes", lambda: load_scenes(train=3, test=2, side=32))
    assert find_revision("fashion_scenes_sample", None) is None
    assert not may_be_hub_id("fashion_scenes_sample")
    splits = load_splits("fashion_scenes_sample", wanted=lambda _: ["test"])
    assert {name: rows.num_rows for name, rows in splits.items()} == {"test": 2}
    assert splits["test"].column_names == ["image", "mask", "instances", "objects", "classes"]
    with pytest.raises(ValueError, match="'fashion_scenes_sample' has no parquet files that can be streamed"):
        find_stream("fashion_scenes_sample", None, "train")


def test_parquet_files_are_splits(make_parquet: MakeFiles) -> None:
    splits = load_splits(str(make_parquet({"train": 6, "validation": 4, "test": 3})))
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "validation": 4, "test": 3}
    assert splits["validation"]["label"][:] == [0, 1, 2, 0]


def test_class_folders_are_a_training_split_whatever_the_names_of_files(make_folders: MakeFiles) -> None:
    names = ["cat/test_1.jpg", "cat/train_2.jpg", "dog/A.JPG", "dog/validation.png", "dog/b c.webp"]
    splits = load_splits(str(make_folders(*names)))
    assert list(splits) == ["train"]
    assert sorted(files(splits["train"])) == sorted(tuple(name.split("/")) for name in names)


def test_a_single_class_folder_is_loaded(make_folders: MakeFiles) -> None:
    splits = load_splits(str(make_folders("cat/1.jpg", "cat/2.jpg")))
    assert files(splits["train"]) == [("cat", "1.jpg"), ("cat", "2.jpg")]


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [("train", "val", "test"), ("training", "valid", "testing"), ("train", "validation", "test")],
)
def test_folders_above_the_classes_are_splits(train: str, validation: str, test: str, make_folders: MakeFiles) -> None:
    folder = make_folders(
        f"{train}/cat/test_1.jpg", f"{train}/dog/2.jpg", f"{validation}/dog/train_3.jpg", f"{test}/cat/4.jpg"
    )
    splits = load_splits(str(folder))
    assert {name: files(split) for name, split in splits.items()} == {
        "train": [("cat", "test_1.jpg"), ("dog", "2.jpg")],
        "validation": [("dog", "train_3.jpg")],
        "test": [("cat", "4.jpg")],
    }


def test_hidden_folders_and_other_files_are_ignored(make_folders: MakeFiles) -> None:
    folder = make_folders(".trash/cat/0.jpg", "train/.cache/1.jpg", "train/cat/2.jpg", "train/dog/3.jpg", ".git/x.png")
    (folder / "train" / "cat" / "notes.txt").write_text("a cat")
    (folder / "README.md").write_text("pets")
    splits = load_splits(str(folder))
    assert {name: files(split) for name, split in splits.items()} == {"train": [("cat", "2.jpg"), ("dog", "3.jpg")]}


def test_file_names_are_not_read_as_patterns(make_folders: MakeFiles) -> None:
    names = ["cat/1[2].jpg", "cat/3*.jpg", "cat/3a.jpg", "cat/5?.jpg", "dog [x]/4.jpg"]
    splits = load_splits(str(make_folders(*names)))
    assert files(splits["train"]) == [tuple(name.split("/")) for name in names]


@pytest.mark.parametrize("name", [".cache/table.parquet", "cat/table.parquet"])
def test_a_parquet_file_among_class_folders_is_ignored(name: str, make_folders: MakeFiles) -> None:
    folder = make_folders("cat/test_1.jpg", "cat/train_2.jpg", "dog/3.jpg")
    (folder / name).parent.mkdir(exist_ok=True)
    datasets.Dataset.from_dict({"label": [0]}).to_parquet(str(folder / name))
    splits = load_splits(str(folder))
    assert files(splits["train"]) == [("cat", "test_1.jpg"), ("cat", "train_2.jpg"), ("dog", "3.jpg")]


def test_the_home_folder_may_be_abbreviated(make_folders: MakeFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(make_folders("pets/cat/1.jpg", "pets/dog/2.jpg")))
    assert len(load_splits("~/pets")["train"]) == 2


def test_split_folders_beside_class_folders_are_rejected(make_folders: MakeFiles) -> None:
    folder = make_folders("train/cat/1.jpg", "val/cat/2.jpg", "dog/3.jpg", "owl/4.jpg")
    with pytest.raises(ValueError, match=r"contains split folders \(train, val\) beside other folders \(dog, owl\)"):
        load_splits(str(folder))


@pytest.mark.parametrize("names", [[], ["1.jpg"], ["train/1.jpg"], [".hidden/1.jpg"]], ids=str)
def test_a_folder_without_class_folders_is_rejected(names: list[str], make_folders: MakeFiles) -> None:
    folder = make_folders(*names)
    with pytest.raises(ValueError, match=f"{re.escape(str(folder))}.*contains neither parquet files nor class folders"):
        load_splits(str(folder))


def test_an_empty_split_folder_is_named(make_folders: MakeFiles) -> None:
    folder = make_folders("train/cat/1.jpg")
    (folder / "test" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"photos/test' contains neither"):
        load_splits(str(folder))


@pytest.mark.parametrize("name", ["./missing", "../missing", "~/missing", "a/b/c", "/missing", "missing/"])
def test_a_missing_folder_is_named_without_asking_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(datasets, "load_dataset")
    with pytest.raises(ValueError, match=f"there is no folder {name!r}"):
        load_splits(name)


def test_a_file_is_rejected(make_folders: MakeFiles) -> None:
    with pytest.raises(ValueError, match=r"1\.jpg' is a file: give the folder"):
        load_splits(str(make_folders("cat/1.jpg") / "cat" / "1.jpg"))


def test_images_deeper_in_a_class_folder_belong_to_it(make_folders: MakeFiles) -> None:
    splits = load_splits(str(make_folders("cat/sub/1.jpg", "cat/2.jpg", "dog/3.jpg", "dog/.4.jpg", "dog/.x/5.jpg")))
    assert splits["train"]["label"][:] == [0, 0, 1]
    assert splits["train"].features["label"].names == ["cat", "dog"]


def test_the_classes_are_those_of_all_splits(make_folders: MakeFiles) -> None:
    splits = load_splits(str(make_folders("train/b/1.jpg", "train/c/2.jpg", "test/a/3.jpg", "test/c/4.jpg")))
    assert splits["train"]["label"][:] == [1, 2]
    assert splits["test"]["label"][:] == [0, 2]
    assert {split.features["label"].names[0] for split in splits.values()} == {"a"}


def test_a_class_folder_without_images_is_named(make_folders: MakeFiles) -> None:
    folder = make_folders("cat/1.jpg", "dog/2.jpg")
    (folder / "owl").mkdir()
    (folder / "owl" / "notes.txt").write_text("none yet")
    with pytest.raises(ValueError, match=r"class folders owl in .* are empty"):
        load_splits(str(folder))


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match=f"cannot read the parquet files in '{re.escape(str(tmp_path))}'"):
        load_splits(str(tmp_path))


def write_rows(path: Path, names: list[str], labels: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Value("binary"), "label": datasets.ClassLabel(names=names)})
    datasets.Dataset.from_dict({"image": [b"x"] * len(labels), "label": labels}, features=features).to_parquet(
        str(path)
    )


def test_splits_that_declare_different_classes_are_rejected(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.parquet", ["a", "b"], [0, 1])
    write_rows(tmp_path / "test.parquet", ["b", "a"], [0, 1])
    with pytest.raises(ValueError, match=r"train\.parquet and test\.parquet declare different classes in .*'label'"):
        load_splits(str(tmp_path))


def test_a_data_card_cannot_change_what_is_loaded(tmp_path: Path) -> None:
    write_rows(tmp_path / "data/train.parquet", ["a", "b"], [0, 1])
    write_rows(tmp_path / "elsewhere/train.parquet", ["a", "b"], [1])
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {tmp_path}/elsewhere/*.parquet\n---\n"
    (tmp_path / "data/README.md").write_text(card)
    assert load_splits(str(tmp_path / "data"))["train"]["label"][:] == [0, 1]


def test_names_of_parquet_files_are_not_read_as_patterns(tmp_path: Path) -> None:
    write_rows(tmp_path / "my [x] data/train.parquet", ["a", "b"], [0, 1])
    write_rows(tmp_path / "my [x] data/test[1].parquet", ["a", "b"], [1])
    splits = load_splits(str(tmp_path / "my [x] data"))
    assert {name: split["label"][:] for name, split in splits.items()} == {"train": [0, 1], "test": [1]}


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("data/test-00000-of-00001.parquet", "test"),
        ("validation/0000.parquet", "validation"),
        ("default/val.parquet", "validation"),
        ("photos.parquet", "train"),
        ("contest.parquet", "train"),
    ],
)
def test_the_path_of_a_parquet_file_names_its_split(path: str, split: str) -> None:
    assert _split_of(Path(path)) == split
