from typing import Any

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader

from scalablevit_pl.diagnosis.plan import planned_shape

LOADER = DataLoader(range(20), batch_size=2)


def planned(**options: Any) -> tuple[int, int, int]:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **options)
    shape = planned_shape(trainer, LOADER)
    return shape.batches_per_epoch, shape.total_steps, shape.accumulated


def test_steps_are_counted_as_lightning_does() -> None:
    assert planned(max_epochs=3) == (10, 30, 1)
    assert planned(max_epochs=3, accumulate_grad_batches=4) == (10, 9, 4)
    assert planned(max_epochs=3, limit_train_batches=6) == (6, 18, 1)
    assert planned(max_epochs=3, limit_train_batches=0.5) == (5, 15, 1)
    assert planned(max_steps=7) == (10, 7, 1)


@pytest.mark.parametrize(
    "options", [{"max_epochs": -1}, {"max_epochs": 0}, {"max_epochs": 2, "limit_train_batches": 0}]
)
def test_an_unknown_number_of_steps_is_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs a known number of steps and batch size, got"):
        planned(**options)
