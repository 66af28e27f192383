from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image

from scalablevit_pl.plotting import RUN_COLOURS
from scalablevit_pl.profiling.measurement import Result
from scalablevit_pl.profiling.networks import Setting
from scalablevit_pl.profiling.picture import _style, comparable_results, draw_profile
from scalablevit_pl.profiling.timing import Spread

OURS, SWIN, TWINS = "scalablevit_s", "swin_tiny_patch4_window7_224", "twins_svt_small"


def result(network: str, batch: int, precision: str = "32", size: int = 224) -> Result:
    setting = Setting(network, precision=precision, batch_size=batch, input_size=(size, size))
    return Result(setting, seconds=Spread.of([0.1]))


def test_styles_differ_without_colour() -> None:
    for name in ("scalablevit_nano", "owner/name"):
        assert (_style(name, 0)["linestyle"], _style(name, 0)["markerfacecolor"]) == ("-", RUN_COLOURS[0])
    for name in ("resnet10t", SWIN):
        assert (_style(name, 0)["linestyle"], _style(name, 0)["markerfacecolor"]) == ("--", "white")
    assert len({_style("x", index)["marker"] for index in range(len(RUN_COLOURS))}) == len(RUN_COLOURS)


def test_accuracies_use_one_way_and_the_largest_batch_measured_for_all() -> None:
    both = [result(name, batch) for name in (OURS, SWIN) for batch in (1, 8)]
    training = Result(Setting(TWINS, "train", batch_size=8), seconds=Spread.of([0.1]))
    others = [result("resnet10t", 8), result(TWINS, 8, size=256), training, result(OURS, 8, "bf16")]
    assert comparable_results([*both, result(OURS, 32), *others]) == [both[1], both[3]]
    assert comparable_results([result(OURS, 1), result(OURS, 8), result(SWIN, 2)]) == [result(OURS, 8)]
    assert comparable_results(others[:3]) == []


def test_the_figure_has_a_panel_for_each_way_and_the_accuracies(tmp_path: Path) -> None:
    pictures = []
    for size in (256, 224):
        measured = [result(name, batch, size=size) for name in (OURS, SWIN) for batch in (1, 8)]
        failed = Result(Setting("resnet18", "train"), "out of memory")
        draw_profile([*measured, failed], tmp_path / "x.png", "title")
        with Image.open(tmp_path / "x.png") as picture:
            pictures.append(np.asarray(picture.convert("RGB")))
    assert pictures[1].shape[1] > 1.3 * pictures[0].shape[1]
    right = pictures[1][:, pictures[1].shape[1] // 2 :]
    for colour in RUN_COLOURS[:2]:
        assert (right == np.round(np.multiply(to_rgb(colour), 255))).all(axis=2).sum() > 30
