"""Names as tables and pictures have room for them."""


def shorten(name: str, length: int = 16) -> str:
    """Shorten a name in its middle, since names that begin alike often end differently."""
    name = " ".join(name.split())
    return name if len(name) <= length else f"{name[: length // 2]}…{name[length // 2 + 1 - length :]}"
