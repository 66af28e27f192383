"""Runs that are killed, stopped or shared by several processes and nodes end like an undisturbed run of one."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import assert_equal_runs, read_csv, wait_for
from forked_command import LONGEST, ForkedCommand, free_port, group_variables
from integration.conftest import Run, Start

EPOCH, EPOCHS = 6, 2
# A network that learns in milliseconds.
BACKBONE = {"embed_dims": [8, 8, 16, 16], "num_heads": [1, 2, 2, 4], "depths": [1, 2, 1, 2], "drop_path_rate": 0.3}
NETWORK = {
    "name": "scalablevit_custom",
    "num_classes": 10,
    "head": "linear",
    "global_pool": "avg",
    "backbone": BACKBONE,
}
# Whatever draws random numbers or keeps a state is on.
FIT = [
    "fit",
    "--config=recipes/quickstart.yaml",
    "--data.dataset=fashion",
    f"--trainer.max_epochs={EPOCHS}",
    f"--trainer.limit_train_batches={EPOCH}",
    "--trainer.limit_val_batches=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--data.augmentation.mixup=0.8",
    "--data.augmentation.cutmix=1.0",
    "--data.augmentation.random_erasing=0.5",
    "--data.augmentation.auto_augment=rand-m9-mstd0.5-inc1",
    "--model.network.class_path=scalablevit_pl.models.build_classifier",
    f"--model.network.config={json.dumps(NETWORK)}",
    "--ema.decay=0.9",
    "--checkpoint.every_steps=1",
]
ONE = ["--data.batch_size=16", "--data.num_workers=2"]
TWO = ["--data.batch_size=8", "--data.num_workers=1", "--trainer.accelerator=cpu", "--trainer.strategy=ddp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, fashion: Path) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    shutil.copytree(fashion, folder / "fashion")
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path, scalablevit: Run) -> Path:
    """An undisturbed run of one process."""
    done = scalablevit(*FIT, *ONE, "--run=whole", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs/whole"


@pytest.fixture(scope="module")
def whole_of_two(folder: Path, start: Start) -> Path:
    """An undisturbed run of two processes."""
    processes = [
        start(*FIT, *TWO, "--trainer.devices=2", "--run=two", cwd=folder, **group) for group in group_variables(2)
    ]
    ends = [process.wait() for process in processes]
    assert [end.returncode for end in ends] == [0, 0], ends
    return folder / "runs/two"


@pytest.mark.parametrize("step", [3, pytest.param(EPOCH, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_exactly(step: int, whole: Path, folder: Path, start: Start, scalablevit: Run) -> None:
    run = folder / f"runs/killed{step}"
    process = start(*FIT, *ONE, f"--run={run.name}", cwd=folder)
    wait_for(run, step, process)
    process.kill()
    process.wait()
    newest = max(run.glob("checkpoints/step=*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)  # and with it last.ckpt, the same file
    done = scalablevit("fit", f"--run={run.name}", "--resume=auto", "--data.num_workers=0", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert f"{newest.name}' as a checkpoint" in done.stderr
    assert "using the one before it" in done.stderr
    assert "is the newest intact checkpoint: resuming after step" in done.stderr
    assert_equal_runs(run, whole, EPOCH * EPOCHS)


@pytest.mark.slow
def test_two_processes_are_evaluated_like_one(whole_of_two: Path, folder: Path, scalablevit: Run) -> None:
    assert json.loads((whole_of_two / "resolved.json").read_text())["global_batch"] == 16
    results, tables = [], []
    for options in ([], ["--trainer.devices=1", "--trainer.strategy=auto"]):
        done = scalablevit("test", "--run=two", "--data.batch_size=30", *options, cwd=folder)
        assert done.returncode == 0, done.stderr
        results.append(json.loads((whole_of_two / "test.json").read_text()))
        tables.append(read_csv(whole_of_two / "predictions.csv"))
    assert (results[0]["processes"], results[1]["processes"]) == (2, 1)
    assert [row["path"] for row in tables[0]] == [row["path"] for row in tables[1]]
    assert len(tables[0]) == 100
    for name in ("test/samples", "test/top1", "test/top5"):
        assert results[0][name] == results[1][name]
    assert results[0]["test/loss"] == pytest.approx(results[1]["test/loss"], rel=1e-6)


@pytest.mark.slow
def test_a_killed_run_of_two_processes_resumes_exactly(
    whole_of_two: Path, folder: Path, start: Start, scalablevit: Run
) -> None:
    run = folder / "runs/killed-two"
    process = start(*FIT, *TWO, "--trainer.devices=2", f"--run={run.name}", cwd=folder)
    wait_for(run, 4, process)
    process.kill()  # the other one loses its connection and ends
    process.wait()
    done = scalablevit("fit", f"--run={run.name}", "--resume=auto", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert_equal_runs(run, whole_of_two, EPOCH * EPOCHS)


def test_a_slurm_job_of_two_tasks_is_requeued_and_continues(whole_of_two: Path, folder: Path, start: Start) -> None:
    run, tools = folder / "runs/slurm", folder / "tools"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tools}/calls\n')
    (tools / "scontrol").chmod(0o755)
    words = [*FIT, *TWO, "--trainer.devices=2", f"--run={run.name}", "--resume=auto"]
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    job |= {"SLURM_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "MASTER_PORT": str(free_port())}
    job |= {"MASTER_ADDR": "127.0.0.1", "PATH": f"{tools}:{os.environ['PATH']}"}

    def start_tasks() -> list[ForkedCommand]:
        return [start(*words, cwd=folder, **job, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in ("0", "1")]

    tasks = start_tasks()
    wait_for(run, 3, tasks[0])
    for task in tasks:
        task.send_signal(signal.SIGUSR1)
    first, _ = (task.wait() for task in tasks)
    assert first.returncode == 0, first.stderr
    assert "stopped by SIGUSR1 after step" in first.stderr
    assert "job 17 is requeued and will resume" in first.stderr
    assert (tools / "calls").read_text() == "requeue 17\n"
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] < EPOCH * EPOCHS
    first, _ = (task.wait() for task in start_tasks())
    assert "resuming after step" in first.stderr, first.stderr
    assert_equal_runs(run, whole_of_two, EPOCH * EPOCHS)


def popen(command: list[str], cwd: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start a process with one pipe for its output."""
    streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environment, **streams)


@pytest.mark.slow
def test_two_nodes_train_and_evaluate_as_one(whole_of_two: Path, folder: Path, environment: dict[str, str]) -> None:
    def on_both(*words: str, runs: tuple[str, str] = ("nodes", "nodes")) -> list[tuple[int, str]]:
        rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=nodes"]
        # After --, because torchrun would read --run as an abbreviation of one of its options.
        command = [
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc-per-node=1",
            *rendezvous,
            "-m",
            "--",
            "scalablevit_pl",
        ]
        words = (*words, "--trainer.num_nodes=2", "--trainer.devices=1")
        command = [sys.executable, "-m", *command, *words]
        nodes = [popen([*command, f"--run={run}"], folder, environment) for run in runs]
        outputs = [node.communicate(timeout=LONGEST)[0] for node in nodes]
        return [(node.returncode, output) for node, output in zip(nodes, outputs, strict=True)]

    ends = on_both(*FIT, *TWO)
    assert [status for status, _ in ends] == [0, 0], ends
    assert_equal_runs(folder / "runs/nodes", whole_of_two, EPOCH * EPOCHS)
    ends = on_both("validate", "--trainer.limit_val_batches=1.0", "--data.batch_size=64")
    assert [status for status, _ in ends] == [0, 0], ends
    report = (folder / "runs/nodes/val.json").read_text()
    assert '"val/samples": 30.0' in report
    assert '"processes": 2' in report
    # A run folder that only the first node can see.
    ends = on_both(*FIT, *TWO, "--resume=auto", f"--trainer.max_epochs={EPOCHS + 1}", runs=("nodes", "elsewhere"))
    assert 0 not in [status for status, _ in ends], ends
    assert any("and a run folder that all nodes share" in output for _, output in ends), ends


def test_auto_starts_a_run_without_checkpoints(folder: Path, scalablevit: Run) -> None:
    words = [*FIT, *ONE, "--run=fresh", "--resume=auto", "--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    done = scalablevit(*words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "there is no checkpoint in runs/fresh: starting from the beginning" in done.stderr
    for path in (folder / "runs/fresh/checkpoints").iterdir():
        path.write_bytes(b"no checkpoint")
    done = scalablevit(*words, cwd=folder)
    assert done.returncode == 2
    assert "none of the 1 checkpoints in 'runs/fresh' can be read: choose another name" in done.stderr
