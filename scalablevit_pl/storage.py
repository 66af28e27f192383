"""Files are written aside and then take their name, so that a killed run leaves whole ones only."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; once that is done without an error it replaces `path`."""
    aside = path.with_name(f".{path.name}.part")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def save_json(values: dict[str, Any], path: Path) -> None:
    """Write plain values as JSON."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextmanager
def folder_written_aside(folder: Path) -> Iterator[Path]:
    """Give a new folder beside `folder` to write files to; once that is done without an error they stand in `folder`.

    A folder that is not there yet appears with all of its files at once. In one that is, each file replaces the one of
    its name after all have been written, and other files stay.
    """
    folder = folder.resolve()  # beside a link there may be another disk
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        aside.chmod(0o777 & ~umask())  # that of mkdtemp is for its owner alone
        yield aside
        if folder.exists():
            paths = sorted(aside.iterdir())
            for path in paths:
                if (folder / path.name).is_dir():
                    raise IsADirectoryError(errno.EISDIR, "is a folder in the place of a file", str(folder / path.name))
            for path in paths:
                path.replace(folder / path.name)
        else:
            aside.rename(folder)
    except OSError as error:
        if error.filename is None:  # as where the disk is full
            error.filename = str(folder)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def umask() -> int:
    """Return the process's mask of permissions, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
