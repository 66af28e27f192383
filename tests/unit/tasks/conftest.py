from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import small_tasks


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    """Build quiet trainers in a temporary folder."""
    return partial(small_tasks.make_trainer, tmp_path)
