"""Where a run keeps what it leaves behind."""

import difflib
import os
from pathlib import Path
from typing import Any

import yaml

RUNS = Path("runs")
CONFIG = "config.yaml"
RESOLVED = "resolved.json"  # written as training starts: from then on there is something to lose


def run_folder(run: str) -> Path:
    """Return the folder of a run: below `runs/` for a name, the path itself for a path.

    Raises:
        ValueError: If the name is empty or means the folder of all runs.
    """
    if run.strip() in ("", ".", ".."):
        raise ValueError(f"--run {run!r} is no name: give the run one of its own, or a path with a {os.sep}")
    return Path(run) if os.sep in run else RUNS / run


def existing_run(run: str) -> Path:
    """Return the folder of a run that has been started.

    Raises:
        ValueError: If there is none; it names the nearest.
    """
    folder = run_folder(run)
    if (folder / CONFIG).is_file():
        return folder
    known = sorted(path.parent.name for path in RUNS.glob(f"*/{CONFIG}"))
    near = difflib.get_close_matches(folder.name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else "give the name of a folder below runs/, or a path"
    raise ValueError(f"there is no run in {str(folder)!r}: {hint}")


def claim_folder(folder: Path, config: dict[str, Any], resume: bool) -> None:
    """Write `config.yaml` into a run folder, which is made if need be.

    Raises:
        ValueError: If the folder holds a run that this one does not resume, or whose data or model are not the same.
    """
    path = folder / CONFIG
    if (folder / RESOLVED).exists() and not resume:
        raise ValueError(
            f"{str(folder)!r} already holds a run: choose another name with --run, or continue it with --resume last"
        )
    if path.exists() and resume:
        earlier = yaml.safe_load(path.read_text(encoding="utf-8"))
        changed = differences({key: earlier.get(key) for key in ("model", "data")}, config)
        if changed:
            raise ValueError(f"the run in {str(folder)!r} cannot be resumed with other values: {'; '.join(changed)}")
    folder.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    aside.replace(path)


def differences(earlier: Any, now: Any, key: str = "") -> list[str]:
    """List the values below the keys of `earlier` that are not the same now."""
    if not (isinstance(earlier, dict) and isinstance(now, dict)):
        return [] if earlier == now else [f"{key} was {earlier!r} and is {now!r}"]
    return [
        line
        for name, value in earlier.items()
        for line in differences(value, now.get(name), f"{key}.{name}" if key else name)
    ]
