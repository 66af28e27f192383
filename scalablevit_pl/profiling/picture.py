"""The picture of a profile."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from scalablevit_pl.models import list_models
from scalablevit_pl.plotting import RUN_COLOURS, save_figure
from scalablevit_pl.profiling.measurement import Result
from scalablevit_pl.profiling.published import Published
from scalablevit_pl.profiling.report import way_of
from scalablevit_pl.text import shorten

MOST_NETWORKS = len(RUN_COLOURS)
MOST_WAYS = 8  # panels of throughput; the accuracies are a ninth
# A network's mark is the same everywhere. Ours are filled on full lines, others hollow on dashed ones.
MARKS = "osD^vP*X"


@dataclass(frozen=True)
class Point:
    """A throughput.

    Attributes:
        network: Name.
        way: In which way it was run, but for the batch.
        batch_size: Images of a call.
        images_per_second: Median.
        comparable: Inference on images of the size for which papers report accuracies.
    """

    network: str
    way: str
    batch_size: int
    images_per_second: float
    comparable: bool


def points(results: Sequence[Result]) -> list[Point]:
    """Return what the picture shows of the results that were measured."""
    return [
        Point(
            result.setting.network,
            way_of(result).replace(f", batch {result.setting.batch_size}", ""),
            result.setting.batch_size,
            rate,
            result.setting.mode == "inference" and result.setting.input_size == (224, 224),
        )
        for result in results
        if (rate := result.images_per_second) is not None
    ]


def draw_profile(points: Sequence[Point], published: Mapping[str, Published], path: Path, title: str) -> None:
    """Draw throughput against batch for each way to run, and published accuracy against throughput.

    The accuracies stand over the throughput of the first way in which inference was measured at 224×224, at the largest
    batch at which all networks that have one were measured.

    Args:
        points: At least one, and of at most `MOST_WAYS` ways.
        published: Accuracies by name of network.
        path: The PNG to write.
        title: Stands above.
    """
    networks = list(dict.fromkeys(point.network for point in points))
    ways = list(dict.fromkeys(point.way for point in points))
    styles = {name: _style(name, index) for index, name in enumerate(networks)}
    chosen = comparable_points(points, published)
    panels = len(ways) + bool(chosen)
    columns = 2 if panels == 4 else min(3, panels)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(max(6.5, 4.6 * columns), 4.2 * rows + 1.2), layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes: list[Axes] = [figure.add_subplot(rows, columns, index + 1) for index in range(panels)]
    for axis, way in zip(axes[: len(ways)], ways, strict=True):
        _draw_throughput(axis, [point for point in points if point.way == way], styles)
        axis.set_title(way, fontsize=10)
    if chosen:
        _draw_accuracy(axes[-1], chosen, published, styles)
    handles = [axes[0].plot([], [], label=shorten(name, 40), **style)[0] for name, style in styles.items()]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(3, columns),
        fontsize=9,
        title="filled marks, full lines: this package; hollow marks, dashed lines: others",
        title_fontsize=8,
    )
    save_figure(figure, path)


def _style(name: str, index: int) -> dict[str, Any]:
    ours = name in list_models() or "/" in name
    colour = RUN_COLOURS[index % len(RUN_COLOURS)]
    return {
        "color": colour,
        "marker": MARKS[index % len(MARKS)],
        "linestyle": "-" if ours else "--",
        "markerfacecolor": colour if ours else "white",
        "markersize": 7.0,
        "markeredgewidth": 1.6,
        "linewidth": 1.8 if ours else 1.3,
    }


def _draw_throughput(axis: Axes, points: Sequence[Point], styles: Mapping[str, dict[str, Any]]) -> None:
    batches = sorted({point.batch_size for point in points})
    for name, style in styles.items():
        line = sorted((point.batch_size, point.images_per_second) for point in points if point.network == name)
        axis.plot([batch for batch, _ in line], [rate for _, rate in line], **style)
    axis.set(xlabel="batch", ylabel="images/s", xscale="log", yscale="log")
    axis.set_xticks(batches, [str(batch) for batch in batches], minor=False)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlim(batches[0] / 1.25, batches[-1] * 1.25)
    ticks = _log_ticks(*axis.get_ylim())
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.3)


def _log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers on a logarithmic axis: of several densities the first that gives three of them.

    On an axis that spans too little for that they stand at equal distances.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks
    return [float(tick) for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]


def comparable_points(points: Sequence[Point], published: Mapping[str, Published]) -> list[Point]:
    """Choose the points over which accuracies are drawn: of one way and one batch, each with a published accuracy."""
    known = [point for point in points if point.comparable and point.network in published]
    known = [point for point in known if point.way == known[0].way]
    networks = {point.network for point in known}
    batches = sorted({point.batch_size for point in known}, reverse=True)
    measured = {batch: [point for point in known if point.batch_size == batch] for batch in batches}
    complete = [batch for batch in batches if {point.network for point in measured[batch]} == networks]
    return measured[complete[0]] if complete else measured[batches[0]] if batches else []


def _draw_accuracy(
    axis: Axes,
    points: Sequence[Point],
    published: Mapping[str, Published],
    styles: Mapping[str, dict[str, Any]],
) -> None:
    for point in points:
        style = styles[point.network] | {"linestyle": "none", "markersize": 10.0}
        axis.plot([point.images_per_second], [published[point.network].top1], **style)
    sources = sorted({published[point.network].source for point in points})
    axis.set_title(f"{points[0].way}, batch {points[0].batch_size}", fontsize=10)
    axis.set_xlabel("images/s\n" + textwrap.fill(f"accuracies of arXiv {', '.join(sources)}", 48))
    axis.set_ylabel("ImageNet top-1 in %\n(published, not measured here)")
    axis.margins(0.15)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.grid(alpha=0.3)
