import pytest
import torch

from scalablevit_pl.diagnosis import speed

CPU = torch.device("cpu")


def test_a_slow_loader_is_a_warning() -> None:
    step = speed.StepSpeed(400.0, 4, CPU)
    finding = speed.check_loader(100.0, step, workers=1, processes=1, cores=16)
    assert (finding.status, finding.remedy) == ("warn", "set --data.num_workers to about 4")
    finding = speed.check_loader(100.0, step, workers=1, processes=8, cores=16)
    assert "which needs 32 cores and there are 16" in finding.remedy
    assert speed.check_loader(500.0, step, workers=1, processes=1, cores=16).status == "ok"


def test_a_full_gpu_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        total_memory = 10e9

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card())
    steps = [speed.StepSpeed(2.0, 4, torch.device("cuda"), memory) for memory in (8_000_000_000, 9_500_000_000)]
    assert [speed.check_step(step, 4).status for step in steps] == ["ok", "warn"]
    assert speed.check_step(steps[1], 4).remedy.startswith("set --data.batch_size 2 with")
