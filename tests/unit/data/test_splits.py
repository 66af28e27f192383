import numpy as np
import pytest

from scalablevit_pl.data.splits import SplitNames, check_split_sizes, cut_rows


@pytest.mark.parametrize("part", ["train", "val", "test", "predict"])
def test_each_part_has_its_split(part: str) -> None:
    expected = {"train": "a", "val": "b", "test": "c", "predict": "c"}[part]
    assert SplitNames("a", "b", "c").of(part, ["a", "validation"]) == expected


@pytest.mark.parametrize(
    ("existing", "expected"), [(["train", "val"], "val"), (["valid", "validation"], "validation"), (["train"], "train")]
)
def test_validation_images_come_from_a_usual_name_or_the_training_split(existing: list[str], expected: str) -> None:
    assert SplitNames("train", None, "test").of("val", existing) == expected


def test_the_cut_is_a_partition_that_follows_its_seed() -> None:
    train, val = (cut_rows(30, 0.2, 5, part) for part in ("train", "val"))
    assert sorted(train + val) == list(range(30))
    assert len(val) == 6
    assert cut_rows(30, 0.2, 6, "val") != val == cut_rows(30, 0.2, 5, "val")


def test_a_cut_without_labels_is_the_same_with_every_version() -> None:
    assert cut_rows(100, 0.1, 0, "val") == [2, 16, 26, 54, 55, 73, 75, 86, 93, 95]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("sizes", "fraction", "expected"),
    [
        ([8, 8, 1], 0.1, [1, 1, 0]),
        ([100, 50, 10], 0.1, [10, 5, 1]),
        ([6, 3, 1], 0.3, [2, 1, 0]),  # 1.8, 0.9 and 0.3 images
        ([1, 0, 5], 0.5, [0, 0, 3]),
        ([1, 1, 1, 5], 0.9, [0, 0, 0, 4]),  # of seven wanted: every class keeps an image
    ],
)
def test_classes_supply_their_share_and_keep_an_image(
    sizes: list[int], fraction: float, expected: list[int], seed: int
) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    train, val = (cut_rows(len(labels), fraction, seed, part, labels) for part in ("train", "val"))
    assert sorted(train + val) == list(range(len(labels)))
    assert np.bincount(labels[val], minlength=len(sizes)).tolist() == expected
    assert all(np.bincount(labels[train], minlength=len(sizes))[np.array(sizes) > 0] > 0)


def test_equal_classes_take_turns_by_seed() -> None:
    labels = np.arange(40) % 20
    cuts = [cut_rows(40, 0.25, seed, "val", labels) for seed in (0, 0, 1)]
    assert [len(set(labels[cut])) for cut in cuts] == [10, 10, 10]
    assert cuts[0] == cuts[1]
    assert set(labels[cuts[0]]) != set(labels[cuts[2]])


def test_classes_of_one_image_each_cannot_be_validated() -> None:
    with pytest.raises(ValueError, match=r"no class has two images.*--data\.val_split"):
        cut_rows(3, 0.1, 0, "val", np.arange(3))


def test_sizes_of_a_split_are_checked_under_any_of_its_names() -> None:
    check_split_sizes({"train": 5, "val": 3}, {"train": 5, "validation": 3, "test": 9})
    with pytest.raises(ValueError, match=r"split 'val' has 3 images, but --data\.split_sizes requires 4"):
        check_split_sizes({"train": 5, "val": 3}, {"valid": 4})
