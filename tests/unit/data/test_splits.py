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


def test_sizes_of_a_split_are_checked_under_any_of_its_names() -> None:
    check_split_sizes({"train": 5, "val": 3}, {"train": 5, "validation": 3, "test": 9})
    with pytest.raises(ValueError, match=r"split 'val' has 3 images, but --data\.split_sizes requires 4"):
        check_split_sizes({"train": 5, "val": 3}, {"valid": 4})
