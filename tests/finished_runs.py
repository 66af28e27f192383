"""What tests read from run folders, and how they compare two runs to the last bit."""

import csv
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from forked_command import LONGEST, ForkedCommand


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def wait_for(run: Path, step: int, command: ForkedCommand | subprocess.Popen[str]) -> None:
    """Wait until the run has written the checkpoint of a step."""
    end = time.monotonic() + LONGEST
    while time.monotonic() < end:
        steps = [int(path.stem.removeprefix("step=")) for path in run.glob("checkpoints/step=*.ckpt")]
        if max(steps, default=0) >= step:
            return
        assert command.poll() is None, command.wait()
        time.sleep(0.05)
    raise TimeoutError(run)


def assert_equal_runs(run: Path, expected: Path, steps: int) -> None:
    """Compare all of the last checkpoints, and metrics.csv without times and rates, to the last bit."""
    last, expected_last = (torch.load(path / "checkpoints/last.ckpt", weights_only=True) for path in (run, expected))
    assert last["global_step"] == steps
    for section in ("state_dict", "ema_state_dict", "optimizer_states", "lr_schedulers", "train_averages"):
        assert differing(last[section], expected_last[section]) == [], section
    assert last["ema_state_dict"].keys() == last["state_dict"].keys()
    assert metrics(run) == metrics(expected)


def differing(one: Any, other: Any, name: str = "") -> list[str]:
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [name]
    if isinstance(one, dict):
        assert one.keys() == other.keys(), name
        return [line for key in one for line in differing(one[key], other[key], f"{name}.{key}")]
    if isinstance(one, list):
        assert len(one) == len(other), name
        return [line for index in range(len(one)) for line in differing(one[index], other[index], f"{name}.{index}")]
    return [] if one == other else [name]


def metrics(run: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv without times and rates."""
    rows = read_csv(run / "metrics.csv")
    return [{name: value for name, value in row.items() if not name.startswith("speed/")} for row in rows]
