"""What loading data costs."""


def profile_data(words: list[str]) -> None:
    """Run `scalablevit profile data [OPTIONS]`.

    Raises:
        ValueError: Always: there is no such command yet.
    """
    raise ValueError(f"scalablevit profile data {' '.join(words)}: this is not there yet")
