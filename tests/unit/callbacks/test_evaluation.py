from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scalablevit_pl.callbacks.evaluation import check_count


def make_trainer(counted: int, limit: float, max_unreadable: int = 0) -> Any:
    images = type("Images", (list,), {"split": "test"})(range(1500))
    return SimpleNamespace(
        limit_test_batches=limit,
        limit_val_batches=limit,
        callback_metrics={"test/samples": torch.tensor(counted), "val/samples": torch.tensor(counted)},
        datamodule=SimpleNamespace(images={"test": images, "val": images}, max_unreadable=max_unreadable),
        world_size=2,
    )


@pytest.mark.parametrize("part", ["val", "test"])
@pytest.mark.parametrize("counted", [1499, 1501, 0])
def test_a_count_that_is_not_that_of_the_split_is_an_error(part: str, counted: int) -> None:
    with pytest.raises(ValueError, match=f"^{counted:,} samples of split 'test' were counted, and it has 1,500: "):
        check_count(part, make_trainer(counted, 1.0))


@pytest.mark.parametrize(("counted", "limit"), [(1500, 1.0), (16, 1), (750, 0.5), (32, 2)])
def test_a_full_count_and_limited_ones_are_right(counted: int, limit: float) -> None:
    check_count("test", make_trainer(counted, limit))


@pytest.mark.parametrize(("counted", "right"), [(1500, True), (1494, True), (1493, False), (1501, False)])
def test_unreadable_images_may_lack_in_the_count(counted: int, right: bool) -> None:
    with nullcontext() if right else pytest.raises(ValueError, match="were counted"):
        check_count("test", make_trainer(counted, 1.0, max_unreadable=3))
