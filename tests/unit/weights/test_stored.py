"""Stored networks: class names, and checks of weights."""

import math

import pytest
import torch
from torch import Tensor

from scalablevit_pl.preprocessing import Preprocessing
from scalablevit_pl.weights.stored import CLASSIFICATION, Description, StoredModel, check_finite, same_classes

MANY = [f"class {index}" for index in range(100)]


@pytest.mark.parametrize(
    ("known", "names", "same"),
    [
        (["a", "b"], ["a", "b"], True),
        (["a", "b"], ["b", "a"], False),
        (["a", "b"], ["a", "c"], False),
        (["a", "b"], ["a", "b", "c"], False),
        (["0", "1"], ["a", "b"], True),
        (["0", "1"], ["a", "b", "c"], False),
        (MANY, [*MANY[:98], "crane", "crane2"], True),
        (MANY, [*MANY[:97], "one", "two", "three"], False),
        (MANY, [*MANY[:98], MANY[99], MANY[98]], False),
        (MANY, [*MANY[:99], MANY[0]], False),
    ],
)
def test_classes_are_the_same_if_their_names_are_in_the_same_order(
    known: list[str], names: list[str], same: bool
) -> None:
    assert same_classes(known, names) == same


def stored(config: dict[str, object], **values: object) -> StoredModel:
    return StoredModel(Description(CLASSIFICATION, config, **values), {}, "here")  # type: ignore[arg-type]


def test_classes_without_names_are_numbered() -> None:
    assert stored({"num_classes": 3}, class_names=["a", "b", "c"]).class_names == ["a", "b", "c"]
    assert stored({"num_classes": 3}).class_names == ["0", "1", "2"]
    assert stored({}).class_names == []


def test_an_unknown_preprocessing_is_that_of_imagenet() -> None:
    assert stored({}).preprocessing == Preprocessing()
    assert stored({}, preprocessing=Preprocessing(64)).preprocessing == Preprocessing(64)


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (torch.tensor([1.0, math.nan]), "holds NaN or infinite weights"),
        (torch.tensor([math.inf, -math.inf]), "holds NaN or infinite weights"),
        (torch.ones(3, dtype=torch.int64), "holds torch.int64 instead of floating-point weights"),
        (torch.ones(3, dtype=torch.bool), "holds torch.bool instead of floating-point weights"),
        (torch.ones(3, dtype=torch.float8_e4m3fn), "holds torch.float8_e4m3fn instead of floating-point weights"),
        (torch.ones(3).to_sparse(), "is not a plain tensor"),
        ("a string", "is not a plain tensor"),
    ],
    ids=str,
)
def test_a_weight_that_is_not_finite_is_named(tensor: Tensor, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^b of the file {problem}"):
        check_finite({"a": torch.ones(3), "b": tensor}, "the file")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_finite_weights_are_accepted_even_if_their_sum_overflows(dtype: torch.dtype) -> None:
    check_finite({"a": torch.full((10,), 60000.0, dtype=dtype), "b": torch.ones(())}, "the file")
