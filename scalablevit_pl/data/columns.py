"""Find the columns of images and labels in a data set, and the classes of its labels."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import datasets

from scalablevit_pl.text import nfc

# Names of columns with masks, which may be images of another column.
MASK_COLUMNS = {
    *("mask", "masks", "annotation", "annotations", "label", "labels", "segmentation", "segmentation_mask"),
    *("semantic", "semantic_mask", "semantic_segmentation", "seg", "gt", "ground_truth"),
}


def find_image_column(features: datasets.Features, named: str | None) -> str:
    """Return the named image column, or the only one, or `image` among several, or the only one that is not a mask.

    Images are columns of type Image; if there are none, structs of `bytes` and `path`, and bytes called `image` or
    `img`. A named column may contain any bytes.
    """
    encoded = [name for name, feature in features.items() if _is_encoded(feature)]
    images = [name for name in encoded if isinstance(features[name], datasets.Image)]
    images = images or [name for name in encoded if isinstance(features[name], dict) or name in ("image", "img")]
    images = [name for name in images if name.lower() not in MASK_COLUMNS] or images
    column = _only(["image"] if "image" in images else images, named, features, "image")
    if column not in encoded:
        raise ValueError(
            f"the column {column!r} contains {features[column]}, not images: store encoded images as bytes, or choose "
            "another with --data.image_column"
        )
    return column


def find_mask_column(features: datasets.Features, named: str | None, image_column: str) -> str:
    """Return the named mask column, or the only one beside the image column, or the only one with the name of masks."""
    encoded = [name for name, feature in features.items() if _is_encoded(feature) and name != image_column]
    masks = [name for name in encoded if name.lower() in MASK_COLUMNS] or encoded
    column = _only(masks, named, features, "mask")
    if column not in encoded:
        raise ValueError(
            f"the column {column!r} contains {features[column]}, not masks: store encoded images, or choose another "
            "with --data.mask_column"
        )
    return column


def listed_classes(features: datasets.Features) -> list[str] | None:
    """Return the class names that the only column of lists of ClassLabel declares, or None."""
    declared = [kind for kind in map(item_type, features.values()) if isinstance(kind, datasets.ClassLabel)]
    return list(declared[0].names) if len(declared) == 1 else None


def _is_encoded(feature: Any) -> bool:
    """Return whether a column contains encoded images: as written by `datasets`, or by other programs."""
    content = feature.get("bytes") if isinstance(feature, dict) else feature
    return isinstance(feature, datasets.Image) or "binary" in (getattr(content, "dtype", None) or "")


def find_label_column(features: datasets.Features, named: str | None) -> str:
    """Return the named label column, the only one of type ClassLabel or of lists of it, or else `label` or `labels`."""
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    lists = [name for name, feature in features.items() if isinstance(item_type(feature), datasets.ClassLabel)]
    usual = [name for name in ("label", "labels") if name in features][:1]
    return _only(labels or lists or usual, named, features, "label")


def item_type(feature: Any) -> Any:
    """Return the type of the elements of a list; None for other types."""
    return getattr(feature, "feature", None)


def _only(candidates: list[str], named: str | None, columns: Iterable[str], kind: str) -> str:
    if named is not None and named not in columns:
        raise ValueError(f"{kind}_column {named!r} is not one of the columns {', '.join(columns)}: correct the name")
    if named is None and len(candidates) != 1:
        found = f"{len(candidates)} {kind} columns ({', '.join(candidates)})" if candidates else f"no {kind} column"
        raise ValueError(f"found {found} among the columns {', '.join(columns)}: choose one with --data.{kind}_column")
    return named or candidates[0]


def declares_classes(splits: datasets.DatasetDict, column: str) -> bool:
    """Return whether a column declares its classes; otherwise they are collected from the training split."""
    feature = next(iter(splits.values())).features[column]
    return isinstance(item_type(feature) or feature, datasets.ClassLabel)


def find_class_names(splits: datasets.DatasetDict, column: str, train_split: str) -> list[str]:
    """Return the class names in the order of their indices: as declared, or else as found in the training split.

    Found names are sorted. Found whole numbers are their own indices, up to the largest. Booleans are `False`, `True`.
    """
    feature = next(iter(splits.values())).features[column]
    feature = item_type(feature) or feature
    if declares_classes(splits, column):
        return list(feature.names)
    if isinstance(feature, datasets.Value):  # not a table, for example
        found = {label for _, label in _stored_labels(splits[train_split], column) if label is not None}
        if found and all(isinstance(label, str) for label in found):
            return sorted({nfc(label) for label in found})
        if found and all(isinstance(label, bool) for label in found):
            return ["False", "True"]
        if found and all(isinstance(label, int) for label in found):
            return [str(index) for index in range(max(found) + 1)]
    raise ValueError(f"label_column {column!r} contains {feature}: expected class names or whole numbers from 0")


def _stored_labels(rows: datasets.Dataset, column: str) -> list[tuple[int, Any]]:
    """Return the labels of all rows with the numbers of their rows; a missing label or list is None."""
    stored = rows.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    if item_type(rows.features[column]) is None:
        return list(enumerate(stored))
    return [(row, label) for row, labels in enumerate(stored) for label in ([None] if labels is None else labels)]


def label_indices(rows: datasets.Dataset, column: str, names: list[str], split: str) -> list[int]:
    """Return the class index of every label, in the order of the rows."""
    stored = _stored_labels(rows, column)
    if stored and all(label == -1 for _, label in stored):
        raise ValueError(
            f"split {split!r} has no labels (all {len(stored)} are -1, as in ImageNet's test split), so nothing can be "
            "measured on it: choose another split, for example with --data.test_split, or run `predict`"
        )
    index_of = {name: index for index, name in enumerate(names)}
    indices = [index_of.get(nfc(label)) if isinstance(label, str) else label for _, label in stored]
    wrong = [place for place, index in enumerate(indices) if index is None or not 0 <= index < len(names)]
    if wrong:
        row, label = stored[wrong[0]]
        raise ValueError(
            f"the label {label!r} of row {row} of split {split!r} is not one of the {len(names)} classes "
            f"({len(wrong)} such labels): correct them, or choose a split that has labels"
        )
    if item_type(rows.features[column]) is not None and len(set(stored)) < len(stored):
        (row, label), _ = Counter(stored).most_common(1)[0]
        raise ValueError(
            f"row {row} of split {split!r} lists the label {label!r} twice: list names or indices, each once"
        )
    return [int(index) for index in indices if index is not None]
