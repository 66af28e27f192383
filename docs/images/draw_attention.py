"""Draw `attention.png`, the diagram of both attentions and of the stages: python docs/images/draw_attention.py."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.path import Path as Polyline
from PIL import Image

WIDTH, HEIGHT = 800, 728  # in the README's pixels, 100 per inch; the file has twice as many in each direction
INK, SOFT, LINE = "#222222", "#555555", "#8C8C8C"
# The palette of Okabe and Ito, which colour-blind readers can distinguish, and tints of it.
BLUE, VERMILION, SKY, ORANGE, GREEN = "#0072B2", "#D55E00", "#56B4E9", "#E69F00", "#009E73"
PALE_SKY, PALE_ORANGE, PALE_GREEN, PALE_VERMILION = "#DDF0FB", "#FCEFCF", "#CDEBE1", "#FBE3D2"
SEEN_BLUE, SEEN_VERMILION, SEEN_GREEN = "#BBDDF1", "#F6C7A6", "#7CCBB2"
GREY, UNSEEN = "#F3F3F3", "#E6E9EC"

CellColour = Callable[[int, int], str]


class Drawing:
    """A white canvas with the origin at the top left."""

    def __init__(self, width: int, height: int) -> None:
        self.figure = Figure(figsize=(width / 100, height / 100), dpi=200, facecolor="white")
        self.canvas = FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")

    def text(self, x: float, y: float, words: str, size: float = 8.5, colour: str = INK, **style: str) -> None:
        settings = {"ha": "center", "va": "center_baseline", "linespacing": 1.4, **style}
        self.axes.text(x, y - 1, words, size=size, color=colour, **settings)

    def box(self, x: float, y: float, width: float, height: float, fill: str, edge: str, radius: float = 5) -> None:
        style = f"round,pad=0,rounding_size={radius}"
        self.axes.add_patch(
            FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=fill, edgecolor=edge, lw=0.9)
        )

    def operation(self, x: float, y: float, words: str, width: float, height: float = 22) -> None:
        """Draw the box of an operation, given its centre."""
        self.box(x - width / 2, y - height / 2, width, height, GREY, LINE)
        self.text(x, y, words, 8.5)

    def tensor(self, x: float, top: float, name: str, shape: str, size: tuple[float, float]) -> None:
        """Draw a matrix of query, key or value: its name above its shape."""
        width, height = size
        fill, edge = {"q": (PALE_SKY, SKY), "k": (PALE_ORANGE, ORANGE), "v": (PALE_GREEN, GREEN)}[name]
        self.box(x - width / 2, top, width, height, fill, edge, radius=2)
        self.text(x, top + height / 2 - 8, name, 10, weight="bold")
        self.text(x, top + height / 2 + 9, shape)

    def grid(self, x: float, y: float, cell: float, count: int, colour: CellColour) -> None:
        """Draw a map of count × count tokens."""
        for row in range(count):
            for column in range(count):
                corner = (x + column * cell, y + row * cell)
                patch = Rectangle(corner, cell, cell, facecolor=colour(row, column), edgecolor="white", lw=0.7)
                self.axes.add_patch(patch)
        self.frame(x, y, count * cell, LINE, 0.9)

    def frame(self, x: float, y: float, side: float, colour: str, line_width: float = 1.6) -> None:
        style = {"edgecolor": colour, "lw": line_width, "joinstyle": "miter", "zorder": 3}  # above the lines
        self.axes.add_patch(Rectangle((x, y), side, side, fill=False, **style))

    def line(self, *points: tuple[float, float], colour: str = INK) -> None:
        self.axes.plot(*zip(*points, strict=True), color=colour, lw=1.1, solid_capstyle="butt", solid_joinstyle="miter")

    def arrow(self, *points: tuple[float, float], colour: str = INK) -> None:
        """Draw a polyline whose last point is the tip of an arrow."""
        style = "-|>,head_length=3.2,head_width=1.7"
        arrow = FancyArrowPatch(path=Polyline(points), arrowstyle=style, color=colour, lw=1.1, joinstyle="miter")
        arrow.set_mutation_scale(1.6)
        self.axes.add_patch(arrow)

    def dot(self, x: float, y: float) -> None:
        self.axes.add_patch(Circle((x, y), 2.4, color=INK))

    def plus(self, x: float, y: float) -> None:
        self.axes.add_patch(Circle((x, y), 9, facecolor="white", edgecolor=INK, lw=1.1))
        self.line((x - 5, y), (x + 5, y))
        self.line((x, y - 5), (x, y + 5))

    def save(self, path: Path) -> None:
        """Write a PNG of 256 colours, without versions and dates: equal drawings give equal files."""
        self.canvas.draw()
        image = Image.fromarray(np.asarray(self.canvas.buffer_rgba())).convert("RGB")
        image.quantize(256, dither=Image.Dither.NONE).save(path, format="PNG", optimize=True)


def neutral(*_cell: int) -> str:
    return UNSEEN


def draw_panel(sheet: Drawing, left: float, name: str, full_name: str, gist: str, colour: str) -> None:
    """Draw the frame, the headings and the input map."""
    sheet.box(left, 8, 388, 536, "white", colour, radius=8)
    sheet.text(left + 20, 32, name, 12.5, colour, ha="left", weight="bold")
    sheet.text(left + 27 + 12.6 * len(name), 32, full_name, 9.5, ha="left")
    sheet.text(left + 20, 54, gist, colour=SOFT, ha="left")
    sheet.text(left + 20, 83, "N tokens, C channels", ha="left")
    sheet.grid(left + 20, 94, 12, 8, neutral)


def draw_result(sheet: Drawing, left: float, colour: CellColour, seen: Sequence[tuple[str, str]]) -> None:
    """Draw the output map, coloured by what one of its tokens depends on, and the legend."""
    sheet.grid(left + 20, 432, 12, 8, colour)
    sheet.frame(left + 20 + 36, 432 + 36, 12, INK)
    sheet.text(left + 136, 440, "What one output token depends on", ha="left", weight="bold")
    for index, (fill, words) in enumerate(seen):
        y = 462 + 20 * index
        sheet.axes.add_patch(Rectangle((left + 137, y - 6), 12, 12, facecolor=fill, edgecolor=LINE, lw=0.6))
        sheet.text(left + 157, y, words, ha="left")


def draw_scalable_attention(sheet: Drawing, left: float) -> None:
    """Draw SSA: many queries, few keys and values."""
    draw_panel(
        sheet,
        left,
        "SSA",
        "scalable self-attention",
        "all tokens query keys and values of a reduced map",
        BLUE,
    )
    query, key, value = left + 68, left + 236, left + 328

    for offset in (24, 48, 72):
        sheet.line((left + 20 + offset, 94), (left + 20 + offset, 190), colour=LINE)
        sheet.line((left + 20, 94 + offset), (left + 116, 94 + offset), colour=LINE)
    draw_reduction(sheet, left, value)

    sheet.arrow((query, 190), (query, 250))
    sheet.arrow((value, 166), (value, 250))
    sheet.arrow((value, 194), (key, 194), (key, 250))
    sheet.dot(value, 194)
    for x in (query, key, value):
        sheet.operation(x, 219, "Linear", 54)
    sheet.tensor(query, 250, "q", "N × C′", (76, 62))
    sheet.tensor(key, 250, "k", "N/s² × C′", (76, 40))
    sheet.tensor(value, 250, "v", "N/s² × C", (76, 40))

    for x, bottom in ((query, 312), (key, 290), (value, 290)):
        sheet.arrow((x, bottom), (x, 334))
    sheet.operation(left + 198, 348, "softmax(scale · q kᵀ) v", 336, 28)
    sheet.arrow((query, 362), (query, 432))
    sheet.operation(query, 394, "Linear", 54)
    sheet.text(left + 136, 382, "C′ = int(C · c): c scales the channels", ha="left")
    sheet.text(left + 136, 400, "of q and k, s the number of k and v", ha="left")
    draw_result(
        sheet,
        left,
        lambda row, column: SKY if (row, column) == (3, 3) else SEEN_BLUE,
        [
            (SKY, "the token itself"),
            (SEEN_BLUE, "the whole map: N · N/s² products"),
        ],
    )
    sheet.text(left + 157, 502, "instead of N · N", ha="left")


def draw_reduction(sheet: Drawing, left: float, value: float) -> None:
    """Draw the reduction of s×s tokens to one."""
    for x, y, side in ((left + 92, 166, 24), (value + 12, 154, 12)):
        sheet.axes.add_patch(Rectangle((x, y), side, side, facecolor=PALE_ORANGE))
    sheet.arrow((left + 116, 142), (left + 131, 142))
    sheet.box(left + 131, 106, 156, 72, GREY, LINE)
    for y, words in ((121, "depthwise s×s, stride s"), (142, "1×1 convolution"), (163, "LayerNorm, GELU")):
        sheet.text(left + 209, y, words)
    sheet.arrow((left + 287, 142), (value - 24, 142))
    sheet.text(value, 83, "N/s² tokens,")
    sheet.text(value, 101, "C′ channels")
    sheet.grid(value - 24, 118, 12, 4, lambda row, column: PALE_ORANGE if (row, column) == (3, 3) else UNSEEN)
    sheet.frame(left + 92, 166, 24, ORANGE)
    sheet.frame(value + 12, 154, 12, ORANGE)


def draw_window_attention(sheet: Drawing, left: float) -> None:
    """Draw IWSA: attention inside windows and the convolution that connects them."""
    gist = "attention inside windows, a convolution between them"
    draw_panel(sheet, left, "IWSA", "interactive window self-attention", gist, VERMILION)
    windows, query, key, value = left + 68, left + 220, left + 278, left + 336

    for row in (0, 48):
        for column in (0, 48):
            sheet.frame(left + 20 + column, 94 + row, 48, VERMILION, 1.3)
    sheet.arrow((left + 116, 142), (left + 191, 142))
    sheet.operation(left + 150, 142, "Linear", 54)
    for x, name in ((query, "q"), (key, "k"), (value, "v")):
        sheet.tensor(x, 122, name, "N × C", (58, 40))

    sheet.line((query, 162), (query, 206))
    sheet.line((key, 162), (key, 206))
    sheet.arrow((value, 206), (windows, 206), (windows, 233))
    sheet.arrow((value, 162), (value, 240))
    for x in (query, key, value):
        sheet.dot(x, 206)
    sheet.operation(left + 139, 206, "cut into windows", 112)
    sheet.box(windows - 43, 233, 86, 86, "white", LINE, radius=2)
    for row in (0, 42):
        for column in (0, 42):
            sheet.grid(windows - 39 + column, 237 + row, 9, 4, neutral)
            sheet.frame(windows - 39 + column, 237 + row, 36, VERMILION, 1.3)
    sheet.text(windows + 52, 268, "w × w tokens", ha="left")
    sheet.text(windows + 52, 286, "in each", ha="left")
    sheet.grid(value - 36, 240, 9, 8, neutral)
    sheet.frame(value - 36 + 18, 240 + 18, 27, GREEN)
    sheet.text(value - 48, 268, "v as the", ha="right")
    sheet.text(value - 48, 286, "whole map", ha="right")

    sheet.arrow((windows, 319), (windows, 334))
    sheet.arrow((value, 312), (value, 334))
    sheet.operation(left + 102, 348, "softmax(scale · q kᵀ) v", 164, 28)
    sheet.operation(left + 297, 348, "LIM: depthwise 3×3", 138, 28)
    sheet.arrow((windows, 362), (windows, 432))
    sheet.arrow((value, 362), (value, 381), (windows + 9, 381))
    sheet.plus(windows, 381)
    sheet.operation(windows, 406, "Linear", 54)
    draw_result(
        sheet,
        left,
        window_colour,
        [
            (SKY, "the token itself"),
            (SEEN_VERMILION, "its window, w × w"),
            (SEEN_GREEN, "through LIM: its 3×3 neighbours"),
        ],
    )
    sheet.text(left + 157, 522, "across the border", ha="left")


def window_colour(row: int, column: int) -> str:
    """Choose the colour of a cell for the token in row 3, column 3, at the corner of its window."""
    if (row, column) == (3, 3):
        return SKY
    if row < 4 and column < 4:
        return SEEN_VERMILION
    return SEEN_GREEN if 2 <= row <= 4 and 2 <= column <= 4 else UNSEEN


def draw_stages(sheet: Drawing, top: float) -> None:
    """Draw the order of the blocks in a stage, and the four stages."""
    sheet.box(8, top, 784, 164, "white", LINE, radius=8)
    sheet.text(28, top + 32, "A stage", 9.5, ha="left", weight="bold")
    windowed, scalable = (PALE_VERMILION, VERMILION), (PALE_SKY, BLUE)
    draw_chain(
        sheet,
        130,
        top + 32,
        28,
        24,
        [
            ("patch embedding", 122, (GREY, LINE)),
            ("IWSA", 60, windowed),
            ("PEG", 54, (PALE_GREEN, GREEN)),
            ("SSA", 60, scalable),
            ("IWSA", 60, windowed),
            ("SSA", 60, scalable),
            ("…", 30, ("white", "white")),
        ],
    )
    words = (
        "Blocks of IWSA and SSA alternate; each ends with an MLP. PEG: x + depthwise 3×3, once, after the first block."
    )
    sheet.text(28, top + 66, words, colour=SOFT, ha="left")
    sheet.text(28, top + 104, "Four stages", 9.5, ha="left", weight="bold")
    stages = [
        (f"stride {stride}, s = {ratio}", 112, (GREY, LINE)) for stride, ratio in ((4, 8), (8, 4), (16, 2), (32, 1))
    ]
    draw_chain(sheet, 130, top + 104, 28, 18, [("image", 54, ("white", LINE)), *stages, ("head", 50, ("white", LINE))])
    words = "Windows have w = 7; s = 1 means no reduction. The drawings above use s = 2 and w = 4."
    sheet.text(28, top + 138, words, colour=SOFT, ha="left")


def draw_chain(
    sheet: Drawing, x: float, y: float, height: float, gap: float, links: Sequence[tuple[str, float, tuple[str, str]]]
) -> None:
    """Draw boxes from left to right with arrows between them; each has words, a width and colours."""
    for index, (words, width, (fill, edge)) in enumerate(links):
        if index:
            sheet.arrow((x - gap, y), (x, y))
        sheet.box(x, y - height / 2, width, height, fill, edge)
        sheet.text(x + width / 2, y, words)
        x += width + gap


def draw(path: Path) -> None:
    """Draw the diagram and save it as PNG."""
    sheet = Drawing(WIDTH, HEIGHT)
    draw_scalable_attention(sheet, 8)
    draw_window_attention(sheet, 404)
    draw_stages(sheet, 556)
    sheet.save(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the two attentions of ScalableViT.")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("attention.png"))
    draw(parser.parse_args(arguments).out)


if __name__ == "__main__":
    main()
