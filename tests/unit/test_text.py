import pytest

from scalablevit_pl.text import one_line, shorten


def test_long_names_keep_both_ends() -> None:
    assert shorten("a very long class name 1") == "a very l… name 1"
    assert shorten("two\nlines\tand more") == "two line…nd more"
    assert shorten("exactly sixteen!") == "exactly sixteen!"
    assert shorten("one two three four", 7) == "one…our"


@pytest.mark.parametrize(
    ("message", "line"),
    [(ValueError("a\n  b\tc"), "a b c"), (KeyError(), "KeyError"), ("", "str"), ("x" * 400, "x" * 300)],
)
def test_messages_become_one_line(message: object, line: str) -> None:
    assert one_line(message) == line
    assert one_line("x" * 400, None) == "x" * 400
