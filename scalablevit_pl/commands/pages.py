"""The pages of `--help`: text files of 80 columns, with the options that people use."""

from pathlib import Path

OVERVIEW = "scalablevit"
FOLDER = Path(__file__).with_name("help")


def read_page(command: str = OVERVIEW) -> str:
    """Return the help page of a command; by default the overview of all commands."""
    return (FOLDER / f"{command}.txt").read_text(encoding="utf-8")


def list_pages() -> list[str]:
    """Return the commands that have a page."""
    return sorted(path.stem for path in FOLDER.glob("*.txt") if path.stem != OVERVIEW)
