"""Options of the commands without a Lightning configuration; errors name the nearest option."""

import argparse
import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Never

# A negative number, or several separated by commas: a value, not an option.
NEGATIVE = re.compile(r"-(\d|\.\d|inf\b|nan\b)[\w.,+-]*")


class OptionParser(argparse.ArgumentParser):
    """A parser that raises a ValueError of one sentence instead of exiting.

    Args:
        command: Name of the command.
    """

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"scalablevit {command}", add_help=False, allow_abbrev=False)

    def error(self, message: str) -> Never:
        """Raise the message instead of printing it."""
        raise ValueError(f"{message}: see {self.prog} --help")

    def read(self, options: list[str]) -> argparse.Namespace:
        """Parse options and operands in any order; `--` ends the options."""
        end = [*options, "--"].index("--")
        options, operands = options[:end], options[end + 1 :]
        known = [option for action in self._actions for option in action.option_strings]
        words: list[str] = []
        for option in options:
            if NEGATIVE.fullmatch(option):
                if words and words[-1] in known:
                    words[-1] += f"={option}"  # argparse would take some of them for options
                else:
                    words.append(option)
                continue
            name = option.partition("=")[0]
            if name.startswith("-") and name != "-" and name not in known:  # "-" is a file name
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                raise ValueError(f"unknown option {name}: did you mean {near}?")
            words.append(option)
        # argparse would take an operand that begins with a dash for an option.
        words += [f"./{operand}" if operand.startswith("-") else operand for operand in operands]
        return self.parse_intermixed_args(words)


def check_output(option: str, path: Path, suffix: str = "", inputs: Iterable[Path] = ()) -> None:
    """Check that a file can be written to the path of an option and would not replace an input."""
    if suffix and path.suffix.lower() != suffix:
        raise ValueError(f"{option} {str(path)!r} must be the name of a {suffix}")
    folder = path.parent
    if not path.name or (path.exists() and not path.is_file()) or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{option} {str(path)!r} must be the name of a file in a folder that exists and is writable")
    if path.resolve() in {each.resolve() for each in inputs}:
        raise ValueError(f"{option} {str(path)!r} is one of the images or the weights: choose another name")


def check_output_folder(option: str, path: Path, inputs: Iterable[Path] = ()) -> None:
    """Check that files can be written into the folder of an option, new or not, and would not replace an input."""
    existing = next(each for each in (path.resolve(), *path.resolve().parents) if each.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"{option} {str(path)!r} must be the name of a folder that is new or writable")
    if path.resolve() in {each.resolve().parent for each in inputs}:
        raise ValueError(
            f"{option} {str(path)!r} holds images or weights that could be replaced: choose another folder"
        )
