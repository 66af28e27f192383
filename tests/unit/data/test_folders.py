import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from scalablevit_pl.data.folders import describe_files, list_images, load_image_folder

MakeFiles = Callable[..., Path]
COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def labels(splits: datasets.DatasetDict) -> dict[str, list[str]]:
    """Return the class of each row of each split."""
    return {
        split: [rows.features["label"].names[label] for label in rows["label"][:]] for split, rows in splits.items()
    }


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("Train", "Valid", "Test"),
        ("Training", "VAL", "Testing"),
        ("train_set", "val_set", "test_set"),
        ("trainset", "validation-images", "test data"),
    ],
)
def test_names_of_splits_are_known_in_any_spelling(
    train: str, validation: str, test: str, make_folders: MakeFiles
) -> None:
    folder = make_folders(f"{train}/cat/1.jpg", f"{train}/dog/2.jpg", f"{validation}/dog/3.jpg", f"{test}/cat/4.jpg")
    expected = {"train": ["cat", "dog"], "validation": ["dog"], "test": ["cat"]}
    assert labels(load_image_folder(folder)[0]) == expected


@pytest.mark.parametrize("name", ["train station", "settrain", "contest", "tests", "data", "set"])
def test_other_names_are_classes(name: str, make_folders: MakeFiles) -> None:
    assert labels(load_image_folder(make_folders("a/1.jpg", f"{name}/2.jpg"))[0]) == {"train": ["a", name]}


@pytest.mark.parametrize(
    ("files", "right"),
    [
        (["images/train/cat/1.jpg", "images/val/cat/2.jpg"], "photos/images"),
        (["images/Train/cat/1.jpg", "images/Train/dog/1.jpg"], "photos/images"),
        (["images/train/cat/1.jpg", "images/test/cat/2.jpg", "extra/1.jpg"], "photos/images"),
        (["pets/cat/1.jpg", "pets/dog/2.jpg"], "photos/pets"),
        (["a/b/cat/1.jpg", "a/b/dog/x/2.jpg"], "photos/a/b"),
        (["train/pets/cat/1.jpg", "train/pets/dog/2.jpg"], "photos/train/pets"),
    ],
)
def test_a_folder_above_the_right_one_is_rejected(files: list[str], right: str, make_folders: MakeFiles) -> None:
    with pytest.raises(ValueError, match=rf"is not the folder that contains the classes: give '\S*/{right}', or"):
        load_image_folder(make_folders(*files))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["2021/cat/1.jpg", "2021/dog/2.jpg", "2022/cat/3.jpg", "2022/dog/4.jpg"],
            r"the folders 2021, 2022 in \S*photos' all contain the folders cat, dog: give one of them, .*/photos/2021'",
        ),
        (
            ["cat/train/1.jpg", "cat/test/1.jpg", "dog/train/1.jpg", "dog/test/1.jpg"],
            "all contain the folders test, tr",
        ),
    ],
)
def test_folders_that_all_contain_the_same_folders_are_rejected(
    files: list[str], message: str, make_folders: MakeFiles
) -> None:
    with pytest.raises(ValueError, match=message):
        load_image_folder(make_folders(*files))


@pytest.mark.parametrize(
    "files",
    [
        ["cat/images/1.jpg", "dog/images/2.jpg"],
        ["cat/a/1.jpg", "cat/b/2.jpg", "dog/a/3.jpg", "dog/c/4.jpg"],
        ["cat/a/1.jpg", "cat/b/2.jpg", "dog/a/3.jpg", "dog/b/4.jpg", "dog/5.jpg"],
    ],
)
def test_folders_inside_classes_may_differ(files: list[str], make_folders: MakeFiles) -> None:
    expected = {"train": [name.split("/")[0] for name in files]}
    assert labels(load_image_folder(make_folders(*files))[0]) == expected


def test_folders_added_by_macos_are_ignored(make_folders: MakeFiles) -> None:
    folder = make_folders("cat/1.jpg", "dog/2.jpg", "__MACOSX/cat/1.jpg", "cat/__MACOSX/3.jpg")
    splits, left_out = load_image_folder(folder)
    assert labels(splits) == {"train": ["cat", "dog"]}
    assert left_out == ""


def test_a_class_in_two_unicode_forms_is_one_class(make_folders: MakeFiles) -> None:
    splits, _ = load_image_folder(make_folders(f"train/{COMPOSED}/1.jpg", f"test/{DECOMPOSED}/2.jpg", "train/a/3.jpg"))
    assert labels(splits) == {"train": ["a", COMPOSED], "test": [COMPOSED]}


def test_a_name_that_is_not_utf8_is_named(make_folders: MakeFiles) -> None:
    folder = make_folders("cat/1.jpg", "dog/2.jpg")
    (folder / "cat/1.jpg").rename(folder / "cat" / os.fsdecode(b"\xff.jpg"))
    with pytest.raises(ValueError, match=r"photos/cat/\\udcff\.jpg' is not UTF-8: rename it"):
        load_image_folder(folder)


def test_files_that_are_not_read_are_counted(make_folders: MakeFiles) -> None:
    folder = make_folders("cat/1.jpg", "dog/2.jpg", "loose.jpg", "dog/deep/3.jpg")
    for name in ("a.xyz", "b.XYZ", "c.txt", "noname", ".hidden.txt", "odd.a b"):
        (folder / "cat" / name).write_text("no image")
    (folder / "README.md").write_text("pets")
    (folder / "dog/gone.jpg").symlink_to("nowhere.jpg")
    (folder / "dog/gone.txt").symlink_to("gone.txt")  # to itself
    splits, left_out = load_image_folder(folder)
    assert labels(splits) == {"train": ["cat", "dog", "dog"]}
    assert sorted(left_out.split(", ")) == [
        "1 .md",
        "1 .txt",
        "1 loose .jpg",
        "2 .xyz",
        "2 dangling links",
        "2 other files",
    ]


def test_links_to_folders_are_followed_once(make_folders: MakeFiles, tmp_path: Path) -> None:
    folder = make_folders("cat/1.jpg", "dog/2.jpg", "dog/a/3.jpg", "../elsewhere/sub/4.jpg")
    (folder / "cat/more").symlink_to(tmp_path / "elsewhere")
    for name, target in {"above": "..", "itself": ".", "again": "more/sub"}.items():
        (folder / "cat" / name).symlink_to(target)
    (tmp_path / "elsewhere/back").symlink_to(folder / "cat")
    found = list_images(folder / "cat")
    assert [str(path.relative_to(folder)) for path in found.paths] == ["cat/1.jpg", "cat/again/4.jpg"]
    assert describe_files(found.left_out) == "3 circular links"


def test_images_are_sorted_by_the_parts_of_their_paths(make_folders: MakeFiles) -> None:
    folder = make_folders("b/1.jpg", "b.jpg", "b-c/1.jpg", "a.jpg", "b/0/2.jpg", "B/1.jpg")
    assert list_images(folder).paths == sorted(folder.rglob("*.jpg"))


# Tables of labels


def write_table(path: Path, *lines: str, header: str = "file_name,label") -> Path:
    path.write_text("\n".join([header, *lines]))
    return path


@pytest.mark.parametrize("name", ["labels.csv", "metadata.csv"])
def test_a_table_names_the_classes_of_a_folder(name: str, make_folders: MakeFiles) -> None:
    folder = make_folders("1.jpg", "b/2.jpg", "b/3.jpg", f"{DECOMPOSED}.jpg")
    write_table(folder / name, "b/2.jpg, dog,x", f"{COMPOSED}.jpg,cat,", "./1.jpg,dog,y", header="file_name,label,note")
    (folder / "notes.csv").write_text("a,b")
    splits, left_out = load_image_folder(folder)
    assert labels(splits) == {"train": ["dog", "cat", "dog"]}
    rows = splits["train"].cast_column("image", datasets.Image(decode=False))["image"][:]
    assert [row["path"] for row in rows] == [str(folder / name) for name in ("b/2.jpg", f"{DECOMPOSED}.jpg", "1.jpg")]
    assert left_out == "1 unlabelled image"


def test_each_split_folder_may_have_a_table(make_folders: MakeFiles) -> None:
    folder = make_folders("Train/1.jpg", "Train/2.jpg", "val/1.jpg")
    write_table(folder / "Train/labels.csv", "1.jpg,b", "2.jpg,a")
    write_table(folder / "val/metadata.csv", "1.jpg,a")
    assert labels(load_image_folder(folder)[0]) == {"train": ["b", "a"], "validation": ["a"]}


def test_one_table_may_label_images_of_several_splits(make_folders: MakeFiles) -> None:
    folder = make_folders("train/x/1.jpg", "test/2.jpg")
    write_table(folder / "labels.csv", "test/2.jpg,a", "train/x/1.jpg,b")
    assert labels(load_image_folder(folder)[0]) == {"test": ["a"], "train": ["b"]}


def test_a_given_table_replaces_class_folders_and_other_tables(make_folders: MakeFiles, tmp_path: Path) -> None:
    folder = make_folders("cat/1.jpg", "dog/2.jpg")
    write_table(folder / "labels.csv", "cat/1.jpg,x")
    # As spreadsheets write it: with a byte order mark and Windows' line ends.
    (tmp_path / "mine.csv").write_bytes(b'\xef\xbb\xbffile_name,label\r\ncat/1.jpg,a\r\ndog/2.jpg,"b, c"\r\n')
    assert labels(load_image_folder(folder, tmp_path / "mine.csv")[0]) == {"train": ["a", "b, c"]}


def test_other_tables_beside_class_folders_are_left_out(make_folders: MakeFiles) -> None:
    folder = make_folders("cat/1.jpg", "dog/2.jpg")
    write_table(folder / "metadata.csv", "cat/1.jpg,a photograph", header="file_name,text")
    splits, left_out = load_image_folder(folder)
    assert labels(splits) == {"train": ["cat", "dog"]}
    assert left_out == "1 .csv"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"file_name,label\n1.jpg,a\n3.jpg,b\n../x.jpg,b\n", r"names 2 files that are not images .*'\S*/photos/3.jpg'"),
        (b"file_name,label\n1.jpg,a\n1.jpg,a\n", r"1.jpg' has several rows, one of them in '\S*labels.csv': keep one"),
        (b"file_name,label\n1.jpg,a\n2.jpg\n", r"labels.csv' has no label for '\S*2.jpg': complete it"),
        (b"file_name,label\n", r"labels.csv' contains no rows: complete it"),
        (b"file_name;label\n1.jpg;a\n", r"lacks the column 'file_name': name its columns file_name, label"),
        (b"file_name,text\n1.jpg,a\n", r"lacks the column 'label'"),
        (b"", r"lacks the column 'file_name'"),
        (
            b"file_name,label\n1.jpg,caf\xe9\n",
            r"cannot read '\S*labels.csv': 'utf-8' .*; save it as CSV in UTF-8",
        ),
    ],
)
def test_a_wrong_table_is_named(table: bytes, message: str, make_folders: MakeFiles) -> None:
    folder = make_folders("1.jpg", "2.jpg")
    (folder / "labels.csv").write_bytes(table)
    with pytest.raises(ValueError, match=message):
        load_image_folder(folder, folder / "labels.csv")


def test_a_missing_table_is_named(make_folders: MakeFiles, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file '\S*nope\.csv': check --data\.labels"):
        load_image_folder(make_folders("1.jpg"), tmp_path / "nope.csv")


def test_a_folder_without_classes_names_the_columns_of_a_table(make_folders: MakeFiles) -> None:
    folder = make_folders("1.jpg")
    write_table(folder / "labels.csv", "1.jpg,a", header="id,breed")
    with pytest.raises(ValueError, match=r"nor a labels\.csv with the columns file_name and label: check the path"):
        load_image_folder(folder)
