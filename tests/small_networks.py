"""A small classifier, and ways to change the files that are made of one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scalablevit_pl.models import ImageClassifier, ScalableViT
from scalablevit_pl.preprocessing import Preprocessing
from scalablevit_pl.weights.folder import CONFIG, WEIGHTS
from scalablevit_pl.weights.stored import CLASSIFICATION, Description

LABELS = ["cat", 'a "dog"', "Kröte | 蛙\n"]
PREPROCESSING = Preprocessing(64, 0.9, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
SIZE = {"embed_dims": (8, 8, 16, 16), "num_heads": (1, 2, 2, 4), "depths": (1, 2, 1, 2)}
Change = Callable[[dict[str, Any]], object]


class Bomb:
    """An object whose pickle creates a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def small(num_classes: int = 3, **options: Any) -> ImageClassifier:
    """Build a classifier none of whose weights has its initial value; options are those of both constructors."""
    torch.manual_seed(0)
    outer = {key: options.pop(key) for key in ("name", "global_pool") if key in options}
    head = options.pop("head", "linear")
    model = ImageClassifier(ScalableViT(**SIZE | options), num_classes, head, **outer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model.eval()


def annotate(model: ImageClassifier, names: list[str] | None, preprocessing: Any = PREPROCESSING) -> ImageClassifier:
    """Set class names and preprocessing."""
    model.annotate(Description(CLASSIFICATION, {}, names, preprocessing))
    return model


def images(channels: int = 3) -> Tensor:
    """Return two images of a size that is not a multiple of anything."""
    return torch.randn(2, channels, 70, 45, generator=torch.Generator().manual_seed(1))


def rewrite(folder: Path, change: Change) -> None:
    """Change the `config.json` of a folder."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    change(config)
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")


def retensor(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Replace tensors in the weights of a folder; None removes one."""
    changed = load_file(folder / WEIGHTS) | changes
    kept = {name: tensor.clone() for name, tensor in changed.items() if tensor is not None}
    (folder / WEIGHTS).unlink()  # not into the file that is mapped
    save_file(kept, folder / WEIGHTS)


def contents(folder: Path) -> dict[str, bytes]:
    """Read all files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def checkpoint_of(network: nn.Module, config: dict[str, Any] | None, /, **record: Any) -> dict[str, Any]:
    """Return what this package reads of a run's checkpoint."""
    state_dict = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    own = {"schema": 1, "network": config, "class_names": LABELS, "preprocessing": PREPROCESSING.to_dict()}
    return {"state_dict": state_dict | {"loss.weight": torch.ones(3)}, "scalablevit_pl": own | record}
