"""The pictures of a run. They are drawn without a display, and written aside before they take their name."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

TRAIN, VAL, RATE, WRONG = "#0072B2", "#D55E00", "#555555", "#D55E00"  # told apart by colour-blind people too
Curve = tuple[Sequence[float], Sequence[float]]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    aside = path.with_name(f".{path.name}.part")
    figure.savefig(aside, format="png", dpi=110)
    aside.replace(path)


def draw_curves(curves: Mapping[str, Curve], path: Path, title: str) -> None:
    """Draw loss and accuracy over the epochs, the learning rate below.

    Args:
        curves: Epochs and values by metric name: `train/loss`, `val/loss`, `train/top1`, `val/top1`, `train/lr`.
        path: The PNG to write.
        title: Stands above.
    """
    figure = Figure(figsize=(9.0, 6.0), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplot_mosaic([["loss", "top1"], ["lr", "lr"]], height_ratios=[3, 1])
    for name, label in (("loss", "loss (cross-entropy)"), ("top1", "top-1 accuracy")):
        for part, colour in (("train", TRAIN), ("val", VAL)):
            _draw_curve(
                axes[name], curves.get(f"{part}/{name}"), colour, {"train": "training", "val": "validation"}[part]
            )
        axes[name].set(xlabel="epoch", ylabel=label)
        if axes[name].lines:
            axes[name].legend()
    _draw_curve(axes["lr"], curves.get("train/lr"), RATE, None)
    axes["lr"].set(xlabel="epoch", ylabel="learning rate", ylim=(0, None))
    for axis in axes.values():
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    save_figure(figure, path)


def _draw_curve(axis: Axes, curve: Curve | None, colour: str, label: str | None) -> None:
    if curve is not None and len(curve[0]):
        axis.plot(*curve, color=colour, label=label, marker="o" if len(curve[0]) < 30 else "", markersize=3)


def draw_predictions(
    images: Sequence[npt.NDArray[np.uint8]],
    labels: Sequence[str],
    predictions: Sequence[str],
    probabilities: Sequence[float],
    path: Path,
    title: str,
) -> None:
    """Draw a grid of images with label and prediction, wrong ones marked.

    Args:
        images: Pixels `(H, W, 3)`.
        labels: True class of each image.
        predictions: Predicted class of each image.
        probabilities: Probability of each prediction.
        path: The PNG to write.
        title: Stands above.
    """
    columns = min(8, len(images))
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(1.5 * columns + 0.2, 1.95 * rows + 0.6), layout="constrained")
    figure.suptitle(title)
    for axis in np.atleast_1d(figure.subplots(rows, columns)).flat:
        axis.set_axis_off()
    for axis, image, label, prediction, probability in zip(
        figure.axes, images, labels, predictions, probabilities, strict=False
    ):
        axis.imshow(image, interpolation="nearest" if image.shape[0] < 100 else "antialiased")
        if label == prediction:
            axis.set_title(f"{_short(label)}\n{probability:.0%}", fontsize=8)
        else:
            axis.set_title(f"✗ {_short(prediction)} {probability:.0%}\nis {_short(label)}", fontsize=8, color=WRONG)
            frame = mpl.patches.Rectangle((0, 0), 1, 1, transform=axis.transAxes, fill=False, color=WRONG, linewidth=4)
            axis.add_patch(frame)
    save_figure(figure, path)


def draw_confusion(counts: npt.NDArray[np.int64], class_names: Sequence[str], path: Path, title: str) -> None:
    """Draw a confusion matrix: each row a true class, shaded by the share of its images.

    Args:
        counts: `(K, K)`, images of class i that were called j.
        class_names: Names of the K classes; left out where they would not be legible.
        path: The PNG to write.
        title: Stands above.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    classes = len(class_names)
    side = min(14.0, max(5.0, 2.5 + 0.55 * classes))
    figure = Figure(figsize=(side + 1.0, side), layout="constrained")
    axis = figure.subplots()
    picture = axis.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    figure.colorbar(picture, ax=axis, shrink=0.8, label="share of the true class")
    axis.set(title=title, xlabel="predicted class", ylabel="true class")
    if classes <= 30:
        names = [_short(name) for name in class_names]
        axis.set_xticks(range(classes), names, rotation=45, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(classes), names)
    if classes <= 20:
        for row, column in np.argwhere(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=8)
    save_figure(figure, path)


def _short(name: str, length: int = 16) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"
