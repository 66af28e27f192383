import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scalablevit_pl.diagnosis import disk


def test_a_folder_without_write_permission_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(disk.tempfile, "TemporaryFile", refuse)
    finding = disk.check_run_folder(tmp_path / "runs/first", resuming=False)
    assert (finding.status, finding.text) == ("FAIL", f"{tmp_path} cannot be written (Permission denied)")


def test_too_little_space_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10e9))
    # Four checkpoints of weights and two moments, four bytes each: 4.8 GB, with averaged weights 6.4.
    assert disk.check_checkpoint_space(tmp_path, 100_000_000, averaged=False).status == "ok"
    finding = disk.check_checkpoint_space(tmp_path, 200_000_000, averaged=True)
    assert (finding.status, finding.text[:7]) == ("FAIL", "13 GB f")
    needs = {tmp_path / "hub": 6_000_000_000, tmp_path / "arrow": 6_000_000_000}  # on one disk
    assert [row.status for row in disk.check_data_space(needs, prepared=False)] == ["FAIL"]
    assert [row.status for row in disk.check_data_space(needs, prepared=True)] == ["warn"]
    assert [row.status for row in disk.check_data_space({tmp_path: 9_000_000_000}, prepared=False)] == ["ok"]
