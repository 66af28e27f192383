"""Options of the commands that are not Lightning's: an unknown one is answered with the nearest that there is."""

import argparse
import difflib
from typing import Never


class OptionParser(argparse.ArgumentParser):
    """A parser that raises a ValueError of one sentence in the place of leaving the program.

    Args:
        command: The command whose options these are.
    """

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"scalablevit {command}", add_help=False, allow_abbrev=False)

    def error(self, message: str) -> Never:
        """Raise what the standard library would print.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"{message}: see {self.prog} --help")

    def read(self, options: list[str]) -> argparse.Namespace:
        """Parse options and operands in any order.

        Raises:
            ValueError: If an option is unknown, or a value is missing or wrong.
        """
        known = [option for action in self._actions for option in action.option_strings]
        for option in options:
            name = option.partition("=")[0]
            if name.startswith("-") and name != "-" and name not in known:  # that is a file: the screen
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                raise ValueError(f"unknown option {name}: did you mean {near}?")
        return self.parse_intermixed_args(options)
