from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from scalablevit_pl.plotting import RUN_COLOURS
from scalablevit_pl.profiling.picture import Point, _log_ticks, _style, comparable_points, draw_profile
from scalablevit_pl.profiling.published import PUBLISHED

OURS, SWIN, TWINS = "scalablevit_s", "swin_tiny_patch4_window7_224", "twins_svt_small"


def point(network: str, batch: int, way: str = "inference", comparable: bool = True) -> Point:
    return Point(network, way, batch, 10.0 * batch, comparable)


def test_ours_and_others_differ_without_colour() -> None:
    for name in ("scalablevit_nano", "owner/name"):
        assert (_style(name, 0)["linestyle"], _style(name, 0)["markerfacecolor"]) == ("-", RUN_COLOURS[0])
    for name in ("resnet10t", SWIN):
        assert (_style(name, 0)["linestyle"], _style(name, 0)["markerfacecolor"]) == ("--", "white")
    assert len({_style("x", index)["marker"] for index in range(len(RUN_COLOURS))}) == len(RUN_COLOURS)


def test_accuracies_stand_over_one_way_and_the_largest_batch_that_all_have() -> None:
    both = [point(name, batch) for name in (OURS, SWIN) for batch in (1, 8)]
    others = [point("resnet10t", 8), point(TWINS, 8, comparable=False), point(OURS, 8, "other")]
    assert comparable_points([*both, point(OURS, 32), *others], PUBLISHED) == [both[1], both[3]]
    assert comparable_points([point(OURS, 1), point(OURS, 8), point(SWIN, 2)], PUBLISHED) == [point(OURS, 8)]
    assert comparable_points(others[:2], PUBLISHED) == []


@pytest.mark.parametrize(
    ("low", "high"), [(1.0, 1.4), (4.5, 8.6), (4.9, 6.9), (27.0, 230.0), (0.03, 40.0), (1.0, 1e6), (100.0, 101.0)]
)
def test_axes_have_a_few_round_numbers(low: float, high: float) -> None:
    ticks = _log_ticks(low, high)
    assert 3 <= len(ticks) <= 8
    assert all(low <= tick <= high for tick in ticks)


def test_the_picture_has_a_panel_for_each_way_and_the_accuracies(tmp_path: Path) -> None:
    pictures = []
    points = [point(name, batch, comparable=False) for name in (OURS, SWIN) for batch in (1, 8)]
    for drawn in (points, [point(name, batch) for name in (OURS, SWIN) for batch in (1, 8)]):
        draw_profile(drawn, PUBLISHED, tmp_path / "x.png", "title")
        with Image.open(tmp_path / "x.png") as picture:
            pictures.append(np.asarray(picture.convert("RGB")))
    assert pictures[1].shape[1] > 1.3 * pictures[0].shape[1]
    right = pictures[1][:, pictures[1].shape[1] // 2 :]
    for colour in RUN_COLOURS[:2]:
        assert (right == np.round(np.multiply(to_rgb(colour), 255))).all(axis=2).sum() > 30
