"""Find the image files in folders, and load those whose class is named by their folder or by a table."""

import csv
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from scalablevit_pl.data.splits import SPLIT_FOLDERS, split_named
from scalablevit_pl.preprocessing.decoding import is_image_file
from scalablevit_pl.text import listed, nfc, one_line

TABLES = ("labels.csv", "metadata.csv")
COLUMNS = ("file_name", "label")

logger = logging.getLogger(__name__)


class ImageList(NamedTuple):
    """The image files of a folder.

    Attributes:
        paths: The files, sorted.
        left_out: How many other files of each kind there are.
    """

    paths: list[Path]
    left_out: Counter[str]


class LabelledFile(NamedTuple):
    """An image file with its class."""

    split: str
    path: Path
    label: str


def list_images(folder: Path) -> ImageList:
    """List the image files in a folder and below it, without hidden ones. Each folder is read once."""
    found, real = ImageList([], Counter()), folder.resolve()
    _list_into(found, folder, {real, *real.parents})
    return found


def find_images(sources: Iterable[str | Path]) -> list[Path]:
    """Return image files as given, and those of patterns and folders, sorted; log which files are left out.

    Raises:
        ValueError: If a source does not exist or has no images.
    """
    paths: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            found, left_out = list_images(source)
            if left_out:
                logger.warning("left out of %s: %s", source, describe_files(left_out))
        else:
            names = [source] if source.is_file() else sorted(glob(str(source), recursive=True))  # noqa: PTH207
            found = [Path(name) for name in names if Path(name).is_file()]
        if not found:
            missing = "holds no images" if source.is_dir() else "does not exist"
            raise ValueError(f"{str(source)!r} {missing}: give image files or folders with images")
        paths += found
    return paths


def _list_into(found: ImageList, folder: Path, read: set[Path]) -> None:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = folder / entry.name
        target = path if entry.is_symlink() else entry  # an entry raises errors for circular links
        if _hidden(entry.name):
            continue
        if target.is_file():
            if is_image_file(path):
                found.paths.append(path)
            else:
                found.left_out[_kind(path)] += 1
        elif not target.is_dir():
            found.left_out["dangling link" if entry.is_symlink() else "special file"] += 1
        elif (real := path.resolve()) not in read:
            read.add(real)
            _list_into(found, path, read)
        elif entry.is_symlink():
            found.left_out["circular link"] += 1


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"  # which macOS adds to archives


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    return suffix if re.fullmatch(r"\.\w{1,8}", suffix) else "other file"


def describe_files(left_out: Counter[str]) -> str:
    """Describe files by their number and kind, such as `3 .heic, 1 dangling link`."""
    return ", ".join(
        f"{count:,} {kind}{'' if count == 1 or '.' in kind else 's'}" for kind, count in left_out.most_common()
    )


def load_image_folder(folder: Path, table: Path | None = None) -> tuple[datasets.DatasetDict, str]:
    """Load images from one folder per class, at any depth below it, or with a table of labels; the files stay in place.

    Args:
        folder: The folder of the classes, of a folder per split, or of the images of a table.
        table: CSV file with the columns `file_name`, relative to the folder, and `label`. By default, such tables are
            found in the folder and its split folders, with names relative to where they lie.

    Returns:
        The splits, with the classes of all of them, sorted by name; and a description of the files that are left out.
    """
    tables = _find_tables(folder) if table is None else {table: folder}
    files, left_out = _files_of_tables(folder, tables) if tables else _files_of_classes(folder)
    # The builder "imagefolder" would assign an image called test_1.jpg to a test split, treat names with brackets as
    # patterns, and take the innermost folder for the class.
    names = datasets.ClassLabel(names=sorted({file.label for file in files}))
    features = datasets.Features({"image": datasets.Image(), "label": names})
    rows: dict[str, list[dict[str, str]]] = {}
    for split, path, label in files:
        rows.setdefault(split, []).append({"image": str(path), "label": label})
    return build_splits(rows, features), describe_files(left_out)


def build_splits(rows: Mapping[str, Sequence[Mapping[str, Any]]], features: datasets.Features) -> datasets.DatasetDict:
    """Return the splits of rows that name files."""
    try:
        splits = {split: datasets.Dataset.from_list(each, features=features) for split, each in rows.items()}
    except UnicodeEncodeError as error:
        raise ValueError(f"the name of {error.object!r} is not UTF-8: rename it") from error
    return datasets.DatasetDict(splits)


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted, without hidden ones."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _hidden(path.name))


def _files_of_classes(folder: Path) -> tuple[Iterable[LabelledFile], Counter[str]]:
    inside = subfolders(folder)
    named = {split_named(path.name): path for path in reversed(inside)}
    roots = {split: named[split] for split in SPLIT_FOLDERS if split in named}
    others = [path.name for path in inside if path not in roots.values()]
    if roots and others:
        raise ValueError(
            f"{str(folder)!r} contains split folders ({', '.join(root.name for root in roots.values())}) beside other "
            f"folders ({', '.join(others)}): use either class folders inside split folders, or class folders only"
        )
    files, left_out, empty = [], loose_files(folder), set()
    for split, root in (roots or {"train": folder}).items():
        lists = {path: list_images(path) for path in subfolders(root)}
        _check_levels(root, lists)
        files += [LabelledFile(split, path, nfc(name.name)) for name, found in lists.items() for path in found.paths]
        left_out += sum((found.left_out for found in lists.values()), loose_files(root) if roots else Counter())
        empty |= {nfc(path.name) for path, found in lists.items() if not found.paths}
    empty -= {file.label for file in files}
    if empty:
        names = ", ".join(sorted(empty))
        raise ValueError(f"the class folders {names} in {str(folder)!r} are empty: delete or fill them")
    return files, left_out


def loose_files(folder: Path) -> Counter[str]:
    """Count the files that are in a folder itself, by kind."""
    files = [path for path in folder.iterdir() if not path.is_dir() and not _hidden(path.name)]
    return Counter(f"loose {_kind(path)}" if is_image_file(path) else _kind(path) for path in files)


def _check_levels(root: Path, lists: dict[Path, ImageList]) -> None:
    """Check that the folders in a folder seem to be classes, and do not contain the classes."""
    folders = {path: {image.parent for image in found.paths} for path, found in lists.items() if found.paths}
    inner = {
        path: {"" if folder == path else folder.relative_to(path).parts[0] for folder in places}
        for path, places in folders.items()
    }
    if not inner:
        raise ValueError(
            f"{str(root)!r} contains neither parquet files nor class folders with images nor a {TABLES[0]} with the "
            f"columns {' and '.join(COLUMNS)}: check the path and the layout"
        )
    first, names = next(iter(inner.items()))
    if len(inner) > 1 and len(names) > 1 and all(others == names for others in inner.values()):
        raise ValueError(
            f"the folders {listed(path.name for path in inner)} in {str(root)!r} all contain the folders "
            f"{listed(sorted(names))}: give one of them, such as {str(first)!r}, or sort the images into one folder "
            "per class"
        )
    nested = [path for path, names in inner.items() if all(map(split_named, names))]
    common = Path(os.path.commonpath(folders[first]))
    if nested or (len(inner) == 1 and common not in folders[first]):
        raise ValueError(
            f"{str(root)!r} is not the folder that contains the classes: give {str((nested or [common])[0])!r}, or "
            "sort the images into one folder per class"
        )


def _find_tables(folder: Path) -> dict[Path, Path]:
    """Map the tables of labels in a folder and its split folders to the folders that they lie in."""
    places = [folder, *(path for path in subfolders(folder) if split_named(path.name))]
    paths = [place / name for place in places for name in TABLES if (place / name).is_file()]
    return {path: path.parent for path in paths if not _missing_columns(path)}


def _missing_columns(table: Path) -> list[str]:
    with table.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        found = next(csv.reader(file), [])
    return [name for name in COLUMNS if name not in found]


def _read_table(table: Path, folder: Path) -> list[tuple[str, str]]:
    """Return the paths and labels of a table whose file names are relative to a folder."""
    if not table.is_file():
        raise ValueError(f"there is no file {str(table)!r}: check --data.labels")
    if missing := _missing_columns(table):
        raise ValueError(f"{str(table)!r} lacks the column {missing[0]!r}: name its columns {', '.join(COLUMNS)}")
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            values = [[row[name] or "" for name in COLUMNS] for row in csv.DictReader(file)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read {str(table)!r}: {one_line(error)}; save it as CSV in UTF-8") from error
    rows = [(nfc(str(folder / name)), nfc(label.strip())) for name, label in values]
    unlabelled = next((path for path, label in rows if not label), None)
    if unlabelled is not None or not rows:
        what = "contains no rows" if unlabelled is None else f"has no label for {unlabelled!r}"
        raise ValueError(f"{str(table)!r} {what}: complete it")
    return rows


def _files_of_tables(folder: Path, tables: dict[Path, Path]) -> tuple[Iterable[LabelledFile], Counter[str]]:
    images = list_images(folder)
    known = {nfc(str(path)): path for path in images.paths}
    files: dict[Path, LabelledFile] = {}
    for table, base in tables.items():
        rows = _read_table(table, base)
        missing = [path for path, _ in rows if path not in known]
        if missing:
            raise ValueError(
                f"{str(table)!r} names {len(missing):,} files that are not images in the data set, such as "
                f"{missing[0]!r}: correct or delete these rows"
            )
        for path, label in rows:
            file = known[path]
            if file in files:
                raise ValueError(f"{path!r} has several rows, one of them in {str(table)!r}: keep one")
            inside = file.relative_to(folder).parts
            split = split_named(inside[0]) if len(inside) > 1 else None
            files[file] = LabelledFile(split or "train", file, label)
    images.left_out.pop(".csv", None)
    images.left_out["unlabelled image"] = len(images.paths) - len(files)
    return files.values(), +images.left_out
