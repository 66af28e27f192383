"""Text for messages, tables and figures."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

WIDTH = 80  # columns of a terminal

# All but the tab and the line end, and halves of characters, which cannot be written at all.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(message: object, length: int | None = 300) -> str:
    """Return a message, such as an error's, on one line of limited length; the type's name where it is empty."""
    return " ".join(str(message).split())[:length] or type(message).__name__


def visible(text: str) -> str:
    """Escape what a terminal would obey instead of showing: control characters and marks that reorder text."""
    return CONTROL.sub(lambda sign: sign[0].encode("unicode_escape").decode(), text)


def as_cell(text: str) -> str:
    """Return a text as a cell of a CSV file, which no spreadsheet runs as a formula.

    A text that begins with one of `= + - @ '`, a tab or a line end gets a `'` in front; `cell.removeprefix("'")`
    restores it. Bytes of a file name that are not UTF-8 are escaped.
    """
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return f"'{text}" if text.startswith(tuple("=+-@'\t\r\n")) else text


def shorten(name: str, length: int = 16) -> str:
    """Shorten a name in the middle: names that begin alike often end differently."""
    name = " ".join(name.split())
    return name if len(name) <= length else f"{name[: length // 2]}…{name[length // 2 + 1 - length :]}"


def aligned(rows: Iterable[Sequence[str]]) -> str:
    """Align cells in 80 columns: the first column to the left, shortened if necessary, the others to the right."""
    lines = list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths[0] = min(widths[0], WIDTH - sum(2 + width for width in widths[1:]))
    return "".join(
        f"{shorten(name, widths[0]):<{widths[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        + "\n"
        for name, *cells in lines
    )


def listed(names: Iterable[str], limit: int = 5, separator: str = ", ") -> str:
    """Join the first names of a list, and say how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return separator.join(names[:limit]) + more


def nfc(name: str) -> str:
    """Return a name in Unicode's form NFC: names that look alike become equal."""
    return unicodedata.normalize("NFC", name)


def gigabytes(size: float) -> str:
    """Format a number of bytes: `1.2 GB`, `350 MB`, `12 kB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}" if size < 10 * unit else f"{size / unit:,.0f} {name}"
    return f"{size / 1e3:.0f} kB"
