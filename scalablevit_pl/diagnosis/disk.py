"""Where a run writes: whether it may, whether a run is there already, whether there is space."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scalablevit_pl.diagnosis.finding import Finding, gigabytes
from scalablevit_pl.run_folder import RESOLVED

# best.ckpt, the newest two of which last.ckpt is one, and one that is being written aside.
CHECKPOINTS = 4
SPARE = 200e6  # bytes for metrics, events and pictures


def check_run_folder(folder: Path, resuming: bool) -> Finding:
    """Tell whether a run may be written there, and leave nothing behind."""
    text = str(folder)
    if (folder / RESOLVED).exists() and not resuming:
        remedy = "choose another name with --run, or go on with it by --resume auto"
        return Finding("FAIL", "run folder", f"{text} already holds a run", remedy)
    place = nearest_existing(folder)
    if not place.is_dir():
        return Finding("FAIL", "run folder", f"{place} is a file", "move it away, or choose another folder with --run")
    try:
        with tempfile.TemporaryFile(dir=place):
            return Finding("ok", "run folder", f"{text}{' goes on' if resuming else ''}, {place} can be written")
    except OSError as error:
        remedy = "mend its permissions, or choose another folder with --run"
        return Finding("FAIL", "run folder", f"{place} cannot be written ({error.strerror})", remedy)


def nearest_existing(path: Path) -> Path:
    """Return the path itself, or else the nearest folder above it that there is."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def check_checkpoint_space(folder: Path, parameters: int, averaged: bool) -> Finding:
    """Compare the free space with what the checkpoints of a run take.

    Args:
        folder: The run folder.
        parameters: Number of weights of the network.
        averaged: Whether checkpoints hold averaged weights, too.
    """
    # Weights and the two moments of AdamW, four bytes each.
    needed = CHECKPOINTS * parameters * 4 * (4 if averaged else 3) + SPARE
    free = shutil.disk_usage(nearest_existing(folder)).free
    text = f"{gigabytes(needed)} for the run and up to {CHECKPOINTS} checkpoints, {gigabytes(free)} free"
    if needed <= free:
        return Finding("ok", "run disk", text)
    return Finding("FAIL", "run disk", text, "make space, or choose a folder on another disk with --run")


def check_data_space(needs: dict[Path, int], prepared: bool) -> Iterator[Finding]:
    """Compare the free space with what a data set takes that is not prepared yet.

    Args:
        needs: The folders that are filled, with the bytes that are written into each; those on one disk are added up.
        prepared: Whether there are signs that it has been prepared before, so that a lack of space may not matter.
    """
    disks: dict[int, tuple[list[Path], int]] = {}
    for folder, size in needs.items():
        place = nearest_existing(folder)
        folders, total = disks.get(place.stat().st_dev, ([], 0))
        disks[place.stat().st_dev] = ([*folders, folder], total + size)
    for folders, needed in disks.values():
        free = shutil.disk_usage(nearest_existing(folders[0])).free
        text = f"{gigabytes(needed)} for the data in {' and '.join(map(str, folders))}, {gigabytes(free)} free"
        remedy = "make space, or let HF_HOME name a folder on a larger disk"
        if needed <= free:
            yield Finding("ok", "data disk", text)
        elif prepared:
            yield Finding("warn", "data disk", f"{text}, which is too little unless they are there already", remedy)
        else:
            yield Finding("FAIL", "data disk", text, remedy)
