"""Text for messages, tables and figures."""


def one_line(message: object, length: int | None = 300) -> str:
    """Return a message, such as an error's, on one line of limited length; the type's name where it is empty."""
    return " ".join(str(message).split())[:length] or type(message).__name__


def shorten(name: str, length: int = 16) -> str:
    """Shorten a name in the middle: names that begin alike often end differently."""
    name = " ".join(name.split())
    return name if len(name) <= length else f"{name[: length // 2]}…{name[length // 2 + 1 - length :]}"
