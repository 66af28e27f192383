"""Where a run keeps what it leaves behind."""

import difflib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from scalablevit_pl.storage import written_aside

logger = logging.getLogger(__name__)

RUNS = Path("runs")
CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"
NO_AVERAGE = {"decay": None, "warmup": True}  # which a configuration without that section means
# What may change in a resume: it makes no difference to what is learnt, or is compared in another way.
FREE = (
    *(f"data.init_args.{name} " for name in ("num_workers", "batch_size", "worker_timeout", "max_unreadable")),
    *(f"model.init_args.{name} " for name in ("compile", "channels_last", "grad_checkpointing")),
)
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


def newest_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints `step=N.ckpt` in a folder, the one that was written last first."""
    return sorted(folder.glob("step=*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)


def resumable_checkpoints(run: Path) -> list[Path]:
    """List the checkpoints that a run can be gone on with, the one that was written last first, none of them twice.

    `best.ckpt` is none of them: it is written before the epoch that it is of has ended.
    """
    steps, last = newest_checkpoints(run / CHECKPOINTS), run / CHECKPOINTS / LAST
    if last.is_file() and not any(path.samefile(last) for path in steps):
        steps = sorted([last, *steps], key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return steps


@contextmanager
def locked_folder(folder: Path, process: int = 0, patience: float = 30.0) -> Iterator[None]:
    """Keep a run folder from being trained in twice, as when a killed run's other processes live for a few seconds.

    Args:
        folder: The run folder, which is made if need be.
        process: Number of this process in the run; each has a lock of its own.
        patience: Seconds to wait for the lock.

    Raises:
        ValueError: If another process has it for longer.
    """
    from filelock import FileLock, Timeout  # which `--help` need not wait for

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f".lock-{process}")
    try:
        with suppress(Timeout):
            lock.acquire(timeout=0.0)
        if not lock.is_locked:
            logger.info("waiting for another process that trains in %s", folder)
            lock.acquire(timeout=patience)
    except Timeout as error:
        raise ValueError(
            f"another process trains in {str(folder)!r}: wait for its end, or choose another name with --run"
        ) from error
    except (NotImplementedError, OSError) as error:
        logger.warning("%s cannot be locked (%s): see that no other run writes into it", folder, error)
    try:
        yield
    finally:
        lock.release()


def claim_folder(folder: Path, config: dict[str, Any], resume: bool) -> None:
    """Write `config.yaml` into a run folder, which is made if need be.

    Raises:
        ValueError: If the folder holds a run that this one does not resume.
    """
    path = folder / CONFIG
    if (folder / RESOLVED).exists() and not resume:
        raise ValueError(
            f"{str(folder)!r} already holds a run: choose another name with --run, or continue it with --resume auto"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        aside.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")


def check_resumable(earlier: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare the configurations of a run's parts where a difference would be a contradiction.

    The length of the training and where it runs may change, and with it how a batch is shared out: the global batch is
    compared once it is known. Of the trainer's settings those of the clipping are compared.

    Raises:
        ValueError: If they differ; it lists the differences.
    """
    earlier, now = {"ema": NO_AVERAGE, **earlier}, {"ema": NO_AVERAGE, **now}
    changed = [
        line
        for section in ("seed_everything", "model", "data", "weights", "ema", "trainer")
        for line in differences(earlier.get(section), now.get(section), section)
        if section != "trainer" or line.startswith("trainer.gradient_clip")
        if not line.startswith(FREE)
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
