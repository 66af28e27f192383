import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_wheel_carries_recipes_and_sample(tmp_path: Path, environment: dict[str, str]) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=600)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 8e6
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=600)
    code = (
        "import sys, scalablevit_pl; from scalablevit_pl.commands.main import main;"
        "assert sys.argv[1] in scalablevit_pl.__file__, scalablevit_pl.__file__; sys.exit(main(sys.argv[2:]))"
    )
    words = [
        "fit",
        "--config",
        "recipes/quickstart.yaml",
        "--config",
        "debug/fast_dev_run.yaml",
        "--data.num_workers=0",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, str(site), *words],
        cwd=work,
        env={**environment, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert (site / "scalablevit_pl/py.typed").is_file()
    assert (site / "scalablevit_pl/data/samples/fashion_mnist_sample/LICENSE").is_file()
