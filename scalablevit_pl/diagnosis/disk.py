"""The disks of a run: whether its folder can be written, whether a run is there already, and free space."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scalablevit_pl.diagnosis.finding import Finding, gigabytes
from scalablevit_pl.run_folder import RESOLVED

# best.ckpt, the newest two, one of which is last.ckpt, and the temporary file of one that is being written.
CHECKPOINTS = 4
SPARE = 200e6  # bytes for metrics, events and pictures


def check_run_folder(folder: Path, resuming: bool) -> Finding:
    """Check that a run can be written to a folder, without creating it."""
    text = str(folder)
    if (folder / RESOLVED).exists() and not resuming:
        remedy = "choose another name with --run, or continue it with --resume auto"
        return Finding("FAIL", "run folder", f"{text} already holds a run", remedy)
    place = nearest_existing(folder)
    if not place.is_dir():
        return Finding("FAIL", "run folder", f"{place} is a file", "move it, or choose another folder with --run")
    try:
        with tempfile.TemporaryFile(dir=place):
            return Finding("ok", "run folder", f"{text}{' is resumed' if resuming else ''}, {place} is writable")
    except OSError as error:
        remedy = "fix its permissions, or choose another folder with --run"
        return Finding("FAIL", "run folder", f"{place} cannot be written ({error.strerror})", remedy)


def nearest_existing(path: Path) -> Path:
    """Return the path itself if it exists, or else its nearest parent that does."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def check_checkpoint_space(folder: Path, parameters: int, averaged: bool) -> Finding:
    """Compare the free space with the size of a run's checkpoints."""
    # Weights and the two moments of AdamW, four bytes each.
    needed = CHECKPOINTS * parameters * 4 * (4 if averaged else 3) + SPARE
    free = shutil.disk_usage(nearest_existing(folder)).free
    text = f"{gigabytes(needed)} for the run with up to {CHECKPOINTS} checkpoints, {gigabytes(free)} free"
    if needed <= free:
        return Finding("ok", "run disk", text)
    return Finding("FAIL", "run disk", text, "free space, or choose a folder on another disk with --run")


def check_data_space(needs: dict[Path, int], prepared: bool) -> Iterator[Finding]:
    """Compare the free space with what a data set needs that is not prepared yet."""
    disks: dict[int, tuple[list[Path], int]] = {}
    for folder, size in needs.items():
        device = nearest_existing(folder).stat().st_dev
        folders, total = disks.get(device, ([], 0))
        disks[device] = ([*folders, folder], total + size)
    for folders, needed in disks.values():
        free = shutil.disk_usage(nearest_existing(folders[0])).free
        text = f"{gigabytes(needed)} for the data in {' and '.join(map(str, folders))}, {gigabytes(free)} free"
        remedy = "free space, or set HF_HOME to a folder on a larger disk"
        if needed <= free:
            yield Finding("ok", "data disk", text)
        elif prepared:
            yield Finding("warn", "data disk", f"{text}: too little, unless the data is there already", remedy)
        else:
            yield Finding("FAIL", "data disk", text, remedy)
