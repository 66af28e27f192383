import math
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from PIL import Image

from scalablevit_pl import plotting
from scalablevit_pl.plotting import (
    TRAIN,
    VAL,
    WRONG,
    Curve,
    _frequent_mistakes,
    class_colors,
    draw_bars,
    draw_comparison,
    draw_confusion,
    draw_curves,
    draw_predictions,
    draw_segmentations,
    drawable_names,
)

Pixels = npt.NDArray[np.uint8]
NAN = float("nan")
LABELS = {"loss": "loss (cross-entropy)", "top1": "top-1 accuracy"}


def read(path: Path) -> Pixels:
    """Read a picture, and check that nothing else was left next to it."""
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def places(picture: Pixels, colour: str | tuple[int, int, int]) -> npt.NDArray[np.int64]:
    """Return row and column of each pixel of exactly that colour."""
    wanted = np.round(np.multiply(to_rgb(colour), 255)) if isinstance(colour, str) else colour
    return np.argwhere((picture == wanted).all(axis=2))


def show(path: Path, count: int, names: list[str], wrong: int = 0, side: int = 28) -> Pixels:
    """Draw grey images of which the first `wrong` are predicted as by the next class's name."""
    labels = [names[index % len(names)] for index in range(count)]
    predictions = [names[(index + (index < wrong)) % len(names)] for index in range(count)]
    images = [np.full((side, side, 3), 128, np.uint8)] * count
    draw_predictions(images, labels, predictions, [index / count for index in range(count)], path, "title")
    return read(path)


@pytest.mark.parametrize("count", [1, 3, 11, 40])
def test_predictions_of_few_and_many_images(count: int, tmp_path: Path) -> None:
    picture = show(tmp_path / "predictions.png", count, ["cat", "dog"])
    columns, rows = min(8, count), -(-count // 8)
    assert picture.shape[1] / picture.shape[0] == pytest.approx(
        max(6.0, 1.5 * columns + 0.2) / (1.95 * rows + 0.6), rel=0.02
    )
    grey = len(places(picture, (128, 128, 128)))
    assert grey > 0.8 * count * 150**2


def test_wrong_predictions_are_marked(tmp_path: Path) -> None:
    areas = [len(places(show(tmp_path / "x.png", 3, ["cat", "dog"], wrong), WRONG)) for wrong in range(4)]
    assert areas[0] == 0
    assert np.diff(areas).min() > 1000


@pytest.mark.parametrize("side", [1, 28, 224])
def test_predictions_of_images_of_any_size(side: int, tmp_path: Path) -> None:
    show(tmp_path / "predictions.png", 2, ["cat", "dog"], side=side)


@pytest.mark.parametrize("classes", [2, 10, 30, 1000, 10**6])
def test_confusion_of_few_and_many_classes(classes: int, tmp_path: Path) -> None:
    pairs = {(index, index): 5 for index in range(1, min(classes, 1000))}
    draw_confusion(pairs, [f"class number {index}" for index in range(classes)], tmp_path / "x.png", "title")
    assert min(read(tmp_path / "x.png").shape[:2]) > 400


def test_rows_of_the_confusion_are_true_classes(tmp_path: Path) -> None:
    middles = []
    for pairs in ({(0, 1): 4}, {(1, 0): 4}):
        draw_confusion(pairs, ["cat", "dog"], tmp_path / "x.png", "title")
        middles.append(places(read(tmp_path / "x.png"), (8, 48, 107)).mean(axis=0))
    assert middles[0][0] < middles[1][0] - 50  # above
    assert middles[0][1] > middles[1][1] + 50  # to the right


def test_the_confusion_is_shaded_by_the_share_of_the_true_class(tmp_path: Path) -> None:
    pictures = []
    for pairs in ({(0, 0): 1, (1, 0): 1}, {(0, 0): 1, (1, 0): 1000}):
        draw_confusion(pairs, ["cat", "dog"], tmp_path / "x.png", "title")
        pictures.append(len(places(read(tmp_path / "x.png"), (8, 48, 107))))
    assert pictures[0] == pytest.approx(pictures[1], rel=0.01)
    assert pictures[0] > 10_000


@pytest.mark.parametrize(
    "names",
    [
        ["plain", "", "two\nlines", "a name that is longer than any axis has room for"],
        ["US$ 5", "from US$ to AU$", "a_b^c \\x", "Ärger ☃ é"],
        ["$\\frac{$", "$^$ and $_$"],
    ],
    ids=["long", "odd", "formulas"],
)
def test_strange_names_are_drawn(names: list[str], tmp_path: Path) -> None:
    show(tmp_path / "x.png", len(names), names, wrong=1)
    draw_confusion({(index, index): 1 for index in range(len(names))}, names, tmp_path / "x.png", names[0])
    draw_curves({}, {str(index): name for index, name in enumerate(names)}, tmp_path / "x.png", " ".join(names))
    read(tmp_path / "x.png")


def test_curves_have_their_colours(tmp_path: Path) -> None:
    curves: dict[str, Curve] = {}
    seen = []
    for name in ("train/loss", "val/loss", "train/top1", "val/top1"):
        curves[name] = ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0] if name.startswith("train") else [1.0, 3.0, 2.0])
        draw_curves(curves, LABELS, tmp_path / "curves.png", "title")
        picture = read(tmp_path / "curves.png")
        halves = picture[:, : picture.shape[1] // 2], picture[:, picture.shape[1] // 2 :]
        seen.append([len(places(half, colour)) > 100 for half in halves for colour in (TRAIN, VAL)])
    assert seen == [[True, False, False, False], [True, True, False, False], [True, True, True, False], [True] * 4]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_curves_and_comparisons_have_an_axis_for_each_metric(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(plotting, "save_figure", lambda figure, path: figures.append(figure))
    labels = {f"metric{index}": f"label {index}" for index in range(count)}
    curves: dict[str, Curve] = {f"val/{name}": ([1.0, 2.0], [0.1, 0.9]) for name in labels}
    draw_curves(curves, labels, tmp_path / "x.png", "title")
    draw_comparison([("run", curves), ("other", curves)], labels, tmp_path / "x.png")
    for figure, others in zip(figures, (["learning rate"], []), strict=True):
        assert [axis.get_ylabel() for axis in figure.axes] == [*labels.values(), *others]
    assert [len(axis.lines) for axis in figures[0].axes] == [1] * count + [0]
    compared = [[line for line in axis.lines if len(line.get_xdata())] for axis in figures[1].axes]
    assert [len(lines) for lines in compared] == [2] * count


def test_training_curves_have_the_names_that_the_task_declares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(plotting, "save_figure", lambda figure, path: figures.append(figure))
    curves: dict[str, Curve] = {name: ([1.0], [0.5]) for name in ("train/loss", "val/loss", "train/top1")}
    draw_curves(curves, LABELS, tmp_path / "x.png", "title", {"loss": "training, mixed"})
    draw_comparison([("run", curves)], LABELS, tmp_path / "x.png", "training, mixed")
    legends = [[text.get_text() for text in axis.get_legend().get_texts()] for axis in figures[0].axes[:2]]
    assert legends == [["training, mixed", "validation"], ["training"]]
    assert [text.get_text() for text in figures[1].legends[0].get_texts()] == ["run", "training, mixed", "validation"]


@pytest.mark.parametrize(
    "make",
    [
        lambda name: ([], []),
        lambda name: ([1.0], [0.5]),
        lambda name: ([1.0], [NAN]),
        lambda name: ([1.0, 2.0, 3.0], [2.0, NAN, float("inf")]),
        lambda name: ([epoch / 20 for epoch in range(2000)], [0.5] * 2000),
        lambda name: ([1.0], [0.0]) if name == "train/lr" else ([], []),
    ],
    ids=["empty", "one point", "one NaN", "some NaN", "constant", "only lr"],
)
def test_curves_of_any_length_and_value(make: Callable[[str], Curve], tmp_path: Path) -> None:
    names = ("train/loss", "val/loss", "train/top1", "val/top1", "train/lr")
    draw_curves({name: make(name) for name in names}, LABELS, tmp_path / "curves.png", "title")
    assert min(read(tmp_path / "curves.png").shape[:2]) > 400


def test_a_run_without_metrics_has_an_empty_picture(tmp_path: Path) -> None:
    draw_curves({}, LABELS, tmp_path / "curves.png", "title")
    read(tmp_path / "curves.png")


def test_a_failed_picture_leaves_the_earlier_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "curves.png"
    draw_curves({}, LABELS, path, "title")
    before = path.read_bytes()

    def fail(figure: object, path: Path, **options: object) -> None:
        path.write_bytes(b"half a picture")
        raise OSError("no space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="no space"):
        draw_curves({"train/loss": ([1.0], [0.5])}, LABELS, path, "title")
    assert path.read_bytes() == before


def test_the_most_frequent_mistakes_come_first() -> None:
    pairs = {(0, 0): 9, (0, 2): 2, (1, 0): 5, (1, 1): 9, (2, 1): 1, (2, 2): 9}
    assert _frequent_mistakes(pairs, ["a", "b", "c"]) == [
        "5 × b (1) predicted as a (0)",
        "2 × a (0) predicted as c (2)",
        "1 × c (2) predicted as b (1)",
    ]
    assert _frequent_mistakes(pairs, ["a", "b", "c"], top=1) == ["5 × b (1) predicted as a (0)"]
    assert _frequent_mistakes({(0, 1): 1_234_567}, ["a", "b"]) == ["1.2M × a (0) predicted as b (1)"]


def test_a_font_that_has_the_characters_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plotting, "FONTS", ("cmr10",))
    fonts, missing = plotting._find_fonts("שלום")
    assert (fonts[0], missing) == ("cmr10", set())
    assert any(font.startswith("DejaVu") for font in fonts[1:])
    assert plotting._find_fonts("peace") == (["cmr10"], set())


def test_names_that_no_font_can_draw_are_replaced_by_their_index(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["cat", "猫", "Ärger", "قط", "with\nline"]
    monkeypatch.setattr(
        plotting, "_glyphs", lambda path: frozenset("Ärger") if "DejaVuSans.ttf" in path else frozenset()
    )
    assert drawable_names(names) == ["cat", "class 1", "Ärger", "class 3", "with\nline"]


def test_names_from_right_to_left_are_drawn_without_warnings(tmp_path: Path) -> None:
    names = drawable_names(["חתול", "قطة", "猫", "cat"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_confusion({(0, 0): 1, (1, 2): 3}, names, tmp_path / "x.png", "title")
    read(tmp_path / "x.png")


def test_class_colors_are_a_fixed_palette_of_different_colors() -> None:
    colors = class_colors()
    assert (colors.shape, colors.dtype) == ((256, 3), np.uint8)
    assert len({tuple(color) for color in colors.tolist()}) == 256
    assert colors[255].tolist() == [255, 255, 255]  # ignored
    assert [to_hex(color / 255) for color in colors[:3]] == ["#404040", "#0072b2", "#e69f00"]
    assert zlib.crc32(colors.tobytes()) == 4113533603
    # Any two of the first twenty differ more than neighbors of a hue circle of fifty.
    differences = np.abs(colors[:20, None].astype(int) - colors[None, :20].astype(int)).sum(2) + 1000 * np.eye(20)
    assert differences.min() > 90


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_segmentations_are_drawn_with_their_errors(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, figures = [], []
    monkeypatch.setattr(Axes, "imshow", lambda axis, picture, **options: shown.append(picture))
    monkeypatch.setattr(plotting, "save_figure", lambda figure, path: figures.append(figure))
    image = np.full((8, 10, 3), 200, dtype=np.uint8)
    truth, predicted = np.zeros((4, 5), dtype=np.uint8), np.zeros((4, 5), dtype=np.uint8)
    truth[0], predicted[3] = 255, 2
    draw_segmentations([(image, truth, predicted)] * count, ["a", "b", "c"], tmp_path / "x.png", "a title")
    assert len(shown) == 4 * count
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == ([] if count == 0 else ["a", "c"]) + ["ignored", "wrong"]
    if count:
        assert np.array_equal(shown[1], class_colors()[truth])
        assert np.array_equal(shown[2], class_colors()[predicted])
        wrong = [int(255 * value) for value in to_rgb(WRONG)]
        assert shown[3][3].tolist() == [wrong] * 5
        assert shown[3][0].min() == 255
        assert len(np.unique(shown[3][1:3])) == 1


def test_legends_name_the_classes_with_the_most_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plotting, "save_figure", lambda figure, path: figures.append(figure))
    truth = np.repeat(np.arange(60, dtype=np.uint8), np.arange(60) + 1)[None]
    draw_segmentations(
        [(np.zeros((*truth.shape, 3), dtype=np.uint8), truth, truth)], list(map(str, range(60))), tmp_path, ""
    )
    legend = figures[0].legends[0]
    assert [text.get_text() for text in legend.get_texts()][:-2] == [str(index) for index in range(20, 60)]
    assert legend.get_title().get_text() == "20 more classes have few pixels"


def test_bars_are_in_the_order_of_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plotting, "save_figure", lambda figure, path: figures.append(figure))
    draw_bars([0.25, math.nan, 0.75], ["low", "none", "high"], tmp_path / "x.png", "a title", "IoU")
    (axis,) = figures[0].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["high", "low", "none"]
    assert [text.get_text() for text in axis.texts] == ["0.750", "0.250", "does not occur"]
    assert axis.get_legend().get_texts()[0].get_text() == "mean 0.500"
    assert [bar.get_facecolor()[:3] for bar in axis.patches] == [
        pytest.approx(class_colors()[index] / 255) for index in (2, 0, 1)
    ]


@pytest.mark.parametrize(("count", "text"), [(9999, "9999"), (10_000, "10k"), (2_345_678, "2.3M")])
def test_counts_of_pixels_fit_into_their_cells(
    count: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plotting, "save_figure", lambda figure, path: figures.append(figure))
    draw_confusion({(0, 0): count}, ["a", "b"], tmp_path / "x.png", "")
    assert [each.get_text() for each in figures[0].axes[0].texts] == [text]
