import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scalablevit_pl.callbacks.preemption import StopSignal, requeue_job


@pytest.fixture
def stop() -> Iterator[StopSignal]:
    stop = StopSignal()
    stop.install()
    yield stop
    stop.restore()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_remembered(signum: int, stop: StopSignal) -> None:
    assert stop.received is None
    os.kill(os.getpid(), signum)
    assert stop.received == signum


def test_handlers_are_taken_again_and_given_back() -> None:
    def own(signum: int, frame: object) -> None: ...

    def lightnings(signum: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, own)
    stop = StopSignal()
    stop.install()
    signal.signal(signal.SIGTERM, lightnings)
    stop.install()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == signal.SIGTERM
    stop.restore()
    assert signal.getsignal(signal.SIGTERM) is own
    signal.signal(signal.SIGTERM, before)


def fake_scontrol(folder: Path, status: int) -> None:
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\necho denied >&2\nexit {status}\n')
    (folder / "scontrol").chmod(0o755)


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ({"SLURM_JOB_ID": "17"}, "17"),
        ({"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "15", "SLURM_ARRAY_TASK_ID": "2"}, "15_2"),
        ({}, None),
        ({"SLURM_JOB_ID": "1; reboot"}, None),
    ],
)
def test_a_job_is_requeued(
    job: dict[str, str], expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_scontrol(tmp_path, 0)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    assert requeue_job() == expected
    calls = (tmp_path / "calls").read_text() if expected else ""
    assert calls == (f"requeue {expected}\n" if expected else "")


def test_a_refused_requeue_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_scontrol(tmp_path, 1)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with pytest.raises(ValueError, match=r"job 17 could not be requeued \(denied\): submit the same script again"):
        requeue_job()


def test_a_loader_outlives_the_first_sigterm() -> None:
    code = (
        "import os, signal, sys; from scalablevit_pl.data.worker import spare_worker; spare_worker(0);"
        "os.kill(os.getpid(), signal.SIGUSR1); os.kill(os.getpid(), signal.SIGTERM); print('alive', flush=True);"
        "os.kill(os.getpid(), signal.SIGTERM);"
        "print('still alive', flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=60)
    assert done.stdout == "alive\n", done.stderr
    assert done.returncode == -signal.SIGTERM
