"""Where a run keeps what it leaves behind."""

import difflib
import os
from pathlib import Path
from typing import Any

import yaml

from scalablevit_pl.storage import written_aside

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
        ValueError: If the folder holds a run that this one does not resume.
    """
    path = folder / CONFIG
    if (folder / RESOLVED).exists() and not resume:
        raise ValueError(
            f"{str(folder)!r} already holds a run: choose another name with --run, or continue it with --resume last"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        aside.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")


def take_folder(folder: Path) -> None:
    """Mark a folder as one that holds a run, which one process alone can do.

    Raises:
        ValueError: If another run has been faster.
    """
    try:
        (folder / RESOLVED).touch(exist_ok=False)
    except FileExistsError as error:
        raise ValueError(f"another run has begun in {str(folder)!r}: choose another name with --run") from error


def check_resumable(earlier: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare the configurations of a run's parts where a difference would be a contradiction.

    The length of the training and where it runs may change, and with it how a batch is shared out: the global batch is
    compared once it is known.

    Raises:
        ValueError: If they differ; it lists the differences.
    """
    changed = [
        line
        for section in ("model", "data", "weights")
        for line in differences(earlier.get(section), now.get(section), section)
        if not line.startswith(("data.init_args.num_workers ", "data.init_args.batch_size "))
    ]
    if changed:
        shown = "; ".join(changed[:5]) + (f"; and {len(changed) - 5} more" if len(changed) > 5 else "")
        raise ValueError(
            f"the run cannot be resumed with other values: {shown}: leave them and --config away, the run has its own"
        )


def differences(earlier: Any, now: Any, key: str = "") -> list[str]:
    """List where two nested values are not the same."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        names: list[Any] = list(dict.fromkeys([*earlier, *now]))
        pairs = [(f"{key}.{name}" if key else name, earlier.get(name), now.get(name)) for name in names]
        return [line for name, before, after in pairs for line in differences(before, after, name)]
    if isinstance(earlier, list) and isinstance(now, list) and len(earlier) == len(now):
        pairs = [
            (f"{key}[{index}]", before, after) for index, (before, after) in enumerate(zip(earlier, now, strict=True))
        ]
        return [line for name, before, after in pairs for line in differences(before, after, name)]
    if isinstance(earlier, list) and isinstance(now, list):
        return [f"{key} had {len(earlier)} entries and has {len(now)}"]
    return [] if earlier == now else [f"{key} was {earlier!r} and is {now!r}"]
