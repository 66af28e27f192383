"""A result of a check: status, subject, text and remedy."""

import re
import textwrap
from dataclasses import dataclass
from functools import partial
from typing import Literal

from scalablevit_pl.text import WIDTH

Status = Literal["ok", "warn", "FAIL"]
SENTENCE = re.compile(r"(.*)[:;] (.*)", re.DOTALL)


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
        head = f"{self.status:<4}  {self.what:<13}  "
        room = " " * len(head)
        wrap = partial(textwrap.wrap, width=WIDTH, break_on_hyphens=False)  # which names of files and classes contain
        rows = wrap(self.text, initial_indent=head, subsequent_indent=room)
        if self.remedy:
            rows += wrap(f"→ {self.remedy}", initial_indent=room, subsequent_indent=f"{room}  ")
        return "\n".join(rows)


def from_sentence(what: str, sentence: str, status: Status = "FAIL") -> Finding:
    """Split the sentence of an error into text and remedy, which follows the last colon or semicolon."""
    parts = SENTENCE.fullmatch(sentence)
    return Finding(status, what, parts[1], parts[2]) if parts else Finding(status, what, sentence)
