"""The disks of a run: whether its folder can be written, whether a run is there already, and free space."""

import shutil
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from scalablevit_pl.diagnosis.finding import Finding, Status
from scalablevit_pl.run_folder import RESOLVED
from scalablevit_pl.text import gigabytes

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
    try:
        with tempfile.TemporaryFile(dir=place):
            return Finding("ok", "run folder", f"{text}{' is resumed' if resuming else ''}, {place} is writable")
    except OSError as error:  # also if it is a file
        remedy = "fix its permissions, or choose another folder with --run"
        return Finding("FAIL", "run folder", f"{place} cannot be written ({error.strerror})", remedy)


def nearest_existing(path: Path) -> Path:
    """Return the path itself if it exists, or else its nearest parent that does."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def check_space(what: str, needed: float, purpose: str, folder: Path, remedy: str, status: Status = "FAIL") -> Finding:
    """Compare the free space of a folder's disk with what is needed for a purpose."""
    free = shutil.disk_usage(nearest_existing(folder)).free
    text = f"{gigabytes(needed)} {purpose}, {gigabytes(free)} free"
    return Finding("ok", what, text) if needed <= free else Finding(status, what, text, remedy)


def check_checkpoint_space(folder: Path, parameters: int, averaged: bool) -> Finding:
    """Compare the free space with the size of a run's checkpoints."""
    # Weights and the two moments of AdamW, four bytes each.
    needed = CHECKPOINTS * parameters * 4 * (4 if averaged else 3) + SPARE
    purpose = f"for the run with up to {CHECKPOINTS} checkpoints"
    return check_space("run disk", needed, purpose, folder, "free space, or choose a folder on another disk with --run")


def check_data_space(needs: dict[Path, int], prepared: bool) -> Iterator[Finding]:
    """Compare the free space with the bytes that a data set needs in each folder; it may be `prepared` already."""
    disks = groupby(sorted(needs, key=_disk), _disk)
    for folders in [list(group) for _, group in disks]:
        needed, places = sum(needs[folder] for folder in folders), " and ".join(map(str, folders))
        remedy = "free space, or set HF_HOME to a folder on a larger disk"
        remedy += ", unless the data is there already" if prepared else ""
        status: Status = "warn" if prepared else "FAIL"
        yield check_space("data disk", needed, f"for the data in {places}", folders[0], remedy, status)


def _disk(folder: Path) -> int:
    return nearest_existing(folder).stat().st_dev
