"""Which split, and which of its rows, a stage of a run uses."""

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

# Names of folders and files that mean a split.
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
SET = re.compile(r"[ _-]?(?:set|data|images)$")  # as in train_set
VALIDATION_NAMES = ("validation", "val", "valid")
STAGE_PARTS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
Integers = npt.NDArray[np.integer[Any]]


def split_named(name: str) -> str | None:
    """Return the split that the name of a folder or file means, in any capitalization; None for other names."""
    word = SET.sub("", name.lower())
    return next((split for split, names in SPLIT_FOLDERS.items() if word in names), None)


class SplitNames(NamedTuple):
    """The splits that the parts `train`, `val`, `test` and `predict` come from.

    Attributes:
        train: Split to train on.
        val: Split to validate on; None for one with a usual name, or else a part of the training split.
        test: Split to test and predict on.
    """

    train: str
    val: str | None
    test: str

    def validation(self, names: Collection[str]) -> str | None:
        """Return the validation split among those that exist, or None to cut it off the training split."""
        return self.val or next((name for name in VALIDATION_NAMES if name in names), None)

    def of(self, part: str, names: Collection[str]) -> str:
        """Return the split that holds a part, given the names of those that exist."""
        if part in ("test", "predict"):
            return self.test
        return (self.validation(names) if part == "val" else None) or self.train


def cut_rows(rows: int, fraction: float, seed: int, part: str, labels: Integers | None = None) -> list[int]:
    """Return the rows of the part `train` or `val` if validation images are drawn from the training split.

    With `labels (rows,)`, each class supplies its share of the validation images and keeps at least one for training.
    """
    # RandomState's stream is frozen, so the cut is the same with every version of NumPy.
    order = np.random.RandomState(seed).permutation(rows)
    count = max(1, round(rows * fraction))
    held = order[:count] if labels is None else _draw_from_classes(order, labels[order], count)
    return sorted(held.tolist() if part == "val" else set(range(rows)).difference(held.tolist()))


def _draw_from_classes(order: Integers, labels: Integers, count: int) -> Integers:
    """Return `count` rows in proportion to the classes, fewer where a class would lose its last image.

    Numbers are rounded by the largest remainder, in integers; classes of equal remainder count in the order drawn.
    """
    _, first, sizes = np.unique(labels, return_index=True, return_counts=True)
    taken, remainders = np.divmod(sizes * count, len(order))
    ranked = np.lexsort((first, -remainders))
    taken[ranked[(sizes - taken > 1)[ranked]][: count - taken.sum()]] += 1
    if not taken.any():
        raise ValueError(
            "no class has two images, so none can be used for validation: add images, or name another split with "
            "--data.val_split"
        )
    groups = np.split(order[np.argsort(labels, kind="stable")], np.cumsum(sizes)[:-1])
    return np.concatenate([group[:number] for group, number in zip(groups, taken, strict=True)])


def check_split_sizes(counts: Mapping[str, int], sizes: Mapping[str, int]) -> None:
    """Check that splits have the required numbers of images; other splits are ignored."""
    for split, count in counts.items():
        same = next((names for names in SPLIT_FOLDERS.values() if split in names), (split,))
        for name, size in sizes.items():
            if name in same and count != size:
                raise ValueError(
                    f"split {split!r} has {count} images, but --data.split_sizes requires {size}: complete the data, "
                    "or set --data.split_sizes null for other data"
                )
