"""Pictures of a run, drawn without a display and written atomically."""

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font_names
from matplotlib.ft2font import FT2Font
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from scalablevit_pl.storage import written_aside
from scalablevit_pl.text import shorten

# Distinguishable for colour-blind people.
TRAIN, VAL, EMA, RATE, WRONG = "#0072B2", "#D55E00", "#009E73", "#555555", "#D55E00"
# Okabe and Ito's palette without the yellow, which vanishes on white, and two more dark colours.
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")
# The first is matplotlib's own; each of the others has Chinese, Japanese and Korean glyphs on some system.
FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Hiragino Sans", "Microsoft YaHei", "WenQuanYi Zen Hei")
# Most classes with which a confusion matrix shows numbers, names, and cells at all.
LEGIBLE_COUNTS, LEGIBLE_NAMES, LEGIBLE_CELLS = 20, 30, 1000
LEGIBLE_LEGEND = 40  # most classes in a legend
PARTS = {
    "train": (TRAIN, "--", "training"),
    "val": (VAL, "-", "validation"),
    "val_ema": (EMA, ":", "validation, averaged weights"),
}
Curve = tuple[Sequence[float], Sequence[float]]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; names in it are plain text, without math markup."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_fontfamily(_find_fonts(text.get_text())[0])
    with written_aside(path) as aside, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # no installed font has it; the tables do
        figure.savefig(aside, format="png", dpi=110)


def drawable_names(names: Sequence[str]) -> list[str]:
    """Return names of classes as pictures show them: by their index if no installed font has their characters."""
    return [f"class {index}" if _find_fonts(name)[1] else name for index, name in enumerate(names)]


def _find_fonts(text: str) -> tuple[list[str], set[str]]:
    """Return the usual fonts and those others that a text needs, and its characters that no installed font has."""
    families = [font for font in FONTS if font in get_font_names()]
    missing = {character for character in text if character.isprintable() and not character.isspace()}
    if text.isascii():
        return families, set()
    for font in sorted(fontManager.ttflist, key=lambda font: font.name not in families):  # the usual ones first
        if missing & _glyphs(font.fname) and not font.name.startswith("Last Resort"):  # which has a box for each
            families.append(font.name)
            missing -= _glyphs(font.fname)
    return families, missing


@cache
def _glyphs(path: str) -> frozenset[str]:
    """Return the characters of a font file; none of one that matplotlib cannot draw."""
    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):
        return frozenset()
    return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()


def draw_curves(
    curves: Mapping[str, Curve],
    labels: Mapping[str, str],
    path: Path,
    title: str,
    training: Mapping[str, str] | None = None,
) -> None:
    """Draw metrics over the epochs side by side, the learning rate below.

    `curves` may hold `{train,val,val_ema}/NAME` and `train/lr`; `labels` has the axis label of each NAME,
    `training` other names of the training curves.
    """
    figure = Figure(figsize=(4.5 * max(2, len(labels)), 6.0), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplot_mosaic([list(labels), ["lr"] * len(labels)], height_ratios=[3, 1])
    for name, label in labels.items():
        for part, (colour, _, meaning) in PARTS.items():
            meaning = (training or {}).get(name, meaning) if part == "train" else meaning
            _draw_curve(axes[name], curves.get(f"{part}/{name}"), colour, label=meaning)
        axes[name].set(xlabel="epoch", ylabel=label)
        if axes[name].lines:
            axes[name].legend()
    _draw_curve(axes["lr"], curves.get("train/lr"), RATE)
    axes["lr"].set(xlabel="epoch", ylabel="learning rate", ylim=(0, None))
    last = max((epoch for epochs, _ in curves.values() for epoch in epochs), default=1.0)
    for axis in axes.values():
        _style(axis)
        axis.set_xlim(0.0, 1.03 * max(1.0, last))
    save_figure(figure, path)


def draw_comparison(
    runs: Sequence[tuple[str, Mapping[str, Curve]]], labels: Mapping[str, str], path: Path, training: str = "training"
) -> None:
    """Draw metrics of several runs over the epochs, each run in its own colour, with curves as for `draw_curves`."""
    figure = Figure(figsize=(5.5 * max(2, len(labels)), 5.6), layout="constrained")
    axes = dict(zip(labels, np.atleast_1d(figure.subplots(1, len(labels))), strict=True))
    handles, drawn = [], set()
    for (name, curves), colour in zip(runs, RUN_COLOURS, strict=False):
        handles.append(Line2D([], [], color=colour, linewidth=3, label=shorten(name, 40)))
        for key, values in curves.items():
            part, _, metric = key.partition("/")
            if _draw_curve(axes[metric], values, colour, linestyle=PARTS[part][1]):
                drawn.add(part)
    for part, (_, style, meaning) in PARTS.items():
        if part in drawn:
            label = training if part == "train" else meaning
            handles += axes[next(iter(labels))].plot([], [], style, color=RATE, label=label)
    for name, label in labels.items():
        axes[name].set(xlabel="epoch", ylabel=label)
        _style(axes[name])
        axes[name].set_xlim(left=0.0)
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    save_figure(figure, path)


def _style(axis: Axes) -> None:
    axis.grid(alpha=0.3)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_curve(axis: Axes, curve: Curve | None, colour: str, **style: Any) -> bool:
    """Draw a curve with at least one finite value, and return whether it has one."""
    if curve is None or not np.isfinite(curve[1]).any():
        return False
    axis.plot(*curve, color=colour, marker="o" if len(curve[0]) < 30 else "", markersize=3, **style)
    return True


def draw_predictions(
    images: Sequence[npt.NDArray[np.uint8]],
    labels: Sequence[str],
    predictions: Sequence[str],
    probabilities: Sequence[float],
    path: Path,
    title: str,
) -> None:
    """Draw a grid of images `(H, W, 3)` with label, prediction and its probability; wrong predictions are marked."""
    columns = max(1, min(8, len(images)))
    rows = max(1, math.ceil(len(images) / columns))
    figure = Figure(figsize=(max(6.0, 1.5 * columns + 0.2), 1.95 * rows + 0.6), layout="constrained")
    figure.suptitle(title)
    for axis in np.atleast_1d(figure.subplots(rows, columns)).flat:
        axis.set_axis_off()
    for axis, image, label, prediction, probability in zip(
        figure.axes, images, labels, predictions, probabilities, strict=False
    ):
        axis.imshow(image, interpolation="nearest" if image.shape[0] < 100 else "antialiased")
        if label == prediction:
            axis.set_title(f"{shorten(label)}\n{probability:.0%}", fontsize=8)
        else:
            axis.set_title(f"✗ {shorten(prediction)} {probability:.0%}\nis {shorten(label)}", fontsize=8, color=WRONG)
            frame = Rectangle((0, 0), 1, 1, transform=axis.transAxes, fill=False, color=WRONG, linewidth=4)
            axis.add_patch(frame)
    save_figure(figure, path)


def draw_confusion(pairs: Mapping[tuple[int, int], int], class_names: Sequence[str], path: Path, title: str) -> None:
    """Draw a confusion matrix: each row is a true class, shaded by the share of its images or pixels.

    `pairs` counts those of each pair (true class, predicted class) that occurs. Names are omitted where they would
    not be legible. With more than a thousand classes, the picture lists the most frequent mistakes instead.
    """
    classes = len(class_names)
    mistakes = "most frequent mistakes\n\n" + "\n".join(_frequent_mistakes(pairs, class_names))
    if classes > LEGIBLE_CELLS:
        figure = Figure(figsize=(8.0, 9.0))
        figure.text(0.05, 0.93, f"matrix of {classes:,} classes not drawn, {mistakes}", va="top", fontsize=11)
    else:
        figure = _draw_matrix(pairs, class_names, mistakes)
    figure.suptitle(title)
    save_figure(figure, path)


def _draw_matrix(pairs: Mapping[tuple[int, int], int], class_names: Sequence[str], mistakes: str) -> Figure:
    classes = len(class_names)
    counts = np.zeros((classes, classes), dtype=np.int64)
    for pair, count in pairs.items():
        counts[pair] = count
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(14.0, max(5.0, 2.5 + 0.55 * classes))
    named = classes <= LEGIBLE_NAMES
    figure = Figure(figsize=(side + (1.0 if named else 5.0), side), layout="constrained")
    axis, beside = figure.subplots(1, 2, width_ratios=[side, 0.01 if named else 4.0])
    beside.set_axis_off()
    # Where a class is a pixel or two wide, small shares would vanish on a linear scale.
    norm = PowerNorm(1.0 if named else 0.4, vmin=0.0, vmax=1.0)
    picture = axis.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest")
    figure.colorbar(picture, ax=axis, shrink=0.8, label="share of the true class")
    axis.set(xlabel="predicted class", ylabel="true class")
    if named:
        names = [shorten(name) for name in class_names]
        axis.set_xticks(range(classes), names, rotation=45, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(classes), names)
    else:
        beside.text(0.0, 1.0, mistakes, va="top", fontsize=11)
    if classes <= LEGIBLE_COUNTS:
        for row, column in np.argwhere(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, _short(counts[row, column]), ha="center", va="center", color=colour, fontsize=8)
    return figure


def _short(count: int) -> str:
    """Return a count with at most four characters or so: `9999`, `12k`, `3.4M`."""
    if count < 10_000:
        return str(count)
    return f"{count / 1e3:.0f}k" if count < 1_000_000 else f"{count / 1e6:.1f}M"


def _frequent_mistakes(pairs: Mapping[tuple[int, int], int], class_names: Sequence[str], top: int = 40) -> list[str]:
    mistakes = sorted((-count, *pair) for pair, count in pairs.items() if pair[0] != pair[1])
    return [
        f"{_short(-count)} × {shorten(class_names[true])} ({true}) predicted as {shorten(class_names[wrong])} ({wrong})"
        for count, true, wrong in mistakes[:top]
    ]


@cache
def class_colors() -> npt.NDArray[np.uint8]:
    """Return the colours `(256, 3)` of all classes that a mask can have; the last, of ignored pixels, is white.

    The first ones are distinguishable for colour-blind people. Each of the others is the one that differs most from all
    before it and from the mark of wrong pixels, in the space OKLab.
    """
    names = (WRONG, "#FFFFFF", "#404040", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#56B4E9", "#8C564B")
    first = [mpl.colors.to_rgb(name) for name in names]
    levels = np.linspace(0.0, 1.0, 16)
    candidates = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    space = _oklab(candidates)
    candidates, space = (each[(space[:, 0] > 0.3) & (space[:, 0] < 0.93)] for each in (candidates, space))
    colors = list(first)
    distances = np.min([((space - _oklab(np.array(color))) ** 2).sum(axis=1) for color in first], axis=0)
    while len(colors) < 257:
        farthest = int(distances.argmax())
        colors.append(tuple(candidates[farthest]))
        distances = np.minimum(distances, ((space - space[farthest]) ** 2).sum(axis=1))
    return (np.array([*colors[2:], colors[1]]) * 255.0).round().astype(np.uint8)


def _oklab(colors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Convert sRGB `(…, 3)` from 0 to 1 to OKLab, whose distances are visible ones.

    Source: https://bottosson.github.io/posts/oklab
    """
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    lab: npt.NDArray[np.float64] = np.cbrt(cones) @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )
    return lab.round(6)  # the same on any machine


def draw_segmentations(
    images: Sequence[Sequence[npt.NDArray[np.uint8]]],
    class_names: Sequence[str],
    path: Path,
    title: str,
) -> None:
    """Draw images with their true and predicted classes and the wrong pixels, and a legend of the classes.

    Each of `images` is an image `(H, W, 3)`, and its true and predicted classes, both `(h, w)`; 255 is ignored.
    """
    across = 2 if len(images) > 2 else 1
    rows = max(1, math.ceil(len(images) / across))
    pixels = sum((np.bincount(part.ravel(), minlength=256) for _, *parts in images for part in parts), np.zeros(256))
    order = [index for index in np.argsort(-pixels, kind="stable").tolist() if index < 255 and pixels[index]]
    named = sorted(order[:LEGIBLE_LEGEND])
    colors = class_colors()
    handles = [Patch(color=colors[index] / 255.0, label=shorten(class_names[index], 24)) for index in named]
    handles.append(Patch(facecolor="white", edgecolor="black", label="ignored"))
    handles.append(Patch(color=WRONG, label="wrong"))
    columns = 4 * across
    height = 1.9 * rows + 0.25 * math.ceil(len(handles) / columns) + 1.0
    figure = Figure(figsize=(1.9 * columns, height), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for place, (image, truth, predicted) in enumerate(images):
        panels = {"image": image, "truth": colors[truth], "prediction": colors[predicted]}
        panels["errors"] = _errors(image, truth, predicted)
        first = 4 * (place % across)
        for axis, (name, panel) in zip(axes[place // across, first : first + 4], panels.items(), strict=True):
            axis.imshow(panel, interpolation="nearest")
            axis.set_title(name if place < across else "", fontsize=10)
    more = f"{len(order) - len(named)} more classes have few pixels" if len(order) > len(named) else None
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9, title=more)
    save_figure(figure, path)


def _errors(
    image: npt.NDArray[np.uint8], truth: npt.NDArray[np.uint8], predicted: npt.NDArray[np.uint8]
) -> npt.NDArray[np.uint8]:
    """Return an image in gray `(h, w, 3)` with wrong pixels in colour, ignored ones in white."""
    lines, columns = (np.arange(new) * old // new for old, new in zip(image.shape, truth.shape, strict=False))
    gray = image[lines][:, columns].mean(axis=2, keepdims=True) / 255.0
    marked = np.where((truth != predicted)[..., None], mpl.colors.to_rgb(WRONG), 0.2 + 0.6 * gray)
    marked[truth == 255] = 1.0
    return (255.0 * marked).astype(np.uint8)


def draw_bars(values: Sequence[float], class_names: Sequence[str], path: Path, title: str, label: str) -> None:
    """Draw a bar for each class in the order of the values, from 0 to 1; classes whose value is NaN are listed last."""
    order = sorted(range(len(values)), key=lambda index: (math.isnan(values[index]), -np.nan_to_num(values[index])))
    figure = Figure(figsize=(8.0, 1.6 + 0.22 * len(values)), layout="constrained")
    figure.suptitle(title)
    axis = figure.subplots()
    drawn = [np.nan_to_num(values[index]) for index in order]
    axis.barh(range(len(order)), drawn, color=class_colors()[order] / 255.0)
    for place, index in enumerate(order):
        text = "does not occur" if math.isnan(values[index]) else f"{values[index]:.3f}"
        axis.text(drawn[place] + 0.01, place, text, va="center", fontsize=8, backgroundcolor="white")
    mean = float(np.nanmean(values)) if not np.isnan(values).all() else math.nan
    axis.axvline(mean, color=RATE, linestyle="--", zorder=0, label=f"mean {mean:.3f}")
    axis.set_yticks(range(len(order)), [shorten(class_names[index], 24) for index in order], fontsize=8)
    axis.set(xlim=(0.0, 1.08), ylim=(len(order) - 0.4, -0.6), xlabel=label)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="lower right")
    save_figure(figure, path)
