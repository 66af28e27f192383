"""The names and colors of classes that files state."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from scalablevit_pl.preprocessing.masks import MOST_CLASSES, Color
from scalablevit_pl.text import nfc, one_line

ADE20K = "objectInfo150.txt"
# Files in a data set's folder that name its classes, as people and programs write them.
CLASS_FILES = ("classes.txt", "data.yaml", "data.yml", "id2label.json", ADE20K)


class ClassFile(NamedTuple):
    """What a file states about the classes.

    Attributes:
        names: Their names in the order of their indices.
        palette: The color of each value in masks, if stated.
    """

    names: list[str]
    palette: list[Color] | None = None


def find_class_file(folder: Path) -> Path | None:
    """Return the file in a folder that names its classes, if there is one."""
    return next((folder / name for name in CLASS_FILES if (folder / name).is_file()), None)


def read_class_file(path: Path) -> ClassFile:
    """Read class names from a text file with one name a line, or from YAML or JSON.

    YAML and JSON are a list of names, names by their index, or hold one of these as `names` or `id2label`, optionally
    with a `palette`.

    Raises:
        ValueError: If it cannot be read or has no names.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = None if path.suffix.lower() == ".txt" else yaml.safe_load(text)
    except (OSError, RecursionError, ValueError, yaml.YAMLError) as error:  # of deep nesting, of impossible dates
        raise ValueError(f"cannot read the class names in {str(path)!r}: {one_line(error, 200)}; correct it") from error
    if path.suffix.lower() == ".txt":
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return ClassFile(check_names(_ade20k_names(lines) if path.name == ADE20K else lines, repr(str(path))))
    palette = _read_palette(content.get("palette"), path) if isinstance(content, dict) else None
    if isinstance(content, dict):
        content = next((content[key] for key in ("names", "id2label") if key in content), content)
    if isinstance(content, dict):
        names = {str(key): name for key, name in content.items()}
        indices = [str(index) for index in range(len(names))]
        content = [names[index] for index in indices] if names.keys() == set(indices) else None
    if not isinstance(content, list):
        raise ValueError(f"{str(path)!r} has no class names: list them as `names`, in the order of their indices")
    if any(isinstance(name, list | dict | set) for name in content):  # aliases can make them larger than the memory
        raise ValueError(f"{str(path)!r} has lists among the class names: list the names themselves")
    return ClassFile(check_names(map(str, content), repr(str(path))), palette)


def check_names(names: Iterable[str], source: str) -> list[str]:
    """Return class names in one spelling; `source` states where they come from in errors."""
    known = [nfc(name) for name in names]
    if not 1 <= len(known) <= MOST_CLASSES:
        raise ValueError(f"{source} names {len(known):,} classes: masks can have 1 to {MOST_CLASSES}")
    twice = next((name for name in known if known.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{source} names the class {twice!r} twice: give each class a name of its own")
    return known


def _read_palette(colors: Any, path: Path) -> list[Color] | None:
    if colors is None:
        return None
    listed = isinstance(colors, list) and all(isinstance(color, list) and len(color) == 3 for color in colors)
    if not listed or not all(isinstance(value, int) for color in colors for value in color):
        raise ValueError(f"{str(path)!r} has a palette that is not a list of colors of three numbers: correct it")
    return [(red, green, blue) for red, green, blue in colors]


def _ade20k_names(lines: list[str]) -> list[str]:
    """Return the names in the last column of ADE20K's table, without synonyms."""
    return [line.split("\t")[-1].split(",")[0].strip() for line in lines[1:]]
