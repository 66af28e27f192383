import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Run = Callable[..., subprocess.CompletedProcess[str]]
QUICK = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=3",
    "--trainer.limit_val_batches=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--data.num_workers=0",
    "--data.batch_size=16",
]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    cache = tmp_path_factory.mktemp("cache")
    return {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def scalablevit(environment: dict[str, str]) -> Run:
    """Run the command as a user does, in a folder of its own."""

    def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "scalablevit_pl", *words]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture(scope="session")
def trained(scalablevit: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run called `first` was trained for three steps."""
    folder = tmp_path_factory.mktemp("work")
    done = scalablevit("fit", "--config", "recipes/quickstart.yaml", "--run", "first", *QUICK, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of four small photographs each."""
    pixels = np.random.RandomState(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(4):
            image = Image.fromarray(pixels.randint(0, 255, (40, 50, 3), dtype=np.uint8))
            image.save(tmp_path / "photos" / name / f"test_{index}.jpg")
    return tmp_path / "photos"
