from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a temporary cache of prepared data sets instead of the user's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def make_parquet(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a folder with one parquet file of noise per split."""

    def make(splits: Mapping[str, int | Sequence[Any]], names: Sequence[str] = ("cat", "dog", "owl")) -> Path:
        """Write splits of given labels, or of a given number of images."""
        folder = tmp_path / "parquet"
        folder.mkdir()
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
        pixels = np.random.RandomState(0)
        for split, rows in splits.items():
            labels = [index % len(names) for index in range(rows)] if isinstance(rows, int) else list(rows)
            images = [Image.fromarray(pixels.randint(0, 256, (11, 13, 3), dtype=np.uint8)) for _ in labels]
            table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
            table.to_parquet(str(folder / f"{split}.parquet"))
        return folder

    return make


@pytest.fixture
def make_folders(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes image files of different colors below a folder."""

    def make(*names: str) -> Path:
        folder = tmp_path / "photos"
        folder.mkdir()
        for index, name in enumerate(names):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9 + index, 12), (20 * index, 0, 0)).save(path)
        return folder

    return make
