from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scalablevit_pl.diagnosis import disk, machine


def test_precision_that_a_cpu_does_not_support_is_a_warning() -> None:
    finding = machine.check_precision("16-mixed", torch.device("cpu"))
    assert (finding.status, finding.remedy) == ("warn", "set --trainer.precision bf16-mixed or 32-true")
    assert machine.check_precision("32-true", torch.device("cpu")).status == "ok"


def test_loader_processes_are_compared_with_cores() -> None:
    assert machine.check_cores(4, 2, 8).status == "ok"
    assert machine.check_cores(4, 4, 8).remedy == "set --data.num_workers to 2"


def test_prefetched_batches_are_compared_with_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    assert [row.status for row in machine.check_shared_memory(2, 1, 20, tmp_path)] == ["ok"]  # five batches
    assert [row.status for row in machine.check_shared_memory(2, 1, 21, tmp_path)] == ["FAIL"]
    assert list(machine.check_shared_memory(0, 1, 21, tmp_path)) == []
