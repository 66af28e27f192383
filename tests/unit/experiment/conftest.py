from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder of its own with a run called `first`, at a fixed time."""
    (tmp_path / "runs" / "first" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "config.yaml").write_text("seed_everything: 0\n")
    torch.save({}, tmp_path / "runs" / "first" / "checkpoints" / "last.ckpt")
    monkeypatch.chdir(tmp_path)
    clock = SimpleNamespace(strftime={"%Y%m%d-%H%M%S": "20260102-030405"}.__getitem__)
    monkeypatch.setattr("scalablevit_pl.experiment.invocation.time", clock)
    return tmp_path
