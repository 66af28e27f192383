"""A result of a check: status, subject, text and remedy."""

import re
import textwrap
from dataclasses import dataclass
from typing import Literal

from scalablevit_pl.text import WIDTH

Status = Literal["ok", "warn", "FAIL"]
SENTENCE = re.compile(r"(.*)[:;] (.*)", re.DOTALL)
WIDTHS = (4, 13)  # of status and subject


@dataclass(frozen=True)
class Finding:
    """A row of the doctor's table.

    Attributes:
        status: `ok`, `warn` for a problem a run can tolerate, `FAIL` for one it cannot.
        what: The subject, in a word or two.
        text: What was found.
        remedy: What to do about it, if anything.
    """

    status: Status
    what: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        """Format the row in 80 columns, with the remedy on its own lines."""
        head = f"{self.status:<{WIDTHS[0]}}  {self.what:<{WIDTHS[1]}}  "
        rows = _wrapped(self.text, head) + (_wrapped(f"→ {self.remedy}", " " * len(head), "  ") if self.remedy else [])
        return "\n".join(rows)


def _wrapped(text: str, head: str, hanging: str = "") -> list[str]:
    # Names of files and classes are only broken if they are longer than a line, and never at their hyphens.
    following = " " * len(head) + hanging
    lines = textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=following, break_on_hyphens=False)
    return lines or [head.rstrip()]


def from_sentence(what: str, sentence: str, status: Status = "FAIL") -> Finding:
    """Split the sentence of an error into text and remedy, which follows the last colon or semicolon."""
    parts = SENTENCE.fullmatch(sentence)
    return Finding(status, what, parts[1], parts[2]) if parts else Finding(status, what, sentence)


def gigabytes(size: float) -> str:
    """Format a number of bytes: `1.2 GB`, `350 MB`, `12 kB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}" if size < 10 * unit else f"{size / unit:,.0f} {name}"
    return f"{size / 1e3:.0f} kB"
