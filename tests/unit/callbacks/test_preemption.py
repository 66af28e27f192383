import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scalablevit_pl.callbacks.preemption import PreemptedError, StopSignal, requeue_job
from scalablevit_pl.commands.experiment import end_preempted


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


@pytest.mark.parametrize("signums", [(signal.SIGUSR1, signal.SIGTERM), (signal.SIGTERM, signal.SIGUSR1)])
def test_a_requeue_is_not_forgotten_where_the_time_is_up(signums: tuple[int, ...], stop: StopSignal) -> None:
    for signum in signums:
        os.kill(os.getpid(), signum)
    assert stop.received == signal.SIGUSR1


def test_signals_are_left_alone_beside_the_main_thread() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(StopSignal().install).result()
    assert signal.getsignal(signal.SIGTERM) is before


def test_handlers_are_taken_again_and_given_back_once() -> None:
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
    stop.restore()
    assert signal.getsignal(signal.SIGTERM) is before


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


def test_a_rejected_requeue_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_scontrol(tmp_path, 1)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with pytest.raises(ValueError, match=r"job 17 could not be requeued \(denied\): submit the same script again"):
        requeue_job()


@pytest.mark.parametrize(
    ("signum", "rank", "job", "status", "calls", "said"),
    [
        (signal.SIGUSR1, "0", "17", 0, "requeue 17\n", ""),
        (signal.SIGUSR1, "1", "17", 0, "", ""),
        (signal.SIGTERM, "0", "17", 143, "", "stopped by SIGTERM after step 3: continue with --resume auto"),
        (signal.SIGTERM, "1", "17", 143, "", ""),
        (signal.SIGUSR1, "0", None, 138, "", "stopped by SIGUSR1 after step 3: continue with --resume auto"),
    ],
)
def test_the_first_process_alone_asks_for_a_requeue_and_only_where_it_was_asked_for(
    signum: int,
    rank: str,
    job: str | None,
    status: int,
    calls: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_scontrol(tmp_path, 0)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "RANK", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", rank)
    if job is not None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    assert end_preempted(PreemptedError(signum, 3)) == status
    called = tmp_path / "calls"
    assert (called.read_text() if called.exists() else "") == calls
    assert capsys.readouterr().err == (f"scalablevit: error: {said}\n" if said else "")


def test_a_loader_process_outlives_signals_to_the_job_and_ends_with_its_parent() -> None:
    code = (
        "import os, signal, sys; from scalablevit_pl.data.worker import spare_worker; spare_worker(0);"
        "os.kill(os.getpid(), signal.SIGUSR1);"
        "os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM);"
        "print('alive', flush=True); sys.stdin.read()"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "alive\n"
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=600) == 0
