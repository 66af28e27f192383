import multiprocessing
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from forked_command import run_command
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
    # The processes that a command starts import a user's modules, which tests have beside them, from this path.
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    settings = {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return {**os.environ, **settings}


@pytest.fixture(scope="session")
def scalablevit(environment: dict[str, str]) -> Iterator[Run]:
    """Run the command as a user does, in its own process and folder.

    The processes are forked from one that has imported what every command imports, which takes far longer than most
    tests. Those that are started, killed or left alone in another way start Python anew.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["scalablevit_pl.experiment.run", "scalablevit_pl.tasks", "scalablevit_pl.data"])

        def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
            with tempfile.TemporaryDirectory() as folder:
                streams = [Path(folder) / "stdout", Path(folder) / "stderr"]
                process = context.Process(target=run_command, args=(words, cwd, *streams))
                process.start()
                process.join(300)
                if process.exitcode is None:
                    process.kill()
                    raise subprocess.TimeoutExpired(words, 300)
                stdout, stderr = (stream.read_text(encoding="utf-8") for stream in streams)
                return subprocess.CompletedProcess(words, process.exitcode, stdout, stderr)

        yield run


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
