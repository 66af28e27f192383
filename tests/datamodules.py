"""Small datamodules for tests, and the parts of a trainer that they use."""

import io
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from PIL import Image

from scalablevit_pl.data import Augmentation, ClassificationDataModule, Preprocessing
from scalablevit_pl.preprocessing import decode_image

SMALL = Preprocessing(8, 0.8, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
PLAIN = Augmentation(auto_augment=None, random_erasing=0.0, mixup=0.0, cutmix=0.0)


def make_data(
    folder: Path | str, stage: str | None = "fit", trainer: Any = None, **arguments: Any
) -> ClassificationDataModule:
    """Make a datamodule of small batches; with a stage, set it up."""
    values = {"batch_size": 4, "num_workers": 0, "preprocessing": SMALL, "augmentation": PLAIN} | arguments
    data = ClassificationDataModule(str(folder), **values)
    data.trainer = trainer
    if stage is not None:
        data.setup(stage)
    return data


def make_trainer(processes: int = 1, rank: int = 0, epoch: int = 0, batch: int = 0) -> SimpleNamespace:
    """Make the parts of a trainer that a datamodule uses: the processes, and the progress of the training."""
    epochs = SimpleNamespace(current=SimpleNamespace(ready=epoch + 1, processed=epoch))
    batches = SimpleNamespace(current=SimpleNamespace(ready=batch))
    loop = SimpleNamespace(epoch_progress=epochs, epoch_loop=SimpleNamespace(batch_progress=batches))
    progress = {"fit_loop": loop, "num_training_batches": 1000, "training": True}
    return SimpleNamespace(world_size=processes, global_rank=rank, **progress)


def indices(loader: Iterable[Any]) -> list[int]:
    """List the `index` of each sample of a loader."""
    return [index for batch in loader for index in batch["index"].tolist()]


def finished(data: ClassificationDataModule, batches: Iterable[Any]) -> list[Any]:
    """Return batches of an evaluation loader as a task gets them."""
    return [data.finish(dict(batch), training=False) for batch in batches]


def transformed(folder: Path, split: str, rows: Iterable[int]) -> torch.Tensor:
    """Read rows of a parquet file and transform them for evaluation without the datamodule."""
    table = datasets.load_dataset(str(folder), split=split).cast_column("image", datasets.Image(decode=False))
    return torch.stack([SMALL(decode_image(table[row]["image"]["bytes"])) for row in rows])


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """Encode an image."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()
