"""The folder of a run: its name, its lock, its configuration and its checkpoints."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from scalablevit_pl.storage import written_aside
from scalablevit_pl.text import listed

logger = logging.getLogger(__name__)

RUNS = Path("runs")
CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"
NO_AVERAGE = {"decay": None, "warmup": True}  # the meaning of a configuration without that section
# Settings that may change in a resume: they do not affect what is learned, or are compared elsewhere.
FREE = (
    *(f"data.init_args.{name} " for name in ("num_workers", "batch_size", "worker_timeout", "max_unreadable")),
    *(f"model.init_args.{name} " for name in ("compile", "channels_last", "grad_checkpointing")),
)
RESOLVED = "resolved.json"  # written as training starts: from then on the folder is not overwritten


def run_folder(run: str) -> Path:
    """Return the folder of a run: below `runs/` for a name, the path itself for a path."""
    if run.strip() in ("", ".", ".."):
        raise ValueError(f"--run {run!r} is not a valid run name: choose another, or give a path with a {os.sep}")
    return Path(run) if os.sep in run else RUNS / run


def existing_run(run: str) -> Path:
    """Return the folder of a run that has been started."""
    folder = run_folder(run)
    if (folder / CONFIG).is_file():
        return folder
    configs = sorted(RUNS.glob(f"*/{CONFIG}"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    names = listed((path.parent.name for path in configs), 10)
    raise ValueError(f"there is no run in {str(folder)!r}: {f'runs/ has {names}' if names else 'give its path'}")


def newest_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints `step=N.ckpt` in a folder, newest first."""
    return sorted(folder.glob("step=*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)


def resumable_checkpoints(run: Path) -> list[Path]:
    """List the checkpoints a run can resume from, newest first, each file once.

    `best.ckpt` is not one of them: it is written before the end of its epoch.
    """
    steps, last = newest_checkpoints(run / CHECKPOINTS), run / CHECKPOINTS / LAST
    if last.is_file() and not any(path.samefile(last) for path in steps):
        steps = sorted([last, *steps], key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return steps


@contextmanager
def locked_folder(folder: Path, process: int = 0, patience: float = 30.0) -> Iterator[None]:
    """Lock a run folder against a second training, such as by processes that outlive a killed run for some seconds.

    Each process of a run has its own lock, for which it waits `patience` seconds.
    """
    from filelock import FileLock, Timeout  # --help does not need it

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f".lock-{process}")
    try:
        with suppress(Timeout):
            lock.acquire(timeout=0.0)
        if not lock.is_locked:
            logger.info("waiting for another process that is training in %s", folder)
            lock.acquire(timeout=patience)
    except Timeout as error:
        raise ValueError(
            f"another process is training in {str(folder)!r}: wait until it ends, or choose another name with --run"
        ) from error
    except (NotImplementedError, OSError) as error:
        logger.warning("%s cannot be locked (%s): make sure that no other run writes into it", folder, error)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def removed_if_unused(folder: Path) -> Iterator[None]:
    """Remove a folder that is new at the end of the block if no training and no evaluation has written into it."""
    new = not folder.exists()
    try:
        yield
    finally:
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if new and all(name in (CONFIG, "tensorboard") or name.startswith(".lock-") for name in names):
            shutil.rmtree(folder, ignore_errors=True)


def claim_folder(folder: Path, config: dict[str, Any], resume: bool) -> None:
    """Write `config.yaml` into a run folder, which is created if needed."""
    path = folder / CONFIG
    if (folder / RESOLVED).exists() and not resume:
        raise ValueError(
            f"{str(folder)!r} already holds a run: choose another name with --run, or continue it with --resume auto"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        aside.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")


def check_resumable(earlier: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare those settings of a run that must not change when it resumes.

    The length of the training and the devices may change, and the batch of each process with them; the global batch is
    compared once it is known. Of the trainer's settings, only gradient clipping is compared.
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
        raise ValueError(
            f"the run cannot resume with other settings: {listed(changed, separator='; ')}: drop these options and "
            "--config, the run uses its saved configuration"
        )


def differences(earlier: Any, now: Any, key: str = "") -> list[str]:
    """List the differences of two nested values, each with its key."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        names = dict.fromkeys([*earlier, *now])
        pairs = [(f"{key}.{name}" if key else name, earlier.get(name), now.get(name)) for name in names]
    elif isinstance(earlier, list) and isinstance(now, list):
        if len(earlier) != len(now):
            return [f"{key} had {len(earlier)} entries and has {len(now)}"]
        pairs = [(f"{key}[{index}]", *both) for index, both in enumerate(zip(earlier, now, strict=True))]
    else:
        return [] if earlier == now else [f"{key} was {earlier!r} and is {now!r}"]
    return [line for name, before, after in pairs for line in differences(before, after, name)]
