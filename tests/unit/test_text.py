import pytest

from scalablevit_pl.text import aligned, as_cell, gigabytes, one_line, shorten, visible


def test_long_names_keep_both_ends() -> None:
    assert shorten("a very long class name 1") == "a very l… name 1"
    assert shorten("two\nlines\tand more") == "two line…nd more"
    assert shorten("exactly sixteen!") == "exactly sixteen!"
    assert shorten("one two three four", 7) == "one…our"


def test_tables_are_aligned_in_80_columns() -> None:
    assert aligned([("name", "ms"), ("a", "1.25"), ("longer", "30")]) == "name      ms\na       1.25\nlonger    30\n"
    lines = aligned([("x" * 100, "1"), ("short", "y" * 40)]).splitlines()
    assert [len(line) for line in lines] == [80, 80]
    assert lines[0].startswith("x" * 19 + "…" + "x" * 18)


@pytest.mark.parametrize(
    ("message", "line"),
    [(ValueError("a\n  b\tc"), "a b c"), (KeyError(), "KeyError"), ("", "str"), ("x" * 400, "x" * 300)],
)
def test_messages_become_one_line(message: object, line: str) -> None:
    assert one_line(message) == line
    assert one_line("x" * 400, None) == "x" * 400


@pytest.mark.parametrize("text", ["=1+1", "+1", "-cat.png", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "'quoted'", "''"])
def test_cells_that_spreadsheets_could_run_are_quoted_and_restored(text: str) -> None:
    assert as_cell(text) == "'" + text
    assert as_cell(text).removeprefix("'") == text


@pytest.mark.parametrize("text", ["", "a cat", "photos/-1.png", "0.5", "Ärger ☃", 'said "no"', " =1"])
def test_other_cells_stay(text: str) -> None:
    assert as_cell(text) == text


def test_bytes_of_file_names_are_escaped() -> None:
    assert as_cell(b"a/\xff\xe9.png".decode("utf-8", "surrogateescape")) == r"a/\udcff\udce9.png"


def test_bytes_have_readable_units() -> None:
    assert [gigabytes(size) for size in (1.23e10, 4.56e9, 12e6, 3e3)] == ["12 GB", "4.6 GB", "12 MB", "3 kB"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07\x1b[2Jred", r"\x1b]0;title\x07\x1b[2Jred"),
        ("gone\rback\b\x7f\x9b31m", r"gone\rback\x08\x7f\x9b31m"),
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
        ("\udcff.png", r"\udcff.png"),
        ("Ärger\t蛙　☃ 👩‍🚀 שלום\n", "Ärger\t蛙　☃ 👩‍🚀 שלום\n"),
    ],
)
def test_only_what_a_terminal_obeys_is_escaped(text: str, shown: str) -> None:
    assert visible(text) == shown
