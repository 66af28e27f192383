import datasets
import pytest

from scalablevit_pl.data.splits import select_split


def test_an_unknown_split_names_those_there_are() -> None:
    splits = datasets.DatasetDict(
        {"train": datasets.Dataset.from_dict({"label": [0]}), "test": datasets.Dataset.from_dict({"label": [1]})}
    )
    assert select_split(splits, "test")["label"][:] == [1]
    with pytest.raises(ValueError, match="there is no split 'val': choose among train, test"):
        select_split(splits, "val")
