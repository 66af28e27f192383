"""Write files and folders under a temporary name first, so that a killed process leaves only complete ones."""

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
    """Yield a temporary path next to `path`, which replaces `path` if the block ends without an error."""
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
    """Yield a temporary folder next to `folder`; its files move to `folder` if the block ends without an error.

    A new folder appears with all of its files at once. In an existing folder, files are replaced only after all new
    ones have been written, and other files stay.
    """
    folder = folder.resolve()  # the disk next to a symbolic link may be another one
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        aside.chmod(0o777 & ~umask())  # mkdtemp allows only its owner
        yield aside
        if folder.exists():
            paths = sorted(aside.iterdir())
            for path in paths:
                if (folder / path.name).is_dir():
                    raise IsADirectoryError(errno.EISDIR, "a folder is in the way of the file", str(folder / path.name))
            for path in paths:
                path.replace(folder / path.name)
        else:
            aside.rename(folder)
    except OSError as error:
        if error.filename is None:  # for example when the disk is full
            error.filename = str(folder)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
