import subprocess
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from forked_command import ForkedCommand
from PIL import Image

from scalablevit_pl.data.source import SAMPLES

Run = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., ForkedCommand]
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
def start(forkserver: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Start the command as a user does, in its own process and folder."""

    def start(*words: str, cwd: Path, **variables: str) -> ForkedCommand:
        return ForkedCommand(forkserver, words, cwd, tmp_path_factory.mktemp("streams"), variables)

    return start


@pytest.fixture(scope="session")
def scalablevit(start: Start) -> Run:
    """Run the command to its end."""

    def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return start(*words, cwd=cwd).wait()

    return run


@pytest.fixture(scope="session")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 300 training and 100 test images of the shipped sample."""
    folder = tmp_path_factory.mktemp("data") / "fashion"
    folder.mkdir()
    for split, count in (("train", 300), ("test", 100)):
        table = pyarrow.parquet.read_table(SAMPLES / "fashion_mnist_sample" / f"{split}.parquet")
        step = len(table) // count
        pyarrow.parquet.write_table(table.take(list(range(0, count * step, step))), folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="session")
def trained(scalablevit: Run, fashion: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run called `first` was trained for three steps."""
    folder = tmp_path_factory.mktemp("work")
    words = ["--run", "first", f"--data.dataset={fashion}"]
    done = scalablevit("fit", "--config", "recipes/quickstart.yaml", *words, *QUICK, cwd=folder)
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
