from typing import Any

import datasets
import pytest

from scalablevit_pl.data.columns import find_class_names, find_image_column, find_label_column, label_indices

IMAGE, NAMES = datasets.Image(), datasets.ClassLabel(names=["cat", "dog"])
TEXT, NUMBER, TRUTH = datasets.Value("string"), datasets.Value("int64"), datasets.Value("bool")
BYTES = datasets.Value("binary")
STRUCT = {"bytes": datasets.Value("large_binary"), "path": datasets.Value("large_string")}


def rows_of(labels: list[Any], feature: Any = None) -> datasets.Dataset:
    features = None if feature is None else datasets.Features({"label": feature})
    return datasets.Dataset.from_dict({"label": labels}, features=features)


def test_columns_are_found_by_their_type() -> None:
    features = datasets.Features({"id": NUMBER, "photo": IMAGE, "label": TEXT, "kind": NAMES})
    assert find_image_column(features, None) == "photo"
    assert find_label_column(features, None) == "kind"


def test_a_column_called_label_may_have_any_type() -> None:
    for feature in (TEXT, NUMBER):
        assert find_label_column(datasets.Features({"image": IMAGE, "label": feature, "class": TEXT}), None) == "label"


def test_the_named_column_wins() -> None:
    features = datasets.Features({"a": IMAGE, "b": IMAGE, "label": NAMES, "coarse": NAMES, "text": TEXT})
    assert find_image_column(features, "b") == "b"
    assert find_label_column(features, "coarse") == "coarse"
    assert find_label_column(features, "text") == "text"


@pytest.mark.parametrize(("find", "kind"), [(find_image_column, "image"), (find_label_column, "label")])
def test_an_unknown_column_is_rejected(find: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=f"{kind}_column 'pic' is not one of the columns image, label"):
        find(datasets.Features({"image": IMAGE, "label": NAMES}), "pic")


@pytest.mark.parametrize(
    ("find", "columns", "message"),
    [
        (find_image_column, {"a": IMAGE, "b": IMAGE}, r"2 image columns \(a, b\) .* --data.image_column"),
        (find_label_column, {"a": NAMES, "b": NAMES}, r"2 label columns \(a, b\) .* --data.label_column"),
        (find_image_column, {"image": TEXT, "b": NAMES}, r"no image column .*image, b: .* --data.image_column"),
        (find_label_column, {"image": IMAGE, "class": TEXT}, r"no label column .* --data.label_column"),
    ],
)
def test_an_ambiguous_or_missing_column_must_be_chosen(find: Any, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find(datasets.Features(columns), None)


@pytest.mark.parametrize(
    ("labels", "feature", "names"),
    [
        ([1, 1], datasets.ClassLabel(names=["zebra", "ape"]), ["zebra", "ape"]),
        (["owl", "cat", "owl", None, "ape"], TEXT, ["ape", "cat", "owl"]),
        (["cafe\u0301", "caf\xe9", "a"], TEXT, ["a", "caf\xe9"]),
        ([3, 0, 3, None], NUMBER, ["0", "1", "2", "3"]),
        ([True, None], TRUTH, ["False", "True"]),
    ],
    ids=["declared", "names", "two forms of a name", "numbers", "booleans"],
)
def test_class_names_are_declared_or_found(labels: list[Any], feature: Any, names: list[str]) -> None:
    other = rows_of(labels[:1], feature)
    splits = datasets.DatasetDict({"test": other, "train": rows_of(labels, feature)})
    assert find_class_names(splits, "label", "train") == names


@pytest.mark.parametrize("labels", [[0.5, 1.0], [None, None], [0.0]], ids=str)
def test_labels_of_other_types_are_rejected(labels: list[Any]) -> None:
    with pytest.raises(ValueError, match="label_column 'label' contains"):
        find_class_names(datasets.DatasetDict({"train": rows_of(labels)}), "label", "train")


@pytest.mark.parametrize(
    ("labels", "feature"),
    [([1, 0, 1], NAMES), (["dog", "cat", "dog"], TEXT), ([1, 0, 1], NUMBER), ([True, False, True], TRUTH)],
    ids=["declared", "names", "numbers", "booleans"],
)
def test_labels_become_indices(labels: list[Any], feature: Any) -> None:
    indices = label_indices(rows_of(labels, feature), "label", ["cat", "dog"], "train")
    assert indices == [1, 0, 1]
    assert {type(index) for index in indices} == {int}


def test_names_in_another_unicode_form_become_indices() -> None:
    assert label_indices(rows_of(["cafe\u0301", "caf\xe9"]), "label", ["a", "caf\xe9"], "train") == [1, 1]


@pytest.mark.parametrize(
    ("labels", "feature", "label"),
    [
        ([0, 1, -1, 0, -1], NUMBER, "-1"),
        ([0, 1, 2, 0, 5], NUMBER, "2"),
        ([0, 1, None, 0, 2], NUMBER, "None"),
        (["cat", "dog", "Cat", "dog", "owl"], TEXT, "'Cat'"),
        (["cat", "dog", None, "dog", ""], TEXT, "None"),
        ([0, 1, -1, 0, -1], NAMES, "-1"),
    ],
    ids=["minus one", "too large", "no number", "other name", "no name", "hidden label"],
)
def test_the_first_row_with_an_invalid_label_is_named(labels: list[Any], feature: Any, label: str) -> None:
    message = rf"the label {label} of row 2 of split 'val' is not one of the 2 classes \(2 such labels\)"
    with pytest.raises(ValueError, match=message):
        label_indices(rows_of(labels, feature), "label", ["cat", "dog"], "val")


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        ([["dog", "cat"], [], ["dog"]], datasets.List(TEXT)),
        ([[1, 0], [], [1]], datasets.List(NAMES)),
        ([[1, 0], [], [1]], datasets.LargeList(NAMES)),
    ],
    ids=["names", "declared", "large"],
)
def test_lists_of_labels_become_indices_in_order(labels: list[Any], feature: Any) -> None:
    rows = rows_of(labels, feature)
    assert find_class_names(datasets.DatasetDict(train=rows), "label", "train") == ["cat", "dog"]
    assert label_indices(rows, "label", ["cat", "dog"], "train") == [1, 0, 1]


def test_whole_numbers_in_lists_are_their_own_indices() -> None:
    rows = rows_of([[3], [], [0, 1]])
    assert find_class_names(datasets.DatasetDict(train=rows), "label", "train") == ["0", "1", "2", "3"]


def test_lists_are_found_after_single_labels() -> None:
    features = {"image": IMAGE, "kind": NAMES, "parts": datasets.List(NAMES), "labels": TEXT}
    assert find_label_column(datasets.Features(features), None) == "kind"
    del features["kind"]
    assert find_label_column(datasets.Features(features), None) == "parts"
    del features["parts"]
    assert find_label_column(datasets.Features(features), None) == "labels"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([["cat"], None], "the label None of row 1"),
        ([["cat"], ["dog", "owl"]], "the label 'owl' of row 1"),
        ([["cat"], ["dog", "dog"]], "row 1 of split 'val' lists the label 'dog' twice"),
        ([[0, 1, 0], [1, 0, 0]], "row 0 of split 'val' lists the label 0 twice"),
    ],
    ids=["no list", "other name", "repeated", "zeros and ones"],
)
def test_invalid_lists_of_labels_are_named(labels: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label_indices(rows_of(labels), "label", ["cat", "dog"], "val")


def test_a_named_image_column_may_contain_encoded_bytes_but_not_labels() -> None:
    features = datasets.Features({"image": datasets.Value("binary"), "label": NAMES})
    assert find_image_column(features, "image") == "image"
    with pytest.raises(ValueError, match=r"'label' contains ClassLabel.*, not images"):
        find_image_column(features, "label")


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"label": NUMBER, "image": BYTES}, "image"),
        ({"img": datasets.Value("large_binary"), "thumb": BYTES}, "img"),
        ({"image": datasets.Value("binary_view")}, "image"),
        ({"photo": STRUCT, "label": TEXT}, "photo"),
        ({"photo": {"bytes": BYTES, "path": datasets.Value("null")}, "hash": BYTES}, "photo"),
        ({"photo": STRUCT, "image": STRUCT}, "image"),
        ({"image": BYTES, "photo": IMAGE}, "photo"),
    ],
    ids=str,
)
def test_images_of_other_programs_are_found(columns: dict[str, Any], found: str) -> None:
    assert find_image_column(datasets.Features(columns), None) == found


@pytest.mark.parametrize(
    "feature", [TEXT, {"bytes": TEXT}, {"path": TEXT}, datasets.List(datasets.Value("uint8"))], ids=str
)
def test_other_columns_are_not_images(feature: Any) -> None:
    with pytest.raises(ValueError, match="found no image column among"):
        find_image_column(datasets.Features({"image": feature, "label": NUMBER}), None)
    with pytest.raises(ValueError, match=r"not images: store encoded images as bytes, or choose another"):
        find_image_column(datasets.Features({"image": feature, "label": NUMBER}), "image")


def test_the_image_column_among_several_is_the_one_called_image() -> None:
    assert find_image_column(datasets.Features({"depth": IMAGE, "image": IMAGE, "mask": IMAGE}), None) == "image"
