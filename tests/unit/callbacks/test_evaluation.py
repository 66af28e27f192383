from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scalablevit_pl.callbacks.evaluation import check_count


def make_trainer(counted: int, limit: float) -> Any:
    images = type("Images", (list,), {"split": "test"})(range(1500))
    return SimpleNamespace(
        limit_test_batches=limit,
        limit_val_batches=limit,
        callback_metrics={"test/samples": torch.tensor(counted), "val/samples": torch.tensor(counted)},
        datamodule=SimpleNamespace(images={"test": images, "val": images}),
    )


@pytest.mark.parametrize("part", ["val", "test"])
@pytest.mark.parametrize("counted", [1499, 1501, 0])
def test_a_count_that_is_not_that_of_the_split_is_an_error(part: str, counted: int) -> None:
    with pytest.raises(ValueError, match=f"^{counted:,} samples of split 'test' were counted, and it has 1,500: "):
        check_count(part, make_trainer(counted, 1.0))


@pytest.mark.parametrize(("counted", "limit"), [(1500, 1.0), (16, 1), (750, 0.5), (32, 2)])
def test_a_full_count_and_limited_ones_are_right(counted: int, limit: float) -> None:
    check_count("test", make_trainer(counted, limit))
