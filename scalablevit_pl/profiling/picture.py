"""The figure of a profile: throughput, and published accuracies by throughput."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from scalablevit_pl.models import list_models
from scalablevit_pl.plotting import RUN_COLOURS, save_figure
from scalablevit_pl.profiling.measurement import Result
from scalablevit_pl.text import shorten

MOST_NETWORKS = len(RUN_COLOURS)
# A network has the same mark everywhere: filled with solid lines for this package, hollow with dashed lines for others.
MARKS = "osD^vP*X"
Styles = Mapping[str, Mapping[str, Any]]


# ImageNet-1k accuracies in percent, at 224×224 without other training data, by the number of the paper on arXiv. None
# was measured here. A timm name with a tag behind a dot may mean other weights, so it has no entry.
PAPERS = {
    "2203.10790": {"scalablevit_s": 83.1, "scalablevit_b": 84.1, "scalablevit_l": 84.4},
    "2103.14030": {
        "swin_tiny_patch4_window7_224": 81.3,
        "swin_small_patch4_window7_224": 83.0,
        "swin_base_patch4_window7_224": 83.5,
    },
    "2104.13840": {"twins_svt_small": 81.7, "twins_svt_base": 83.2, "twins_svt_large": 83.7},
    "2201.03545": {"convnext_tiny": 82.1, "convnext_small": 83.1, "convnext_base": 83.8},
    "2012.12877": {"deit_tiny_patch16_224": 72.2, "deit_small_patch16_224": 79.8, "deit_base_patch16_224": 81.8},
}
PUBLISHED = {name: (top1, paper) for paper, accuracies in PAPERS.items() for name, top1 in accuracies.items()}


def draw_profile(results: Sequence[Result], path: Path, title: str) -> None:
    """Draw throughput by batch for each way to run, and published accuracy by throughput.

    The panel of accuracies uses the first way in which inference was measured at 224×224, and the largest batch at
    which all networks with a published accuracy were measured.
    """
    measured = [result for result in results if result.seconds]
    networks = list(dict.fromkeys(result.setting.name for result in measured))
    ways = list(dict.fromkeys(map(way_of, measured)))
    styles = {name: _style(name, index) for index, name in enumerate(networks)}
    chosen = comparable_results(measured)
    panels = len(ways) + bool(chosen)
    columns = 2 if panels == 4 else min(3, panels)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(max(6.5, 4.6 * columns), 4.2 * rows + 1.2), layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes: list[Axes] = [figure.add_subplot(rows, columns, index + 1) for index in range(panels)]
    for axis, way in zip(axes[: len(ways)], ways, strict=True):
        _draw_throughput(axis, [result for result in measured if way_of(result) == way], styles)
        axis.set_title(way, fontsize=10)
    if chosen:
        _draw_accuracy(axes[-1], chosen, styles)
    handles = [axes[0].plot([], [], label=shorten(name, 40), **style)[0] for name, style in styles.items()]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(3, columns),
        fontsize=9,
        title="filled marks, solid lines: this package; hollow marks, dashed lines: others",
        title_fontsize=8,
    )
    save_figure(figure, path)


def way_of(result: Result) -> str:
    """Return the title of a result's panel."""
    return f"{result.setting.way}, {result.setting.size}"


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


def _draw_throughput(axis: Axes, results: Sequence[Result], styles: Styles) -> None:
    batches = sorted({result.setting.batch_size for result in results})
    for name, style in styles.items():
        own = [result for result in results if result.setting.name == name]
        line = sorted((result.setting.batch_size, result.images_per_second or 0.0) for result in own)
        axis.plot([batch for batch, _ in line], [rate for _, rate in line], **style)
    axis.set(xlabel="batch", ylabel="images/s", xscale="log", yscale="log")
    axis.set_xticks(batches, [str(batch) for batch in batches], minor=False)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlim(batches[0] / 1.25, batches[-1] * 1.25)
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.3)


def comparable_results(results: Sequence[Result]) -> list[Result]:
    """Select the results with a published accuracy: of one way to run, and of one batch."""
    published = [result for result in results if result.setting.name in PUBLISHED]
    known = [case for case in published if case.setting.mode == "inference" and case.setting.input_size == (224, 224)]
    known = [result for result in known if way_of(result) == way_of(known[0])]
    batches = sorted({result.setting.batch_size for result in known}, reverse=True)
    groups = [[result for result in known if result.setting.batch_size == batch] for batch in batches]
    networks = {result.setting.name for result in known}
    return next((group for group in groups if len(group) == len(networks)), groups[0] if groups else [])


def _draw_accuracy(axis: Axes, results: Sequence[Result], styles: Styles) -> None:
    for result in results:
        name = result.setting.name
        style = {**styles[name], "linestyle": "none", "markersize": 10.0}
        axis.plot([result.images_per_second or 0.0], [PUBLISHED[name][0]], **style)
    sources = sorted({PUBLISHED[result.setting.name][1] for result in results})
    axis.set_title(f"{way_of(results[0])}, batch {results[0].setting.batch_size}", fontsize=10)
    axis.set_xlabel("images/s\n" + textwrap.fill(f"accuracies from arXiv {', '.join(sources)}", 48))
    axis.set_ylabel("ImageNet top-1 in %\n(published, not measured here)")
    axis.margins(0.15)
    axis.grid(alpha=0.3)
